"""A small few-shot and a small retrieval table as JSON, for test_reproducible: python small_tables.py 32,1 5,1, each a
batch size and a number of threads; one line each."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from vermouth.baselines import embed_items, store_items
from vermouth.data.fewshot import load_fewshot
from vermouth.data.sbir import load_sbir
from vermouth.model import Vermouth
from vermouth.tasks.fewshot import StudyFeatures, few_shot_accuracy, study_items
from vermouth.tasks.sbir import evaluate_sbir, train_sbir


def few_shot_table(model, folder, batch_size):
    data = load_fewshot(limit=30)
    items = study_items(data, [1, 4], [1])
    store = store_items(model, items, folder, batch_size=batch_size, quiet=True)
    reading = StudyFeatures(store, items, store.prompts)
    table = {}
    for k in (1, 4):
        table[f"few-shot, {k} shots"] = few_shot_accuracy(model, data, k, 1, epochs=10, lr=1e-3, reading=reading)
    return table


def sbir_table(model, folder, batch_size):
    split = load_sbir(shots=1, limit=30)
    items = [*split.train_sketches, *split.train_photos]
    store = store_items(model, items, folder, batch_size=batch_size, quiet=True)
    train_sbir(model, split, epochs=5, lr=1e-3, quiet=True, features=store)

    def embed(images, prompts):
        return model.embed(images, prompts, batch_size)

    queries, gallery = (
        embed_items(embed, items, model.prompts([item.image for item in items]))
        for items in (split.test_sketches, split.test_photos)
    )
    return evaluate_sbir(queries, gallery, split, ks=(10,))


if __name__ == "__main__":
    loaded = Vermouth.build(uhead="pico")
    frozen = {name: getattr(loaded, name) for name in ("backbone", "clip", "captioner", "expert")}
    for setting in sys.argv[1:]:
        batch_size, threads = map(int, setting.split(","))
        torch.set_num_threads(threads)
        # weights are drawn anew, so that no setting profits from the training of another
        model, folder = Vermouth.build(uhead="pico", **frozen), Path(tempfile.mkdtemp())
        table = few_shot_table(model, folder / "fewshot", batch_size)
        print(json.dumps(table | sbir_table(model, folder / "sbir", batch_size)))
