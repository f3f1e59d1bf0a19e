"Kills of train and run: what is finished is kept, and the next run ends as an undisturbed one does."

import os
import random
import signal
import time

import nbformat
import pytest
from conftest import COUNTS
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


def test_training_that_is_killed_at_any_file(tmp_path, monkeypatch):
    "Just before one of the files that it writes gets its name: the vectors, the weights, the card."
    for i, item in enumerate(Toybox("photo", n=12, seed=4)):
        (tmp_path / f"photos/class{i % 2}").mkdir(parents=True, exist_ok=True)
        item.image.save(tmp_path / f"photos/class{i % 2}/{i}.png")
    model, kills = open_model("efficientnet_lite0", "cpu"), 0

    def train(out):
        train_model("classify", tmp_path / "photos", tmp_path / out, model, quiet=True, head="linear")

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
    COUNTS["kills survived"] += kills
    assert trained_digest(tmp_path / "killed") == trained_digest(tmp_path / "undisturbed")


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
    dice, kills, out, results = random.Random(1), 0, tmp_path / "out", tmp_path / "results"

    def work():
        os.setsid()
        assert all(page["ok"] for page in run_pages(pages, {}, out, results))

    for _ in range(4):
        pid = run_forked(work)
        time.sleep(dice.uniform(0.3, 2))
        os.killpg(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    for skipped in (False, True):
        ended = list(run_pages(pages, {}, out, results))
        assert [page["ok"] for page in ended] == [True, True]
        assert not skipped or all(page["skipped"] for page in ended)
    for page in pages:
        assert all(cell.execution_count for cell in nbformat.read(out / page.name, 4).cells if cell.source)
    assert set((results / "rows").read_text().split()) == {page.stem for page in pages} and kills
    COUNTS["kills survived"] += kills
