"The feature store under abuse: cut and changed files, other settings, other images, full disks."

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
from conftest import COUNTS
from datasets import Dataset
from odd_files import damaged
from store_helpers import FEW, ITEMS, content, interrupted, shards

from vermouth.core import VermouthError
from vermouth.data import arrow
from vermouth.data.toybox import Toybox
from vermouth.store import FeatureStore, extract


@pytest.fixture
def copy(whole, tmp_path):
    "A store to be damaged."
    return Path(shutil.copytree(whole.out, tmp_path / "copy"))


# Damage


def test_a_truncated_shard_is_named_and_only_it_is_made_again(whole, backbone, copy):
    opened, path = FeatureStore(copy), shards(copy)[2]
    opened[9]
    os.truncate(path, 100)
    for reading in (lambda: FeatureStore(copy), lambda: opened[9], opened.checksum):
        with pytest.raises(VermouthError, match=f"{path.name} has 100 bytes where .* Delete that file and run extract"):
            reading()
    times = {p: p.stat().st_mtime_ns for p in shards(copy) if p != path}
    path.unlink()
    with pytest.raises(VermouthError, match=f"{path.name} is missing"):
        FeatureStore(copy)
    assert extract(backbone, ITEMS, copy, **FEW).checksum() == whole.checksum() and content(copy) == content(whole.out)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    os.truncate(path, 1000)
    assert extract(backbone, ITEMS, copy, **FEW).checksum() == whole.checksum(), "or only extract again"


def test_a_flipped_bit_is_found_when_a_shard_is_first_read(copy):
    path = shards(copy)[1]
    good = path.read_bytes()
    for where in random.Random(0).sample(range(len(good)), 10):
        path.write_bytes(good[:where] + bytes([good[where] ^ 1]) + good[where + 1 :])
        store = FeatureStore(copy)
        store.batch([0, 8])  # of other shards
        for reading in (lambda store=store: store[4], lambda store=store: store.ids, store.checksum):
            with pytest.raises(VermouthError, match=f"{path.name} is not what was written .its sha256 differs"):
                reading()


@pytest.mark.parametrize("damage", ["cut", "empty", "linked", "of other settings", "of other items", "moved"])
def test_a_shard_of_an_unfinished_store_that_is_not_ours_is_not_taken(backbone, whole, tmp_path, damage):
    out, mine = interrupted(backbone, ITEMS, tmp_path / "store", 1 + 3 * 4), tmp_path / "mine.txt"
    path = shards(out)[1]
    mine.write_text("mine")
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "linked":
        path.unlink(), path.symlink_to(mine)
    if damage in ("cut", "empty", "linked"):
        store = extract(backbone, ITEMS, out, **FEW)
        assert (
            store.checksum() == whole.checksum() and mine.read_text() == "mine" and content(out) == content(whole.out)
        )
        return
    if damage == "of other settings":
        other = interrupted(backbone, ITEMS, tmp_path / "other", 1 + 3 * 4, seed=1)
    if damage == "of other items":
        other = interrupted(backbone, Toybox("photo", n=18, seed=1), tmp_path / "other", 1 + 3 * 4)
    path.unlink()
    if damage == "moved":
        name = shards(out)[0].name
        shutil.copy(out / name, out / name.replace("data-00000", "data-00001"))
    else:
        shutil.copy(shards(other)[1], out)
    before = content(out)
    with pytest.raises(VermouthError, match="items: of '4' … '7' the store .* has other images"):
        extract(backbone, ITEMS, out, **FEW)
    assert content(out) == before


def held(out):
    "All that a reader is told, but for the names of weights."
    found = FeatureStore(out)
    maps = [m.numpy().tobytes() for m in found.batch(range(len(found)))]
    made = found.settings["timesteps"], found.settings["dtype"], found.shapes
    return maps, found.ids, found.prompts, found.kept, found.skipped, made, found.checksum()


def test_every_damage_to_a_store_is_found(backbone, tmp_path):
    out, dice, cases, harmless = tmp_path / "store", random.Random(3), 600, 0
    images = [toy.image for toy in Toybox("photo", n=6)]
    images[4] = images[4].resize((32, 32))
    extract(backbone, images, out, ["a fish", "a cat", "", "a bus", "", "a tree"], **FEW | {"shard_size": 3})
    whole, paths = held(out), [out / "dataset_info.json", out / "state.json", *shards(out)]
    assert len(whole[1]) == 5 and len(paths) == 4
    for i in range(cases):
        path = paths[i % 4]
        good = path.read_bytes()
        while (worse := damaged(good, dice)) == good:
            pass
        path.write_bytes(worse)
        try:
            assert held(out) == whole and path.suffix == ".json", f"{path.name} was changed and it was not noticed"
            harmless += 1  # white space
        except VermouthError as e:
            assert (path.name in str(e) or "format" in str(e)) and "\n" not in str(e)
        path.write_bytes(good)
    assert harmless < 50 and held(out) == whole
    COUNTS["fuzz cases"] += cases


@pytest.mark.parametrize(
    "name, change",
    [
        ("dataset_info.json", {"maps": {"level0": [96, 2, -2]}}),
        ("dataset_info.json", {"maps": {"level0": ["a", 2, 2]}}),
        ("dataset_info.json", {"settings": {}}),
        ("dataset_info.json", {"settings": {"dtype": "float64"}}),
        ("dataset_info.json", {"items": None}),
        ("dataset_info.json", {"shard_size": 0}),
        ("dataset_info.json", {"more": 1}),
        ("state.json", {"_data_files": []}),
        ("state.json", {"_data_files": None}),
        ("state.json", {"items": -4}),
        ("state.json", {"filename": "../data.arrow"}),
        ("state.json", {"skipped": [[99, "a", "b", "c"]]}),
        ("state.json", {"skipped": [[1, None, "b", "c"]], "items": 3}),
        ("state.json", {"plan": "0" * 16}),
    ],
)
def test_files_whose_seal_is_right_and_whose_entries_are_not_are_refused(copy, name, change):
    path = copy / name
    content = json.loads(path.read_text())
    del content["seal"]
    if name == "dataset_info.json":
        content["description"] = json.dumps(json.loads(content["description"]) | change)
    elif change.keys() & {"items", "filename", "skipped"}:
        content["_data_files"][0] |= change
    else:
        content |= change
    arrow.put_sealed(path, content)
    with pytest.raises(VermouthError, match=f"{name} is damaged"):
        FeatureStore(copy)
    path.write_text("[" * 100_000)
    with pytest.raises(VermouthError, match=f"{name} is damaged"):
        FeatureStore(copy)


def test_other_formats_are_refused(backbone, copy, tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("manifest.json", "shard-00000.safetensors"):
        (tmp_path / "old" / name).write_text('{"format": 1}')
    for refused in (lambda: FeatureStore(tmp_path / "old"), lambda: extract(backbone, ITEMS, tmp_path / "old", **FEW)):
        with pytest.raises(VermouthError, match="made by 0.1: extract again"):
            refused()
    info = json.loads((copy / "dataset_info.json").read_text())
    plan = json.loads(info["description"]) | {"version": 4, "more": 1}
    arrow.put_sealed(copy / "dataset_info.json", {"description": json.dumps(plan)})
    with pytest.raises(VermouthError, match="format 4, this version reads 3. Extract again"):
        FeatureStore(copy)
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "dataset")
    with pytest.raises(VermouthError, match="dataset_info.json is damaged"):
        FeatureStore(tmp_path / "dataset")
    with pytest.raises(VermouthError, match="holds 'data-00000-of-00001.arrow', which is no part of a store"):
        extract(backbone, ITEMS, tmp_path / "dataset", **FEW)


# What is refused


@pytest.mark.parametrize(
    "name, value",
    [
        ("timesteps", (100,)),
        ("stages", "up"),
        ("attention", "up_cross"),
        ("noise", "none"),
        ("seed", 1),
        ("trajectory", "independent"),
        ("ddim_steps", 5),
        ("size", 128),
        ("dtype", "bfloat16"),
        ("shard_size", 8),
    ],
)
def test_a_stale_store_is_refused_by_name(backbone, whole, name, value):
    before, asked = content(whole.out), value if isinstance(value, (int, str)) else value[0]
    with pytest.raises(VermouthError, match=rf"made with {name}=.*, asked for {name}=.*{asked}"):
        extract(backbone, ITEMS, whole.out, **FEW | {name: value})
    with pytest.raises(VermouthError, match=f"made with {name}="):
        FeatureStore(whole.out, {name: value})
    assert content(whole.out) == before


def test_other_weights_prompts_and_items_are_refused(whole, backbone):
    before = content(whole.out)
    others = [
        (backbone.randomized(), ITEMS, None, "with backbone='toybox [0-9a-f]{16}', asked for backbone='toybox, random"),
        (backbone, ITEMS, "a cat", "made with prompt='empty', asked for prompt='given"),
        (backbone, Toybox("photo", n=17), None, "items: 17 of them"),
        (backbone, Toybox("photo", n=18, seed=1), None, "items: of '0' … '3' the store .* has other images"),
    ]
    for network, images, prompts, message in others:
        with pytest.raises(VermouthError, match=message):
            extract(network, images, whole.out, prompts, **FEW)
    assert content(whole.out) == before, "a refusal changes nothing"


def test_a_replaced_image_of_the_same_name_and_length_does_not_keep_its_old_features(backbone, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, toy in enumerate(Toybox("photo", n=6)):
        toy.image.save(photos / f"{i}.bmp")
    files = sorted(photos.iterdir())
    extract(backbone, files, tmp_path / "store", **FEW)
    length, stat = files[5].stat().st_size, files[5].stat()
    Toybox("photo", n=1, seed=1)[0].image.save(files[5])
    os.utime(files[5], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files[5].stat().st_size == length
    with pytest.raises(VermouthError, match="items: of '4.bmp' … '5.bmp' the store .* has other images"):
        extract(backbone, files, tmp_path / "store", **FEW)


def test_a_small_disk_is_refused_with_both_numbers(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 12_345, 12_345))
    with pytest.raises(VermouthError, match="18 items take 5.26e-05 GB and 1.23e-05 GB are free"):
        extract(backbone, ITEMS, tmp_path / "store", **FEW)
    assert not list((tmp_path / "store").glob("[!.]*"))


def test_a_disk_that_fills_up_costs_nothing(whole, backbone, tmp_path):
    "The kernel refuses long files here, as a full disk would."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))  # the plan fits, a shard does not
        with pytest.raises(
            VermouthError, match="data-00000-.* cannot be written .*extract again; finished shards stay"
        ):
            extract(backbone, ITEMS, tmp_path / "store", **FEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path / "store").keys() == {"dataset_info.json"}
    assert extract(backbone, ITEMS, tmp_path / "store", **FEW).checksum() == whole.checksum()


def test_foreign_folders_and_wrong_arguments(backbone, copy, tmp_path):
    (tmp_path / "file").write_text("")
    (copy / "notes.txt").write_text("mine")
    refused = [
        (dict(out=copy), "holds 'notes.txt'"),
        (dict(out=tmp_path / "file"), "cannot be written"),
        (dict(items=[]), "items: an empty list"),
        (dict(items="photos"), "one path"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(shard_size=0), "shard_size=0"),
        (dict(shard_size=2**31), "shard_size=2147483648: a file of too many numbers"),
        (dict(dtype="float32"), "dtype='float32': unknown"),
        (dict(timestep=3), "timestep: no setting"),
        (dict(prompts=["a"]), "prompts: 1 of them for 18"),
    ]
    for change, message in refused:
        with pytest.raises(VermouthError, match=message):
            extract(backbone, **{"items": ITEMS, "out": tmp_path / "store"} | FEW | change)
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink(), (copy / "dataset_info.json").unlink()
    with pytest.raises(VermouthError, match="but no dataset_info.json"):
        extract(backbone, ITEMS, copy, **FEW)
