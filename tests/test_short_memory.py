"A part of the model that runs out of memory gets smaller batches, with the same result, or one sentence."

import numpy as np
import pytest
import torch
from PIL import Image
from program import CLASSES, CLASSIFY, NAMES

PARTS = {
    "VAE": lambda model: (model.backbone.vae, "encode"),
    "captioner": lambda model: (model.captioner.model, "generate"),
    "expert": lambda model: (model.expert.net, "forward"),
    "CLIP": lambda model: (model.clip.model, "encode_text"),
}


@pytest.fixture
def folder(program, photos):
    for i, image in enumerate(photos):
        image.save(program.folder / f"{i}.png")
    return program.folder


def limit(monkeypatch, model, part, most):
    "Memory for so many images or texts at once, in one part of the model."
    owner, name = PARTS[part](model)
    real = getattr(owner, name)

    def limited(*args, **kwargs):
        batch = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize("part, most", [("VAE", 2), ("captioner", 1), ("expert", 2), ("CLIP", 1)])
def test_little_memory_gives_the_same_probabilities(program, folder, toybox, photos, monkeypatch, part, most):
    plain = toybox.classify(photos, CLASSES).tolist()
    limit(monkeypatch, toybox, part, most)
    document = program(*CLASSIFY)
    found = [[image["probabilities"][name] for name in CLASSES] for image in document["images"]]
    np.testing.assert_allclose(found, plain, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_memory_for_not_even_one_is_said(program, folder, toybox, monkeypatch, part):
    limit(monkeypatch, toybox, part, 0)
    program.refuses(*CLASSIFY, says="not enough memory for a single one")


def test_little_memory_gives_the_same_mask(program, folder, toybox, photos, monkeypatch):
    plain = toybox.segment(photos[0], CLASSES, short=96)
    head = toybox.segmentation_head
    forward = head.forward

    def limited(maps):
        if len(maps[0]) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")
        return forward(maps)

    monkeypatch.setattr(head, "forward", limited)
    program("segment", "0.png", *NAMES, "--out", "mask.png", "--short", "96", "--json")
    with Image.open("mask.png") as mask:
        assert (np.asarray(mask) == plain).mean() > 0.999
