"""Captioners and CLIPs in the hub's older layout, with broken weights, and without a network."""

import json

import huggingface_hub.constants as hub
import pytest
import torch
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration

from vermouth import text
from vermouth.core import VermouthError
from vermouth.text import load_captioner, load_clip, make_prompts

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "##s"]


@pytest.fixture(scope="module")
def hub_blip(tmp_path_factory):
    "A BLIP folder in the hub's older layout, with vocab.txt and preprocessor_config.json."
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | special
    preprocessor = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "do_resize": True,
        "do_normalize": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={
            **sizes,
            "vocab_size": len(WORDS) + 2,
            "max_position_embeddings": 32,
            "bos_token_id": len(WORDS),
            "eos_token_id": 2,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_hub_layout_loads_with_its_own_normalisation(hub_blip):
    captioner = load_captioner(hub_blip, device="cpu")
    assert captioner.processor.image_processor.image_mean == (0.48, 0.46, 0.41)
    assert not any(p.requires_grad for p in captioner.model.parameters()) and not captioner.model.training
    captions = captioner([Image.new("RGB", (20, 30), "red"), Image.new("L", (9, 9))])
    assert len(captions) == 2 and all(isinstance(c, str) for c in captions)


def test_captions_do_not_depend_on_the_global_generator(hub_blip):
    captioner, image = load_captioner(hub_blip, device="cpu"), Image.effect_noise((32, 32), 90)
    torch.manual_seed(1)
    first = captioner(image)
    torch.manual_seed(2)
    assert captioner(image) == first


def test_truncated_weights_are_named(hub_blip, tmp_path):
    for p in hub_blip.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((hub_blip / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(VermouthError, match="captioner=.*cannot be loaded here"):
        load_captioner(tmp_path)


@pytest.mark.parametrize("load", [load_captioner, load_clip])
def test_pickles_are_refused(load, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(VermouthError, match="pickled ones are not read"):
        load(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(VermouthError, match="a bert model. Pass a BLIP captioner"):
        load_captioner(tmp_path)


NAMES = {
    "load_captioner": "Salesforce/blip-image-captioning-base",
    "load_clip": "ViT-L-14/openai",
    "clip_for": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


@pytest.mark.parametrize("function, name", NAMES.items())
def test_without_network_the_weights_are_named(tmp_path, monkeypatch, function, name):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(VermouthError, match=name):
        getattr(text, function)(name)


def test_one_image_is_one_prompt():
    assert make_prompts("empty", torch.zeros(3, 8, 8)) == [""]
    assert make_prompts("empty", torch.zeros(2, 3, 8, 8)) == ["", ""]
