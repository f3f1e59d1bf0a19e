"Saved models in other folders, and damaged ones."

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save, save_file

from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth
from vermouth.zoo.saving import FORMAT, weights_name


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


def weights(folder):
    "The file of weights that is in a folder."
    return next(folder.glob("model-*.safetensors"))


def replace_weights(folder, state):
    "Give a model other tensors, as somebody does who changes the card, too."
    data = save(state)
    weights(folder).unlink()
    digest = hashlib.sha256(data).hexdigest()
    (folder / weights_name(digest)).write_bytes(data)
    change(folder, weights=digest)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_frozen_parts_are_named_and_not_copied(model, saved):
    assert files(saved) == [weights(saved).name, "vermouth.json"]
    assert {k.split(".")[0] for k in load_file(weights(saved))} == {"adapters", "uhead"}
    card = json.loads((saved / "vermouth.json").read_text())
    assert card["backbone"] == {"name": "toybox", "fingerprint": model.backbone.fingerprint}
    assert card["expert"] == {"name": "toybox", "fingerprint": model.expert.fingerprint, "frozen": True}


def test_another_backbone_is_refused(refused, model, saved):
    refused(saved, "backbone='toybox, random U-Net 3': its weights", backbone=model.backbone.randomized(3))


def test_a_head_of_another_architecture_is_refused(refused, parts, saved, tmp_path):
    Vermouth.build(device="cpu", uhead="small", **parts).save(tmp_path / "other")
    replace_weights(saved, load_file(weights(tmp_path / "other")))
    refused(saved, "of another architecture than vermouth.json says (has uhead.levels.0.again")


@pytest.mark.parametrize(
    "lacks, message",
    [(True, "(lacks uhead.pool.out.weight; 1 tensors differ)"), (False, "has uhead.pool.out.weight of shape")],
)
def test_missing_and_misshapen_tensors_are_refused(refused, saved, lacks, message):
    state = load_file(weights(saved))
    weight = state.pop("uhead.pool.out.weight")
    if not lacks:
        state["uhead.pool.out.weight"] = weight[1:].contiguous()
    replace_weights(saved, state)
    refused(saved, message)


def test_weights_that_are_not_finite_are_refused(refused, saved):
    state = load_file(weights(saved))
    state["uhead.pool.out.weight"][0, 0] = torch.nan
    replace_weights(saved, state)
    refused(saved, "holds NaN or infinite values, in uhead.pool.out.weight")


def test_changed_weights_are_refused(refused, saved):
    state = load_file(weights(saved))
    state["uhead.pool.out.weight"] *= 2
    save_file(state, weights(saved))
    refused(saved, "is not the file that vermouth.json describes")


def test_cut_and_pickled_weights_are_refused(refused, saved):
    file = weights(saved)
    whole = file.read_bytes()
    for part in (b"", whole[:7], whole[:1000], whole[:-1]):
        file.write_bytes(part)
        refused(saved, "is not a whole file in safetensors format")
    torch.save({"a": torch.zeros(1)}, file)
    refused(saved, "is not a whole file in safetensors format")
    file.rename(saved / "pytorch_model.bin")
    refused(saved, f"{file.name} is missing (pytorch_model.bin is there, but pickled weights are not read)")


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
        ({"uhead": {"widths": [2**14] * 4}}, "of another architecture than vermouth.json says"),
        ({"uhead": {"widths": [32 * 10**30] * 4}}, "its heads cannot be built"),
        ({"uhead": {"out_res": 10**9}}, "its heads cannot be built"),
        ({"heads": {"dense": {"width": 2**40}}}, "its heads cannot be built"),
        ({"kind": "tree"}, "kind is missing or unknown"),
        ({"kind": "linear"}, "backbone is unknown"),
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
    assert files(saved) == [weights(saved).name, "vermouth.json"]
    assert Vermouth.load(saved, backbone=parts["backbone"]).expert is None


def test_a_full_disk_is_a_sentence_and_the_old_model_stays(model, parts, saved, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VermouthError, match="cannot be written .No space left on device."):
        model.save(saved)
    monkeypatch.undo()
    assert files(saved) == [weights(saved).name, "vermouth.json"]
    assert torch.equal(Vermouth.load(saved, "cpu", **parts).embed(photos()), model.embed(photos()))


def test_a_model_of_version_0_2_still_loads(model, parts, saved):
    card = json.loads((saved / "vermouth.json").read_text())
    later = ("kind", "training", "protocol", "normalise")
    card = {key: value for key, value in card.items() if key not in later} | {"format": 1}
    (saved / "vermouth.json").write_text(json.dumps(card))
    weights(saved).rename(saved / "model.safetensors")
    assert torch.equal(Vermouth.load(saved, "cpu", **parts).embed(photos()), model.embed(photos()))


def test_push_to_hub_writes_a_page_and_from_pretrained_reads_it(model, parts, tmp_path, monkeypatch):
    def upload(self, *, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model.push_to_hub("me/mine")
    page = (tmp_path / "hub/README.md").read_text()
    assert "| backbone | toybox | Apache-2.0 |" in page and "library_name: vermouth" in page
    assert 'open_model("me/mine")' in page.replace("'", '"')
    again = Vermouth.from_pretrained(tmp_path / "hub", device="cpu", **parts)
    assert torch.equal(again.embed(photos()), model.embed(photos()))


def test_threads_agree_where_the_caller_has_lowered_the_precision(toybox):
    "The flags belong to the process: a part that ran outside of `frozen` would depend on what other threads do."
    photos = [item.image for item in Toybox("photo", n=6, seed=5)]
    before = torch.get_float32_matmul_precision()
    expected = [toybox.classify(photo, ["cat", "duck"], [""]) for photo in photos]
    try:
        torch.set_float32_matmul_precision("medium")
        # a thread does not take over the number of torch's threads, which decides how a convolution is computed
        with ThreadPoolExecutor(6, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
            found = list(pool.map(lambda photo: toybox.classify(photo, ["cat", "duck"], [""]), photos))
        alone = [toybox.classify(photo, ["cat", "duck"], [""]) for photo in photos]
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other, third in zip(expected, found, alone):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_a_head_is_asked_with_the_scale_it_was_trained_with(toybox, photos, tmp_path):
    names = ["cat", "duck", "car"]
    before = toybox.classify(photos, names, prompts=[""] * len(photos))
    try:
        toybox.logits = {"scale": 1.0, "temperature": 0.2}
        toybox.save(tmp_path)
        flat = toybox.classify(photos, names, prompts=[""] * len(photos))
    finally:
        toybox.logits = Vermouth.logits
    again = Vermouth.load(tmp_path, "cpu")
    assert again.logits == {"scale": 1.0, "temperature": 0.2}
    assert torch.allclose(again.classify(photos, names, prompts=[""] * len(photos)), flat, atol=1e-6)
    assert (flat.max(1).values < before.max(1).values).all(), "5 instead of 23 times the cosines"
    card = json.loads((tmp_path / "vermouth.json").read_text())
    del card["logits"]
    (tmp_path / "vermouth.json").write_text(json.dumps(card))
    assert Vermouth.load(tmp_path, "cpu").logits == Vermouth.logits, "a card of before"
