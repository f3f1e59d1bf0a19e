"""The official ZS-SBIR layouts, on small fabricated trees, and the real Sketchy pack where it is."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vermouth.core import VermouthError
from vermouth.data.sbir import LAYOUTS, load_sbir

SEEN, UNSEEN, EACH = ["pig", "car_(sedan)", "mouse (animal)"], ["alarm clock", "hot-air_balloon"], 3
LISTS = {
    "sketchy_split1": ("sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"),
    "tuberlin": ("png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt"),
    "quickdraw": ("sketch_{}.txt", "all_photo_{}.txt"),
}
LISTS["sketchy_split2"] = LISTS["sketchy_split1"]


def make_tree(root, dataset):
    lists = root / LAYOUTS[dataset].lists
    lists.mkdir(parents=True)
    for part, split, names in (("", "train", SEEN), ("_zero", "zero", UNSEEN)):
        (lists / f"cname_cid{part}.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
        for pattern, kind in zip(LISTS[dataset], ("sketch", "photo"), strict=True):
            lines = []
            for label, name in enumerate(names):
                for i in range(EACH):
                    path = root / kind / name / f"{i} of many.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (4, 4), (label * 50, i * 50, 0)).save(path)
                    lines.append(f"{path.relative_to(root)} {label}\n")
            (lists / pattern.format(split)).write_text("".join(lines))
    return root


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_official_layouts_are_read(dataset, tmp_path):
    split = load_sbir(dataset, make_tree(tmp_path, dataset))
    assert split.seen == ("pig", "car (sedan)", "mouse (animal)") and split.unseen == ("alarm clock", "hot-air balloon")
    assert (len(split.train_sketches), len(split.train_photos)) == (9, 9)
    assert (len(split.test_sketches), len(split.test_photos)) == (6, 6)
    item = split.test_photos[4]
    assert (item.label, item.name, item.key) == (1, "hot-air balloon", "photo/hot-air_balloon/1 of many.png")
    assert item.image.getpixel((0, 0)) == (50, 50, 0)


def test_quickdraw_is_read_in_its_other_spelling(tmp_path):
    make_tree(tmp_path, "quickdraw")
    for old, new in (("sketch_{}.txt", "sketch_filelist_{}.txt"), ("all_photo_{}.txt", "photo_filelist_{}.txt")):
        for part in ("train", "zero"):
            (tmp_path / "zeroshot" / old.format(part)).rename(tmp_path / "zeroshot" / new.format(part))
    assert len(load_sbir("quickdraw", tmp_path).test_sketches) == 6


def test_shots_are_seeded_nested_and_leave_the_test_set_alone(tmp_path):
    make_tree(tmp_path, "tuberlin")
    one, two, again, other = (
        load_sbir("tuberlin", tmp_path, shots=k, seed=s) for k, s in ((1, 0), (2, 0), (2, 0), (2, 1))
    )
    assert Counter(i.label for i in two.train_sketches) == {0: 2, 1: 2, 2: 2}
    assert set(one.train_photos) < set(two.train_photos)
    assert two == again and two != other
    assert two.test_sketches == other.test_sketches


def test_limit_is_even_over_classes(tmp_path):
    split = load_sbir("tuberlin", make_tree(tmp_path, "tuberlin"), limit=3)
    assert sorted(Counter(i.label for i in split.test_photos).values()) == [1, 2] and len(split.test_sketches) == 3
    assert len(split.train_photos) == 9


def test_too_many_shots_are_refused(tmp_path):
    with pytest.raises(VermouthError, match="shots=4: class 'pig' has 3 sketches. Ask for at most 3"):
        load_sbir("tuberlin", make_tree(tmp_path, "tuberlin"), shots=4)


@pytest.mark.parametrize(
    "name",
    ["cname_cid.txt", "cname_cid_zero.txt", "png_ready_filelist_train.txt", "ImageResized_ready_filelist_zero.txt"],
)
def test_missing_list_is_named_with_its_source(name, tmp_path):
    (make_tree(tmp_path, "tuberlin") / "zeroshot" / name).unlink()
    with pytest.raises(VermouthError, match=f"zeroshot/{name} is missing.*Get the lists from github.com.*TU-Berlin"):
        load_sbir("tuberlin", tmp_path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("png_ready_filelist_train.txt", "sketch/pig/0.png\n", "line 1: 'sketch/pig/0.png' is not 'path label'"),
        ("png_ready_filelist_train.txt", "a.png 0\n\nb.png x1\n", "line 3: 'b.png x1' is not"),
        ("png_ready_filelist_zero.txt", "\n\n", "no lines"),
        ("png_ready_filelist_zero.txt", "a.png 2\n", "'a.png' has a label beyond the 2 class names"),
        ("cname_cid.txt", "pig 0\ncat 0\n", "labels are not 0 to 1, each once"),
    ],
)
def test_malformed_lists_are_refused_with_the_line(name, text, message, tmp_path):
    (make_tree(tmp_path, "tuberlin") / "zeroshot" / name).write_text(text)
    with pytest.raises(VermouthError, match=message):
        load_sbir("tuberlin", tmp_path)


def test_missing_images_are_counted_before_anything_runs(tmp_path):
    make_tree(tmp_path, "tuberlin")
    for i in (0, 2):
        (tmp_path / "photo/pig" / f"{i} of many.png").unlink()
    with pytest.raises(VermouthError, match="2 of 30 listed images are missing, first 'photo/pig/0 of many.png'"):
        load_sbir("tuberlin", tmp_path)


def make_folders(root, names=("a", "b", "c", "d", "e", "f")):
    for kind in ("sketch", "photo"):
        for name in names:
            (root / kind / name).mkdir(parents=True)
            for suffix in ("png", "JPG"):
                Image.new("L", (4, 4)).save(root / kind / name / f"1.{suffix}")
            (root / kind / name / "notes.txt").write_text("not an image")
    return root


def test_folders_are_split_by_seed(tmp_path):
    make_folders(tmp_path)
    splits = [load_sbir("folder", tmp_path, seed=s) for s in range(6)]
    assert all(len(s.unseen) == 2 and len(s.test_photos) == 4 and not set(s.seen) & set(s.unseen) for s in splits)
    assert len({s.unseen for s in splits}) > 1
    assert load_sbir("folder", tmp_path, seed=3) == splits[3]


def test_mistakes_in_folders_are_named(tmp_path):
    make_folders(tmp_path)
    with pytest.raises(VermouthError, match="6 of 6 classes. Leave at least one seen"):
        load_sbir("folder", tmp_path, unseen="abcdef")
    (tmp_path / "photo/lonely").mkdir()
    with pytest.raises(VermouthError, match="class 'lonely' is in photo/ but not in sketch/"):
        load_sbir("folder", tmp_path)
    (tmp_path / "sketch/lonely").mkdir()
    with pytest.raises(VermouthError, match="no images in sketch/lonely"):
        load_sbir("folder", tmp_path)
    (tmp_path / "one/sketch/a").mkdir(parents=True)
    (tmp_path / "one/photo/a").mkdir(parents=True)
    with pytest.raises(VermouthError, match="1 class"):
        load_sbir("folder", tmp_path / "one")


def test_toybox_test_images_are_the_same_for_every_seed_of_training():
    a, b, again = (load_sbir("toybox", shots=1, seed=s, test_per_class=2, limit=6) for s in (0, 1, 0))
    assert [i.key for i in a.test_photos] == [i.key for i in b.test_photos] and len(a.test_photos) == 6
    assert a.train_photos[0].key != b.train_photos[0].key
    image, same, other = (split.train_photos[3].image.tobytes() for split in (a, again, b))
    assert image == same != other
    toybox, index = a.test_sketches[0].source
    assert toybox[index].name == a.test_sketches[0].name


@pytest.mark.skipif("VERMOUTH_DATA" not in os.environ, reason="real Sketchy images: set VERMOUTH_DATA")
@pytest.mark.parametrize(
    "dataset, seen, unseen, queries", [("sketchy_split1", 100, 25, 625), ("sketchy_split2", 104, 21, 525)]
)
def test_real_sketchy_has_its_official_sizes(dataset, seen, unseen, queries):
    split = load_sbir(dataset, Path(os.environ["VERMOUTH_DATA"]) / "sbir/Sketchy")
    assert (len(split.seen), len(split.unseen)) == (seen, unseen)
    assert (len(split.test_sketches), len(split.test_photos)) == (queries, queries)
    assert not set(split.seen) & set(split.unseen) and not any("_" in name for name in split.seen)
    assert split.train_photos[0].image.size == (128, 128) and split.test_sketches[-1].image.mode == "RGB"
