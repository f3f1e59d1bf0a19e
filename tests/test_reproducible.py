"The same numbers again: in a fresh process, with other batch sizes and other thread counts."

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sd_layout import write_folder
from small_tables import tables

from vermouth.backbone import load_backbone
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("fresh_process.py")
SETTINGS = ["32,1", "5,1", "32,2", "7,2"]  # batch size and threads


@pytest.fixture(scope="module")
def model():
    return Vermouth.build("toybox", device="cpu", uhead="pico", seed=1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def place(model, images, tmp_path_factory):
    "A folder with a backbone, a model and images."
    folder = tmp_path_factory.mktemp("fresh")
    write_folder(folder / "sd1", "sd1")
    model.save(folder / "model")
    torch.save(images, folder / "x.pt")
    return folder


@pytest.fixture(scope="module")
def elsewhere(place, tmp_path_factory):
    "What one new process finds, in another folder and with two threads; and what it says, until it has features."
    words = [sys.executable, str(SCRIPT), str(place), *SETTINGS]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    cwd = tmp_path_factory.mktemp("elsewhere")
    run = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return torch.load(place / "found.pt") | {"said": run.stdout + run.stderr.partition("features\n")[0]}


def test_a_fresh_process_gives_the_same_features(elsewhere, place, images):
    assert not elsewhere["said"]
    for a, b in zip(elsewhere["features"], load_backbone(place / "sd1", "cpu").features(images, "cat", size="keep")):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_a_fresh_process_gives_the_same_bytes(elsewhere, model):
    assert torch.equal(elsewhere["embedded"][0], model.embed([x.image for x in Toybox("photo", n=3, seed=5)]))


def test_the_shipped_model_loads_anywhere(elsewhere):
    shipped = Vermouth.load("toybox", "cpu")
    assert shipped.expert.name == "toybox" and shipped.captioner.name == "toybox" and not shipped.training
    assert torch.equal(elsewhere["embedded"][1], shipped.embed([x.image for x in Toybox("photo", n=3, seed=5)]))


def test_the_same_settings_give_the_same_numbers_in_another_process(elsewhere, model):
    assert tables(model, SETTINGS[0]) == {SETTINGS[0]: elsewhere["tables"][SETTINGS[0]]}


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_batch_size_and_threads_change_no_table(elsewhere, setting):
    first, other = elsewhere["tables"][SETTINGS[0]], elsewhere["tables"][setting]
    assert other.keys() == first.keys() and len(first) >= 5
    different = {name: value for name, value in other.items() if abs(value - first[name]) >= 0.001}
    assert different == {}, f"{first} before"
