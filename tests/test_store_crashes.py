"What a crash costs a feature store, and several processes that share its folder."

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import COUNTS, KILLS
from store_helpers import FEW, ITEMS, Counting, content, interrupted, run_alone, shards

from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.store import FeatureStore, extract, write_lock

CRASHES = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # a forked process has no others
from vermouth.backbone import load_backbone
from vermouth.data.toybox import Toybox
from vermouth.store import extract

few, backbone, toys = json.loads(sys.argv[2]), load_backbone("toybox", "cpu"), Toybox("photo", n=18)

def dying(out, before, die_at):  # at which renaming of a file
    rename, count = os.replace, iter(range(1000))
    def replace(*names):
        here = next(count) == die_at
        if not (here and before): rename(*names)
        if here: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    extract(backbone, toys, out, **few)
    os._exit(0)

for before in (True, False):
    deaths = 0
    for die_at in (0, 0, 1, 2, 0, 3, 0, 0):
        pid = os.fork() or dying(Path(sys.argv[1], str(before)), before, die_at)
        status = os.waitpid(pid, 0)[1]
        deaths += os.WIFSIGNALED(status)
        if not status: break
    print(deaths)
"""


def test_killed_at_every_step_it_ends_with_the_same_bytes(whole, backbone, tmp_path):
    "A run renames 7 files: the plan, five shards, their list. Each run dies just before or just after one of them."
    assert run_alone(CRASHES, tmp_path, json.dumps(FEW)).split() == ["8", "4"]
    for out in (tmp_path / "True", tmp_path / "False"):
        store = extract(backbone, ITEMS, out, **FEW)
        assert store.checksum() == whole.checksum() and content(out) == content(whole.out)


KILLED = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from vermouth.backbone import load_backbone
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.store import FeatureStore, extract

def make(where):
    return extract(backbone, toys, where, stages="mid", attention=(), shard_size=2, batch_size=1, quiet=True)

backbone, toys, dice = load_backbone("toybox", "cpu"), [item.image for item in Toybox("photo", n=16)], random.Random(0)
out, home = Path(sys.argv[1], "store"), Path(sys.argv[1])
make(home / "warm")
began = time.perf_counter()
whole = make(home / "whole").checksum()
took, kills, early = time.perf_counter() - began, 0, 0
while kills < int(sys.argv[2]):
    if not (pid := os.fork()): make(out), os._exit(0)
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
assert make(out).checksum() == whole
print(json.dumps([kills, early]))
"""


def test_kill_9_at_any_moment_and_the_store_is_the_same(tmp_path):
    kills, early = json.loads(run_alone(KILLED, tmp_path, KILLS))
    assert kills == KILLS and early >= KILLS // 4, f"{early} of {kills} kills came before the store was whole"
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
    code = "import sys, time; from pathlib import Path; from vermouth.store import write_lock\n"
    code += "with write_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        started = time.time()
        with pytest.raises(VermouthError, match="another process is writing this store"):
            extract(backbone, ITEMS, tmp_path / "store", **FEW)
        assert time.time() - started < 5
        process.kill()
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


def test_a_worker_of_torchrun_is_killed_and_the_store_is_the_same(backbone, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    for i, toy in enumerate(Toybox("photo", n=256)):
        toy.image.save(photos / f"{i:03d}.png")
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    options = ["--captioner", "none", "-p", "stages", "mid", "-p", "attention", "[]", "--batch-size", "8", "--json"]
    options += ["--dtype", "float32"]
    words = [*launch, "-m", "vermouth.app.cli", "extract", str(photos), "--out", str(out), *options]
    command = [sys.executable, "-m", *words]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not shards(out):
            time.sleep(0.01)
        kept = {path: path.stat().st_mtime_ns for path in shards(out)}
        psutil.Process(run.pid).children()[-1].kill()
        said, errors = run.communicate()
    assert run.returncode == 0 and 1 <= len(kept) < 4, errors[-2000:]
    files = sorted(photos.iterdir())
    alone = extract(backbone, files, tmp_path / "alone", size=64, stages="mid", attention=(), batch_size=8, quiet=True)
    found = json.loads(said)
    assert (found["items"], found["checksum"]) == (256, alone.checksum()) and content(out) == content(alone.out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done stays done"
