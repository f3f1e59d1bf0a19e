"""The frozen backbone on random-weight folders in the exact layout of Stable Diffusion 1.5 and 2.1.

VERMOUTH_SLOW=1 adds the full widths.
"""

import os

import pytest
import torch
from PIL import Image
from sd_layout import write_folder

from vermouth.backbone import load_backbone
from vermouth.core import VermouthError
from vermouth.families.unet import SIZES
from vermouth.hooks import STAGE_SETS, tapped, unet_blocks

PROMPTS = ["a photo of a cat", None, "cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_folder(tmp_path_factory.mktemp("sd") / kind, kind) for kind in SIZES}


@pytest.fixture(scope="module")
def backbones(folders):
    return {kind: load_backbone(folder, device="cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_and_schedule_are_those_of_the_layout(kind, backbones, images):
    bb = backbones[kind]
    assert (bb.factor, bb.multiple, bb.tokens) == (8, 64, 77)
    assert bb.scheduler.config.prediction_type == ("v_prediction" if kind == "sd2.1" else "epsilon")
    assert bb.alphas[0] == pytest.approx(0.99915, abs=1e-5) and bb.alphas[-1] == pytest.approx(0.00466, abs=1e-5)
    assert bb.feature_dims() == [160, 237, 237, 120]
    fs = bb.features(images, PROMPTS, size="keep")
    assert [tuple(f.shape) for f in fs] == [(3, 160, 1, 2), (3, 237, 2, 4), (3, 237, 4, 8), (3, 120, 8, 16)]


def test_tokens_are_those_of_clip(backbones):
    one, two = backbones["sd1"].tokenizer, backbones["sd2.1"].tokenizer
    assert one("cat").input_ids[0::2] == two("cat").input_ids[0::2] == [49406, 49407]
    assert one("cat", padding="max_length").input_ids[-1] == 49407  # 1.x pads with end-of-text
    assert two("cat", padding="max_length").input_ids[-1] == 0      # 2.x with "!"


@pytest.mark.parametrize("kind", SIZES)
def test_latents_are_the_posterior_mean(kind, backbones, images):
    bb = backbones[kind]
    with torch.no_grad():
        mean = bb.vae.encode(images).latent_dist.mean
    assert relative(bb.encode_images(images), mean * 0.18215) < 1e-6


def test_frozen(backbones, images):
    bb = backbones["sd1"]
    for model in (bb.vae, bb.unet, bb.text_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    first = bb.features(images, PROMPTS, size="keep")[0]
    assert not first.requires_grad and not first.is_inference()
    head = torch.nn.Conv2d(first.shape[1], 2, 1)
    head(first).sum().backward()
    assert head.weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bb.features(images, PROMPTS, size="keep")[0], first)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("noise", ["ddpm", "ddim", "none"])
def test_an_image_has_its_own_features(kind, noise, backbones, images):
    bb, how = backbones[kind], dict(noise=noise, ddim_steps=2, size="keep")
    together = bb.features(images, PROMPTS, **how)
    reversed_ = [f.flip(0) for f in bb.features(images.flip(0), PROMPTS[::-1], batch_size=2, **how)]
    alone = [torch.cat(level) for level in zip(*(bb.features(im, p, **how) for im, p in zip(images, PROMPTS)))]
    assert max(relative(a, b) for other in (reversed_, alone) for a, b in zip(other, together)) < 1e-5


def test_every_way_to_hand_in_an_image(backbones, tmp_path):
    bb, im = backbones["sd1"], Image.effect_noise((64, 64), 80).convert("RGB")
    im.save(tmp_path / "im.png")
    tensor = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1) / 127.5 - 1
    same = bb.features([im, str(tmp_path / "im.png"), tmp_path / "im.png", tensor], "cat", size="keep")
    for f in same:
        assert max(relative(g, f[0]) for g in f) < 1e-6
    assert relative(bb.features(tensor[None], "cat", size="keep")[0], same[0][:1]) < 1e-5


@pytest.mark.parametrize("kind", ["sd1", "sd2.1"])
def test_stages_and_attention_everywhere(kind, backbones, images):
    bb = backbones[kind]
    for stages in STAGE_SETS:
        for attention in [(), "up_cross", ("up_cross", "up_cross_fine")]:
            assert [
                f.shape[1] for f in bb.features(images[:1], "cat", stages=stages, attention=attention, size="keep")
            ] == bb.feature_dims(stages, attention)


def test_maps_sum_to_one(backbones, images):
    fs = backbones["sd2.1"].features(images, PROMPTS, attention=("up_cross", "up_cross_fine"), size="keep")
    for f in fs[1:]:
        assert torch.allclose(f[:, -77:].sum(1), torch.ones(()), atol=1e-5)


def test_bfloat16_is_close(folders, backbones, images):
    half = load_backbone(folders["sd2.1"], device="cpu", dtype="bfloat16").features(images, PROMPTS, size="keep")
    assert all(f.dtype == torch.bfloat16 for f in half)
    assert max(relative(a, b) for a, b in zip(half, backbones["sd2.1"].features(images, PROMPTS, size="keep"))) < 0.05


@pytest.mark.parametrize("kind", ["sd1", "sd2.1"])
def test_steps_follow_the_kind_of_prediction(kind, backbones, images):
    from diffusers import DDIMScheduler

    bb = backbones[kind]
    z, c = bb.encode_images(images), bb.encode_text(PROMPTS)
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=bb.scheduler.config.prediction_type,
    )
    theirs.set_timesteps(5)  # 801, 601, 401, 201, 1
    eps = torch.randn(z.shape[1:], generator=torch.Generator("cpu").manual_seed(8888)).expand_as(z)
    xt = theirs.add_noise(z, eps, torch.tensor([401] * 3))
    xt = theirs.step(bb.predict(xt, 401, c), 401, xt).prev_sample
    outputs = {}
    handle = bb.unet.mid_block.register_forward_hook(lambda m, a, o: outputs.update(mid=o))
    bb.predict(xt, 201, c)
    handle.remove()
    assert relative(bb.features(images, PROMPTS, (401, 201), stages="mid", size="keep")[0], outputs["mid"]) < 1e-5


def test_any_photo_at_the_size_of_the_checkpoint(backbones):
    photos = [Image.effect_noise((75, 100), 80).convert("RGB"), Image.new("RGB", (640, 64), "red")]
    bb = backbones["sd1"]
    assert bb.native_size == (512, 512) and backbones["sd2.1"].native_size == (768, 768)
    with pytest.raises(VermouthError, match="must be multiples of 64"):
        bb.features(photos[0], size="keep")
    bb.family.sample_size = 8, 8
    fs = bb.features(photos, "cat", stages="mid")
    bb.family.sample_size = 64, 64
    assert torch.equal(fs[0], bb.features(photos, "cat", stages="mid", size=64)[0])


def test_time_steps_kept_apart(backbones, images):
    bb, how = backbones["sd1"], {"stages": "mid", "size": "keep"}
    each = [bb.features(images, PROMPTS, t, **how)[0] for t in (100, 300, 200)]
    apart = bb.features(images, PROMPTS, (100, 300, 200), **how, combine="list")
    assert len(apart) == 3 and all(torch.equal(maps[0], e) for maps, e in zip(apart, each))
    stacked = bb.features(images, PROMPTS, (100, 300, 200), **how, combine="stack", batch_size=2)[0]
    assert stacked.shape == (3, 3, 160, 1, 2) and relative(stacked, torch.stack(each, 1)) < 1e-5
    mean = bb.features(images, PROMPTS, (100, 300, 200), **how, combine="mean")[0]
    assert relative(mean, sum(each) / 3) < 1e-5


def count_calls(unet):
    "Count how often each block and the output layer run; returns the counts and the handles of the hooks."
    count = {}
    places = unet_blocks(unet) | {"out": unet.conv_out}
    handles = [
        m.register_forward_pre_hook(lambda m, a, name=name: count.update({name: count.get(name, 0) + 1}))
        for name, m in places.items()
    ]
    return count, handles


@pytest.mark.parametrize(
    "how, ran",
    [
        (dict(stages="mid"), "down0 down1 down2 down3 mid"),
        (dict(stages="down", attention=()), "down0 down1 down2 down3"),
        (dict(stages="down"), "down0 down1 down2 down3 mid up0 up1 up2"),
        (dict(stages="down", attention=("down_cross", "down_self")), "down0 down1 down2 down3"),
        (dict(stages="mid", attention=("mid_cross", "mid_self")), "down0 down1 down2 down3 mid"),
        (dict(stages=("mid", "up")), "down0 down1 down2 down3 mid up0 up1 up2 up3"),
    ],
)
def test_nothing_runs_after_the_last_tap(how, ran, backbones, images):
    count, handles = count_calls(backbones["sd1"].unet)
    backbones["sd1"].features(images, PROMPTS, **how, size="keep")
    for handle in handles:
        handle.remove()
    assert count == {name: 1 for name in ran.split()}


def test_passes_are_those_needed(backbones, images):
    for how, passes in [
        (dict(timesteps=(300, 200, 100)), 3),
        (dict(timesteps=(300, 100), trajectory="independent"), 2),
        (dict(noise="ddim", ddim_steps=4), 5),
        (dict(noise="none"), 1),
    ]:
        count, handles = count_calls(backbones["sd1"].unet)
        backbones["sd1"].features(images, PROMPTS, stages="mid", **how, size="keep")
        for handle in handles:
            handle.remove()
        assert count["mid"] == passes


def hooks_and_processors(unet):
    return [(m._forward_hooks.copy(), id(getattr(m, "processor", None))) for m in unet.modules()]


def test_the_unet_is_left_as_it_was(backbones, images):
    bb = backbones["sd1"]
    before = hooks_and_processors(bb.unet)
    bb.features(images, PROMPTS, size="keep")
    assert hooks_and_processors(bb.unet) == before
    with pytest.raises(ZeroDivisionError), tapped(bb.unet, ["mid", "up1.attn0.self.q"], [1, 2]):
        raise ZeroDivisionError
    assert hooks_and_processors(bb.unet) == before
    with pytest.raises(RuntimeError), tapped(bb.unet, ["up3"], [1, 2]):
        bb.predict(torch.zeros(1, 4, 8, 8), 200, torch.zeros(1, 77, 5))
    assert hooks_and_processors(bb.unet) == before


def test_batches_split_when_memory_is_short(backbones, images, monkeypatch):
    bb, passes = backbones["sd1"], []
    whole, forward = bb.features(images, PROMPTS, size="keep"), bb.unet.forward

    def tight(sample, *args, **kwargs):
        passes.append(len(sample))
        if len(sample) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(bb.unet, "forward", tight)
    assert max(relative(a, b) for a, b in zip(bb.features(images, PROMPTS, size="keep"), whole)) < 1e-5
    assert passes == [3, 2, 1, 1, 1]


@pytest.mark.skipif(
    os.environ.get("VERMOUTH_SLOW", "0") in ("", "0"),
    reason="full widths take about 10 GB and minutes; set VERMOUTH_SLOW=1",
)
@pytest.mark.parametrize("kind", ["sd1", "sd2.1"])
def test_full_width(kind, tmp_path):
    bb = load_backbone(
        write_folder(tmp_path / kind, kind, width=1, dtype=torch.bfloat16), device="cpu", dtype="bfloat16"
    )
    assert bb.feature_dims() == [1280, 1357, 1357, 960]
    fs = bb.features(Image.new("RGB", (256, 256), "red"), "a photo of a cat", size="keep")
    assert [tuple(f.shape[1:]) for f in fs] == [(1280, 4, 4), (1357, 8, 8), (1357, 16, 16), (960, 32, 32)]
    assert all(torch.isfinite(f).all() for f in fs)
