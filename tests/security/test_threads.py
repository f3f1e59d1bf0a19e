"""One model in several threads, called from its own hooks, and stopped at any point of a pass.

Hooks, attention processors, the padding of a tokenizer and the precision of float32 are state that passes share. Every
result here is compared with that of a single thread, bit by bit.
"""

import copy
import pickle
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.data import DataLoader

from vermouth import core, hooks
from vermouth.backbone import Backbone, FeatureSettings, random_backbone
from vermouth.text import image_embeddings, text_embeddings

PLACES = ["up1.attn0.self.q", "mid.resnet1", "up2.attn0.cross.map"]
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


def same(a, b):
    a, b = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))


def state(*models):
    "Hooks, processors and compiled calls of all modules, and what belongs to the whole process."
    modules = [module for model in models for module in model.modules()]
    return (
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks), id(getattr(m, "processor", None))) for m in modules],
        [backend.fp32_precision for backend in core._BACKENDS],
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        [model.training for model in models],
        dict(core._users),
        [passes for passes in hooks._passes.values() if passes],
    )


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


def in_threads(calls, threads=8):
    "The results of calls, or the errors, in order; the threads start together."
    ready = threading.Barrier(threads, timeout=60)

    def run(call):
        try:
            return call()
        except Exception as e:
            return e

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: ready.wait(), range(threads)))
        return list(pool.map(run, calls))


def once(module, action):
    "Call an action after the next pass of a module; returns the hook, and a list for the action's result."

    def call(*_):
        handle.remove()
        results.append(action())

    results, handle = [], module.register_forward_hook(call)
    return handle, results


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
    bb._warned = False
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


@pytest.fixture(scope="module")
def small():
    "All kinds of blocks and layers, as few as possible."
    bb = random_backbone(width=8)
    torch.manual_seed(0)
    config = dict(bb.unet.config) | {"block_out_channels": (16,) * 4, "layers_per_block": 1, "attention_head_dim": 2}
    parts = {"vae": bb.vae, "unet": UNet2DConditionModel.from_config(config), "text_encoder": bb.text_encoder}
    return Backbone.from_components(**parts, tokenizer=bb.tokenizer, scheduler=bb.scheduler)


@pytest.fixture(scope="module")
def latents(small):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), small.encode_text("a cat")


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


class Processor:
    "Raises instead of computing attention."

    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


def hook_points(bb):
    "Modules before or after which an error is raised."
    yield from (bb.vae.encoder, bb.vae.quant_conv, bb.text_encoder, bb.unet.conv_in, bb.unet.time_embedding)
    yield from hooks.unet_blocks(bb.unet).values()
    yield from {id(place.module): place.module for place in hooks.unet_places(bb.unet).values()}.values()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("stop"), SystemExit])
def test_an_error_at_any_hook_leaves_a_whole_model(error, small):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    parts = small.unet, small.vae, small.text_encoder

    def read():
        return small.features(image, "a cat", (300, 100), attention="up_cross", size="keep")

    def fail(*_):
        raise error

    expected, before, stopped = read(), state(*parts), 0
    points = list(hook_points(small))[:: 1 if error is KeyboardInterrupt else 9]
    for module in points:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(fail)
            with suppress(KeyboardInterrupt, RuntimeError, SystemExit):
                read()
                stopped -= 1  # the place is not part of this pass
            stopped += 1
            handle.remove()
            assert state(*parts) == before
    assert stopped > len(points)
    for layer in [m for m in small.unet.modules() if hasattr(m, "processor")][::9]:
        whole = layer.processor
        layer.set_processor(Processor(error))
        with suppress(KeyboardInterrupt, RuntimeError, SystemExit):
            small.predict(torch.zeros(1, 4, 8, 8), 1, small.encode_text(None))
        layer.set_processor(whole)
        assert state(*parts) == before
    assert same(read(), expected)
    assert same(in_threads([read], 1)[0], expected)  # no lock is held


def test_an_interrupt_at_any_line_of_ours(small, latents):
    "A line that undoes something is the only place where a trace may stay, and the next call removes it."
    files, count, target = {core.__file__, hooks.__file__}, 0, -1
    expected, before = small.features_from_latents(*latents), state(small.unet)

    def each_line(frame, event, _):
        nonlocal count
        count += event == "line"
        if count == target and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return each_line

    def read(stop_at):
        nonlocal count, target
        count, target = 0, stop_at
        sys.settrace(lambda frame, *_: each_line if frame.f_code.co_filename in files else None)
        try:
            return small.features_from_latents(*latents)
        finally:
            sys.settrace(None)

    read(-1)
    for stop_at in range(3, count, count // 40):
        with suppress(KeyboardInterrupt):
            read(stop_at)
        assert same(small.features_from_latents(*latents), expected)
        assert state(small.unet) == before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda bb: pickle.loads(pickle.dumps(bb))])
def test_copies_give_the_same_features(again, small, latents):
    expected = small.features_from_latents(*latents)
    assert same(again(small).features_from_latents(*latents), expected)


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
