"The feature store: what it holds, and which images it skips."

import importlib
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from photo_folders import forget_ours, found_forked
from store_helpers import FEW, ITEMS, content, run_alone, shards
from torch.utils.data import DataLoader, StackDataset

from vermouth.app.files import image_paths, unpacked
from vermouth.app.index import Index
from vermouth.baselines import read_items, store_items
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.expert import load_expert
from vermouth.model import Vermouth
from vermouth.store import FeatureStore, extract
from vermouth.text import load_clip
from vermouth.train import train_head

# Reading


@pytest.mark.slow
def test_a_process_without_vermouth_opens_the_store_as_a_dataset(whole):
    code = """
import json, sys
import torch
from datasets import load_from_disk
dataset = load_from_disk(sys.argv[1])
rows = dataset.with_format("torch", dtype=torch.float16)
parts = dataset.map(lambda row: {"n": len(row["level0"])}).train_test_split(0.5, seed=0)
made = json.loads(dataset.info.description)["settings"]
assert not any(name.startswith("vermouth") for name in sys.modules)
total = float(rows[7]["level0"].double().sum())
print(json.dumps([len(dataset), dataset["id"][7], total, parts["test"]["n"][0], made]))
"""
    length, name, total, channels, made = json.loads(run_alone(code, whole.out, cwd=whole.out).splitlines()[-1])
    assert [length, name, total, channels] == [18, "7", float(whole[7][0].double().sum()), 96]
    assert made == whole.settings and made["timesteps"] == [200]


def test_a_finished_store_is_copied_to_object_storage_and_back(whole, backbone, tmp_path):
    fsspec = pytest.importorskip("fsspec")  # comes with datasets
    fs, _ = fsspec.url_to_fs("memory://features")
    fs.put(str(whole.out), "memory://features", recursive=True)
    dataset = load_from_disk("memory://features", storage_options={})
    assert dataset["id"][:] == whole.ids
    fs.get("memory://features", str(tmp_path / "back"), recursive=True)
    assert FeatureStore(tmp_path / "back").checksum() == whole.checksum()
    for make in (FeatureStore, lambda out: extract(backbone, ITEMS, out, **FEW), Index):
        with pytest.raises(VermouthError, match="out='memory://features': an address"):
            make("memory://features")


def test_a_fresh_process_reads_what_was_written(whole):
    def read():
        forget_ours("vermouth", "datasets")
        store = importlib.import_module("vermouth.store").FeatureStore(whole.out)
        return [len(store), store.checksum(), float(store[7][0].double().sum()), "datasets" in sys.modules]

    assert found_forked(read) == [18, whole.checksum(), float(whole[7][0].double().sum()), False]


def test_items_and_batches_in_any_order(whole):
    everything = whole.batch(range(18))
    order = [17, 0, 5, 4, 5, -1]
    for level, all_of_it in zip(whole.batch(order), everything, strict=True):
        assert torch.equal(level, all_of_it[order])
    assert [m.shape for m in whole.batch([])] == [(0, 96, 2, 2)]
    assert len(list(whole)) == len(whole) == 18
    whole[3][0].zero_()
    assert torch.equal(whole[3][0], everything[0][3]), "what was handed out is not the file"
    with pytest.raises(IndexError):
        whole[18]


def test_loader_workers(whole):
    for store in (whole, pickle.loads(pickle.dumps(whole))):
        loader = DataLoader(StackDataset(store, range(18)), batch_size=5, num_workers=2)
        maps, labels = zip(*loader, strict=True)
        assert torch.cat(labels).tolist() == list(range(18))
        assert torch.equal(torch.cat([level for (level,) in maps]), whole.batch(range(18))[0])
    with pytest.raises(ValueError, match="Size mismatch"):
        StackDataset(whole, [1, 2, 3])


def test_the_store_holds_what_read_gives_and_trains_to_the_same_bits(backbone, tmp_path):
    clip, expert, toys = load_clip("toybox", "cpu"), load_expert("toybox", device="cpu"), Toybox("sketch", "seen", n=72)
    labels, generator = [i % 36 for i in range(72)], torch.Generator().manual_seed(0)
    names = torch.nn.functional.normalize(torch.randn(36, clip.dim, generator=generator), dim=-1)

    def model():
        return Vermouth.build(backbone=backbone, clip=clip, expert=expert, prompt="empty")

    store = store_items(model(), toys, tmp_path / "store", quiet=True)
    for level, read in zip(store.batch(range(64)), model().read([toys[i].image for i in range(64)]), strict=True):
        assert torch.equal(level, read.half())
    one, two = model(), model()
    history, again = [
        train_head(m, features, labels, names, epochs=3, batch_size=16, lr=1e-3, clip=1.0, quiet=True)
        for m, features in ((one, store), (two, read_items(two, toys, [""] * 72)))
    ]
    assert len(store.shapes) == 4 + len(expert.dims)
    assert history.equals(again) and history.valid_loss.notna().all()
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shard_size", [1, 6, 18])
def test_the_content_does_not_depend_on_the_size_of_shards(whole, backbone, tmp_path, shard_size):
    store = extract(backbone, ITEMS, tmp_path / "store", **FEW | {"shard_size": shard_size})
    for a, b in zip(store.batch(range(18)), whole.batch(range(18)), strict=True):
        torch.testing.assert_close(a, b)
    alone = extract(backbone, ITEMS, tmp_path / "alone", **FEW | {"batch_size": 1})
    if shard_size == 1:  # the same batches, so the same bits
        assert store.checksum() == alone.checksum()


def test_slow_machines_make_smaller_shards(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("vermouth.data.extraction.SHARD_SECONDS", 1e-6)
    store = extract(backbone, ITEMS, tmp_path / "store", **FEW | {"shard_size": None})
    assert store.plan.shard_size == 1 and len(shards(store.out)) == 18


# Bad images


def test_numbers_too_large_for_half_precision(backbone, tmp_path, monkeypatch):
    features = type(backbone).features

    def enlarge(factor):
        monkeypatch.setattr(
            type(backbone), "features", lambda *args, **more: [m * factor for m in features(*args, **more)]
        )

    for factor, message in ((1e6, "dtype='float16': features reach .* Pass dtype='bfloat16'"), (torch.inf, "infinite")):
        enlarge(factor)
        with pytest.raises(VermouthError, match=message):
            extract(backbone, ITEMS, tmp_path / "half", **FEW)
    enlarge(1e6)
    store = extract(backbone, ITEMS, tmp_path / "brain", **FEW, dtype="bfloat16")
    assert store[0][0].dtype == torch.bfloat16 and store[0][0].isfinite().all()


def test_bad_files_are_skipped_wherever_the_folder_lies(backbone, tmp_path, capsys):
    checksums = []
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        for i, toy in enumerate(ITEMS):
            toy.image.resize((64, 64) if i != 6 else (128, 64)).save(tmp_path / name / f"{i:02}.png")
        (tmp_path / name / "00.png").write_bytes(b"")
        (tmp_path / name / "05.png").write_bytes(b"not an image")
        files = [*sorted((tmp_path / name).iterdir()), tmp_path / name / "gone.png"]
        store = extract(backbone, files, tmp_path / f"{name}.store", **FEW | {"quiet": False})
        printed, skipped = capsys.readouterr().out, dict(store.skipped)
        assert "4 of 19 skipped" in printed and str(tmp_path) not in printed
        assert skipped.keys() == {"00.png", "05.png", "06.png", "gone.png"} and len(store) == len(store.ids) == 15
        assert "64×128 pixels where the store holds 64×64" in skipped["06.png"]
        assert [f"{i:02}.png" for i in store.kept] == store.ids, "labels of the whole list find their items"
        checksums.append(store.checksum())
        assert not any(str(tmp_path).encode() in data for data in content(store.out).values())
    assert checksums[0] == checksums[1]
    with pytest.raises(VermouthError, match="none of 2 can be used. The first: image='00.png'"):
        extract(backbone, files[:1] + [files[5]], tmp_path / "none", **FEW)


# Shards of a webdataset


def test_the_webdataset_librarys_own_shards_are_read_as_it_reads_them(backbone, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "shard-%03d.tar"), maxcount=4, verbose=0) as tars:
        for i, toy in enumerate(Toybox("photo", n=10)):
            label = {"label": int(toy.label)}
            tars.write({"__key__": f"toys/{i:02}", "png": toy.image, "txt": toy.caption, "json": label})
    named = str(tmp_path / "shard-{000..002}.tar")
    packed = unpacked(image_paths([named]))
    streamed = list(webdataset.WebDataset(named, shardshuffle=False).decode("rgb8"))
    assert [item.key.partition("/")[2] for item in packed] == [f"{sample['__key__']}.png" for sample in streamed]
    assert len(packed) == 10
    for item, sample in zip(packed, streamed, strict=True):
        assert np.array_equal(np.asarray(item.image), sample["png"])
    whole = extract(backbone, [item.image for item in packed], tmp_path / "images", **FEW)
    store = extract(backbone, packed, tmp_path / "shards", **FEW)
    assert store.ids[0] == "shard-000.tar/toys/00.png"
    assert torch.equal(store.batch(range(10))[0], whole.batch(range(10))[0])
