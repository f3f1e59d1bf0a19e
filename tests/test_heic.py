"HEIC: read where pillow-heif is installed, counted and named where it is not."

import io

import numpy as np
import pytest
from PIL import Image

from vermouth import images
from vermouth.core import VermouthError
from vermouth.images import is_image_name, is_junk, read_image, unread_kinds

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)  # a header without an image


@pytest.fixture
def without(monkeypatch):
    "As if pillow-heif were not installed."
    monkeypatch.setattr(images, "HAS_HEIF", False)
    monkeypatch.setattr(images, "SUFFIXES", tuple(s for s in images.SUFFIXES if s not in images.HEIF_SUFFIXES))
    monkeypatch.setattr(images, "UNREAD_SUFFIXES", images.UNREAD_SUFFIXES | {*images.HEIF_SUFFIXES})


def test_the_kind_is_named_by_its_bytes(without):
    for name in ("a.heic", "a.jpg"):
        assert is_image_name(name) == (name == "a.jpg")
    with pytest.raises(VermouthError, match=r"a HEIC image. To read it, from the checkout run .*\[heif\]"):
        read_image(HEIC)


@pytest.mark.parametrize("command", ["index", "extract"])
def test_files_of_kinds_that_are_not_read_are_counted_in_one_sentence(without, program, photos, command):
    folder = program.folder / "in"
    folder.mkdir()
    photos[0].save(folder / "a.png")
    for name in ("b.heic", "c.HEIC", "d.nef", "._e.heic"):
        (folder / name).write_bytes(HEIC)
    options = ["--captioner", "none"] if command == "extract" else []
    with pytest.warns(UserWarning, match="2 .heic files, 1 .nef file not read: from the checkout run") as seen:
        found = program(command, "in", "--out", "out", *options, "--json")
    assert found["set_aside"] == [] and len([w for w in seen if "not read" in str(w.message)]) == 1


def test_kinds_are_counted_without_junk(without):
    assert unread_kinds(["a.heic", "x/._b.heic", "c.txt"]).startswith("1 .heic file not read: from the checkout")
    assert unread_kinds(["a.dng", "b.heif"]).endswith("for HEIC; convert them to JPEG or PNG.")
    assert unread_kinds(["a.jpg"]) == ""
    assert all(map(is_junk, ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", "__MACOSX")))


def test_heic_is_read():
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (1, 48, 3)))
    pillow_heif.from_pillow(picture).save(buffer := io.BytesIO(), quality=90)
    found = read_image(buffer.getvalue())
    assert found.size == (48, 64) and np.abs(np.asarray(found).astype(int) - np.asarray(picture)).max() < 16
    with pytest.raises(VermouthError, match="cannot be read|not an image"):
        read_image(buffer.getvalue()[:200])
    assert "HEIF" not in Image.OPEN, "registered for this process"
