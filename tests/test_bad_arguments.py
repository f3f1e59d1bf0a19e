"Class names, settings and tensors that are wrong or unusual: one sentence each, or they work."

import os
import warnings

import numpy as np
import pytest
import torch
from disks import run_child
from program import CLASSIFY, EXTRACT

from vermouth.core import VermouthError
from vermouth.text import make_prompts

# Class names


@pytest.fixture
def folder(program, photos):
    for i, image in enumerate(photos[:3]):
        image.save(program.folder / f"{i}.png")
    return program.folder


def classify(names):
    return ["classify", ".", "--names", names, "--json", "--batch-size", "1"]


@pytest.mark.parametrize(
    "names, sentence",
    [
        ("zyzzyva,cat", "CLIP does not know 'zyzzyva', and reads"),
        ("cat," + "fish " * 500, "1 longer than CLIP's"),
        (
            "cat 猫,fish кошка,tree قطة,bus γάτα,car חתול,dog 🐈",
            "CLIP does not know '猫', 'кошка', 'قطة', 'γάτα', 'חתול' and others",
        ),
    ],
    ids=["unknown word", "500 words", "other alphabets"],
)
def test_a_name_that_clip_cannot_read_is_reported_once(program, folder, names, sentence):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        document = program(*classify(names))
    messages = [str(w.message) for w in caught if str(w.message).startswith("texts:")]
    assert len(messages) == 1 and sentence in messages[0]
    assert len(document["images"]) == 3 and not document["set_aside"]


@pytest.mark.parametrize(
    "names, sentence",
    [
        ("cat, dog ,cat", "names: 'cat' stands at 0 and at 2."),
        ("tall_tree,tall  tree", "names: 'tall tree' stands at 0 and at 1."),
        ("猫,кошка", "names: '猫' and 'кошка' look the same to this CLIP."),
        ("{},{0}", "names: '{}' and '{0}' look the same to this CLIP."),
        ("cat", "names='cat': one name, which everything would get"),
        ("cat,,dog", "names: number 1 is empty"),
        ("cat," + os.fsdecode(b"caf\xe9"), "is not text in UTF-8"),
    ],
)
def test_names_that_cannot_classify_are_refused(program, folder, names, sentence):
    program.refuses(*classify(names), says=sentence)


def test_one_name_cannot_segment(program, folder):
    program.refuses("segment", "0.png", "--names", "cat", "--out", "mask.png", says="names='cat': one name")


def test_braces_in_a_name_are_text(program, folder):
    document = program(*classify("cat {},fish {0},tree {cat},%s"))
    assert all(abs(sum(image["probabilities"].values()) - 1) < 1e-4 for image in document["images"])


def test_a_shell_sees_one_sentence_for_a_long_name(photos, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    words = ["classify", "photo.png", "--names", "cat," + "fish " * 500]
    result = run_child(words, lambda: os.chdir(tmp_path))
    assert (result.exit_code, result.stdout.count("\n"), result.stderr.count("\n")) == (0, 1, 2)
    warned, chosen = result.stderr.splitlines()
    assert warned.startswith("texts: 1 longer than CLIP's 32 tokens, the end is cut.")
    assert chosen.startswith("model: toybox (auto: no trained model, denoiser or CLIP")


# Settings


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["-p", "timesteps", "1000"], "timesteps=1000: give one or more whole numbers from 0 to 999"),
        (["-p", "timesteps", "[200, -1]"], "timesteps=[200, -1]"),
        (["-p", "timesteps", "200.5"], "timesteps=200.5"),
        (["-p", "seed", "lucky"], "seed='lucky': pass a whole number"),
        (["-p", "seed", str(2**70)], "pass a whole number"),
        (["--size", "0"], "size=0: pass a side in pixels from 1"),
        (["--size", "-8"], "size=-8: pass a side"),
        (["--size", "1000000"], "size=1000000: pass a side"),
        (["--dtype", "float17", "--model", "./toybox"], "dtype='float17': unknown"),
        (["--device", "cuda:99", "--model", "./toybox"], "device='cuda:99': not usable here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_refused(program, photos, words, sentence):
    (program.folder / "in").mkdir()
    photos[0].save(program.folder / "in/0.png")
    program.refuses(*EXTRACT, "--json", *words, says=sentence)


def test_empty_batches_are_refused(program, folder):
    program.refuses(*CLASSIFY, "--batch-size", "0", says="batch_size=0")


# Tensors and arrays


@pytest.mark.parametrize(
    "images, sentence",
    [
        (torch.full((3, 64, 64), float("nan")), "images: a tensor with NaN"),
        (torch.full((3, 64, 64), float("inf")), "images: a tensor with NaN or infinite"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "images: a tensor of torch.uint8"),
        (np.zeros((64, 64, 3)), "images: an array of float64"),
        ([np.ones((64, 64, 3), np.float32)], "images: an array of float32"),
        (torch.full((3, 64, 64), 255.0), "images: a tensor with values from 255 to 255. Scale it to [-1, 1]"),
        (torch.zeros(64, 64, 3), "images: a tensor of shape (64, 64, 3)"),
        (torch.tensor(0.5), "images: a tensor of shape ()"),
    ],
    ids=["NaN", "inf", "bytes", "float64", "float32 array", "0…255", "channels last", "a number"],
)
def test_a_tensor_that_is_no_image_is_refused(toybox, images, sentence):
    with pytest.raises(VermouthError) as caught:
        toybox.embed(images)
    assert sentence in str(caught.value)


def test_labels_that_are_no_classes_are_refused(photos):
    with pytest.raises(VermouthError, match="labels: 1 is not an index of 1 names"):
        make_prompts("oracle", photos, names=["cat"], labels=[0, 1, 0, 0, 0])
