"The paper's protocol in the three tasks: what reaches the training, what class names become, and the pages."

import pytest
import torch
import yaml
from conftest import ROOT
from page_runs import page_rows
from torch.nn import functional as F

from vermouth.data.fewshot import load_fewshot
from vermouth.data.sbir import load_sbir
from vermouth.data.segmentation import load_segmentation
from vermouth.experiments.tables import by_protocol
from vermouth.metrics import retrieval_metrics
from vermouth.model import Vermouth
from vermouth.tasks import fewshot, sbir, segmentation
from vermouth.text import templates_for


class Stopped(Exception):
    "Training was reached."


@pytest.fixture
def trained_with(monkeypatch):
    "The arguments that the tasks hand to `train_head`, which is not run."
    seen = {}

    def record(head, features, targets, classes, groups=None, epochs=1, batch_size=64, **options):
        seen.update(options, epochs=epochs, batch_size=batch_size, classes=classes, features=features)
        raise Stopped

    for task in (sbir, fewshot, segmentation):
        monkeypatch.setattr(task, "train_head", record)
    return seen


@pytest.fixture(scope="module")
def published():
    model = Vermouth.build(uhead="pico", protocol="paper", normalise=True)
    model.add_segmentation_head()
    return model


def some(seen, *names):
    return {name: seen[name] for name in names if name in seen}


def test_retrieval_uses_every_image_in_steps_of_both_kinds(published, trained_with):
    split = load_sbir("toybox", shots=1, limit=4)
    prompts = [""] * len([*split.train_sketches, *split.train_photos])
    with pytest.raises(Stopped):
        sbir.train_sbir(published, split, prompts, quiet=True)
    assert some(trained_with, "held", "sizes", "lr") == {"held": 0, "sizes": (32, 32), "lr": 1e-4}
    assert trained_with["scale"] / trained_with["temperature"] == pytest.approx(23.026)
    with pytest.raises(Stopped):
        sbir.train_sbir(published, split, prompts, quiet=True, protocol="ours", held=0.5)
    assert trained_with["held"] == 0.5


def test_few_shot_training_is_the_published_one(published, trained_with):
    data = load_fewshot(test_per_class=1)
    reading = fewshot.read_study(published, fewshot.study_items(data, (1,), (1,)), [""] * 24)
    assert reading.flipped is not None
    with pytest.raises(Stopped):
        fewshot.train_few_shot(published, data, reading, 1, 1)
    wanted = {"scale": 1, "temperature": 0.2, "clip": 1, "held": 0, "lr": 1e-4, "epochs": 100, "batch_size": 64}
    assert some(trained_with, *wanted) == wanted
    assert isinstance(trained_with["features"], fewshot.DrawnViews)


def test_few_shot_names_are_hidden_states_before_the_projection(published):
    data, clip = load_fewshot(test_per_class=1), published.clip
    tokens = clip.tokenizer([f"a photo of {name}" for name in data.names])
    projected = clip.model.encode_text(tokens).float()
    hidden = fewshot.few_shot_classes(published, data)
    back = F.normalize(hidden @ clip.model.text_projection, dim=1)
    assert torch.allclose(back, F.normalize(projected, dim=1), atol=1e-5)
    assert len(fewshot.few_shot_text("paper", "caltech101")["templates"]) == len(templates_for("caltech101")) == 34


def test_segmentation_training_is_the_published_one(published, trained_with):
    split = load_segmentation(shots=1, test_scenes=2)
    with pytest.raises(Stopped):
        segmentation.train_segmentation(published, split, [""] * len(split.train), quiet=True)
    wanted = {"scale": 1, "temperature": 0.02, "lr": 1e-4, "held": 0, "batch_size": 16}
    assert some(trained_with, *wanted) == wanted
    assert trained_with["epochs"] == round(80_000 * 16 / len(split.train))
    assert published.segmentation_head.dropout == 0.1


def test_masks_in_prompts_are_marked(published):
    split = load_segmentation(shots=1, test_scenes=2)
    [prompt, _] = segmentation.mask_prompts(split.test, split)
    named = {split.names[k] for k in set(split.test[0].mask.ravel().tolist()) - {split.ignore_index}}
    assert set(prompt.removeprefix("a photo of ").split(" and ")) == named
    assert segmentation.ORACLE.startswith("oracle"), "the page beside the paper leaves such rows out"


def test_class_means_weigh_classes_alike():
    queries, gallery = torch.eye(3)[[0, 0, 0, 1]], torch.eye(3)[[0, 2, 2]]
    numbers = retrieval_metrics(queries, gallery, [0, 0, 0, 1], [0, 2, 1], (), interpolated=True, by_class=True)
    # three queries of class 0 find theirs first; the one of class 1 has three equal photos, and its own stands last
    assert numbers["mAP@all"] == pytest.approx((3 * 1 + 1 / 3) / 4)
    assert numbers["mAP@all, class mean"] == pytest.approx((1 + 1 / 3) / 2)


SMALL = {
    "10_sbir.ipynb": {"shots": 1, "epochs": 1, "limit": 12, "size": 32, "seed": 0, "expert": ""},
    "11_fewshot.ipynb": {"shots": [1], "seed": [1], "epochs": 1, "limit": 12, "size": 32},
    "12_segmentation.ipynb": {"shots": 1, "epochs": 1, "limit": 2, "size": 32, "seed": 0, "expert": ""},
}


@pytest.mark.slow
@pytest.mark.parametrize("page", SMALL)
def test_a_page_runs_by_the_published_protocol_and_says_so(page, tmp_path):
    rows = page_rows(page, tmp_path, protocol="paper", **SMALL[page])
    assert rows.setting.str.contains("protocol=paper").all()
    assert rows[~rows.method.str.contains(" − ")].value.between(0, 1).all()
    assert "Vermouth" in by_protocol(rows, rows.metric.iloc[0])["paper"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation_coco_stuff171", "segmentation_coco_stuff171_segmentor"])
def test_both_released_states_of_segmentation_run_on_toybox(name, tmp_path):
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    toys = {"model": "toybox", "captioner": "toybox", "dataset": "toybox", "device": "cpu", "dtype": "float32"}
    toys |= {"expert": settings["expert"] and "toybox", "networks": [], "shots": 1, "epochs": 1, "limit": 2}
    toys["size"] = 32
    rows = page_rows("12_segmentation.ipynb", tmp_path, **settings | toys)
    expected = f"t={settings['timesteps'][0]} " + (f".*decoder={settings['decoder']} " if "decoder" in settings else "")
    assert rows.setting.str.contains(expected).all() and rows.value.between(0, 1).all()
