"Networks without trained weights: what classify, segment and the web page say before they answer."

import json

import open_clip
import published_layout
import pytest
import torch
from program import run_here
from safetensors.torch import save_file
from sd_layout import write_folder

from vermouth.app.answers import fit_note
from vermouth.app.web import by_names, cut_out
from vermouth.backbone import load_backbone, random_backbone
from vermouth.data.toybox import Toybox
from vermouth.families.adapters import family_of
from vermouth.model import open_model
from vermouth.text import load_clip
from vermouth.zoo.embedders import ClipEmbedder, PyramidEmbedder
from vermouth.zoo.training import doubt, noise_left, untrained_clip, untrained_denoiser

NAMES = ("--names", "cat,duck,car")
DENOISER, CLIP = "takes no noise out of a picture, as a network without", "of 6 plain colours, as a network without"
TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A picture, a Stable Diffusion and a CLIP with random weights, sharp as a trained one's."
    folder = tmp_path_factory.mktemp("untrained")
    Toybox("photo", n=1)[0].image.save(folder / "photo.png")
    write_folder(folder / "sd")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TOWERS)
    model.logit_scale.data.fill_(4.6052)
    (folder / "clip").mkdir()
    save_file(model.state_dict(), folder / "clip/open_clip_model.safetensors")
    settings = {"model_cfg": TOWERS, "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(settings))
    return folder


def warnings_of(*words):
    "What a command says on standard error, and in its document."
    text, document = run_here(*words), run_here(*words, "--json")
    assert (text.exit_code, document.exit_code) == (0, 0), text.output + document.output
    return text.stderr, json.loads(document.stdout)["warning"]


def test_segment_with_an_untrained_denoiser(place, tmp_path):
    words = ("segment", place / "photo.png", *NAMES, "--out", tmp_path / "mask.png", "--model", place / "sd")
    assert all(DENOISER in said for said in warnings_of(*words))
    with pytest.warns(UserWarning, match=DENOISER):
        cut_out(open_model(place / "sd", "cpu"), str(place / "photo.png"), "cat,duck")


def test_classify_and_segment_with_an_untrained_clip(place, tmp_path):
    model = ("--model", f"clip:{place / 'clip'}")
    assert all(CLIP in said for said in warnings_of("classify", place / "photo.png", *NAMES, *model))
    words = ("segment", place / "photo.png", *NAMES, "--out", tmp_path / "mask.png", *model)
    assert all(CLIP in said for said in warnings_of(*words))
    with pytest.warns(UserWarning, match=CLIP):
        by_names(open_model(model[1], "cpu"), str(place / "photo.png"), "cat,duck")


def test_a_clip_beside_an_untrained_denoiser_is_trusted():
    "The denoiser does not classify, and its part of a vector is not the whole."
    model = PyramidEmbedder(random_backbone("sd1", "cpu", width=8), load_clip("toybox", "cpu"), size=64)
    assert (doubt(model, "embed"), doubt(model, "classify")) == ("", "") and DENOISER in doubt(model, "segment")


@pytest.mark.parametrize("size", ["sd1", "sd2.1", "sdxl", "pixart-512", "sd3-medium", "flux-schnell"])
def test_denoisers_of_every_family(size, monkeypatch):
    published = family_of(size).published
    if size == "flux-schnell":  # 6 of 57 layers
        configs = published[size](8)
        configs["transformer"] |= published_layout.FLUX
        monkeypatch.setitem(published, size, lambda width: configs)
    backbone = random_backbone(size, "cpu", width=8)
    assert DENOISER.split(",")[0] in untrained_denoiser(backbone, 64)
    last = [p for p in backbone.family.denoiser.parameters()][-2:]
    for parameter in last:  # an output of zeros is what an optimiser often starts from
        parameter.data.zero_()
    assert noise_left(backbone, 64) >= 1


def test_what_was_trained_is_not_doubted():
    backbone, clip = load_backbone("toybox", "cpu"), load_clip("toybox", "cpu")
    pyramid, photo = PyramidEmbedder(backbone), Toybox("sketch", n=1)[0].image
    for model in (pyramid, PyramidEmbedder(backbone, clip), ClipEmbedder(clip), open_model("toybox", "cpu")):
        assert [fit_note(model, [photo], asked=asked) for asked in ("classify", "segment")] == ["", ""], model
    assert max(noise_left(backbone, side) for side in (64, 96, 128)) < 0.5
    lite = open_model("efficientnet_lite0", "cpu")
    assert [doubt(lite, asked) for asked in ("embed", "classify", "segment")] == [""] * 3


def test_what_is_not_asked():
    backbone = random_backbone("sd1", "cpu", width=8)
    assert untrained_denoiser(backbone, 64)
    backbone.opened = {"name": "sd1", "overlay": {"unet": "cleandift"}}  # trained for maps of clean pictures
    assert untrained_denoiser(backbone, 64) == ""
    clip = load_clip("toybox", "cpu")
    clip.model.logit_scale.data.fill_(0.0)
    assert untrained_clip(clip) == ""  # the order of scores counts, not how sure they are
