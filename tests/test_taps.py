"Single places of a U-Net in the exact layout of Stable Diffusion 1.5 and 2.1."

import pytest
import torch
from sd_layout import write_folder

from vermouth.backbone import load_backbone

PROMPTS = ["a photo of a cat", None, "cat"]


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kind", ["sd1", "sd2.1"])
def test_every_place_of_the_published_layout(kind, images, tmp_path):
    bb = load_backbone(write_folder(tmp_path / kind, kind), device="cpu")
    taps = bb.taps((64, 128))
    assert [tap.position for tap in taps] == list(range(len(taps))) and len({tap.name for tap in taps}) == len(taps)
    assert sum(tap.kind == "map" for tap in taps) == 16 and {"up1.attn2.cross", "mid.resnet1"} <= {t.name for t in taps}
    names = [tap.name for tap in taps]
    fs = bb.features(images[:1], "cat", stages=names, size="keep")
    assert [tuple(f.shape[1:]) for f in fs] == [tap.shape for tap in taps]
    assert bb.feature_dims(names) == [tap.shape[0] for tap in taps]
    levels = bb.features(images[:1], "cat", attention=("up_cross", "up_cross_fine"), size="keep")
    for name, level in (("mid", 0), ("up0", 1), ("up1", 2)):
        f = fs[names.index(name)]
        assert relative(f, levels[level][:, : f.shape[1]]) < 1e-5
    for level in (1, 2, 3):
        maps = [f for f, tap in zip(fs, taps) if tap.kind == "map" and tap.name.startswith(f"up{level}")]
        assert relative(torch.stack(maps).mean(0), levels[level][:, -77:]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("change", ["fuse_projections", "compile_blocks"])
def test_places_of_a_faster_backbone(change, images, tmp_path):
    names, how = ["down2.attn0.self.k", "mid.resnet1", "down2.attn0.cross.map", "down1.attn0"], {"size": "keep"}
    bb = load_backbone(write_folder(tmp_path / "sd", "sd1"), device="cpu")
    expected = bb.features(images, PROMPTS, stages=names, **how)
    getattr(bb, change)(**({"backend": "eager"} if change == "compile_blocks" else {}))
    bb.features(images, PROMPTS, stages="mid", **how)  # compiles blocks that have no hooks yet
    for f, e in zip(bb.features(images, PROMPTS, stages=names, **how), expected):
        assert relative(f, e) < 1e-5
