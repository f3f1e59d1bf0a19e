"""The official few-shot layouts, on small fabricated trees, and the real Caltech101 pack where it is."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from torchvision import datasets

from vermouth.core import VermouthError
from vermouth.data.fewshot import LAYOUTS, load_fewshot

DATA = os.environ.get("VERMOUTH_DATA")

# What CoOp's instructions leave on the disk: folder, images below it, list file, and a path as its lists spell it.
TREES = {
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json", "{name}_{i}.jpg"),
    "flowers102": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "image_{label}{i}.jpg"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json", "{name}/{name}_{i}.jpg"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json", "{name}/{name}_{i}.jpg"),
    "stanford_cars": ("stanford_cars", ".", "split_zhou_StanfordCars.json", "cars_train/{label}{i}.jpg"),
    "food101": ("food-101", "images", "split_zhou_Food101.json", "{name}/{i}.jpg"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json", "s/{name}/sun_{i}.jpg"),
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "{name}/image_{i}.jpg"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "{name}/v_{i}.jpg"),
}
NAMES, SPELT = ("sea_lion", "ant"), ("sea lion", "ant")
TRAIN, EACH = 4, 6  # the first four of six images per class are for training


def paint(path, label, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (label * 50, i * 30, 0)).save(path)


def make_split(root, dataset, below=""):
    "Make a tree with a split file; `below` puts the images where torchvision's download would."
    folder, images, lists, pattern = TREES[dataset]
    rows = [
        [pattern.format(name=name, label=label, i=i), label, name, i]
        for label, name in enumerate(NAMES)
        for i in range(EACH)
    ]
    for path, label, _, i in rows:
        paint(root / folder / below / images / path, label, i)
    part = {"train": [r[:3] for r in rows if r[3] < TRAIN], "val": [], "test": [r[:3] for r in rows if r[3] >= TRAIN]}
    (root / folder / lists).write_text(json.dumps(part))
    return root / folder, part


def make_aircraft(root, below=""):
    folder = root / "fgvc_aircraft" / below
    for label in range(2):
        for i in range(EACH):
            paint(folder / "images" / f"{label}{i}.jpg", label, i)
    (folder / "variants.txt").write_text("sea_lion\nant\n")
    for part, which in (("train", range(TRAIN)), ("val", []), ("test", range(TRAIN, EACH))):
        (folder / f"images_variant_{part}.txt").write_text(
            "".join(f"{label}{i} {name}\n" for label, name in enumerate(NAMES) for i in which)
        )
    return folder


def make_imagenet(root):
    folder = root / "imagenet"
    for label, wnid in enumerate(("n01", "n02")):
        for i in range(EACH):
            paint(folder / "images" / ("train" if i < TRAIN else "val") / wnid / f"{i}.JPEG", label, i)
    (folder / "classnames.txt").write_text("n02 ant\nn01 sea_lion\n")
    return folder


def make(root, dataset):
    if dataset == "fgvc_aircraft":
        return make_aircraft(root)
    return make_imagenet(root) if dataset == "imagenet" else make_split(root, dataset)[0]


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_official_layouts_are_read(dataset, tmp_path):
    make(tmp_path, dataset)
    data = load_fewshot(dataset, tmp_path)
    assert data.names == SPELT
    assert (len(data.train), len(data.test)) == (2 * TRAIN, 2 * (EACH - TRAIN))
    item = data.test[-1]
    assert (item.label, item.name) == (1, "ant")
    assert item.key.startswith(f"{LAYOUTS[dataset].folder}/")
    red, green, _ = item.image.getpixel((0, 0))
    assert abs(red - 50) < 12, "the image that the list names"
    assert abs(green - 30 * (EACH - 1)) < 12, "the image that the list names"
    assert Counter(item.label for item in data.shots(2, seed=1)) == {0: 2, 1: 2}
    with pytest.raises(VermouthError, match="shots=5: class 'sea lion' has 4 images"):
        data.shots(5)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_missing_list_is_named_with_its_source(dataset, tmp_path):
    layout = LAYOUTS[dataset]
    missing = f"{layout.folder}/.* is missing, and {dataset} needs it. Follow DATASETS.md .* the images are from"
    with pytest.raises(VermouthError, match=missing):
        load_fewshot(dataset, tmp_path)
    folder = make(tmp_path, dataset)
    (folder / layout.lists).unlink()
    with pytest.raises(VermouthError, match=f"{layout.folder}/{layout.lists} is missing.*{layout.drive}"):
        load_fewshot(dataset, tmp_path)


def test_shots_do_not_depend_on_the_limit_and_are_not_in_the_test_set(tmp_path):
    make_split(tmp_path, "dtd")
    whole, part = load_fewshot("dtd", tmp_path), load_fewshot("dtd", tmp_path, limit=2)
    assert whole.shots(2, 3) == part.shots(2, 3) != whole.shots(2, 1)
    assert [item.label for item in part.test] == [0, 1]
    assert not {i.key for i in whole.pool([1, 4], [1, 2])} & {i.key for i in whole.test}
    assert len(whole.pool([4], [1])) == 8


@pytest.mark.parametrize("wrapped", [False, True])
def test_index_files_decide_which_shots_are_taken(wrapped, tmp_path):
    folder, part = make_split(tmp_path, "eurosat")
    rows = [part["train"][3], part["train"][6]]
    if wrapped:
        keys = "impath", "label", "classname"
        items = [dict(zip(keys, (f"./data/eurosat/2750/{path}", *rest), strict=True)) for path, *rest in rows]
        rows = {"data": items, "indices": [3, 6]}
    (folder / "shot_indices").mkdir()
    (folder / "shot_indices" / "shot_1-seed_2.json").write_text(json.dumps({"train": rows, "val": []}))
    data = load_fewshot("eurosat", tmp_path)
    assert [item.key for item in data.shots(1, 2)] == ["eurosat/sea_lion/sea_lion_3.jpg", "eurosat/ant/ant_2.jpg"]
    assert data.origin([1, 2], [1, 2]) == "1 of 4 shot sets from index files, 3 drawn by seed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part["test"].clear(), "no list 'test'"),
        (lambda part: part["test"].append(["x.jpg", 0, "ant"]), "label 0 is 'sea lion' and, for 'x.jpg', 'ant'"),
        (
            lambda part: part["train"].append(["x.jpg", 5, "bee"]),
            "no image has label 2, but labels go to 5: a class is missing",
        ),
        (lambda part: part["train"].append(["x.jpg", 2, "bee"]), "class 'bee' has no test image"),
        (lambda part: part["train"].append(["x.jpg", "2", "bee"]), r"is not \[path, label, name\]"),
    ],
)
def test_a_wrong_split_file_is_refused(change, message, tmp_path):
    folder, part = make_split(tmp_path, "food101")
    change(part)
    (folder / "split_zhou_Food101.json").write_text(json.dumps(part))
    with pytest.raises(VermouthError, match=message):
        load_fewshot("food101", tmp_path)
    (folder / "split_zhou_Food101.json").write_text("{")
    with pytest.raises(VermouthError, match="cannot be read as JSON"):
        load_fewshot("food101", tmp_path)


def test_aircraft_and_imagenet_name_what_does_not_fit(tmp_path):
    folder = make_aircraft(tmp_path)
    (folder / "images_variant_test.txt").write_text("04 sea_lion\n14 wasp\n")
    with pytest.raises(VermouthError, match="'wasp' is not in variants.txt"):
        load_fewshot("fgvc_aircraft", tmp_path)
    folder = make_imagenet(tmp_path)
    (folder / "classnames.txt").write_text("n01 missile\nn02 missile\n")
    names = load_fewshot("imagenet", tmp_path).names
    assert names == ("missile (n01)", "missile (n02)"), "CLIP's list has two such pairs"
    (folder / "classnames.txt").write_text("n01 missile\n")
    with pytest.raises(VermouthError, match="n02 is in only one of classnames.txt and the folders"):
        load_fewshot("imagenet", tmp_path)


def test_downloads_are_torchvisions_and_only_on_request(tmp_path, monkeypatch):
    calls = []

    def fake(root, download):
        calls.append((root, download))
        make_split(tmp_path, "flowers102", "flowers-102")

    monkeypatch.setattr(datasets, "Flowers102", fake)
    with pytest.raises(VermouthError, match="or pass download=True"):
        load_fewshot("flowers102", tmp_path)
    assert not calls
    assert len(load_fewshot("flowers102", tmp_path, download=True).test) == 4
    assert calls == [(str(tmp_path / "oxford_flowers"), True)]

    def offline(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "DTD", offline)
    refused = r"torchvision could not fetch dtd \(no route to host\). Get the images from"
    with pytest.raises(VermouthError, match=refused):
        load_fewshot("dtd", tmp_path, download=True)


def test_torchvision_still_has_the_data_sets_that_it_downloads():
    assert all(hasattr(datasets, layout.torchvision) for layout in LAYOUTS.values() if layout.torchvision)


def test_aircraft_is_read_where_torchvision_puts_it(tmp_path):
    make_aircraft(tmp_path, "fgvc-aircraft-2013b/data")
    assert len(load_fewshot("fgvc_aircraft", tmp_path).train) == 8


@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
def test_the_real_caltech101_has_its_lists_and_shots():
    data = load_fewshot("caltech101", Path(DATA) / "fewshot")
    assert (len(data.names), len(data.test)) == (100, 2465)
    assert data.origin([1, 2, 4, 8, 16], [1, 2, 3]) == "15 of 15 shot sets from index files, 0 drawn by seed"
    assert len(data.shots(16, 2)) == 1600
    assert data.shots(1, 1)[0].key == "caltech-101/Faces/image_0201.jpg"
    assert data.test[0].image.mode == "RGB"
