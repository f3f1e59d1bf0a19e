"Tar files whose entries claim false sizes: the entry is set aside, all others are found, the run goes on."

import io
import random
import tarfile

import numpy as np
import pytest
from conftest import COUNTS
from PIL import Image
from store_helpers import FEW

from vermouth.app.files import packed_images
from vermouth.core import VermouthError
from vermouth.store import extract


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def entry(name, data, size=None):
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def shard(path, size=None, names=("a.png", "b.png", "c.png", "d.png"), wrong="b.png"):
    "A tar file of which one entry claims another size."
    parts = [entry(name, png(i), size if name == wrong else None) for i, name in enumerate(names)]
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def read(images):
    good, refused = [], {}
    for image in images:
        try:
            good.append((image.key.split("/")[-1], image.image.size))
        except VermouthError as e:
            refused[image.key.split("/")[-1]] = str(e)
    return good, refused


@pytest.mark.parametrize("size", [2**60, 2**62, 2**63, 2**70, 5 * 2**30, 2**30 + 1, 600_000, -1, -512, -1024, -(2**40)])
@pytest.mark.parametrize("wrong", ["a.png", "b.png", "d.png"])
def test_an_entry_that_lies_about_its_size_is_set_aside_alone(size, wrong, tmp_path):
    good, refused = read(packed_images(shard(tmp_path / "0.tar", size, wrong=wrong)))
    assert list(refused) == [wrong] and ("more than" in refused[wrong])
    assert [name for name, _ in good] == [name for name in ("a.png", "b.png", "c.png", "d.png") if name != wrong]
    COUNTS["archives with a false size, no other entry lost"] += 1


def test_the_run_goes_on(backbone, tmp_path):
    images = [*packed_images(shard(tmp_path / "0.tar", 2**60)), *packed_images(shard(tmp_path / "1.tar"))]
    store = extract(backbone, images, tmp_path / "store", **FEW)
    assert len(store) == 7 and [key for key, _ in store.skipped] == ["0.tar/b.png"]


def test_random_damage_ends_in_images_or_in_a_sentence(tmp_path):
    whole, draw = shard(tmp_path / "0.tar").read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 2, 5])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "1.tar").write_bytes(data[: draw.choice([None, draw.randrange(len(data))])])
        try:
            read(packed_images(tmp_path / "1.tar"))
        except VermouthError as e:
            assert "not a plain tar file" in str(e)
        COUNTS["damaged archives that end in images or in a sentence"] += 1


def test_litter_in_an_archive_is_no_image(tmp_path):
    names = ("./cat/1.png", "__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/._1.png")
    assert [image.key for image in packed_images(shard(tmp_path / "0.tar", names=names))] == ["0.tar/./cat/1.png"]
