"""Kills of train and run: what is finished is kept, and the next run ends as an undisturbed one does.

VERMOUTH_KILLS=20 makes this many kills of each command, here and in the tests of stores and indexes.
"""

import json
import os
import random
import shutil
import signal
import time

import nbformat
import pytest
from conftest import COUNTS, KILLS
from photo_folders import run_forked

from vermouth.app.run import run_pages
from vermouth.app.train import train_model
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import open_model
from vermouth.zoo.saving import read_card, read_state

# train


class Killed(BaseException):
    "Nothing catches it, as nothing catches a kill."


def trained_digest(folder):
    read_state(folder, card := read_card(folder))
    return card["weights"]


@pytest.fixture
def train(tmp_path):
    "Train a linear classifier of two classes; the argument names the folder of the model."
    for i, item in enumerate(Toybox("photo", n=12, seed=4)):
        (tmp_path / f"photos/class{i % 2}").mkdir(parents=True, exist_ok=True)
        item.image.save(tmp_path / f"photos/class{i % 2}/{i}.png")
    model = open_model("efficientnet_lite0", "cpu")

    def run(out):
        train_model("classify", tmp_path / "photos", tmp_path / out, model, quiet=True, head="linear")

    return run


def test_training_that_is_killed_at_any_file(train, tmp_path, monkeypatch):
    "Just before one of the files that it writes gets its name: the vectors, the weights, the card."
    kills = 0
    train("undisturbed")
    while True:
        left = iter(range(kills, -1, -1))  # files that this run may still write

        def replace(*names, real=os.replace, left=left):
            if not next(left):
                raise Killed
            real(*names)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            try:
                train("killed")
                break
            except Killed:
                kills += 1
        with pytest.raises(VermouthError, match="vermouth.json is missing"):
            trained_digest(tmp_path / "killed")
    assert kills >= 3
    assert trained_digest(tmp_path / "killed") == trained_digest(tmp_path / "undisturbed")


def test_training_that_is_killed_at_any_moment(train, tmp_path):
    "It leaves no model or the whole one, and the vectors that it has written are not computed again."
    dice, out, kills, early = random.Random(0), tmp_path / "killed", 0, 0
    train("warm")
    began = time.perf_counter()
    train("undisturbed")
    took = time.perf_counter() - began
    while kills < KILLS:
        written = {path: path.stat().st_ino for path in out.glob("features/*.safetensors")}
        pid = run_forked(lambda: train("killed"))
        time.sleep(dice.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        assert all(path.stat().st_ino == inode for path, inode in written.items())
        try:
            assert trained_digest(out) == trained_digest(tmp_path / "undisturbed")
            shutil.rmtree(out)
        except VermouthError as error:
            assert "vermouth.json is missing" in str(error)
            early += os.WIFSIGNALED(status)
    assert early, "all kills came after the model was there"
    COUNTS["kills of train"] += kills
    train("killed")
    assert trained_digest(out) == trained_digest(tmp_path / "undisturbed")


# run

PAGE = """from pathlib import Path
Path(out_dir).mkdir(exist_ok=True)
with (Path(out_dir) / "rows").open("a") as f: f.write("NAME\\n")"""
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


@pytest.fixture
def pages(tmp_path):
    for name in ("10_first", "11_second"):
        cells = [nbformat.v4.new_code_cell(text) for text in ("out_dir = 'results'", PAGE.replace("NAME", name))]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / f"{name}.ipynb")
    return sorted(tmp_path.glob("*.ipynb"))


def test_pages_whose_run_is_killed_at_any_moment(pages, tmp_path):
    "What has ended well is known as such, and is whole, after each kill."
    dice, kills, out, results = random.Random(1), 0, tmp_path / "out", tmp_path / "results"

    def work():
        os.setsid()
        assert all(page["ok"] for page in run_pages(pages, {}, out, results))

    def ended():
        state = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
        return {name for name, page in state.items() if page["ok"]}

    while kills < KILLS:
        before = ended()
        pid = run_forked(work)
        time.sleep(dice.uniform(0.3, 3))
        os.killpg(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert before <= ended()
        for name in ended():
            assert all(cell.execution_count for cell in nbformat.read(out / f"{name}.ipynb", 4).cells if cell.source)
        if len(ended()) == len(pages):
            shutil.rmtree(out)
    COUNTS["kills of run"] += kills
    for skipped in (False, True):
        pages_ended = list(run_pages(pages, {}, out, results))
        assert [page["ok"] for page in pages_ended] == [True, True]
        assert not skipped or all(page["skipped"] for page in pages_ended)
    assert set((results / "rows").read_text().split()) == {page.stem for page in pages}
