"A small feature store for tests, and ways to disturb the making of one."

import os
import signal
import subprocess
import sys

import pytest

from vermouth.data.toybox import Toybox
from vermouth.store import extract

FEW = {"stages": "mid", "attention": (), "shard_size": 4, "batch_size": 4, "quiet": True}  # 5 shards
ITEMS = Toybox("photo", n=18)


def shards(out):
    "Paths of the shards of a store."
    return sorted(out.glob("data-*.arrow"))


def content(out):
    "All that stands in a store's folder, by name, but for its lock."
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


class Counting:
    "A backbone that counts the images it reads, and gets a signal in the batch that goes beyond `enough`."

    def __init__(self, backbone, enough=10**9):
        self.backbone, self.enough, self.count = backbone, enough, 0

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def features(self, images, *args, **more):
        self.count += len(images)
        if self.count > self.enough:
            os.kill(os.getpid(), signal.SIGINT)
        return self.backbone.features(images, *args, **more)


def interrupted(backbone, items, out, enough, **change):
    "An unfinished store whose making was stopped with Ctrl-C."
    with pytest.raises(KeyboardInterrupt):
        extract(Counting(backbone, enough), items, out, **FEW | change)
    return out


def run_alone(code, *words, **options):
    "Standard output of a Python program in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quick = "import gc; gc.disable()\n"  # it would take a quarter of the imports' time
    command = [sys.executable, "-W", "ignore", "-c", quick + code, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False, **options)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
