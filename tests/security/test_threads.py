"""One model in several threads, called from its own hooks, and copied.

Hooks, attention processors, the padding of a tokenizer and the precision of float32 are state that passes share. Every
result here is compared with that of a single thread, bit by bit.
"""

import copy
import pickle
import sys
import warnings
from collections import Counter

import pytest
import torch
from passes import in_threads, once, same, state
from torch.utils.data import DataLoader

from vermouth import core, hooks
from vermouth.backbone import Backbone, FeatureSettings
from vermouth.text import image_embeddings, text_embeddings
from vermouth.zoo.embedders import ClipEmbedder, ExpertEmbedder
from vermouth.zoo.linear import LinearClassifier

PLACES = ["up1.attn0.self.q", "mid.resnet1", "up2.attn0.cross.map"]
LINEAR = {"mean": torch.zeros(128), "scale": torch.ones(1), "weight": torch.linspace(-1, 1, 256).view(2, 128)}
TRAINING = {"task": "classify", "names": ["cat", "duck"], "data": "", "metrics": {}, "calibration": []}
TEXTS = ["a cat", "a photo of a red house and a tree", "", "a duck"]


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def impatient():
    "Threads change places two hundred times as often as by default."
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 200)
    yield
    sys.setswitchinterval(before)


def jobs(model, other, images):
    "One call of each kind, for the image and the text of a number."
    bb = model.backbone
    return {
        "features": lambda i: bb.features(images[i], TEXTS[i]),
        "places": lambda i: bb.features(images[i], TEXTS[i], stages=PLACES),
        "two time steps": lambda i: bb.features(images[i], TEXTS[i], (300, 100), "mid"),
        "another backbone, same U-Net": lambda i: other.features(images[i], TEXTS[i], stages="down", attention=()),
        "hidden states": lambda i: bb.encode_text(TEXTS[i:]),
        "latents": lambda i: bb.encode_images(images[i]),
        "embed": lambda i: model.embed(images[i], [TEXTS[i]]),
        "expert": lambda i: model.expert(images[i]),
        "CLIP, texts": lambda i: text_embeddings(TEXTS[: i + 1], model.clip),
        "CLIP, images": lambda i: image_embeddings(images[i], model.clip),
    }


@pytest.mark.slow
def test_eight_threads_give_what_one_gives(toybox, images):
    bb = toybox.backbone
    parts = {"vae": bb.vae, "unet": bb.unet, "text_encoder": bb.text_encoder}
    other = Backbone.from_components(**parts, tokenizer=bb.tokenizer, scheduler=bb.scheduler)
    work, before = jobs(toybox, other, images), state(toybox, bb.unet)
    serial = {(name, i): work[name](i) for name in work for i in range(4)}
    calls = (list(serial) * 3)[: 8 * 12]
    results = in_threads([lambda key=key: work[key[0]](key[1]) for key in calls])
    wrong = Counter(
        f"{key[0]}: {type(result).__name__}"
        for key, result in zip(calls, results, strict=True)
        if isinstance(result, Exception) or not same(result, serial[key])
    )
    assert not wrong
    assert state(toybox, bb.unet) == before


def test_a_warning_comes_once_and_a_fingerprint_is_one(toybox):
    bb = copy.copy(toybox.backbone)
    bb.family.warned = False
    bb.__dict__.pop("fingerprint", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = in_threads([lambda: bb.encode_text("a cat " * 40), lambda: bb.fingerprint] * 8)
    assert len([w for w in caught if "is cut there" in str(w.message)]) == 1
    assert {r for r in results if isinstance(r, str)} == {toybox.backbone.fingerprint}


def test_captions_of_eight_threads(toybox, photos):
    serial = [toybox.captioner(photo) for photo in photos[:2]]
    assert in_threads([lambda i=i: toybox.captioner(photos[i % 2]) for i in range(8)]) == serial * 4


def test_a_model_in_training_stays_in_training(toybox, images):
    expected, modes = toybox.embed(images, TEXTS), []
    toybox.train()
    try:
        for result in in_threads([lambda: toybox.embed(images, TEXTS)] * 8):
            assert same(result, expected)
            modes.append(toybox.training)
        assert modes == [True] * 8
    finally:
        toybox.eval()


READINGS = [
    FeatureSettings(),
    FeatureSettings(stages="mid", attention=()),
    FeatureSettings(stages=PLACES),
    FeatureSettings((300, 100), stages="down"),
]


@pytest.mark.parametrize("inner", range(len(READINGS)))
def test_features_inside_features(inner, small, latents):
    alone = [small.features_from_latents(*latents, how) for how in READINGS]
    before = state(small.unet)
    for block in [*hooks.unet_blocks(small.unet).values()][inner::4]:
        for outer, how in enumerate(READINGS):
            handle, found = once(block, lambda: small.features_from_latents(*latents, READINGS[inner]))
            assert same(small.features_from_latents(*latents, how), alone[outer])
            handle.remove()
            assert not found or same(found[0], alone[inner])
            assert state(small.unet) == before


def test_a_foreign_pass_in_another_thread_is_not_read(small, latents):
    "Somebody calls the U-Net itself while features are read."
    whole = lambda: small.unet(latents[0] * 2, 7, latents[1]).sample  # noqa: E731
    expected, direct = small.features_from_latents(*latents), whole()
    _, found = once(small.unet.mid_block, lambda: in_threads([whole], 1)[0])
    assert same(small.features_from_latents(*latents), expected)
    assert torch.allclose(found[0], direct, atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda bb: pickle.loads(pickle.dumps(bb))])
def test_copies_give_the_same_features(again, small, latents):
    expected = small.features_from_latents(*latents)
    assert same(again(small).features_from_latents(*latents), expected)


@pytest.fixture
def lowered():
    "The caller lets float32 be multiplied in a shorter type."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_parts_called_by_themselves_ignore_the_precision_of_the_caller(toybox, images, photos, request):
    "Six threads, one thread, and the default: bit by bit the same."
    linear = LinearClassifier(ExpertEmbedder(toybox.expert), {**LINEAR, "bias": torch.zeros(2)}, TRAINING)
    clip = ClipEmbedder(toybox.clip)
    work = jobs(toybox, toybox.backbone, images) | {
        "captions": lambda i: toybox.captioner(photos[i]),
        "classes of a CLIP": lambda i: clip.classify(photos[i], ["cat", "duck"]),
        "masks of a CLIP": lambda i: torch.from_numpy(clip.segment(photos[i], ["cat", "duck"])),
        "classes of a linear layer": lambda i: linear.classify(photos[i]),
    }
    calls = [(name, i) for name in work for i in range(2)]
    expected = [work[name](i) for name, i in calls]
    request.getfixturevalue("lowered")
    alone = [work[name](i) for name, i in calls]
    together = in_threads([lambda name=name, i=i: work[name](i) for name, i in calls], 6)
    for call, *results in zip(calls, expected, alone, together, strict=True):
        if call[0] == "captions":
            assert results[0] == results[1] == results[2]
        else:
            assert all(same(results[0], result) for result in results[1:]), call


def test_maps_of_a_frozen_expert_may_be_learned_from(toybox, images):
    "They are ordinary tensors, though the expert runs in inference mode."
    layer = torch.nn.Conv2d(toybox.expert.dims[0], 1, 1)
    layer(toybox.expert(images)[0]).mean().backward()
    assert layer.weight.grad is not None


class Calls(list):
    "A data set whose items are made when they are asked for."

    def __getitem__(self, i):
        return super().__getitem__(i)()


@pytest.mark.skipif(not hasattr(core.os, "fork"), reason="no fork on this system")
def test_forked_workers_read_while_a_pass_goes_on(small, latents):
    "Workers are forked by a callback inside a pass, whose hooks and locks they must not keep."
    calls = Calls(lambda how=how: small.features_from_latents(*latents, how)[0] for how in READINGS)
    expected = [call() for call in list.__iter__(calls)]
    options = {"num_workers": 2, "batch_size": None, "multiprocessing_context": "fork", "timeout": 60}
    # of another thread than the one that holds the U-Net
    _, found = once(small.unet.mid_block, lambda: in_threads([lambda: list(DataLoader(calls, **options))], 1)[0])
    assert same(small.features_from_latents(*latents)[0], expected[0])
    assert same(found[0], expected)
