"Saved models in other processes and folders, and damaged ones."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import FORMAT, Vermouth

EMBED = """
import sys, torch
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth
torch.set_num_threads(int(sys.argv[2]))
f = Vermouth.load(sys.argv[1], "cpu").embed([x.image for x in Toybox("photo", n=3, seed=5)])
print(f.numpy().tobytes().hex())
"""


def embed_in_fresh_process(folder, cwd):
    "The bytes of three photos' embeddings, computed by a new process in `cwd`."
    run = subprocess.run(
        [sys.executable, "-c", EMBED, str(folder), str(torch.get_num_threads())],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return bytes.fromhex(run.stdout.split()[-1])


def photos():
    return [x.image for x in Toybox("photo", n=3, seed=5)]


@pytest.fixture(scope="module")
def model():
    return Vermouth.build("toybox", device="cpu", uhead="pico", seed=1)


@pytest.fixture(scope="module")
def parts(model):
    "The frozen parts, which need not be loaded again."
    return {name: getattr(model, name) for name in ("backbone", "clip", "captioner", "expert")}


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def refused(parts):
    def check(folder, message, **changed):
        with pytest.raises(VermouthError) as e:
            Vermouth.load(folder, "cpu", **parts | changed)
        assert message in str(e.value) and "\n" not in str(e.value), e.value

    return check


def change(folder, **entries):
    card = json.loads((folder / "vermouth.json").read_text())
    (folder / "vermouth.json").write_text(json.dumps(card | entries))
    return card


def test_a_fresh_process_gives_the_same_bytes(model, saved, tmp_path):
    assert embed_in_fresh_process(saved, tmp_path) == model.embed(photos()).numpy().tobytes()


def test_the_shipped_model_loads_anywhere(tmp_path):
    shipped = Vermouth.load("toybox", "cpu")
    assert shipped.expert.name == "toybox" and shipped.captioner.name == "toybox" and not shipped.training
    assert embed_in_fresh_process("toybox", tmp_path) == shipped.embed(photos()).numpy().tobytes()


def test_frozen_parts_are_named_and_not_copied(model, saved):
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "vermouth.json"]
    assert {k.split(".")[0] for k in load_file(saved / "model.safetensors")} == {"adapters", "uhead"}
    card = json.loads((saved / "vermouth.json").read_text())
    assert card["backbone"] == {"name": "toybox", "fingerprint": model.backbone.fingerprint}
    assert card["expert"] == {"name": "toybox", "fingerprint": model.expert.fingerprint, "frozen": True}


def test_another_backbone_is_refused(refused, model, saved):
    refused(saved, "backbone='toybox, random U-Net 3': its weights", backbone=model.backbone.randomized(3))


def test_a_head_of_another_architecture_is_refused(refused, parts, saved, tmp_path):
    Vermouth.build(device="cpu", uhead="small", **parts).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    refused(saved, "of another architecture than vermouth.json says (has uhead.levels.0.again")


@pytest.mark.parametrize(
    "lacks, message",
    [(True, "(lacks uhead.pool.out.weight; 1 tensors differ)"), (False, "has uhead.pool.out.weight of shape")],
)
def test_missing_and_misshapen_tensors_are_refused(refused, saved, lacks, message):
    state = load_file(saved / "model.safetensors")
    weight = state.pop("uhead.pool.out.weight")
    if not lacks:
        state["uhead.pool.out.weight"] = weight[1:].contiguous()
    save_file(state, saved / "model.safetensors")
    refused(saved, message)


def test_changed_weights_are_refused(refused, saved):
    state = load_file(saved / "model.safetensors")
    state["uhead.pool.out.weight"] *= 2
    save_file(state, saved / "model.safetensors")
    refused(saved, "is not the file that vermouth.json describes")


def test_cut_and_pickled_weights_are_refused(refused, saved):
    whole = (saved / "model.safetensors").read_bytes()
    for part in (b"", whole[:7], whole[:1000], whole[:-1]):
        (saved / "model.safetensors").write_bytes(part)
        refused(saved, "is not a whole file in safetensors format")
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    refused(saved, "is not a whole file in safetensors format")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refused(saved, "model.safetensors is missing (pytorch_model.bin is there, but pickled weights are not read)")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
        ("null", "it is not of type dict"),
        ("{}", "is missing"),
        (json.dumps({"format": FORMAT + 1}), "Upgrade vermouth"),
    ],
)
def test_a_broken_card_is_refused(refused, saved, text, message):
    (saved / "vermouth.json").write_bytes(text.encode("latin-1"))
    refused(saved, message)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"size": "64"}, "size is not of type int"),
        ({"size": True}, "size is not of type int"),
        ({"backbone": "toybox"}, "backbone is not of type dict"),
        ({"extra": 1}, "extra is unknown"),
        ({"settings": {"timesteps": ["200"]}}, "settings.timesteps is not of type int"),
        ({"uhead": {"arch": "huge"}}, "arch='huge': unknown"),
        ({"uhead": {"widths": [33, 32, 32, 32]}}, "each a multiple of 32"),
        ({"heads": {"nose": {}}}, "a head 'nose' that this version does not know"),
    ],
)
def test_a_card_with_a_wrong_entry_is_refused(refused, parts, saved, entries, message):
    card = change(saved)
    changed = {k: card[k] | v if isinstance(v, dict) and k in card else v for k, v in entries.items()}
    change(saved, **changed)
    refused(saved, message)
    (saved / "vermouth.json").write_text(json.dumps(card))
    assert Vermouth.load(saved, "cpu", **parts)


def test_absent_folders_and_parts_are_named(refused, saved, tmp_path):
    refused(tmp_path / "none", "vermouth.json is missing. Pass 'toybox', or a folder that Vermouth.save has written")
    change(saved, backbone={"name": str(tmp_path / "gone"), "fingerprint": "0"})
    refused(saved, "gone", backbone=None)


def test_saving_again_replaces_both_files_and_leaves_nothing_else(parts, saved):
    Vermouth.build("toybox", device="cpu", uhead="none", **parts | {"expert": None}).save(saved, dtype="float16")
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "vermouth.json"]
    assert Vermouth.load(saved, backbone=parts["backbone"]).expert is None


def test_a_full_disk_is_a_sentence_and_the_old_model_stays(model, parts, saved, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VermouthError, match="cannot be written .No space left on device."):
        model.save(saved)
    monkeypatch.undo()
    assert sorted(p.name for p in Path(saved).iterdir()) == ["model.safetensors", "vermouth.json"]
    assert torch.equal(Vermouth.load(saved, "cpu", **parts).embed(photos()), model.embed(photos()))
