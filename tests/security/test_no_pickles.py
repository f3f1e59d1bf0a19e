"No loader opens a pickle, wherever it lies and whatever names it; and a card's folders are not followed unasked."

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from traps import copy_family, copy_head, merge

from vermouth.backbone import load_backbone
from vermouth.core import VermouthError
from vermouth.expert import load_expert
from vermouth.model import Vermouth, open_model
from vermouth.text import load_captioner, load_clip


class Trap:
    "A pickle that makes a folder when it is opened."

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.fixture
def family(tmp_path):
    return copy_family(tmp_path / "family")


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "opened"
    assert not (tmp_path / "opened").exists(), "a pickle was opened"


LOADERS = {
    "vae": lambda root: load_backbone(root, "cpu"),
    "unet": lambda root: load_backbone(root, "cpu"),
    "text_encoder": lambda root: load_backbone(root, "cpu"),
    "clip": lambda root: load_clip(root / "clip", "cpu"),
    "captioner": lambda root: load_captioner(root / "captioner", "cpu"),
    "expert": lambda root: load_expert(root / "expert", device="cpu"),
    "unet=": lambda root: load_backbone("toybox", "cpu", unet=root / "unet"),
    "lora=": lambda root: load_backbone("toybox", "cpu", lora=root / "lora"),
}
NAMES = [
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "pytorch_model.bin",
    "model.pth",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
]


def place_of(root, door):
    (place := root / door.rstrip("=")).mkdir(exist_ok=True)
    return place


def pickles(place, marker, names=NAMES):
    for name in names:
        (place / name).unlink(missing_ok=True)
        torch.save(Trap(marker), place / name)


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / "opened"), tmp_path / "model.bin")
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert (tmp_path / "opened").exists()


@pytest.mark.parametrize("door", [door for door in LOADERS if door != "lora="])
def test_pickles_beside_safetensors_are_left_alone(door, family, marker):
    place = place_of(family, door)
    if door == "clip":  # the name that open_clip itself looks for after its pickles
        (place / "open_clip_model.safetensors").rename(place / "model.safetensors")
    pickles(place, marker)
    assert LOADERS[door](family)


@pytest.mark.parametrize("door", LOADERS)
def test_a_folder_of_pickles_is_refused(door, family, marker):
    for path in (place := place_of(family, door)).glob("*.safetensors"):
        path.unlink()
    pickles(place, marker)
    with pytest.raises(VermouthError, match="safetensors"):
        LOADERS[door](family)


@pytest.mark.parametrize("door", LOADERS)
def test_a_pickle_under_the_name_of_safetensors_is_refused(door, family, marker):
    place = place_of(family, door)
    names = [path.name for path in place.glob("*.safetensors")] or ["pytorch_lora_weights.safetensors"]
    pickles(place, marker, names)
    with pytest.raises(VermouthError) as error:
        LOADERS[door](family)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("door", ["vae", "unet", "text_encoder", "captioner"])
@pytest.mark.parametrize("listing", ["{}.safetensors.index.json", "{}.bin.index.json"])
def test_an_index_that_names_pickles_is_refused(door, listing, family, marker):
    stem = next((place := place_of(family, door)).glob("*.safetensors")).stem
    pickles(place, marker, [f"{stem}.bin"])
    entries = {"weight_map": {"conv_in.weight": f"{stem}.bin"}}
    (place / listing.format(stem)).write_text(json.dumps(entries))
    with pytest.raises(VermouthError, match=rf"names '{stem}.bin'. Give weights in safetensors format"):
        LOADERS[door](family)


@pytest.mark.parametrize("door", ["vae", "captioner"])
def test_a_pipe_in_place_of_weights_is_refused_and_not_waited_for(door, family):
    for path in place_of(family, door).glob("*.safetensors"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(VermouthError, match="safetensors"):
        LOADERS[door](family)


@pytest.mark.parametrize("part", ["backbone", "clip", "captioner", "expert"])
def test_a_folder_in_a_card_is_followed_only_if_that_is_allowed(part, family, tmp_path, marker):
    place = family if part == "backbone" else family / part
    head = copy_head(tmp_path / "head", **{part: place})
    pickles(place if part != "backbone" else place / "unet", marker)
    for load in (Vermouth.load, open_model):
        with pytest.raises(VermouthError, match=rf"it would open what only its card names: {part} '{place}'"):
            load(head, "cpu")
    assert Vermouth.load(head, "cpu", allow=("folder",)).classify
    with pytest.raises(VermouthError, match=r"allow=\('folder',\) if you trust the card"):
        Vermouth.load(head, "cpu", allow=("hub",))


def test_a_part_that_the_caller_passes_stands_for_the_folder_in_a_card(family, tmp_path):
    head = copy_head(tmp_path / "head", clip=family / "clip")
    assert Vermouth.load(head, "cpu", clip=load_clip(family / "clip", "cpu"))


def test_settings_of_a_clip_and_a_captioner_end_in_one_sentence(family, tmp_path):
    wrong = [
        ("clip/open_clip_config.json", {"model_cfg": {"text_cfg": {"vocab_size": 2**40}}}),
        ("clip/open_clip_config.json", {"model_cfg": {"text_cfg": {"layers": 10**9}}}),
        ("clip/open_clip_config.json", {"model_cfg": {"vision_cfg": {"width": "wide"}}}),
        ("clip/open_clip_config.json", {"model_cfg": {"embed_dim": float("nan")}}),
        ("clip/open_clip_config.json", {"preprocess_cfg": {"mean": "grey"}}),
        ("captioner/config.json", {"text_config": {"vocab_size": 2**40}}),
        ("captioner/config.json", {"vision_config": {"num_hidden_layers": 10**9}}),
        ("captioner/config.json", {"text_config": {"hidden_size": [1]}}),
        ("captioner/config.json", {"initializer_factor": float("inf")}),
    ]
    for i, (file, values) in enumerate(wrong):
        shutil.copytree(family / Path(file).parent, copy := tmp_path / str(i), symlinks=True)
        merge(copy / Path(file).name, values)
        with pytest.raises(VermouthError) as error:
            (load_clip if file.startswith("clip") else load_captioner)(copy, "cpu")
        assert "\n" not in str(error.value)
