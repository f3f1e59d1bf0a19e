"What is hashed is what is decoded, and a file that was replaced by another of the same size and date is seen."

import io
import itertools
import os
import tarfile

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from odd_files import Grey
from PIL import Image

from vermouth import images
from vermouth.app.files import unpacked
from vermouth.app.heads import embed_stored
from vermouth.app.index import build_index
from vermouth.core import VermouthError
from vermouth.data.extraction import content_digest, image_digest
from vermouth.data.items import Item
from vermouth.store import extract
from vermouth.zoo.embedders import ExpertEmbedder

COLOURS = ("red", "green", "blue", "white")
FEW = {"stages": "mid", "attention": (), "quiet": True}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for colour in COLOURS:
        paint(tmp_path / f"photos/{colour}.bmp", colour)
    return tmp_path / "photos"


def paint(path, colour):
    Image.new("RGB", (64, 64), colour).save(path)


def replace(path, colour):
    "Another image of the same size in bytes, with the date of the first."
    was = path.stat()
    paint(path, colour)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)


def as_items(paths):
    return [Item(path, 0, "a", path.name) for path in paths]


@pytest.mark.parametrize("kind", [list, as_items], ids=["paths", "items"])
def test_a_file_that_changes_while_it_is_read_cannot_get_the_features_of_another(backbone, folder, monkeypatch, kind):
    paths, right = sorted(folder.iterdir()), {}
    store = extract(backbone, kind(paths), folder.parent / "right", **FEW)
    for path, maps in zip(paths, store, strict=True):
        right[image_digest(path)] = maps[0]
    colours, read = itertools.cycle(COLOURS), images.read_bytes

    def replaced(path):
        data = read(path)
        paint(path, next(colours))
        return data

    monkeypatch.setattr(images, "read_bytes", replaced)
    dizzy = extract(backbone, kind(paths), folder.parent / "dizzy", **FEW)
    digests = load_from_disk(dizzy.out)["image_sha256"]
    assert len(digests) == 4 and set(digests) <= set(right)
    for digest, maps in zip(digests, dizzy, strict=True):
        torch.testing.assert_close(maps[0], right[digest])


@pytest.mark.parametrize("kind", [list, as_items], ids=["paths", "items"])
def test_a_replaced_file_gets_new_features(backbone, folder, kind):
    paths, out = sorted(folder.iterdir()), folder.parent / "store"
    before = extract(backbone, kind(paths), out, **FEW)
    replace(folder / "red.bmp", "yellow")
    with pytest.raises(VermouthError, match="has other images. Give another out, or delete this one"):
        extract(backbone, kind(paths), out, **FEW)
    after = extract(backbone, kind(paths), folder.parent / "new", **FEW)
    assert after.checksum() != before.checksum()
    changed = [not np.array_equal(before[i][0], after[i][0]) for i in range(len(paths))]
    assert changed == [path.name == "red.bmp" for path in paths]


def test_a_replaced_photo_is_indexed_again(folder, tmp_path):
    model = Grey()
    build_index(folder, tmp_path / "idx", model, quiet=True)
    replace(folder / "red.bmp", "yellow")
    changes = build_index(folder, tmp_path / "idx", model, quiet=True).changes
    assert (changes["changed"], changes["looked_at"]) == (1, 1)
    assert build_index(folder, tmp_path / "idx", model, quiet=True).changes["looked_at"] == 0


def test_images_of_a_tar_file_are_known_by_their_bytes(backbone, folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as f:
        for path in sorted(folder.iterdir()):
            f.add(path, path.name)
        f.addfile(tarfile.TarInfo("broken.png"), io.BytesIO())
    packed = unpacked([tmp_path / "a.tar"])
    assert [image_digest(item) for item in packed[:4]] == [image_digest(path) for path in sorted(folder.iterdir())]
    store = extract(backbone, packed, tmp_path / "store", **FEW)
    assert [name for name, _ in store.skipped] == ["a.tar/broken.png"]
    assert image_digest(packed[-1]) == content_digest(b"")


# The vectors that training keeps


@pytest.fixture
def kept(toybox, photos, tmp_path):
    "Compute the vectors of two images, or read what an earlier call has kept."
    expert = ExpertEmbedder(toybox.expert)
    items = []
    for i in range(2):
        photos[i].save(tmp_path / f"{i}.bmp")
        items.append(Item(str(tmp_path / f"{i}.bmp"), i, str(i), str(i)))
    return lambda: embed_stored(expert, items, tmp_path / "features").values


def test_training_sees_a_replaced_image_of_the_same_size_and_time(kept, photos, tmp_path):
    before, found = kept(), (tmp_path / "0.bmp").stat()
    photos[3].save(tmp_path / "0.bmp")
    os.utime(tmp_path / "0.bmp", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (tmp_path / "0.bmp").stat().st_size == found.st_size
    after = kept()
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_damaged_vectors_are_computed_again(kept, tmp_path):
    expected = kept()
    [file] = (tmp_path / "features").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:99], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"kept", b"kepd"), b"x" * 999):
        file.write_bytes(damaged)
        assert torch.equal(kept(), expected)
