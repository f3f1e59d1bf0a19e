"Images that are small on the disk and large in memory: what indexing and extracting take stays within a limit."

import sys

import pytest
from bombs import LARGE
from photo_folders import found_forked, peak_memory
from PIL import Image

from vermouth import images
from vermouth.app import files
from vermouth.app.heads import embed_stored
from vermouth.app.index import build_index
from vermouth.core import VermouthError, keep_freed_memory
from vermouth.data.items import Item
from vermouth.store import extract
from vermouth.zoo.embedders import ExpertEmbedder

SIDE, PIXELS = 2500, 6_250_000  # a sixteenth of the largest image; the limits of this test are the real ones by it
MOST = 400_000_000  # bytes beyond those of the models and libraries: 64 for a pixel of the largest image


def peak(place, folder, model):
    "The most bytes in memory after a folder's images are indexed, extracted and classified."
    paths, out = sorted((place / folder).iterdir()), place / f"{folder} out"
    options = {"captioner": model.captioner, "size": 64, "stages": "mid", "attention": (), "quiet": True}
    assert len(build_index(place / folder, out / "index", model, quiet=True)) == len(paths)
    assert len(extract(model.backbone, paths, out / "store", **options)) == len(paths)
    done, skipped = files.over_images(lambda batch: model.classify(batch, ["cat", "dog"]).tolist(), paths, "")
    assert len(done) == len(paths)
    return peak_memory()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures Linux's resident memory")
def test_bombs_together_take_little_more_than_one(toybox, tmp_path):
    for folder, side in (("small", 64), ("large", SIDE)):
        (tmp_path / folder).mkdir()
        for name, write in LARGE.items():
            write(tmp_path / folder / name, side if name != "alpha.webp" else side * 2 // 3)

    def growth():
        keep_freed_memory()
        images.MAX_PIXELS = files.MAX_PIXELS = PIXELS
        images.LARGE_IMAGE = PIXELS // 3
        images._new_budgets()
        before = peak(tmp_path, "small", toybox)
        return peak(tmp_path, "large", toybox) - before

    assert 0 < found_forked(growth) < MOST


def test_an_image_is_refused_by_its_header(tmp_path):
    "Nothing is decoded: the pixels are not even there."
    Image.new("1", (10_001, 10_000)).save(tmp_path / "large.png")
    (tmp_path / "large.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    (tmp_path / "line.pgm").write_bytes(b"P5 50000000 1 255\n")
    for name, says in {"large.png": "10001×10000 pixels, more than", "line.pgm": "50000000×1 pixels"}.items():
        with pytest.raises(VermouthError, match=says):
            images.read_image(tmp_path / name)


def test_an_image_too_large_for_the_models_is_skipped_where_no_size_is_given(toybox, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (2112, 2048)).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    store = extract(toybox.backbone, paths, tmp_path / "store", stages="mid", attention=(), quiet=True)
    assert store.skipped == [("b.png", "image='b.png': 2112×2048 pixels are too many for the models. Give size=.")]


def test_training_decodes_no_more_images_at_once_than_fit(toybox, photos, tmp_path, monkeypatch):
    "Of the largest size, one; the others are still files."
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        photos[0].save(path)
    sizes, expert = [], ExpertEmbedder(toybox.expert)
    embed = expert.embed
    monkeypatch.setattr(files, "MAX_PIXELS", photos[0].width * photos[0].height)
    monkeypatch.setattr(expert, "embed", lambda images: (sizes.append(len(images)), embed(images))[1])
    items = [Item(str(path), 0, "a", path.name) for path in paths]
    assert len(embed_stored(expert, items, tmp_path / "features")) == 5 and sizes == [1] * 5
