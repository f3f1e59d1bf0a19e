"Tensors in [0, 1] are refused wherever images go in, unless their range is given; no bright image is taken for one."

import numpy as np
import pytest
import torch
from PIL import Image

from vermouth.core import VermouthError
from vermouth.images import image_batch
from vermouth.store import extract
from vermouth.text import image_embeddings, make_prompts

NAMES = ["cat", "tree"]
DOORS = {
    "image_batch": lambda model, x, **more: image_batch(x, **more),
    "encode_images": lambda model, x, **more: model.backbone.encode_images(x, **more),
    "features": lambda model, x, **more: model.backbone.features(x, stages="mid", attention=(), **more)[0],
    "expert": lambda model, x, **more: model.expert(x, **more)[0],
    "captioner": lambda model, x, **more: model.captioner(x, **more),
    "CLIP": lambda model, x, **more: image_embeddings(x, model.clip, **more),
    "prompts": lambda model, x, **more: make_prompts("caption", x, model.captioner, **more),
    "read": lambda model, x, **more: model.read(x, **more)[0],
    "embed": lambda model, x, **more: model.embed(x, **more),
    "classify": lambda model, x, **more: model.classify(x, NAMES, **more),
    "segment": lambda model, x, **more: np.stack(model.segment(list(x), NAMES, **more)),
}


@pytest.fixture(scope="module")
def batch(photos):
    return image_batch(photos[:2])


def same(a, b):
    if isinstance(a, list):
        return a == b
    return np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_a_range_that_is_not_given_is_refused_and_one_that_is_given_is_used(toybox, batch, photos, door):
    enter, zero_one = DOORS[door], (batch + 1) / 2
    for wrong in (zero_one, list(zero_one)):
        with pytest.raises(VermouthError, match=r"look like \[0, 1\].*value_range=\(0, 1\)"):
            enter(toybox, wrong)
    right = enter(toybox, photos[:2])
    assert same(enter(toybox, batch), right) and same(enter(toybox, batch, value_range=(-1, 1)), right)
    assert same(enter(toybox, zero_one, value_range=(0, 1)), right)
    assert same(enter(toybox, (batch + 1) * 127.5, value_range=(0, 255)), right)
    with pytest.raises(VermouthError, match=r"Scale it to \[0, 1\]"):
        enter(toybox, zero_one * 255, value_range=(0, 1))


@pytest.mark.parametrize("door", DOORS)
def test_white_images_pass_where_their_range_is_known(toybox, door):
    white = Image.new("RGB", (64, 64), "white")
    found = [DOORS[door](toybox, image) for image in ([white], np.full((1, 64, 64, 3), 255, np.uint8))]
    assert same(*found)
    assert same(DOORS[door](toybox, torch.ones(1, 3, 64, 64), value_range=(-1, 1)), found[0])


def test_a_store_of_tensors(backbone, batch, photos, tmp_path):
    few = {"stages": "mid", "attention": (), "quiet": True}
    with pytest.raises(VermouthError, match=r"none of 2 can be used.*value_range=\(0, 1\)"):
        extract(backbone, list((batch + 1) / 2), tmp_path / "no", **few)
    found = extract(backbone, list((batch + 1) / 2), tmp_path / "yes", value_range=(0, 1), **few)
    assert same(found.batch([0, 1])[0], extract(backbone, photos[:2], tmp_path / "images", **few).batch([0, 1])[0])
    with pytest.raises(VermouthError, match=r"made with value_range=\[0, 1\], asked for value_range=None"):
        extract(backbone, list((batch + 1) / 2), tmp_path / "yes", **few)
