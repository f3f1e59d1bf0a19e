"""Few-shot classification: the official layouts on small fabricated trees, the protocol, the results page, and the real Caltech101 pack where it is."""
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT as REPOSITORY
from PIL import Image
from sklearn.metrics import accuracy_score

from vermouth.core import VermouthError
from vermouth.data.fewshot import LAYOUTS, load_fewshot
from vermouth.data.item import Item

DATA = os.environ.get("VERMOUTH_DATA")
ROOT = Path(DATA or ".") / "fewshot"
real = pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")

# What CoOp's instructions leave on the disk: folder, images below it, list file, and a path as its lists spell it.
TREES = {"oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json", "{name}_{i}.jpg"), "flowers102": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "image_{label}{i}.jpg"),
         "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json", "{name}/{name}_{i}.jpg"), "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json", "{name}/{name}_{i}.jpg"),
         "stanford_cars": ("stanford_cars", ".", "split_zhou_StanfordCars.json", "cars_train/{label}{i}.jpg"), "food101": ("food-101", "images", "split_zhou_Food101.json", "{name}/{i}.jpg"),
         "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json", "s/{name}/sun_{i}.jpg"), "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "{name}/image_{i}.jpg"),
         "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "{name}/v_{i}.jpg")}
NAMES, SPELT, TRAIN, EACH = ("sea_lion", "ant"), ("sea lion", "ant"), 4, 6  # the first four of six images per class are for training


def paint(path, label, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (label * 50, i * 30, 0)).save(path)


def make_split(root, dataset, below=""):
    "A tree with a split file; `below` puts the images where torchvision's download would."
    folder, images, lists, pattern = TREES[dataset]
    rows = [[pattern.format(name=name, label=label, i=i), label, name, i] for label, name in enumerate(NAMES) for i in range(EACH)]
    for path, label, _, i in rows: paint(root / folder / below / images / path, label, i)
    part = {"train": [r[:3] for r in rows if r[3] < TRAIN], "val": [], "test": [r[:3] for r in rows if r[3] >= TRAIN]}
    (root / folder / lists).write_text(json.dumps(part))
    return root / folder, part


def make_aircraft(root, below=""):
    folder = root / "fgvc_aircraft" / below
    for label in range(2):
        for i in range(EACH): paint(folder / "images" / f"{label}{i}.jpg", label, i)
    (folder / "variants.txt").write_text("sea_lion\nant\n")
    for part, which in (("train", range(TRAIN)), ("val", []), ("test", range(TRAIN, EACH))):
        (folder / f"images_variant_{part}.txt").write_text("".join(f"{label}{i} {name}\n" for label, name in enumerate(NAMES) for i in which))
    return folder


def make_imagenet(root):
    folder = root / "imagenet"
    for label, wnid in enumerate(("n01", "n02")):
        for i in range(EACH): paint(folder / "images" / ("train" if i < TRAIN else "val") / wnid / f"{i}.JPEG", label, i)
    (folder / "classnames.txt").write_text("n02 ant\nn01 sea_lion\n")
    return folder


def make(root, dataset):
    if dataset == "fgvc_aircraft": return make_aircraft(root)
    return make_imagenet(root) if dataset == "imagenet" else make_split(root, dataset)[0]


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_official_layout(dataset, tmp_path):
    make(tmp_path, dataset)
    data = load_fewshot(dataset, tmp_path)
    assert data.names == SPELT and (len(data.train), len(data.test)) == (2 * TRAIN, 2 * (EACH - TRAIN))
    item = data.test[-1]
    assert (item.label, item.name) == (1, "ant") and item.key.startswith(f"{LAYOUTS[dataset].folder}/")
    red, green, _ = item.image.getpixel((0, 0))
    assert abs(red - 50) < 12 and abs(green - 30 * (EACH - 1)) < 12, "the image that the list names"
    assert Counter(item.label for item in data.shots(2, seed=1)) == {0: 2, 1: 2}
    with pytest.raises(VermouthError, match="shots=5: class 'sea lion' has 4 images"): data.shots(5)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_missing_list_is_named_with_its_source(dataset, tmp_path):
    with pytest.raises(VermouthError, match=f"{LAYOUTS[dataset].folder}/.* is missing, and {dataset} needs it. Follow DATASETS.md .* the images are from"): load_fewshot(dataset, tmp_path)
    folder, layout = make(tmp_path, dataset), LAYOUTS[dataset]
    (folder / layout.lists).unlink()
    with pytest.raises(VermouthError, match=f"{layout.folder}/{layout.lists} is missing.*{layout.drive}"): load_fewshot(dataset, tmp_path)


def test_shots_do_not_depend_on_the_limit_and_are_not_in_the_test_set(tmp_path):
    make_split(tmp_path, "dtd")
    whole, part = load_fewshot("dtd", tmp_path), load_fewshot("dtd", tmp_path, limit=2)
    assert whole.shots(2, 3) == part.shots(2, 3) != whole.shots(2, 1)
    assert [item.label for item in part.test] == [0, 1]
    assert not {i.key for i in whole.pool([1, 4], [1, 2])} & {i.key for i in whole.test}
    assert len(whole.pool([4], [1])) == 8


@pytest.mark.parametrize("wrapped", [False, True])
def test_index_files_decide(wrapped, tmp_path):
    folder, part = make_split(tmp_path, "eurosat")
    rows = [part["train"][3], part["train"][6]]
    if wrapped: rows = {"data": [{"impath": f"./data/eurosat/2750/{path}", "label": label, "classname": name} for path, label, name in rows], "indices": [3, 6]}
    (folder / "shot_indices").mkdir()
    (folder / "shot_indices" / "shot_1-seed_2.json").write_text(json.dumps({"train": rows, "val": []}))
    data = load_fewshot("eurosat", tmp_path)
    assert [item.key for item in data.shots(1, 2)] == ["eurosat/sea_lion/sea_lion_3.jpg", "eurosat/ant/ant_2.jpg"]
    assert data.origin([1, 2], [1, 2]) == "1 of 4 shot sets from index files, 3 drawn by seed"


@pytest.mark.parametrize(("change", "message"), [
    (lambda part: part["test"].clear(), "no list 'test'"),
    (lambda part: part["test"].append(["x.jpg", 0, "ant"]), "label 0 is 'sea lion' and, for 'x.jpg', 'ant'"),
    (lambda part: part["train"].append(["x.jpg", 5, "bee"]), "no image has label 2, but labels go to 5: a class is missing"),
    (lambda part: part["train"].append(["x.jpg", 2, "bee"]), "class 'bee' has no test image"),
    (lambda part: part["train"].append(["x.jpg", "2", "bee"]), r"is not \[path, label, name\]"),
])
def test_a_wrong_split_file_is_refused(change, message, tmp_path):
    folder, part = make_split(tmp_path, "food101")
    change(part)
    (folder / "split_zhou_Food101.json").write_text(json.dumps(part))
    with pytest.raises(VermouthError, match=message): load_fewshot("food101", tmp_path)
    (folder / "split_zhou_Food101.json").write_text("{")
    with pytest.raises(VermouthError, match="cannot be read as JSON"): load_fewshot("food101", tmp_path)


def test_aircraft_and_imagenet_name_what_does_not_fit(tmp_path):
    folder = make_aircraft(tmp_path)
    (folder / "images_variant_test.txt").write_text("04 sea_lion\n14 wasp\n")
    with pytest.raises(VermouthError, match="'wasp' is not in variants.txt"): load_fewshot("fgvc_aircraft", tmp_path)
    folder = make_imagenet(tmp_path)
    (folder / "classnames.txt").write_text("n01 missile\nn02 missile\n")
    assert load_fewshot("imagenet", tmp_path).names == ("missile (n01)", "missile (n02)"), "CLIP's list has two such pairs"
    (folder / "classnames.txt").write_text("n01 missile\n")
    with pytest.raises(VermouthError, match="n02 is in only one of classnames.txt and the folders"): load_fewshot("imagenet", tmp_path)


def test_downloads_are_torchvisions_and_only_on_request(tmp_path, monkeypatch):
    from torchvision import datasets
    asked = []

    def fake(root, download):
        asked.append((root, download))
        make_split(tmp_path, "flowers102", "flowers-102")
    monkeypatch.setattr(datasets, "Flowers102", fake)
    with pytest.raises(VermouthError, match="or pass download=True"): load_fewshot("flowers102", tmp_path)
    assert not asked
    assert len(load_fewshot("flowers102", tmp_path, download=True).test) == 4
    assert asked == [(str(tmp_path / "oxford_flowers"), True)]

    def offline(root, download): raise OSError("no route to host")
    monkeypatch.setattr(datasets, "DTD", offline)
    with pytest.raises(VermouthError, match=r"torchvision could not fetch dtd \(no route to host\). Get the images from"): load_fewshot("dtd", tmp_path, download=True)


def test_what_torchvision_downloads_it_still_has():
    from torchvision import datasets
    assert all(hasattr(datasets, layout.torchvision) for layout in LAYOUTS.values() if layout.torchvision)


def test_aircraft_where_torchvision_puts_it(tmp_path):
    make_aircraft(tmp_path, "fgvc-aircraft-2013b/data")
    assert len(load_fewshot("fgvc_aircraft", tmp_path).train) == 8


@real
def test_real_caltech101():
    data = load_fewshot("caltech101", ROOT)
    assert (len(data.names), len(data.test)) == (100, 2465)
    assert data.origin([1, 2, 4, 8, 16], [1, 2, 3]) == "15 of 15 shot sets from index files, 0 drawn by seed"
    assert len(data.shots(16, 2)) == 1600
    assert data.shots(1, 1)[0].key == "caltech-101/Faces/image_0201.jpg"
    assert data.test[0].image.mode == "RGB"


# The protocol


@pytest.fixture(scope="module")
def study():
    "A model, data, and what it read: four shots of two seeds."
    from vermouth.model import Vermouth
    from vermouth.tasks.fewshot import read_study, study_items
    model, data = Vermouth.build(uhead="pico"), load_fewshot(test_per_class=3)
    return model, data, read_study(model, study_items(data, (4,), (1, 2)))


def test_a_run_is_repeatable_starts_anew_and_agrees_with_scikit_learn(study):
    from vermouth.tasks.fewshot import few_shot_accuracy, scores_on_test, train_few_shot
    model, data, reading = study
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = train_few_shot(model, data, reading, 4, 1, epochs=5, lr=1e-3)
    scores, labels = scores_on_test(trained, data, reading)
    assert few_shot_accuracy(model, data, 4, 1, epochs=5, lr=1e-3, reading=reading) == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert labels == [item.label for item in data.test]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model given is left as it is"
    other = train_few_shot(model, data, reading, 4, 2, epochs=5, lr=1e-3)
    assert not torch.equal(trained.uhead.pool.out.weight, other.uhead.pool.out.weight)


def test_nothing_but_the_oracle_looks_at_a_label(study):
    from vermouth.tasks.fewshot import oracle_prompts, read_study
    model, data, reading = study
    relabelled = [replace(item, label=(item.label + 1) % 12, name="cheat") for item in reading.items[:6]]
    again = read_study(model, relabelled)
    assert again.prompts == reading.prompts[:6]
    for a, b in zip(again.features.batch(range(6)), reading.features.batch(range(6))): assert torch.allclose(a.float(), b.float(), rtol=2e-3, atol=1e-4 * float(b.abs().max())), "but for the batch's size, which may move the last of float16's bits, nothing changed"
    assert oracle_prompts(data, data.test[:1]) == [f"a photo of {data.names[0]}"]


def test_a_bad_test_image_is_set_aside_and_the_rest_is_read(study, tmp_path, capsys):
    from vermouth.tasks.fewshot import read_study
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    reading = read_study(study[0], [*study[1].test[:2], Item(tmp_path / "bad.jpg", 0, "cat", "bad.jpg")], out=tmp_path / "stores")
    assert len(reading.items) == len(reading.prompts) == 2 and "left out: bad.jpg" in capsys.readouterr().out


def test_another_setting_is_another_store(study):
    from vermouth.baselines import store_name
    model, data, reading = study
    names = {store_name(model, data.test, p) for p in (None, ["cat"] * len(data.test), ["dog"] * len(data.test))} | {store_name(model, data.test[1:], None)}
    assert len(names) == 4


def test_timm_backbones_are_probed_where_their_weights_are(study, tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file
    from vermouth.tasks import fewshot
    _, data, reading = study
    monkeypatch.setattr(fewshot, "TIMM", {"here": "resnet10t.c3_in1k", "absent": "vit_base_patch16_224.dino"})
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(fewshot, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name) if "resnet10t" in repo else None)
    monkeypatch.setattr("vermouth.expert.hf_hub_download", lambda repo, name: str(tmp_path / name))
    small = replace(reading, items=reading.items[:3], prompts=reading.prompts[:3])
    found, absent = fewshot.timm_vectors(small, "cpu")
    assert found["here"].shape == (3, 512) and absent == {"absent": "no weights here; fetch them with: hf download timm/vit_base_patch16_224.dino model.safetensors"}


# The results page

METHODS = {"Vermouth", "Vermouth without expert", "U-head on random weights", "U-head on random weights without expert", "oracle: prompts from the true label", "linear probe on the same features", "training-free nearest class mean",
           "expert only, linear probe", "CLIP linear probe", "CLIP zero-shot", "caption only, linear probe", "caption only"}


def run(folder, **parameters):
    "Execute the page in `folder`; what it printed and showed."
    papermill.execute_notebook(str(REPOSITORY / "nbs" / "11_fewshot.ipynb"), str(folder / "out.ipynb"), parameters=parameters, cwd=str(folder), progress_bar=False)
    outputs = [o for c in nbformat.read(folder / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    return "\n".join(o.get("text", "") + o.get("data", {}).get("text/html", "") for o in outputs)


def test_page_on_toybox_as_nbdev_test_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    shown = run(tmp_path)
    assert all(f"<th>{method}</th>" in shown for method in METHODS)
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"], "nothing is left where committed results lie"


@real
def test_page_on_caltech101(tmp_path):
    shown = run(tmp_path, dataset="caltech101", root=str(ROOT), shots=1, seed=1, epochs=1, limit=100)
    rows = pd.read_csv(tmp_path / "results" / "11_fewshot.csv")
    left_out = {name for name in ("MAE-L", "ConvNeXtV2-L", "SwinV2-L", "DINO-B", "DINOv2-B", "BEiTv2-L") if f"{name}, linear probe: left out" in shown}
    probed = {m.removesuffix(", linear probe") for m in rows.method} & {"MAE-L", "ConvNeXtV2-L", "SwinV2-L", "DINO-B", "DINOv2-B", "BEiTv2-L"}
    assert METHODS <= set(rows.method) and len(left_out | probed) == 6
    assert (rows.n == 100).all() and rows.value.between(0, 1).all() and rows.setting.str.contains("shots=").all()
    assert "1 of 1 shot sets from index files" in shown
