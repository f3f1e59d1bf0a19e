"""Segmentation: the head, labels of any image, names, training, memory, and the results page."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from page_runs import page_rows, without_differences
from photo_folders import found_forked, peak_memory
from PIL import Image
from sklearn.metrics import jaccard_score

from vermouth.core import VermouthError
from vermouth.data.segmentation import class_names, load_segmentation
from vermouth.data.toybox import LABELS, Toybox
from vermouth.model import Vermouth
from vermouth.seghead import DenseHead
from vermouth.tasks.segmentation import confusion_counts, model_labeller, run_segmentation, segmentation_scores
from vermouth.visualize import overlay

DATA = os.environ.get("VERMOUTH_DATA")
real = pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")


@pytest.fixture(scope="module")
def model():
    model = Vermouth.build("toybox", device="cpu")
    model.add_segmentation_head()
    return model


@pytest.fixture(scope="module")
def scene():
    return Toybox("scene", n=2, seed=4)[1]


def test_the_paper_s_decoder_takes_any_size():
    head = DenseHead((1280, 1357, 1357, 960), 768)
    sizes = [(6, 9), (12, 18), (24, 36), (48, 72)]
    with torch.no_grad():
        out = head([torch.randn(1, c, *size) for c, size in zip(head.in_dims, sizes, strict=True)])
    assert out.shape == (1, 768, 96, 144)


def test_labels_have_the_image_s_own_size(model, scene, tmp_path):
    path, image = tmp_path / "x.png", scene.image.resize((150, 70))
    image.save(path)
    for given in (path, str(path), np.asarray(image)):
        labels = model.segment(given, ["sky", "a cat"])
        assert isinstance(labels, np.ndarray)
        assert labels.shape == (70, 150)
        assert labels.max() <= 1
    several = model.segment([scene.image, scene.image.resize((30, 90))], ["sky", "cat"])
    assert [m.shape for m in several] == [(64, 64), (90, 30)]
    assert overlay(path, labels, ["sky", "a cat"]).width > 150


def test_one_window_is_the_whole_image(model, scene):
    assert (model.segment(scene.image, LABELS, short=64) == model.segment(scene.image, LABELS)).all()


def test_all_windows_share_one_caption_of_the_whole_image(model, scene, monkeypatch):
    captioned = []

    def prompts(images, value_range=None):
        captioned.append(len(images))
        return ["a photo of sand"] * len(images)

    monkeypatch.setattr(model, "prompts", prompts)
    labels = model.segment(scene.image.resize((128, 64)), LABELS, short=64)
    assert labels.shape == (64, 128)
    assert captioned == [1]


def test_labels_depend_neither_on_the_order_of_names_nor_on_chunks(model, scene):
    names = list(LABELS)
    reverse = names[::-1]
    labels, again = model.segment(scene.image, names), model.segment(scene.image, reverse)
    found = sorted((reverse[k] for k in np.unique(again)), key=names.index)
    assert [names[k] for k in np.unique(labels)] == found
    assert (np.array(names)[labels] == np.array(reverse)[again]).mean() > 0.999
    assert (model.segment(scene.image, names, chunk=1) == labels).all()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "an empty list"),
        (["cat", ""], "number 1 is empty"),
        (["cat", "dog", "cat"], "'cat' stands at 0 and at 2"),
        ("cat", "one string"),
    ],
)
def test_bad_names_are_refused(model, scene, names, message):
    with pytest.raises(VermouthError, match=message):
        model.segment(scene.image, names)


def test_a_model_without_a_head_says_how_to_get_one(scene):
    with pytest.raises(VermouthError, match="it has no segmentation head. Train one with"):
        Vermouth.build("toybox", device="cpu").segment(scene.image, ["cat"])


@pytest.mark.slow
def test_training_helps_and_agrees_with_scikit_learn(model):
    split = load_segmentation(shots=2, test_scenes=24)
    prompts = [["a photo"] * len(split.train), ["a photo"] * len(split.test)]
    before = segmentation_scores(confusion_counts(model_labeller(model), split, prompts[1]), split)
    after = run_segmentation(model, split, prompts, epochs=2)
    assert after["pixel accuracy"] > before["pixel accuracy"] + 0.2
    assert after["mIoU seen"] > before["mIoU seen"]
    [found] = model_labeller(model)([i.image for i in split.test], prompts[1], [split.names])
    true, found = np.stack([i.mask for i in split.test]).ravel(), np.stack(found).ravel()
    labels = np.union1d(true, found)
    theirs = jaccard_score(true, found, labels=labels, average="macro", zero_division=0)
    assert after["mIoU"] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.slow
def test_847_names_on_512_pixels_need_little_memory_whole_and_in_windows(model):
    image, names = Image.effect_noise((512, 512), 60).convert("RGB"), class_names("ade847")

    def peaks():
        before = peak_memory()
        for options in ({}, {"short": 512, "overlap": 0.25}):
            labels = model.segment(image, names, **options)
            assert labels.shape == (512, 512)
            yield (peak_memory() - before) / 1e9

    whole, windows = found_forked(lambda: list(peaks()))
    assert 0 < whole < 3, f"{whole} GB beyond the model"
    assert 0 < windows < 3, f"{windows} GB beyond the model"


METHODS = {
    "Vermouth",
    "without expert",
    "random weights",
    "expert only",
    "cross-attention, untrained",
    "CLIP patches",
    "caption only",
    "majority class",
    "oracle: prompts from the mask",
}
# rows of the training's own names, with and without another frozen network
REGIONS = {"regions named by CLIP (ours)", "expert only, regions named by CLIP (ours)", "Vermouth+ (ours)"}
LITE = {"EfficientNet-Lite0 only", "EfficientNet-Lite0 only, fused with CLIP (ours)"}
FUSED = REGIONS | {"expert only, fused with CLIP (ours)"}
ONE = {"shots": 1, "epochs": 1, "size": 32, "protocol": "ours", "seed": 0}
METRICS = {"mIoU", "mIoU seen", "mIoU unseen", "harmonic mean", "pixel accuracy", "mIoU unseen alone"}


@pytest.mark.slow
def test_the_page_writes_every_method(tmp_path):
    rows = page_rows("12_segmentation.ipynb", tmp_path, **ONE, limit=6)
    rows = without_differences(rows)
    assert set(rows.method) == METHODS | REGIONS | LITE
    assert set(rows.metric) == METRICS
    assert (rows.n == 6).all()
    assert rows.value.between(0, 1).all() and (rows.low <= rows.high).all()
    assert (tmp_path / "results" / "12_segmentation.png").stat().st_size > 10_000


@pytest.mark.slow
@real
@pytest.mark.parametrize(
    ("dataset", "folder"), [("voc20", "VOCdevkit"), ("folder", "camvid"), ("ade150", "ADEChallengeData2016")]
)
def test_the_page_reads_photographs(dataset, folder, tmp_path):
    root = str(Path(DATA) / "seg" / folder)
    rows = page_rows("12_segmentation.ipynb", tmp_path, dataset=dataset, root=root, **ONE, limit=4)
    # this pack of ADE20K has no images to train on, so the head learns Toybox's names
    assert set(without_differences(rows).method) == (METHODS if dataset == "ade150" else METHODS | FUSED)


@pytest.mark.slow
@real
def test_a_head_is_tested_on_another_data_set_by_its_names_alone(tmp_path):
    root = str(Path(DATA) / "seg")
    few = ONE | {"limit": 4}
    rows = page_rows("12_segmentation.ipynb", tmp_path, dataset=["voc20", "ade150"], root=root, **few)
    assert set(rows.dataset) == {"ade150"}
    assert set(without_differences(rows).method) == METHODS
    assert rows.setting.str.endswith("trained on voc20").all()
