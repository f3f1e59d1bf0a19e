"The benchmark's references and the training of normalisation layers, on every kind of U-Net; transformers are refused."

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner
from unet_layout import pipeline

from vermouth.app.cli import app
from vermouth.backbone import Backbone
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.experiments.bench import benchmark, dift_way, our_way, released_way
from vermouth.experiments.costs import bytes_per_image, parameters
from vermouth.families.adapters import HUB, SIZES
from vermouth.model import Vermouth
from vermouth.tasks.fewshot import TunedNorms, live_inputs
from vermouth.train import train_head

PROMPTS = ["a photo of a cat", "a dog"]


@pytest.fixture(scope="module")
def backbones():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other channels are zero
        return {name: backbone_of(name) for name in ("sd1", "inpainting", "sdxl")}


def backbone_of(name):
    parts = {k: v for k, v in pipeline(name).components.items() if hasattr(v, "config") or k.startswith("tokenizer")}
    return Backbone.from_components(**parts)


@pytest.mark.parametrize("name, up1", [("sd1", (160, 4)), ("inpainting", (160, 4)), ("sdxl", (80, 8))])
def test_the_references_read_what_ours_reads(name, up1, backbones):
    bb = backbones[name]
    context, latents = bb.encode_text(PROMPTS), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for ours, plain in zip(our_way(bb, latents, context), released_way(bb, latents, context), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    block = dift_way(bb, latents, context, noises=3)
    assert block.shape == (2, up1[0], up1[1], up1[1])
    (alone,) = our_way(bb, latents, context, ("up1",), ())
    torch.testing.assert_close(block, alone, atol=1e-5, rtol=1e-5)  # the same latents three times


def test_they_refuse_a_transformer(transformers):
    bb = transformers["sd3"]
    latents, context = torch.randn(1, 16, 8, 8), bb.encode_text("a cat")
    for way in (released_way, dift_way):
        with pytest.raises(VermouthError, match="3.x has a transformer, and the references are ways to read"):
            way(bb, latents, context)


@pytest.fixture
def model_of(toybox):
    def build(bb):
        parts = {"backbone": bb, "clip": toybox.clip, "expert": toybox.expert, "prompt": "empty"}
        return Vermouth.build(**parts, uhead="pico", size=64)

    return build


@pytest.mark.parametrize("name", ["inpainting", "sdxl"])
def test_normalisation_layers_learn(name, backbones, model_of):
    model, items = model_of(backbones[name]), Toybox("photo", n=4, seed=3)
    live, inputs = TunedNorms(model), live_inputs(model, items, PROMPTS * 2)
    with torch.no_grad():
        kept = model(model.read([item.image for item in items], PROMPTS * 2))
        torch.testing.assert_close(live(inputs), kept, atol=1e-4, rtol=1e-4)
    before, own = copy.deepcopy(live.unet.state_dict()), copy.deepcopy(model.backbone.unet.state_dict())
    names = F.normalize(torch.randn(4, model.clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    train_head(live, inputs, range(4), names, lr=1e-3, held=0, quiet=True)
    moved = {key for key, w in live.unet.state_dict().items() if not torch.equal(w, before[key])}
    assert len(moved) > 10 and all("norm" in key for key in moved)
    assert all(torch.equal(w, own[key]) for key, w in model.backbone.unet.state_dict().items())


def test_a_transformer_has_none_that_could(transformers, model_of):
    said = "train_norms=True: a U-Net's normalisation layers learn, and FLUX.1 has a transformer. Pass train_norms=F"
    with pytest.raises(VermouthError, match=said):
        TunedNorms(model_of(transformers["flux"]))


# parameters in millions of the denoiser and of all parts, as published or counted in the published files
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (860, 1066),
    "SimianLuo/LCM_Dreamshaper_v7": (860, 1066),
    "stabilityai/sd-turbo": (866, 1290),
    "stabilityai/stable-diffusion-xl-base-1.0": (2567, 3469),
    "stabilityai/sdxl-turbo": (2567, 3469),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (611, 5457),
    "stabilityai/stable-diffusion-3-medium-diffusers": (2028, 7693),
    "stabilityai/stable-diffusion-3.5-large": (8057, 13721),
    "black-forest-labs/FLUX.1-schnell": (11891, 16860),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_on_the_hub_says_how_large_the_model_is(name):
    counts = parameters(name)
    assert (round(next(iter(counts.values())) / 1e6), round(sum(counts.values()) / 1e6)) == PUBLISHED[name]
    assert bytes_per_image(512, model=name) == bytes_per_image(512, model=HUB[name]) > 1e6


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(VermouthError, match="model='stabilityai/sdxl-turb': unknown.* Did you mean 'stability"):
        parameters("stabilityai/sdxl-turb")


def test_bench_measures_every_size_and_lists_them(quick_rate):
    said = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "400"}).output
    assert all(f"{size}," in said or f"{size}." in said for size in SIZES)
    for size, lowest in (("sdxl", "mid"), ("pixart-512", "block6")):
        rows = benchmark(size, 64, device="cpu", dtypes=("float32",), width=8)
        assert len(rows) == 5 and all(row["operations"] > 0 for row in rows)
        operations = {row["what"]: row["operations"] for row in rows}
        assert operations[lowest] < 0.6 * operations["mid, up"]
