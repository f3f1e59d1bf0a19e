"""Few-shot classification: the protocol, and the results page on Toybox and on the real Caltech101 pack where it is."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from page_runs import page_text, run_page, without_differences
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score

from vermouth import baselines
from vermouth.baselines import store_name
from vermouth.data.fewshot import load_fewshot
from vermouth.data.items import Item
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth
from vermouth.tasks.fewshot import (
    few_shot_accuracy,
    oracle_prompts,
    read_study,
    score_test_set,
    study_items,
    train_few_shot,
)

DATA = os.environ.get("VERMOUTH_DATA")


@pytest.fixture(scope="module")
def study():
    "A model, data, and what it read: four shots of two seeds."
    model, data = Vermouth.build(uhead="pico"), load_fewshot(test_per_class=3)
    return model, data, read_study(model, study_items(data, (4,), (1, 2)))


@pytest.mark.slow
def test_a_run_is_repeatable_starts_anew_and_agrees_with_scikit_learn(study):
    model, data, reading = study
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = train_few_shot(model, data, reading, 4, 1, epochs=5, lr=1e-3)
    scores, labels = score_test_set(trained, data, reading)
    again = few_shot_accuracy(model, data, 4, 1, epochs=5, lr=1e-3, reading=reading)
    assert again == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert labels == [item.label for item in data.test]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model given is left as it is"
    other = train_few_shot(model, data, reading, 4, 2, epochs=5, lr=1e-3)
    assert not torch.equal(trained.uhead.pool.out.weight, other.uhead.pool.out.weight)


def test_only_oracle_prompts_depend_on_labels(study):
    model, data, reading = study
    relabelled = [replace(item, label=(item.label + 1) % 12, name="cheat") for item in reading.items[:6]]
    again = read_study(model, relabelled)
    assert again.prompts == reading.prompts[:6]
    for a, b in zip(again.features.batch(range(6)), reading.features.batch(range(6)), strict=True):
        # the size of the batch may move the last bits of float16
        assert torch.allclose(a.float(), b.float(), rtol=2e-3, atol=1e-4 * float(b.abs().max()))
    assert oracle_prompts(data, data.test[:1]) == [f"a photo of {data.names[0]}"]


def test_a_bad_test_image_is_skipped_and_the_rest_is_read(study, tmp_path, capsys):
    model, data, _ = study
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    items = [*data.test[:2], Item(tmp_path / "bad.jpg", 0, "cat", "bad.jpg")]
    reading = read_study(model, items, out=tmp_path / "stores")
    assert len(reading.items) == len(reading.prompts) == 2
    assert "left out: bad.jpg" in capsys.readouterr().out


def test_another_setting_is_another_store(study):
    model, data, _ = study
    prompts = None, ["cat"] * len(data.test), ["dog"] * len(data.test)
    names = {store_name(model, data.test, p) for p in prompts}
    assert len(names | {store_name(model, data.test[1:], None)}) == 4


def test_networks_are_used_where_their_weights_are(tmp_path, monkeypatch):
    sources = {"here": "resnet10t.c3_in1k", "absent": "vit_base_patch16_224.dino"}
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")

    def cached(repo, name):
        return str(tmp_path / name) if "resnet10t" in repo else None

    monkeypatch.setattr(baselines, "NETWORKS", sources)
    monkeypatch.setattr(baselines, "try_to_load_from_cache", cached)
    monkeypatch.setattr("vermouth.expert.hf_hub_download", lambda repo, name: str(tmp_path / name))
    found, absent = baselines.load_networks("auto", "caltech101", device="cpu")
    embed = baselines.network_embedders(found)["here"]
    assert embed([item.image for item in Toybox("photo", n=3)], [""] * 3).shape == (3, 512)
    command = "hf download timm/vit_base_patch16_224.dino model.safetensors"
    assert absent == {"absent": f"no weights here; fetch them with: {command}"}


METHODS = {
    "Vermouth",
    "Vermouth without expert",
    "U-head on random weights",
    "U-head on random weights without expert",
    "oracle: prompts from the true label",
    "linear probe on the same features",
    "training-free nearest class mean",
    "expert only, linear probe",
    "CLIP linear probe",
    "expert, trained bottleneck",
    "CLIP, trained bottleneck",
    "CLIP zero-shot",
    "caption only, linear probe",
    "caption only",
}
OTHER = {"EfficientNet-Lite0, linear probe", "EfficientNet-Lite0, trained bottleneck"}


@pytest.mark.slow
def test_the_page_shows_every_method_on_toybox_as_nbdev_test_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    shown = page_text(run_page("11_fewshot.ipynb", tmp_path, shots=[1], seed=[1], limit=12))
    assert all(f"<th>{method}</th>" in shown for method in METHODS | OTHER)
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"], "nothing is left where committed results lie"


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
def test_the_page_reads_caltech101(tmp_path):
    root = str(Path(DATA) / "fewshot")
    few = {"shots": 1, "seed": 1, "epochs": 1, "limit": 24, "size": 32, "protocol": "ours"}
    shown = page_text(run_page("11_fewshot.ipynb", tmp_path, dataset="caltech101", root=root, **few))
    rows = pd.read_csv(tmp_path / "results" / "11_fewshot.csv")
    beside = {*baselines.NETWORKS} - {"EfficientNet-Lite0"}  # which is the expert of photographs
    left_out = {name for name in beside if f"{name}: left out" in shown}
    probed = {method.removesuffix(", linear probe") for method in rows.method} & beside
    assert set(rows.method) >= METHODS
    assert len(left_out | probed) == len(beside) == 6
    assert (rows.n == 24).all()
    assert without_differences(rows).value.between(0, 1).all()
    assert rows.setting.str.contains("shots=").all()
    assert "1 of 1 shot sets from index files" in shown
