"A feature store made by the workers of a Ray cluster on this machine, one of which is killed."

import os
import threading
import time

import psutil
import pytest
from store_helpers import ITEMS, content, shards

from vermouth.app.cluster import extract_on_ray
from vermouth.core import VermouthError
from vermouth.store import extract

ray = pytest.importorskip("ray", reason="needs the extra: pip install -e '.[ray]'")
FEW = {"stages": "mid", "attention": (), "shard_size": 2, "batch_size": 2}  # 9 shards


def load_toybox():
    from vermouth.backbone import load_backbone

    return load_backbone("toybox"), None, None


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(OMP)})
    yield
    ray.shutdown()


OMP = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.path.dirname(__file__)}


def workers():
    "Processes of this cluster that make shards."
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.is_running() and any("Lazy" in word for word in p.cmdline())]


def kill_one(out):
    while not shards(out):
        time.sleep(0.01)
    killed.append(workers()[0].pid)
    psutil.Process(killed[0]).kill()


killed: list[int] = []


def test_a_worker_is_killed_and_every_item_is_there_once(backbone, tmp_path):
    out = tmp_path / "ray"
    killer = threading.Thread(target=kill_one, args=[out])
    killer.start()
    store = extract_on_ray(load_toybox, ITEMS, out, workers=2, gpus=0, **FEW)
    killer.join()
    alone = extract(backbone, ITEMS, tmp_path / "alone", quiet=True, **FEW)
    assert killed and store.checksum(quiet=True) == alone.checksum(quiet=True) and content(out) == content(alone.out)


def test_a_job_that_is_started_again_keeps_its_shards(backbone, tmp_path):
    out = tmp_path / "again"
    for k in range(3):
        extract(backbone, ITEMS, out, shard_of=(k, 9), quiet=True, **FEW)
    kept = {path: path.stat().st_mtime_ns for path in shards(out)}
    store = extract_on_ray(load_toybox, ITEMS, out, workers=1, gpus=0, **FEW)
    assert len(kept) == 3 and len(store) == 18
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_what_is_wrong_with_the_items_is_said_as_without_ray(tmp_path):
    with pytest.raises(VermouthError, match="stages="):
        extract_on_ray(load_toybox, ITEMS, tmp_path / "wrong", workers=1, gpus=0, **FEW | {"stages": "middle"})
