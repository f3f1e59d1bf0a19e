"Lists of pairs of images that others have made: they name no file elsewhere, and are whole or refused in one sentence."

import json
import os

import pytest
from conftest import COUNTS

from vermouth.core import VermouthError
from vermouth.data.correspondence import load_correspondence

NOTE = {
    "category": "cat",
    "src_imname": "a.jpg",
    "trg_imname": "b.jpg",
    "src_kps": [[1, 2]],
    "trg_kps": [[3, 4]],
    "trg_bndbox": [0, 0, 9, 9],
}
ODD = [None, [], {}, "x", -1, 10**400, float("nan"), True, "\x1b[2J", "a\0b"]
ODD += [[[1]], [[1, 2, 3]], [["x", "y"]], [1, None]]
NAMES = ("../a.jpg", "cat/../../a.jpg", "..\\a.jpg", "/etc/../../a.jpg", "a\0b")


@pytest.fixture
def root(photos, tmp_path):
    (tmp_path / "data/JPEGImages/cat").mkdir(parents=True)
    (tmp_path / "data/PairAnnotation/test").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        photos[0].save(tmp_path / "data/JPEGImages/cat" / name)
    photos[1].save(tmp_path / "a.jpg")
    return tmp_path / "data"


def refused(dataset, root):
    "Whether a data set is refused, in one line."
    COUNTS["inputs tried"] += 1
    try:
        load_correspondence(dataset, root)
    except VermouthError as error:
        assert "\n" not in str(error) and str(error)[-1] == "."
        return True
    return False


def write_note(root, data):
    (root / "PairAnnotation/test/1.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.mark.parametrize("key", NOTE)
def test_odd_entries_of_spair(root, key):
    write_note(root, NOTE)
    assert not refused("spair", root)
    write_note(root, {k: v for k, v in NOTE.items() if k != key})
    assert refused("spair", root)
    for value in ODD:
        write_note(root, NOTE | {key: value})
        taken = not refused("spair", root)
        if taken:
            [pair] = load_correspondence("spair", root)
            assert pair.extent > 0 and pair.source_points.shape == pair.target_points.shape
            assert root.resolve() in pair.source.resolve().parents and root.resolve() in pair.target.resolve().parents


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[1]", b"{" * 9])
def test_damaged_notes(root, data):
    write_note(root, data)
    assert refused("spair", root)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_folder(root, name):
    for key in ("src_imname", "trg_imname", "category"):
        write_note(root, NOTE | {key: name})
        assert refused("spair", root)
    (root / "test_pairs_ps.csv").write_text(f"photo,sketch,XA,YA,XB,YB,class\n{name},a.jpg,1,1,1,1,cat\n")
    assert refused("psc6k", root)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"photo,sketch\ncat/a.jpg,cat/b.jpg\n",
        b"photo,sketch,XA,YA,XB,YB,class\ncat/a.jpg,cat/b.jpg,1;2,1,1,1,cat\n",
        b"photo,sketch,XA,YA,XB,YB,class\ncat/a.jpg,cat/b.jpg,nan,1,1,1,cat\n",
        b"photo,sketch,XA,YA,XB,YB,class\ncat/a.jpg,cat/b.jpg,x,1,1,1,cat\n",
        b"photo,sketch,XA,YA,XB,YB,class\ncat/a.jpg,cat/b.jpg,1,1\n",
        b'photo,sketch,XA,YA,XB,YB,class\n"cat/a.jpg,cat/b.jpg,1,1,1,1,cat\n',
        b"photo,sketch,XA,YA,XB,YB,class\n" + b"x" * 200_000 + b",a.jpg,1,1,1,1,cat\n",
        b"\xff\xfe\xfd",
    ],
)
def test_damaged_tables(root, text):
    (root / "test_pairs_ps.csv").write_bytes(text)
    assert refused("psc6k", root)


def test_pipes_in_the_place_of_lists(root):
    os.mkfifo(root / "PairAnnotation/test/1.json")
    os.mkfifo(root / "test_pairs_ps.csv")
    assert refused("spair", root) and refused("psc6k", root)
