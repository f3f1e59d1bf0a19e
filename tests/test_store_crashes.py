"What a crash costs a feature store, and several processes that share its folder."

import json
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
from conftest import COUNTS, KILLS
from photo_folders import run_forked
from program import run_here
from store_helpers import FEW, ITEMS, Counting, content, interrupted, shards

from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.store import FeatureStore, extract, write_lock


def dying(before, renaming, work):
    "Do some work, and die just before or just after a file is renamed, after so many others."
    rename, count = os.replace, iter(range(1000))

    def replace(*names):
        here = next(count) == renaming
        if not (here and before):
            rename(*names)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    work()


@pytest.mark.parametrize("before, deaths", [(True, 8), (False, 4)])
def test_killed_at_every_step_it_ends_with_the_same_bytes(whole, backbone, tmp_path, before, deaths):
    "A run renames 7 files: the plan, five shards, their list. Each run dies just before or just after one of them."
    work, killed = partial(extract, backbone, ITEMS, out := tmp_path / "store", **FEW), 0
    for renaming in (0, 0, 1, 2, 0, 3, 0, 0):
        status = os.waitpid(run_forked(partial(dying, before, renaming, work)), 0)[1]
        killed += os.WIFSIGNALED(status)
        if not status:
            break
    assert killed == deaths
    assert work().checksum() == whole.checksum() and content(out) == content(whole.out)


def test_kill_9_at_any_moment_and_the_store_is_the_same(backbone, tmp_path):
    toys, dice = [item.image for item in Toybox("photo", n=16)], random.Random(0)
    options = {"stages": "mid", "attention": (), "shard_size": 2, "batch_size": 1, "quiet": True}
    make, out, kills, early = partial(extract, backbone, toys, **options), tmp_path / "store", 0, 0
    make(out=tmp_path / "warm")
    began = time.perf_counter()
    whole = make(out=tmp_path / "whole").checksum()
    took = time.perf_counter() - began
    while kills < KILLS:
        pid = run_forked(partial(make, out=out))
        time.sleep(dice.uniform(0, 0.5) * took)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        try:
            assert FeatureStore(out).checksum() == whole
            shutil.rmtree(out)
        except VermouthError:
            early += os.WIFSIGNALED(status)
    assert make(out=out).checksum() == whole
    assert early >= KILLS // 4, f"{early} of {kills} kills came before the store was whole"
    COUNTS["kills of extract"] += kills
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_a_killed_process_loses_only_its_unfinished_shard(backbone, whole, tmp_path):
    begun = interrupted(backbone, ITEMS, tmp_path / "store", 1 + 3 * 4 + 2)
    assert len(shards(begun)) == 3 and not list(begun.glob("*.tmp"))
    with pytest.raises(VermouthError, match="unfinished. Run extract again"):
        FeatureStore(begun)
    with pytest.raises(VermouthError, match="made with seed=8888, asked for seed=1"):
        extract(backbone, ITEMS, begun, **FEW, seed=1)
    times = {path: path.stat().st_mtime_ns for path in shards(begun)}
    (begun / "data-00003-0123.tmp").write_text("half")
    counting = Counting(backbone)
    store = extract(counting, ITEMS, begun, **FEW)
    assert counting.count == 18 - 3 * 4 and content(begun) == content(whole.out)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a finished shard was made again"
    assert store.checksum() == whole.checksum()


def test_the_second_writer_is_refused_at_once_and_the_dead_free_the_lock(whole, backbone, tmp_path):
    def hold():
        with write_lock(tmp_path / "store"):
            (tmp_path / "held").touch()
            time.sleep(600)

    pid = run_forked(hold)
    while not (tmp_path / "held").exists() and not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.01)
    started = time.time()
    with pytest.raises(VermouthError, match="another process is writing this store"):
        extract(backbone, ITEMS, tmp_path / "store", **FEW)
    assert time.time() - started < 5
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert extract(backbone, ITEMS, tmp_path / "store", **FEW).checksum() == whole.checksum()
    with write_lock(tmp_path / "store"):
        assert FeatureStore(tmp_path / "store").checksum() == whole.checksum(), "readers need not wait"


# Several processes


def test_processes_share_the_shards_in_any_order(whole, backbone, tmp_path):
    out = tmp_path / "store"
    counts = [Counting(backbone) for _ in range(3)]
    made = [extract(counts[k], ITEMS, out, **FEW, shard_of=(k, 3)) for k in (2, 0)]
    assert made == [None, None] and not (out / "state.json").exists()
    store = extract(counts[1], ITEMS, out, **FEW, shard_of=(1, 3))
    assert [c.count for c in counts] == [4 + 4, 4 + 2, 1 + 4], "one more image each for the sizes, where none are known"
    assert content(out) == content(whole.out) and store.checksum() == whole.checksum()
    assert extract(backbone, ITEMS, out, **FEW, shard_of=(0, 2)).checksum() == whole.checksum()
    with pytest.raises(VermouthError, match="shard_of=\\(3, 3\\)"):
        extract(backbone, ITEMS, out, **FEW, shard_of=(3, 3))


def launched(rank, words, folder):
    "A command as one of a launcher's two processes, in a fork of this one; what it prints is in a file afterwards."

    def work():
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        result = run_here(*words)
        (folder / f"printed {rank}").write_text(result.stdout)
        assert result.exit_code == 0, result.stderr

    return run_forked(work)


@pytest.mark.slow
def test_a_worker_of_a_launcher_is_killed_and_the_store_is_the_same(backbone, tmp_path, monkeypatch):
    "torchrun then ends the others, too, and starts all of them again; tests of the index run it."
    photos, out = tmp_path / "photos", tmp_path / "store"
    monkeypatch.setattr("vermouth.data.extraction.SHARD_NUMBERS", 32 * 96 * 2 * 2)  # 4 shards of 32 images
    photos.mkdir()
    for i, toy in enumerate(Toybox("photo", n=128)):
        toy.image.save(photos / f"{i:03d}.png")
    options = ["--captioner", "none", "-p", "stages", "mid", "-p", "attention", "[]", "--batch-size", "8", "--json"]
    words = ["extract", photos, "--out", out, *options, "--dtype", "float32"]
    pids = [launched(rank, words, tmp_path) for rank in (0, 1)]
    while not shards(out) and not os.waitpid(pids[0], os.WNOHANG)[0]:
        time.sleep(0.01)
    kept = {path: path.stat().st_mtime_ns for path in shards(out)}
    os.kill(pids[1], signal.SIGKILL)
    os.kill(pids[0], signal.SIGTERM)
    assert all(os.WIFSIGNALED(os.waitpid(pid, 0)[1]) for pid in pids) and 1 <= len(kept) < 4
    pids = [launched(rank, words, tmp_path) for rank in (0, 1)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    files = sorted(photos.iterdir())
    alone = extract(backbone, files, tmp_path / "alone", size=64, stages="mid", attention=(), batch_size=8, quiet=True)
    found = json.loads((tmp_path / "printed 0").read_text())
    assert (found["items"], found["checksum"]) == (128, alone.checksum()) and content(out) == content(alone.out)
    assert not (tmp_path / "printed 1").read_text(), "one of them prints the result"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done stays done"
