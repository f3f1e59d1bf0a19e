"Weights and features that are NaN or infinite are an error everywhere, with the model's name and a remedy."

import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vermouth.backbone import load_backbone, random_backbone
from vermouth.core import VermouthError, check_finite
from vermouth.expert import load_expert
from vermouth.model import Vermouth
from vermouth.text import image_embeddings, load_captioner, load_clip, text_embeddings

TOYBOX = Path(str(files("vermouth"))) / "toybox"
BAD = [torch.nan, torch.inf, -torch.inf]


def damaged(part, folder, value):
    "A copy of a part of the Toybox in which one number of its largest file of weights is another."
    shutil.copytree(TOYBOX / part, folder)
    weights = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    state = load_file(weights)
    name = max(sorted(state), key=lambda key: state[key].numel())
    state[name].view(-1)[-1] = value
    save_file(state, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("load, part", [(load_clip, "clip"), (load_captioner, "captioner"), (load_expert, "expert")])
def test_weights_of_every_part(load, part, value, tmp_path):
    folder = damaged(part, tmp_path / part, value)
    with pytest.raises(VermouthError, match="NaN or infinite") as refused:
        load(folder, device="cpu")
    assert str(folder) in str(refused.value) and "again" in str(refused.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_checkpoint(part, tmp_path):
    folder = tmp_path / "sd"
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(TOYBOX / name, folder / name)
    shutil.copy(TOYBOX / "model_index.json", folder)
    shutil.rmtree(folder / part)
    damaged(part, folder / part, torch.nan)
    with pytest.raises(VermouthError, match="NaN or infinite") as refused:
        load_backbone(str(folder), device="cpu")
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("dtype, remedy", [("float32", "Fetch its weights again"), ("float16", "dtype='bfloat16'")])
def test_features_that_overflow(dtype, remedy):
    bb = random_backbone(width=8, dtype=dtype)
    bb.unet.conv_in.weight.data.fill_(torch.finfo(bb.dtype).max)  # finite, but their products are not
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    latents, context = bb.encode_images(image), bb.encode_text("a cat")
    for call in (
        lambda: bb.features(image, "a cat", size="keep"),
        lambda: bb.features(image, "a cat", stages=["down0.resnet0"], size="keep"),
        lambda: bb.features_from_latents(latents, context),
    ):
        with pytest.raises(VermouthError, match="stand-in for sd1.*its features: NaN or infinite") as refused:
            call()
        assert remedy in str(refused.value)
    with pytest.raises(VermouthError, match="latents: NaN or infinite"):
        bb.features_from_latents(latents * torch.nan, context)
    bb.vae.encoder.conv_in.weight.data[:] = torch.nan
    with pytest.raises(VermouthError, match="the latents of its VAE: NaN or infinite"):
        bb.encode_images(image)
    bb.text_encoder.final_layer_norm.weight.data[0] = torch.nan
    with pytest.raises(VermouthError, match="hidden states of its text encoder: NaN or infinite"):
        bb.encode_text("a cat")


def test_embeddings_of_a_head_and_a_clip_changed_in_memory(photos):
    model = Vermouth.load("toybox", "cpu")
    clip, weight = model.clip, next(iter(model.uhead.parameters()))
    weight.data[:] = torch.nan
    for call in (lambda: model.embed(photos[0], [""]), lambda: model.classify(photos[0], ["cat", "house"], [""])):
        with pytest.raises(VermouthError, match="toybox.*embeddings: NaN or infinite"):
            call()
    for parameter in clip.model.parameters():
        parameter.data.fill_(torch.nan)
    for call in (lambda: text_embeddings("a cat", clip), lambda: image_embeddings(photos[0], clip)):
        with pytest.raises(VermouthError, match="clip='toybox'.*NaN or infinite"):
            call()


def test_finite_numbers_pass_whatever_their_sum():
    check_finite([torch.full((9,), 3e38), torch.full((9,), 6e4).half(), torch.tensor([1]), torch.ones(0)], "x")
    for value in BAD:
        with pytest.raises(VermouthError, match="x: NaN or infinite"):
            check_finite([torch.ones(3), torch.tensor([1, value])], "x")
