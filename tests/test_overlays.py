"Other weights over a checkpoint's, as options of every command that takes a model."

import json

import pytest
import torch
from photo_folders import write_two_classes
from program import run_here
from safetensors.torch import save_file

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def place(backbone, tmp_path_factory):
    "Photos of two classes, and a LoRA for Toybox's U-Net."
    place = tmp_path_factory.mktemp("overlays")
    write_two_classes(place / "photos", 12)
    c, d = backbone.unet.get_submodule(LAYER).weight.shape
    a, b = torch.randn(2, d), torch.randn(c, 2)
    save_file({f"unet.{LAYER}.lora_A.weight": a, f"unet.{LAYER}.lora_B.weight": b}, place / "style.safetensors")
    return place


@pytest.fixture(scope="module")
def index(place):
    words = ["--out", place / "idx", "--model", "toybox", "--lora", place / "style.safetensors", "--json"]
    return json.loads(run_here("index", place / "photos", *words).stdout)


def test_an_index_is_searched_with_the_overlay_that_it_was_made_with(place, index):
    assert index["model"] == "toybox + lora=style.safetensors"
    photo = next((place / "photos/fish").iterdir())
    found = json.loads(run_here("search", place / "idx", photo, "--json").stdout)
    assert found["hits"][0]["score"] > 0.999 and found["model"] == index["model"]


def test_an_index_refuses_the_model_without_its_overlay(place, index):
    photo = next((place / "photos/fish").iterdir())
    refused = run_here("search", place / "idx", photo, "--model", "toybox")
    assert refused.exit_code == 2 and "are not those that made the index" in refused.stderr
    given = ["--model", "toybox", "--lora", place / "style.safetensors"]
    assert run_here("search", place / "idx", photo, *given).exit_code == 0


def test_a_trained_model_names_its_overlay_and_opens_it_where_that_is_allowed(place, index):
    lora = ["--lora", place / "style.safetensors"]
    words = ["--out", place / "mine", "--model", "toybox", *lora, "--head", "linear"]
    assert run_here("train", place / "photos", *words).exit_code == 0
    card = json.loads((place / "mine/vermouth.json").read_text())
    over = card["features"]["backbone"]["overlay"]
    assert over == {"unet": None, "lora": [str(place / "style.safetensors")], "variant": None}
    photo, asked = next((place / "photos/fish").iterdir()), ("--model", place / "mine", "--json")
    refused = run_here("classify", photo, *asked)
    assert refused.exit_code == 2 and "it would open what only its card names: lora1" in refused.stderr
    allowed = run_here("--allow", "folder", "classify", photo, *asked)
    given = run_here("classify", photo, *asked, *lora)
    assert allowed.exit_code == given.exit_code == 0 and allowed.stdout == given.stdout


@pytest.mark.parametrize("command", ["index", "classify", "segment", "train"])
def test_an_overlay_needs_a_denoiser(place, command):
    photo = next((place / "photos/fish").iterdir())
    words = {"index": [place / "photos", "--out", place / "no"], "classify": [photo, "--names", "a,b"]}
    words |= {"segment": [photo, "--names", "a,b", "--out", place / "no.png"]}
    words |= {"train": [place / "photos", "--out", place / "no"]}
    refused = run_here(command, *words[command], "--model", "efficientnet_lite0", "--variant", "fp16")
    assert refused.exit_code == 2
    assert "variant='fp16': efficientnet_lite0 has no denoiser to put it over" in refused.stderr


def test_bench_needs_a_model_under_an_overlay(place):
    refused = run_here("bench", "--lora", place / "style.safetensors")
    assert refused.exit_code == 2 and "over which weights? Pass model, a denoiser." in refused.stderr
