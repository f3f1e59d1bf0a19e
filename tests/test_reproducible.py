"The same tables again: in fresh processes, with other batch sizes and other thread counts."
import json
import os
import subprocess
import sys

import pytest

TABLE = """
import json, sys, tempfile
from pathlib import Path
import torch
from vermouth.baselines import store_items
from vermouth.data.fewshot import load_fewshot
from vermouth.data.sbir import load_sbir
from vermouth.items import embed_items
from vermouth.model import Vermouth
from vermouth.tasks.fewshot import Reading, few_shot_accuracy, study_items
from vermouth.tasks.sbir import evaluate, train_sbir

batch, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
model, folder = Vermouth.build(uhead="pico"), Path(tempfile.mkdtemp())
data = load_fewshot(limit=60)
items = study_items(data, [1, 4], [1])
store = store_items(model, items, folder / "fewshot", batch_size=batch, quiet=True)
reading = Reading(store, items, store.prompts)
rows = {f"few-shot, {k} shots": few_shot_accuracy(model, data, k, 1, epochs=10, lr=1e-3, reading=reading) for k in (1, 4)}

split = load_sbir(shots=1, limit=48)
store = store_items(model, [*split.train_sketches, *split.train_photos], folder / "sbir", batch_size=batch, quiet=True)
train_sbir(model, split, epochs=5, lr=1e-3, quiet=True, features=store)
queries, gallery = (embed_items(lambda images, prompts: model.embed(images, prompts, batch), items, model.prompts([item.image for item in items])) for items in (split.test_sketches, split.test_photos))
print(json.dumps(rows | evaluate(queries, gallery, split, ks=(10,))))
"""


def table(batch, threads):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", TABLE, str(batch), str(threads)], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def once(): return table(32, 1)


def test_the_same_settings_give_the_same_numbers(once):
    assert table(32, 1) == once


@pytest.mark.parametrize("batch,threads", [(5, 1), (32, 2), (7, 2)])
def test_batch_size_and_threads_change_no_table(once, batch, threads):
    other = table(batch, threads)
    assert other.keys() == once.keys() and len(once) >= 5
    assert {name: value for name, value in other.items() if abs(value - once[name]) >= 0.001} == {}, f"{once} before"
