"Stores and indexes on the hub, through datasets' own `push_to_hub`: the hub is a folder."

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset, load_from_disk
from fsspec.implementations.local import LocalFileSystem
from store_helpers import FEW

from vermouth.app import search  # noqa: F401  (Index.export)
from vermouth.app.index import build_index
from vermouth.backbone import load_backbone
from vermouth.data.toybox import Toybox
from vermouth.store import extract

PICTURES = list(Toybox("photo", n=6))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "What datasets knows of the hub when it pushes, made of a folder that holds the one repository."
    folder = tmp_path / "hub"
    folder.mkdir()

    def write(repo_id, additions=(), operations=(), **options):
        for addition in [*additions, *operations]:
            place = folder / addition.path_in_repo
            place.parent.mkdir(exist_ok=True)
            if not place.exists():  # the commit names what was uploaded before
                with addition.as_file() as f:
                    place.write_bytes(f.read())

    class Api:
        def __init__(self, **options):
            self.preupload_lfs_files = self.create_commit = write

        def repo_info(self, repo_id, **options):
            return SimpleNamespace(id=repo_id, sha="main")

    class Files(LocalFileSystem):
        def _strip_protocol(self, path):
            return str(path).replace("datasets/me/mine", str(folder))

    monkeypatch.setattr(datasets.arrow_dataset, "HfApi", Api)
    monkeypatch.setattr(datasets.arrow_dataset, "HfFileSystem", Files)
    return folder


def from_hub(hub):
    return load_dataset("parquet", data_files=str(hub / "data/*.parquet"), split="train")


def test_a_store_is_pushed_as_it_is(hub, tmp_path):
    store = extract(load_backbone("toybox", "cpu"), PICTURES, tmp_path / "store", **FEW)
    load_from_disk(store.out).push_to_hub("me/mine")
    again = from_hub(hub).with_format("torch", dtype=torch.float16)
    assert [row["id"] for row in again] == store.ids
    assert all(torch.equal(row["level0"], store[i][0]) for i, row in enumerate(again))
    assert "dataset_info" in (hub / "README.md").read_text()


def test_an_index_is_pushed_as_the_file_that_it_exports(hub, tmp_path):
    class Mean:
        name, fingerprint = "mean", "0" * 16

        def embed(self, images):
            images = images if isinstance(images, list) else [images]
            pixels = np.stack([np.asarray(image.resize((2, 2)), np.float32).ravel() for image in images])
            return torch.nn.functional.normalize(torch.from_numpy(pixels), dim=1)

    (tmp_path / "photos").mkdir()
    for i, item in enumerate(PICTURES):
        item.image.save(tmp_path / f"photos/{i}.png")
    index = build_index(tmp_path / "photos", tmp_path / "idx", Mean(), quiet=True)
    index.export(tmp_path / "photos.parquet")
    load_dataset("parquet", data_files=str(tmp_path / "photos.parquet"), split="train").push_to_hub("me/mine")
    again = from_hub(hub).with_format("numpy")
    assert [*again["path"]] == index.paths and {*again["model"]} == {"mean"}
    vectors = np.stack(again["vector"])
    found = np.argsort(-vectors @ vectors[0])[:3]
    assert [index.paths[i] for i in found] == [hit.path for hit in index.search(PICTURES[0].image, Mean(), k=3)]
