"Segmentation away from its pages: official layouts on small made-up trees and real packs, bad input, memory, and the results page through papermill."
import json
import os
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import jaccard_score

from vermouth.core import VermouthError
from vermouth.data.masks import pair
from vermouth.data.segmentation import COCO_NUMBERS, class_names, load_segmentation
from vermouth.data.toybox import LABELS, Toybox
from vermouth.dense import DenseHead
from vermouth.model import Vermouth
from vermouth.segment import add_dense, overlay
from vermouth.tasks.segmentation import by_model, evaluate, run_segmentation, scores

DATA = os.environ.get("VERMOUTH_DATA")
real = pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")


def put(root, image, mask, numbers):
    "An image and a mask of one row."
    for path in (root / image, root / mask): path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([numbers])
    Image.new("RGB", (len(numbers), 1)).save(root / image)
    if mask.endswith(".mat"): savemat(root / mask, {"LabelMap": row.astype(np.uint16)})
    else: Image.fromarray(row.astype(np.uint16 if mask.endswith(".tif") else np.uint8)).save(root / mask)


def listed(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("a\n")


# data set, image, mask, its list, the file's numbers, the labels they mean
FORMS = [
    ("voc20", "VOC2012/JPEGImages/a.jpg", "VOC2012/SegmentationClassAug/a.png", "VOC2012/ImageSets/Segmentation/val.txt", [0, 1, 20, 255], [255, 0, 19, 255]),
    ("voc21", "VOCdevkit/VOC2012/JPEGImages/a.jpg", "VOCdevkit/VOC2012/SegmentationClass/a.png", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", [0, 1, 20, 255], [0, 1, 20, 255]),
    ("pc59", "JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/val.txt", [0, 1, 59], [255, 0, 58]),
    ("pc59", "VOC2010/JPEGImages/a.jpg", "VOC2010/annotations_detectron2/pc59_val/a.png", None, [0, 58, 255], [0, 58, 255]),
    ("pc59", "VOC2010/JPEGImages/a.jpg", "VOC2010/trainval/a.mat", "VOC2010/pascalcontext_val.txt", [2, 397, 1, 458], [0, 49, 255, 58]),
    ("pc459", "VOC2010/JPEGImages/a.jpg", "VOC2010/annotations_detectron2/pc459_val/a.tif", None, [0, 255, 458, 459, 65535], [0, 255, 458, 65535, 65535]),
    ("pc459", "VOC2010/JPEGImages/a.jpg", "VOC2010/trainval/a.mat", "VOC2010/ImageSets/Main/val.txt", [1, 256, 459, 0], [0, 255, 458, 65535]),
    ("ade150", "ADEChallengeData2016/images/validation/a.jpg", "ADEChallengeData2016/annotations/validation/a.png", None, [0, 1, 150], [255, 0, 149]),
    ("ade847", "ADE20K_2021_17_01/images_detectron2/validation/a.jpg", "ADE20K_2021_17_01/annotations_detectron2/validation/a.tif", None, [0, 255, 846, 65535], [0, 255, 846, 65535]),
    ("coco_stuff171", "val2017/a.jpg", "stuffthingmaps/val2017/a.png", None, [0, 12, 91, 181, 255], [0, 11, 80, 170, 255]),
    ("coco_stuff171", "coco/val2017/a.jpg", "coco/stuffthingmaps_detectron2/val2017/a.png", None, [0, 170, 255], [0, 170, 255]),
    ("coco_stuff171", "images/val2017/a.jpg", "annotations/val2017/a_labelTrainIds.png", None, [0, 170, 255], [0, 170, 255]),
]


@pytest.mark.parametrize("dataset,image,mask,lists,numbers,labels", FORMS)
def test_each_form_gives_the_same_labels(dataset, image, mask, lists, numbers, labels, tmp_path):
    put(tmp_path, image, mask, numbers)
    if lists: listed(tmp_path, lists)
    split = load_segmentation(dataset, tmp_path)
    assert [item.key for item in split.test] == [image] and split.train == []
    assert pair(split.test[0])[1].tolist() == [labels]
    assert split.ignore_index == (255 if len(split.names) <= 255 else 65535)


@pytest.mark.parametrize("dataset,image,mask,lists,numbers,labels", [f for f in FORMS if f[3]])
def test_a_missing_list_is_named(dataset, image, mask, lists, numbers, labels, tmp_path):
    put(tmp_path, image, mask, numbers)
    with pytest.raises(VermouthError, match=r"\.txt is missing, which says what belongs to .*Get it from"): load_segmentation(dataset, tmp_path)


def test_the_shipped_names_are_those_of_the_data_sets():
    names = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in Path(str(files("vermouth.data") / "classnames")).glob("*.json")}
    assert {d: len(n) for d, n in names.items()} == {"voc20": 20, "pc59": 59, "pc459": 459, "ade150": 150, "ade847": 847, "coco_stuff171": 171}
    assert [class_names("coco_stuff171")[COCO_NUMBERS.index(n)] for n in (0, 12, 89, 91, 181)] == ["person", "stop sign", "toothbrush", "banner", "wood"]
    assert (class_names("ade150")[0], class_names("ade150")[149], class_names("voc20")[14]) == ("wall", "flag", "person")


def folder(root, names="cat\ndog\nvoid (ignore)\n"):
    for part in ("train", "test"):
        for name in "ab": put(root, f"{part}/images/{name}.jpg", f"{part}/masks/{name}.png", [0, 1, 2, 255])
    (root / "classnames.txt").write_text(names)
    return root


def test_plain_folders(tmp_path):
    split = load_segmentation("folder", folder(tmp_path), unseen=["dog"])
    assert (len(split.train), len(split.test), split.names, split.unseen) == (2, 2, ("cat", "dog"), (1,))
    assert split.test[0].mask.tolist() == [[0, 1, 255, 255]]


@pytest.mark.parametrize("damage,says", [
    (lambda t: Image.new("L", (9, 9)).save(t / "masks/a.png"), r"9×9 pixels \(width×height\), its image 4×1"),
    (lambda t: put(t, "x.jpg", "masks/a.png", [0, 1, 2, 77]), "number 77 is none of the 2 classes"),
    (lambda t: (t / "masks/a.png").unlink(), "a.png': no such file. Add the mask"),
    (lambda t: (t / "masks/a.png").write_bytes(b"no"), "a.png': cannot be read"),
    (lambda t: Image.new("RGB", (4, 1)).save(t / "masks/a.png"), "a picture in RGB. Save one class number per pixel"),
    (lambda t: (t / "images/a.jpg").write_bytes(b"no"), "not an image Pillow can read"),
])
def test_bad_files_are_set_aside_and_the_rest_goes_on(damage, says, tmp_path):
    damage(folder(tmp_path) / "test")
    with pytest.warns(UserWarning, match=f"1 of 2 images set aside. The first: .*{says}"): split = load_segmentation("folder", tmp_path)
    assert [item.key for item in split.test] == ["test/images/b.jpg"]
    with pytest.raises(VermouthError, match=says): pair(load_segmentation("folder", tmp_path, check=False).test[0])


@pytest.mark.parametrize("names,says", [("cat\n\ndog\n", "line 2 is empty"), ("cat\ncat\n", "'cat' stands there twice"), ("x (ignore)\n", "no class")])
def test_bad_class_lists(names, says, tmp_path):
    with pytest.raises(VermouthError, match=says): load_segmentation("folder", folder(tmp_path, names))


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(VermouthError, match="no classnames.txt"): load_segmentation("folder", tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(VermouthError, match=r"no images in test/images/, val/images/ or images/"): load_segmentation("folder", tmp_path)
    for dataset in ("voc20", "pc59", "pc459", "ade150", "ade847", "coco_stuff171"):
        with pytest.raises(VermouthError, match=f"so this is not the root of {dataset}. Get it from "): load_segmentation(dataset, tmp_path)


def test_shots_and_limit_choose_the_same_images_every_time(tmp_path):
    split = load_segmentation("folder", folder(tmp_path), shots=1, seed=3, limit=1)
    assert (len(split.train), len(split.test)) == (1, 1) and split == load_segmentation("folder", tmp_path, shots=1, seed=3, limit=1)


@real
@pytest.mark.parametrize("dataset,place,train,test,ignored", [("voc20", "VOCdevkit", 311, 443, True), ("voc21", "VOCdevkit/VOC2012", 311, 443, True),
                                                             ("ade150", "ADEChallengeData2016", 0, 3, True), ("folder", "camvid", 367, 233, True)])
def test_real_packs(dataset, place, train, test, ignored):
    split = load_segmentation(dataset, Path(DATA) / "seg" / place)
    assert (len(split.train), len(split.test)) == (train, test)
    found = np.unique(np.concatenate([np.unique(item.mask) for item in split.test[:40]]))
    assert (255 in found) == ignored and found[found != 255].max() < len(split.names)


@pytest.fixture(scope="module")
def model():
    model = Vermouth.build("toybox", device="cpu")
    add_dense(model)
    return model


@pytest.fixture(scope="module")
def scene(): return Toybox("scene", n=2, seed=4)[1]


def test_the_paper_s_decoder_has_any_size():
    head = DenseHead((1280, 1357, 1357, 960), 768)
    with torch.no_grad(): out = head([torch.randn(1, c, h, w) for c, h, w in zip(head.in_dims, (6, 12, 24, 48), (9, 18, 36, 72))])
    assert out.shape == (1, 768, 96, 144)


def test_labels_have_the_image_s_own_size(model, scene, tmp_path):
    scene.image.resize((150, 70)).save(tmp_path / "x.png")
    for image in (tmp_path / "x.png", str(tmp_path / "x.png"), np.asarray(scene.image.resize((150, 70)))):
        labels = model.segment(image, ["sky", "a cat"])
        assert isinstance(labels, np.ndarray) and labels.shape == (70, 150) and labels.max() <= 1
    many = model.segment([scene.image, scene.image.resize((30, 90))], ["sky", "cat"])
    assert [m.shape for m in many] == [(64, 64), (90, 30)]
    assert overlay(tmp_path / "x.png", labels, ["sky", "a cat"]).width > 150


def test_one_window_is_the_whole_image(model, scene):
    assert (model.segment(scene.image, LABELS, short=64) == model.segment(scene.image, LABELS)).all()
    wide = scene.image.resize((128, 64))
    seen = []
    model_prompts, model.prompts = model.prompts, lambda images: seen.append(len(images)) or ["a photo of sand"] * len(images)
    try: cut = model.segment(wide, LABELS, short=64)
    finally: model.prompts = model_prompts
    assert cut.shape == (64, 128) and seen == [1], "one caption, of the whole image, for all windows"


def test_other_names_are_only_other_names(model, scene):
    names = list(LABELS)
    labels = model.segment(scene.image, names)
    turned = names[::-1]
    again = model.segment(scene.image, turned)
    assert [names[k] for k in np.unique(labels)] == sorted((turned[k] for k in np.unique(again)), key=names.index)
    assert (np.array(names)[labels] == np.array(turned)[again]).mean() > 0.999
    assert (model.segment(scene.image, names, chunk=1) == labels).all()


@pytest.mark.parametrize("names,says", [([], "an empty list"), (["cat", ""], "number 1 is empty"), (["cat", "dog", "cat"], "'cat' stands at 0 and at 2"), ("cat", "one string")])
def test_bad_names(model, scene, names, says):
    with pytest.raises(VermouthError, match=says): model.segment(scene.image, names)


def test_a_model_without_a_head_says_how_to_get_one(scene):
    with pytest.raises(VermouthError, match="it has no segmentation head. Train one with"): Vermouth.build("toybox", device="cpu").segment(scene.image, ["cat"])


def test_training_helps_and_agrees_with_scikit_learn(model):
    split = load_segmentation(shots=2, test_scenes=24)
    prompts = [["a photo"] * len(split.train), ["a photo"] * len(split.test)]
    before = scores(evaluate(by_model(model), split, prompts[1]), split)
    after = run_segmentation(model, split, prompts, epochs=2)
    assert after["pixel accuracy"] > before["pixel accuracy"] + 0.2 and after["mIoU seen"] > before["mIoU seen"]
    [found] = by_model(model)([i.image for i in split.test], prompts[1], [split.names])
    true, found = np.stack([i.mask for i in split.test]).ravel(), np.stack(found).ravel()
    assert after["mIoU"] == pytest.approx(jaccard_score(true, found, labels=np.union1d(true, found), average="macro", zero_division=0), abs=1e-9)


PEAK = """
import resource, sys
import torch
from PIL import Image
from vermouth.data.segmentation import class_names
from vermouth.model import Vermouth
from vermouth.segment import add_dense
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = Vermouth.build("toybox", device="cpu")
add_dense(model)
image = Image.effect_noise((512, 512), 60).convert("RGB")
model.segment(image, ["cat"])  # libraries warm up
before = peak()
labels = model.segment(image, class_names("ade847"), **eval(sys.argv[1]))
assert labels.shape == (512, 512)
print((peak() - before) / 1e9)
"""


@pytest.mark.parametrize("how", ["{}", "{'short': 512}"])
def test_847_names_on_512_pixels_need_little_memory(how):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, how], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) < 3, f"{run.stdout} GB beyond the model"


def results(folder, **parameters):
    papermill.execute_notebook(str(ROOT / "nbs" / "12_segmentation.ipynb"), str(folder / "out.ipynb"), parameters=parameters, cwd=str(folder), progress_bar=False)
    return pd.read_csv(folder / "results" / "12_segmentation.csv")


METHODS = {"Vermouth", "without expert", "random weights", "expert only", "cross-attention, untrained", "CLIP patches", "caption only", "majority class"}


def test_the_page_writes_every_method(tmp_path):
    rows = results(tmp_path, shots=1, epochs=1, limit=16)
    assert set(rows.method) == METHODS and (rows.n == 16).all() and rows.value.between(0, 1).all()
    assert set(rows.metric) == {"mIoU", "mIoU seen", "mIoU unseen", "harmonic mean", "pixel accuracy", "mIoU unseen alone"}
    assert (tmp_path / "results" / "12_segmentation.png").stat().st_size > 10_000


@real
@pytest.mark.parametrize("dataset,place,methods", [("voc20", "VOCdevkit", METHODS), ("folder", "camvid", METHODS), ("ade150", "ADEChallengeData2016", METHODS)])
def test_the_page_reads_photographs(dataset, place, methods, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = results(tmp_path, dataset=dataset, root=str(Path(DATA) / "seg" / place), shots=1, epochs=1, limit=8)
    assert set(rows.method) == methods


@real
def test_a_head_meets_another_data_set_with_nothing_but_its_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = results(tmp_path, dataset=["voc20", "ade150"], root=str(Path(DATA) / "seg"), shots=1, epochs=1, limit=4)
    assert set(rows.dataset) == {"ade150"} and set(rows.method) == METHODS and rows.setting.str.endswith("trained on voc20").all()
