"Kills of train and run, at any moment: what is finished is kept, and the next run ends as an undisturbed one does."

import json
import os
import random
import signal
import time
from pathlib import Path

import nbformat
import pytest
from conftest import COUNTS
from photo_folders import run_forked
from store_helpers import run_alone

from vermouth.app.run import run_pages

TRAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a forked process has no others
from vermouth.app.train import train_model
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import open_model
from vermouth.zoo.saving import read_card, read_state

home, dice = Path(sys.argv[1]), random.Random(0)
for i, item in enumerate(Toybox("photo", split="unseen", n=64, seed=4)):
    if item.label < 12:
        (home / "photos" / item.name).mkdir(parents=True, exist_ok=True)
        item.image.save(home / "photos" / item.name / f"{i}.png")
model = open_model("efficientnet_lite0", "cpu")

def make(out):
    train_model("classify", home / "photos", home / out, model, quiet=True, head="linear")

def digest(out):
    card = read_card(home / out)
    read_state(home / out, card)
    return card["weights"]

began = time.perf_counter()
make("whole")
took, kills, early = time.perf_counter() - began, 0, 0
while kills < 6:
    if not (pid := os.fork()):
        make("mine")
        os._exit(0)
    time.sleep(dice.uniform(0, 1) * took)
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        assert digest("mine") == digest("whole")
    except VermouthError as error:
        assert "vermouth.json is missing" in str(error), error
        early += 1
make("mine")
assert digest("mine") == digest("whole")
print(json.dumps([kills, early]))
"""


def test_training_that_is_killed(tmp_path):
    kills, early = json.loads(run_alone(TRAIN, tmp_path).splitlines()[-1])
    assert kills == 6 and early
    COUNTS["kills survived"] += kills


PAGE = """from pathlib import Path
Path(out_dir).mkdir(exist_ok=True)
with (Path(out_dir) / "rows").open("a") as f: f.write("NAME\\n")"""


@pytest.fixture
def pages(tmp_path):
    for name in ("10_first", "11_second"):
        cells = [nbformat.v4.new_code_cell(text) for text in ("out_dir = 'results'", PAGE.replace("NAME", name))]
        page = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"display_name": "", "name": "python3"}})
        page.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(page, tmp_path / f"{name}.ipynb")
    return sorted(tmp_path.glob("*.ipynb"))


def test_pages_whose_run_is_killed(pages, tmp_path):
    dice, kills, out, results = random.Random(1), 0, tmp_path / "out", tmp_path / "results"

    def work():
        os.setsid()
        assert all(page["ok"] for page in run_pages(pages, {}, out, results))

    for _ in range(4):
        pid = run_forked(work)
        time.sleep(dice.uniform(0.2, 3))
        os.killpg(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    ended = list(run_pages(pages, {}, out, results))
    assert [page["ok"] for page in ended] == [True, True] and all(page["skipped"] for page in run_pages(pages, {}, out, results))
    for page in pages:
        done = nbformat.read(out / page.name, 4)
        assert all(cell.execution_count for cell in done.cells)
    assert set(Path(results, "rows").read_text().split()) == {page.stem for page in pages} and kills
    COUNTS["kills survived"] += kills
