"An index made by several processes and by the workers of a Ray cluster, some of which are killed."

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from disks import run_child
from odd_files import Grey
from photo_folders import answers, build, run_forked, write_photos

from vermouth.app import database
from vermouth.app.cluster import index_on_ray
from vermouth.app.search import Index
from vermouth.core import VermouthError
from vermouth.model import open_model


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


class Slow(Grey):
    "A model that takes its time and appends the images it was given to a file, a byte each."

    def __init__(self, log=None):
        super().__init__()
        self.log = log

    def embed(self, images):
        time.sleep(0.05)
        if self.log:
            with open(self.log, "ab") as f:
                f.write(b"." * len(images))
        return super().embed(images)


def rows(out):
    "Photos that a database has, whether they count or not."
    if not (out / database.FILE).exists():
        return 0
    try:
        with database.connect(out) as db:
            return db.execute("SELECT count(*) FROM photos").fetchone()[0]
    except VermouthError:  # being made
        return 0


def ends_with(count, out, seconds=120):
    "Wait until a database has so many photos."
    until = time.monotonic() + seconds
    while rows(out) < count and time.monotonic() < until:
        time.sleep(0.02)
    return rows(out) >= count


def test_processes_share_the_photos_in_any_order(photos, tmp_path):
    (photos / "text.png").write_text("not an image")
    alone = build(photos, tmp_path / "alone")
    out = tmp_path / "idx"
    assert [build(photos, out, shard_of=(k, 3)) for k in (2, 0)] == [None, None]
    with pytest.raises(VermouthError, match="not finished"):
        Index(out)
    made = build(photos, out, shard_of=(1, 3))
    assert made.checksum() == alone.checksum() and answers(out) == answers(alone.out)
    assert made.changes == alone.changes | {"looked_at": 8}, "those of the last process"
    (photos / "0/00.png").unlink()
    (photos / "1/01.png").rename(photos / "moved.png")
    assert build(photos, out, shard_of=(1, 2)) is None
    assert len(Index(out)) == 24, "readers see the finished state"
    changed = build(photos, out, shard_of=(0, 2)).changes
    assert {what: changed[what] for what in ("photos", "new", "removed")} == {"photos": 23, "new": 1, "removed": 2}


def test_a_killed_process_loses_one_batch_and_each_photo_is_there_once(photos, tmp_path):
    out, log = tmp_path / "idx", tmp_path / "log"
    pids = [run_forked(lambda k=k: build(photos, out, Slow(log), batch_size=2, shard_of=(k, 2))) for k in range(2)]
    assert ends_with(4, out)
    os.kill(pids[0], signal.SIGKILL)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [-signal.SIGKILL, 0]
    made = build(photos, out, Slow(log), batch_size=2, shard_of=(0, 2))
    assert len(made) == len(set(made.paths)) == 24 and answers(out) == answers(build(photos, tmp_path / "alone").out)
    assert 24 <= log.stat().st_size <= 26, "at most one batch is embedded twice"


@pytest.mark.slow
def test_processes_that_end_together_leave_no_photo_out(photos, tmp_path):
    alone = build(photos, tmp_path / "alone").checksum()
    for i in range(5):
        out = tmp_path / f"idx{i}"
        pids = [run_forked(lambda k=k, out=out: build(photos, out, batch_size=2, shard_of=(k, 4))) for k in range(4)]
        assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids} == {0}
        assert Index(out).checksum() == alone


def test_another_model_is_refused_and_a_whole_run_goes_on_with_the_shares(photos, tmp_path):
    out, other = tmp_path / "idx", Grey()
    assert build(photos, out, shard_of=(0, 2)) is None
    other.fingerprint = "f" * 16
    with pytest.raises(VermouthError, match="are not those that made the index"):
        build(photos, out, other, shard_of=(1, 2))
    log = tmp_path / "log"
    assert len(build(photos, out, Slow(log))) == 24 and log.stat().st_size == 12
    with pytest.raises(VermouthError, match="shard_of=\\(2, 2\\)"):
        build(photos, out, shard_of=(2, 2))


@pytest.mark.slow
def test_a_worker_of_torchrun_is_killed_and_the_index_is_the_same(tmp_path):
    "With the model that is loaded soonest."
    photos, out = write_photos(tmp_path / "photos", 48), tmp_path / "idx"
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    options = ["--model", "efficientnet_lite0", "--batch-size", "4", "--json"]
    words = ["-m", *launch, "-m", "vermouth.app.cli", "index", str(photos), "--out", str(out), *options]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert ends_with(4, out)
        psutil.Process(run.pid).children()[-1].kill()
        said, errors = run.communicate()
    assert run.returncode == 0, errors[-2000:]
    assert '"photos": 48' in said.decode()
    assert Index(out).checksum() == build(photos, tmp_path / "alone", open_model(options[1], "cpu")).checksum()


def test_a_job_of_an_array_says_what_is_missing(photos, tmp_path):
    words = ["index", photos, "--out", tmp_path / "idx", "--model", "toybox", "--shard-of", "0", "2", "--json"]
    run = run_child(words)
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout) == {"index": str(tmp_path / "idx"), "complete": False}


OMP = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.path.dirname(__file__)}


def kill_one(out, killed):
    "Kill a worker of the cluster once a batch is written."
    assert ends_with(4, out)
    found = psutil.Process().children(recursive=True)
    found = [p for p in found if p.is_running() and any("PhotoWorker" in word for word in p.cmdline())]
    killed.append(found[0].pid)
    found[0].kill()


def test_a_worker_of_ray_is_killed_and_each_photo_is_there_once(photos, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra: pip install -e '.[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(OMP)})
    out, killed = tmp_path / "idx", []
    killer = threading.Thread(target=kill_one, args=[out, killed])
    killer.start()
    try:
        made = index_on_ray(Slow, photos, out, workers=2, gpus=0, batch_size=2, quiet=True)
        killer.join()
        assert killed and len(made) == len(set(made.paths)) == 24
        assert answers(out) == answers(build(photos, tmp_path / "alone").out)
        with pytest.raises(VermouthError, match="no such folder"):
            index_on_ray(Slow, tmp_path / "none", out, workers=1, gpus=0)
    finally:
        ray.shutdown()
