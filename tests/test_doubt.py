"What is said where answers are worth nothing: photographs to a drawn world, guesses, features that are no numbers."

import numpy as np
import pytest
import torch
from PIL import Image

from vermouth.app.answers import fit_note
from vermouth.app.index import build_index
from vermouth.backbone import load_backbone, random_backbone
from vermouth.baselines import linear_probe, nearest_class_mean
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.expert import load_expert
from vermouth.text import load_clip
from vermouth.train import train_head
from vermouth.uhead import UHead
from vermouth.zoo.embedders import ClipEmbedder, ExpertEmbedder, PyramidEmbedder
from vermouth.zoo.linear import LinearClassifier, fit_linear, fit_whitening

PARTS = {
    "pyramid": lambda: PyramidEmbedder(load_backbone("toybox", "cpu")),
    "expert": lambda: ExpertEmbedder(load_expert("toybox", device="cpu")),
    "clip": lambda: ClipEmbedder(load_clip("toybox", "cpu")),
}


def trained_on(embedder, metrics=()):
    dim = embedder.embed(np.zeros((64, 64, 3), np.uint8)).shape[1]
    state = {"mean": torch.zeros(dim), "scale": torch.ones(1), "weight": torch.zeros(2, dim), "bias": torch.zeros(2)}
    training = {"task": "classify", "names": ["a", "b"], "data": "x", "metrics": dict(metrics), "calibration": []}
    return LinearClassifier(embedder, state, training)


@pytest.mark.parametrize("part", PARTS)
def test_a_head_on_any_part_of_the_toybox_knows_drawn_pictures_only(part):
    model = trained_on(PARTS[part]())
    drawn = [item.image for item in Toybox("photo", split="all", n=12, seed=5)]
    noise = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(12)]
    assert fit_note(model, drawn) == ""
    assert fit_note(model, noise).startswith("model: toybox knows drawn pictures only")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"accuracy": 1 / 6, "chance": 1 / 6, "test images": 60}, True),
        ({"accuracy": 0.0, "chance": 1 / 6, "test images": 60}, True),
        ({"accuracy": 0.9, "chance": 1 / 6, "test images": 60}, False),
        ({"mAP@all": 0.1, "chance": 0.1}, True),
        ({"accuracy": float("nan"), "chance": 0.5, "test images": 9}, False),
        ({"accuracy": "high", "chance": [], "test images": None}, False),
        ({}, False),
    ],
)
def test_a_model_that_learned_nothing_says_so(metrics, said):
    drawn = [item.image for item in Toybox("photo", n=2)]
    note = fit_note(trained_on(PARTS["expert"](), metrics), drawn)
    assert ("its answers are guesses" in note) == said


class Bare:
    "Another model's vectors, and nothing else of it."

    name, fingerprint = "bare", "0" * 16

    def __init__(self, model):
        self.embed = model.embed


def test_an_index_of_an_untrained_network_says_so(tmp_path):
    for i, item in enumerate(Toybox("photo", split="all", n=12)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        item.image.save(tmp_path / f"photos/{i}.png")
    untrained = PyramidEmbedder(random_backbone("sd1", "cpu", width=8), size=64)
    said = {
        model: build_index(tmp_path / "photos", tmp_path / str(i), model, quiet=True).misfit
        for i, model in enumerate([untrained, Bare(untrained), PARTS["expert"](), PARTS["pyramid"]()])
    }
    no_denoiser, alike, *known = said.values()
    assert "takes no noise out of a picture, as a network without trained weights" in no_denoiser
    assert "any two of the photos are alike to it" in alike
    assert known == ["", ""]


def test_an_expert_whose_maps_overflow_is_refused():
    expert = load_expert("toybox", device="cpu")
    first = next(p for p in expert.net.parameters() if p.ndim == 4)
    first.data.fill_(1e38)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for read in (expert, ExpertEmbedder(expert).embed, trained_on_broken(expert)):
        with pytest.raises(VermouthError, match="its maps: NaN or infinite"):
            read([photo])


def trained_on_broken(expert):
    dim = expert.dims[0]
    state = {"mean": torch.zeros(dim), "scale": torch.ones(1), "weight": torch.zeros(2, dim), "bias": torch.zeros(2)}
    training = {"task": "classify", "names": ["a", "b"], "data": "x", "metrics": {}, "calibration": []}
    return LinearClassifier(ExpertEmbedder(expert), state, training).classify


def bad(shape):
    values = torch.randn(shape)
    values.view(-1)[3] = float("nan")
    return values


def test_a_head_is_not_trained_on_features_that_are_no_numbers():
    head = UHead([8], 16)
    before = [p.clone() for p in head.parameters()]
    classes = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    with pytest.raises(VermouthError, match="features: the loss of a batch: NaN or infinite"):
        train_head(head, [bad((8, 8, 4, 4))], [0, 1] * 4, classes, batch_size=8, held=0, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


LABELS = torch.tensor([0, 1] * 4)


@pytest.mark.parametrize(
    "fit",
    [
        lambda x: nearest_class_mean(x, LABELS.tolist(), x),
        lambda x: linear_probe(x, LABELS.tolist(), x),
        lambda x: linear_probe(torch.randn(8, 5), LABELS.tolist(), x),
        lambda x: fit_linear(x, LABELS),
        lambda x: fit_whitening(x, LABELS, 0.5),
    ],
)
def test_nothing_is_fitted_to_vectors_that_are_no_numbers(fit):
    with pytest.raises(VermouthError, match="NaN or infinite numbers. Leave such images out"):
        fit(bad((8, 5)))
