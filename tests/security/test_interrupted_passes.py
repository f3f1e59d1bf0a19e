"A model is whole after any exception: of a hook, of an attention processor, at any line of ours."

import sys
from contextlib import suppress

import pytest
import torch
from passes import in_threads, same, state

from vermouth import core, hooks


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
