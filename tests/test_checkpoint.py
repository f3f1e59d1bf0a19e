"Checkpoints that are damaged, incomplete, of another family, or in the hub's cache."

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from sd_layout import write_folder

from vermouth.backbone import load_backbone
from vermouth.core import VermouthError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sd") / "sd1")


@pytest.fixture
def copy(folder, tmp_path):
    "A folder that a test may damage."
    return Path(shutil.copytree(folder, tmp_path / "sd1"))


def refuses(folder, *parts):
    with pytest.raises(VermouthError) as error:
        load_backbone(folder, device="cpu")
    for text in parts:
        assert text in str(error.value)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_a_hub_id_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(VermouthError, match="hf download someone/small-sd"):
        load_backbone("someone/small-sd", device="cpu")
    repository = tmp_path / "models--someone--small-sd"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    images = torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cached = load_backbone("someone/small-sd", device="cpu").features(images, "cat", size="keep")
    for a, b in zip(cached, load_backbone(folder, device="cpu").features(images, "cat", size="keep")):
        assert relative(a, b) < 1e-5


def test_pickles_are_refused(copy):
    os.rename(copy / "unet" / "diffusion_pytorch_model.safetensors", copy / "unet" / "diffusion_pytorch_model.bin")
    refuses(copy, "no safetensors weights in unet/")


def test_damage_is_noticed(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    refuses(copy, "unet/ cannot be read")
    shutil.rmtree(copy / "unet")
    refuses(copy, "lacks unet/. Copy that folder from")


@pytest.mark.parametrize(
    "part, file", [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]
)
def test_missing_weights_are_not_made_up(copy, part, file):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / part / f"{file}.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, copy / part / f"{file}.safetensors", metadata={"format": "pt"})
    refuses(copy, f"{part}/ lacks 1 of its weights")


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "vae/config.json",
        "text_encoder/config.json",
    ],
)
def test_broken_settings_are_named(copy, file):
    (copy / file).write_text("{")
    refuses(copy, file.split("/")[0])


def test_a_missing_vocabulary_is_not_made_up(copy):
    (copy / "tokenizer" / "merges.txt").unlink()
    refuses(copy, "tokenizer/ holds no vocabulary")


def test_indexes_of_weights_name_safetensors_of_their_own_folder(copy):
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = copy / part / f"{stem}.safetensors.index.json"
        for name in (f"{stem}.bin", "../unet/diffusion_pytorch_model.safetensors"):
            index.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": name}}))
            refuses(copy, f"{part}/ has a {index.name} that names '{name}'")
        index.unlink()


def test_other_families_are_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    xl = index | second | {"_class_name": "StableDiffusionXLPipeline"}
    (copy / "model_index.json").write_text(json.dumps(xl))
    refuses(copy, "lacks text_encoder_2/", "stabilityai/stable-diffusion-xl-base-1.0")
    sana = {"transformer": ["diffusers", "SanaTransformer2DModel"], "_class_name": "SanaPipeline"}
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"} | sana))
    refuses(copy, "holds a SanaPipeline whose transformer is SanaTransformer2DModel. Give one of: Stable Diffusion 1.x")
    image = {"_class_name": "StableDiffusionImageVariationPipeline"}
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "text_encoder"} | image))
    refuses(copy, "whose text_encoder is missing. It looks like Stable Diffusion 1.x or 2.x, which needs CLIPTextModel")
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    refuses(copy, "unet is missing")
