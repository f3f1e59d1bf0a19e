"A small few-shot and a small retrieval table, for test_reproducible."

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vermouth.baselines import embed_items, store_items
from vermouth.data.fewshot import load_fewshot
from vermouth.data.sbir import load_sbir
from vermouth.model import Vermouth
from vermouth.tasks.fewshot import StudyFeatures, few_shot_accuracy, study_items
from vermouth.tasks.sbir import evaluate_sbir, train_sbir


def few_shot_table(model, folder, batch_size):
    data = load_fewshot(limit=12)
    items = study_items(data, [1, 2], [1])
    store = store_items(model, items, folder, batch_size=batch_size, quiet=True)
    reading = StudyFeatures(store, items, store.prompts)
    table = {}
    for k in (1, 2):
        table[f"few-shot, {k} shots"] = few_shot_accuracy(model, data, k, 1, epochs=6, lr=1e-3, reading=reading)
    return table


def sbir_table(model, folder, batch_size):
    split = load_sbir(shots=1, limit=12)
    split = replace(split, train_sketches=split.train_sketches[::3], train_photos=split.train_photos[::3])
    items = [*split.train_sketches, *split.train_photos]
    store = store_items(model, items, folder, batch_size=batch_size, quiet=True)
    train_sbir(model, split, epochs=3, lr=1e-3, quiet=True, features=store)

    def embed(images, prompts):
        return model.embed(images, prompts, batch_size)

    queries, gallery = (
        embed_items(embed, items, model.prompts([item.image for item in items]))
        for items in (split.test_sketches, split.test_photos)
    )
    similarity = {f"similarity {i}": float(value) for i, value in enumerate((queries @ gallery.T).diagonal())}
    return evaluate_sbir(queries, gallery, split, ks=(10,)) | similarity


def tables(loaded, *settings):
    "Both tables for each setting, a batch size and a number of threads, with a model's frozen parts: values by name."
    frozen, found = {name: getattr(loaded, name) for name in ("backbone", "clip", "captioner", "expert")}, {}
    for setting in settings:
        batch_size, threads = map(int, setting.split(","))
        torch.set_num_threads(threads)
        # weights are drawn anew, so that no setting profits from the training of another
        model, folder = Vermouth.build(uhead="pico", **frozen), Path(tempfile.mkdtemp())
        table = few_shot_table(model, folder / "fewshot", batch_size)
        found[setting] = table | sbir_table(model, folder / "sbir", batch_size)
    return found
