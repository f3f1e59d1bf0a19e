"""Official segmentation layouts on small made-up trees, plain folders, bad files, and the real packs where they are."""

import json
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vermouth.core import VermouthError
from vermouth.data.masks import pair
from vermouth.data.segmentation import COCO_NUMBERS, class_names, load_segmentation

DATA = os.environ.get("VERMOUTH_DATA")
OFFICIAL = {"voc20": 20, "pc59": 59, "pc459": 459, "ade150": 150, "ade847": 847, "coco_stuff171": 171}


def put(root, image, mask, numbers):
    "Write an image and a mask of one row."
    for path in (root / image, root / mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([numbers])
    Image.new("RGB", (len(numbers), 1)).save(root / image)
    if mask.endswith(".mat"):
        savemat(root / mask, {"LabelMap": row.astype(np.uint16)})
    else:
        Image.fromarray(row.astype(np.uint16 if mask.endswith(".tif") else np.uint8)).save(root / mask)


# Each layout: data set, folder, image and mask below it, list of images, numbers in the file, the labels they mean.
LAYOUTS = [
    (
        "voc20",
        "VOC2012",
        "JPEGImages/a.jpg",
        "SegmentationClassAug/a.png",
        "ImageSets/Segmentation/val.txt",
        [0, 1, 20, 255],
        [255, 0, 19, 255],
    ),
    (
        "voc21",
        "VOCdevkit/VOC2012",
        "JPEGImages/a.jpg",
        "SegmentationClass/a.png",
        "ImageSets/Segmentation/val.txt",
        [0, 1, 20, 255],
        [0, 1, 20, 255],
    ),
    (
        "pc59",
        ".",
        "JPEGImages/a.jpg",
        "SegmentationClassContext/a.png",
        "ImageSets/SegmentationContext/val.txt",
        [0, 1, 59],
        [255, 0, 58],
    ),
    ("pc59", "VOC2010", "JPEGImages/a.jpg", "annotations_detectron2/pc59_val/a.png", None, [0, 58, 255], [0, 58, 255]),
    (
        "pc59",
        "VOC2010",
        "JPEGImages/a.jpg",
        "trainval/a.mat",
        "pascalcontext_val.txt",
        [2, 397, 1, 458],
        [0, 49, 255, 58],
    ),
    (
        "pc459",
        "VOC2010",
        "JPEGImages/a.jpg",
        "annotations_detectron2/pc459_val/a.tif",
        None,
        [0, 255, 458, 459, 65535],
        [0, 255, 458, 65535, 65535],
    ),
    (
        "pc459",
        "VOC2010",
        "JPEGImages/a.jpg",
        "trainval/a.mat",
        "ImageSets/Main/val.txt",
        [1, 256, 459, 0],
        [0, 255, 458, 65535],
    ),
    (
        "ade150",
        "ADEChallengeData2016",
        "images/validation/a.jpg",
        "annotations/validation/a.png",
        None,
        [0, 1, 150],
        [255, 0, 149],
    ),
    (
        "ade847",
        "ADE20K_2021_17_01",
        "images_detectron2/validation/a.jpg",
        "annotations_detectron2/validation/a.tif",
        None,
        [0, 255, 846, 65535],
        [0, 255, 846, 65535],
    ),
    (
        "coco_stuff171",
        ".",
        "val2017/a.jpg",
        "stuffthingmaps/val2017/a.png",
        None,
        [0, 12, 91, 181, 255],
        [0, 11, 80, 170, 255],
    ),
    (
        "coco_stuff171",
        "coco",
        "val2017/a.jpg",
        "stuffthingmaps_detectron2/val2017/a.png",
        None,
        [0, 170, 255],
        [0, 170, 255],
    ),
    (
        "coco_stuff171",
        ".",
        "images/val2017/a.jpg",
        "annotations/val2017/a_labelTrainIds.png",
        None,
        [0, 170, 255],
        [0, 170, 255],
    ),
]
COLUMNS = "dataset, folder, image, mask, listed, numbers, labels"


@pytest.mark.parametrize(COLUMNS, LAYOUTS)
def test_each_layout_gives_the_same_labels(dataset, folder, image, mask, listed, numbers, labels, tmp_path):
    put(tmp_path / folder, image, mask, numbers)
    if listed:
        path = tmp_path / folder / listed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a\n")
    split = load_segmentation(dataset, tmp_path)
    assert [item.key for item in split.test] == [str(Path(folder, image))]
    assert split.train == []
    assert pair(split.test[0])[1].tolist() == [labels]
    assert split.ignore_index == (255 if len(split.names) <= 255 else 65535)


@pytest.mark.parametrize(COLUMNS, [layout for layout in LAYOUTS if layout[4]])
def test_a_missing_list_is_named(dataset, folder, image, mask, listed, numbers, labels, tmp_path):
    put(tmp_path / folder, image, mask, numbers)
    with pytest.raises(VermouthError, match=r"\.txt is missing, which says what belongs to .*Get it from"):
        load_segmentation(dataset, tmp_path)


def test_the_packaged_names_are_those_of_the_data_sets():
    folder = Path(str(files("vermouth.data") / "classnames"))
    names = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert {dataset: len(listed) for dataset, listed in names.items()} == OFFICIAL
    coco = [class_names("coco_stuff171")[COCO_NUMBERS.index(n)] for n in (0, 12, 89, 91, 181)]
    assert coco == ["person", "stop sign", "toothbrush", "banner", "wood"]
    ade = class_names("ade150")
    assert (ade[0], ade[149], class_names("voc20")[14]) == ("wall", "flag", "person")


def test_run_together_names_are_words_and_the_official_ones_are_accepted(tmp_path):
    changed = {
        d: sum(a != b for a, b in zip(class_names(d), class_names(d, original=True), strict=True)) for d in OFFICIAL
    }
    assert changed == {"pc59": 1, "pc459": 94, "ade847": 5} | dict.fromkeys(("voc20", "ade150", "coco_stuff171"), 0)
    assert {"air conditioner", "hot-air balloon", "video game console"} < {*class_names("pc459")}
    put(tmp_path, "JPEGImages/a.jpg", "annotations_detectron2/pc459_val/a.tif", [0, 2])
    for name in ("airconditioner", "air conditioner"):
        assert load_segmentation("pc459", tmp_path, unseen=[name]).unseen == (2,)


def make_folder(root, names="cat\ndog\nvoid (ignore)\n"):
    for part in ("train", "test"):
        for name in "ab":
            put(root, f"{part}/images/{name}.jpg", f"{part}/masks/{name}.png", [0, 1, 2, 255])
    (root / "classnames.txt").write_text(names)
    return root


def test_plain_folders_are_read(tmp_path):
    split = load_segmentation("folder", make_folder(tmp_path), unseen=["dog"])
    assert (len(split.train), len(split.test), split.names, split.unseen) == (2, 2, ("cat", "dog"), (1,))
    assert split.test[0].mask.tolist() == [[0, 1, 255, 255]]


def save_mask(mode, size):
    return lambda test: Image.new(mode, size).save(test / "masks/a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (save_mask("L", (9, 9)), r"9×9 pixels \(width×height\), its image 4×1"),
        (lambda test: put(test, "x.jpg", "masks/a.png", [0, 1, 2, 77]), "number 77 is none of the 2 classes"),
        (lambda test: (test / "masks/a.png").unlink(), "a.png': no such file. Add the mask"),
        (lambda test: (test / "masks/a.png").write_bytes(b"no"), "a.png': cannot be read"),
        (save_mask("RGB", (4, 1)), "a picture in RGB. Save one class number per pixel"),
        (lambda test: (test / "images/a.jpg").write_bytes(b"no"), "not an image Pillow can read"),
    ],
)
def test_bad_files_are_skipped_and_the_rest_is_read(damage, message, tmp_path):
    damage(make_folder(tmp_path) / "test")
    with pytest.warns(UserWarning, match=f"1 of 2 images set aside. The first: .*{message}"):
        split = load_segmentation("folder", tmp_path)
    assert [item.key for item in split.test] == ["test/images/b.jpg"]
    with pytest.raises(VermouthError, match=message):
        pair(load_segmentation("folder", tmp_path, check=False).test[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [("cat\n\ndog\n", "line 2 is empty"), ("cat\ncat\n", "'cat' stands there twice"), ("x (ignore)\n", "no class")],
)
def test_bad_class_lists_are_refused(names, message, tmp_path):
    with pytest.raises(VermouthError, match=message):
        load_segmentation("folder", make_folder(tmp_path, names))


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(VermouthError, match="no classnames.txt"):
        load_segmentation("folder", tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(VermouthError, match=r"no images in test/images/, val/images/ or images/"):
        load_segmentation("folder", tmp_path)
    for dataset in OFFICIAL:
        with pytest.raises(VermouthError, match=f"so this is not the root of {dataset}. Get it from "):
            load_segmentation(dataset, tmp_path)


def test_shots_and_limit_choose_the_same_images_every_time(tmp_path):
    make_folder(tmp_path)
    split, again = (load_segmentation("folder", tmp_path, shots=1, seed=3, limit=1) for _ in range(2))
    assert (len(split.train), len(split.test)) == (1, 1)
    assert split == again


@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
@pytest.mark.parametrize(
    ("dataset", "folder", "train", "test"),
    [
        ("voc20", "VOCdevkit", 311, 443),
        ("voc21", "VOCdevkit/VOC2012", 311, 443),
        ("ade150", "ADEChallengeData2016", 0, 3),
        ("folder", "camvid", 367, 233),
    ],
)
def test_real_packs_have_all_their_images_and_no_other_label(dataset, folder, train, test):
    split = load_segmentation(dataset, Path(DATA) / "seg" / folder)
    assert (len(split.train), len(split.test)) == (train, test)
    found = np.unique(np.concatenate([np.unique(item.mask) for item in split.test[:40]]))
    assert 255 in found
    assert found[found != 255].max() < len(split.names)
