"""The Ray engine: nobody else reaches its cluster, odd files get the answers of one process, nothing is tried for ever.

The parts that need no Ray are checked on the page of `vermouth.app.cluster`, on every machine.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import COUNTS
from PIL import Image

from vermouth.app import cluster
from vermouth.app.index import Index, build_index
from vermouth.core import VermouthError

pytest.importorskip("ray", reason="needs the extra: pip install -e '.[ray]'")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NAMES = [b"a.png", b"\xff.png", b"a\nb.png", b"\x1b[2J.png", b"=cmd|calc'!A0.png", b"-rf.png", b"x" * 250 + b".png"]


class Grey:
    "A model of four numbers; an image of one colour kills who reads it, as one that takes too much memory would."

    name, fingerprint = "grey", "0" * 16

    def embed(self, images):
        pixels = [image.getpixel((0, 0)) for image in images]
        if (6, 6, 6) in pixels:
            os.kill(os.getpid(), signal.SIGKILL)
        if (7, 7, 7) in pixels:
            time.sleep(0.2)
        return torch.nn.functional.normalize(torch.tensor([[*pixel, 1.0] for pixel in pixels]), dim=1)


def wrong_model():
    raise VermouthError("model='x': not on this machine. Copy it.")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    "Workers find this file; no cluster is joined."
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def fill(folder, colours):
    folder.mkdir()
    for i, colour in enumerate(colours):
        Image.new("RGB", (32, 32), (colour,) * 3).save(folder / f"{i}.png")
    return folder


# Who reaches it

WATCHED = """
import json, os, psutil, subprocess, sys
from pathlib import Path
from vermouth.app import cluster

ray = cluster.load_ray()
before = dict(os.environ)
with cluster.private_cluster(ray):
    @ray.remote
    def token():
        return os.environ["RAY_AUTH_TOKEN"]

    secret = ray.get(token.remote())
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {c.laddr.ip for p in own for c in p.net_connections() if c.status == "LISTEN"}
    folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent.parent
    words = " ".join(word for p in own for word in p.cmdline())
    files = [f for f in folder.rglob("*") if f.is_file()]
    found = {
        "listening": sorted(listening), "mode": oct(folder.stat().st_mode & 0o777), "folder": str(folder),
        "told": secret in words or any(secret.encode() in f.read_bytes() for f in files),
        "as asked": secret == os.environ["RAY_AUTH_TOKEN"],
    }
    stranger = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('inside')"
    other = dict(before) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    address = ray.get_runtime_context().gcs_address
    try:
        words = [sys.executable, "-c", stranger, address]
        run = subprocess.run(words, capture_output=True, text=True, env=other, timeout=60)
        found["stranger"] = run.stdout
    except subprocess.TimeoutExpired as e:
        found["stranger"] = (e.stdout or b"").decode()
found["left"] = [str(f) for f in folder.rglob("*") if f.is_file()]
found["environment"] = [name for name in cluster.private_settings() if os.environ.get(name) != before.get(name)]
found["processes"] = [p.name() for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]
print(json.dumps(found))
"""


def test_nobody_else_reaches_the_cluster():
    run = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {ip.removeprefix("::ffff:") for ip in found["listening"]} == {"127.0.0.1"}
    assert (found["mode"], found["told"], found["as asked"]) == ("0o700", False, True)
    assert "inside" not in found["stranger"], "a stranger without the token was let in"
    assert (found["left"], found["environment"], found["processes"]) == ([], [], [])


def test_an_address_that_nobody_answers(monkeypatch, tmp_path):
    photos = fill(tmp_path / "photos", [1])
    for address in ("nonsense", "127.0.0.1:x", "bogus://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(VermouthError, match=r"RAY_ADDRESS=.*: Ray does not start"):
            cluster.index_on_ray(Grey, photos, tmp_path / "idx", 1, 0, quiet=True)
        COUNTS["inputs tried"] += 1


# What is in the folder


def test_odd_files_get_the_answers_of_one_process(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        Image.new("RGB", (32, 32), (i * 30, 20, 9)).save(tmp_path / "picture.png")
        os.rename(tmp_path / "picture.png", os.path.join(os.fsencode(folder), name))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    alone = build_index(folder, tmp_path / "alone", Grey(), quiet=True)
    there = cluster.index_on_ray(Grey, folder, tmp_path / "there", 2, 0, 3, quiet=True)
    assert (there.checksum(), there.paths, there.skipped) == (alone.checksum(), alone.paths, alone.skipped)
    assert (len(there), len(there.skipped)) == (7, 6)
    COUNTS["inputs tried"] += 13


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (wrong_model, "model='x': not on this machine. Copy it."),
        (lambda: 1 / 0, "division by zero"),
        (lambda: (_ for _ in ()).throw(RuntimeError("\x1b[2J\nboom")), r"\x1b[2J boom"),
        ((lambda lock: lambda: lock)(threading.Lock()), "load: cannot be sent to a worker"),
    ],
    ids=["refused", "an error", "escapes", "cannot be sent"],
)
def test_what_a_worker_raises_is_one_sentence(load, says, tmp_path):
    with pytest.raises(VermouthError) as error:
        cluster.index_on_ray(load, fill(tmp_path / "photos", [1]), tmp_path / "idx", 1, 0, model=Grey(), quiet=True)
    assert says in str(error.value) and "\n" not in str(error.value) and "\x1b" not in str(error.value)
    COUNTS["inputs tried"] += 1


def test_an_image_that_kills_its_workers_ends_the_job_and_nothing_is_lost(tmp_path):
    photos, out = fill(tmp_path / "photos", [1, 2, 6]), tmp_path / "idx"
    with pytest.raises(VermouthError, match="a worker failed"):
        cluster.index_on_ray(Grey, photos, out, 1, 0, 1, quiet=True)
    (photos / "2.png").unlink()
    made = build_index(photos, out, Grey(), quiet=True)
    assert made.changes["looked_at"] == 0 and made.paths == ["0.png", "1.png"]
    COUNTS["workers killed"] += 4


def test_more_than_there_is(tmp_path):
    with pytest.raises(VermouthError, match=r"gpus=64: the cluster has"):
        cluster.index_on_ray(Grey, fill(tmp_path / "photos", [1]), tmp_path / "idx", 1, 64, quiet=True)


# Ends

JOB = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_ray import Grey
from vermouth.app import cluster
print(len(cluster.index_on_ray(Grey, sys.argv[3], sys.argv[4], 2, 0, 1, quiet=True)), flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_job_that_is_ended_leaves_no_process_and_goes_on(end, tmp_path):
    photos, out = fill(tmp_path / "photos", [7] * 2), tmp_path / "idx"
    for i in range(60):
        Image.new("RGB", (32, 32), (7, 7, 7)).save(photos / f"more-{i}.png", compress_level=i % 9)
        (photos / f"more-{i}.png").open("ab").write(b"%d" % i)  # bytes of its own
    words = [sys.executable, "-c", JOB, *os.environ["PYTHONPATH"].split(os.pathsep), photos, out]
    errors = tmp_path / "errors.txt"
    with errors.open("w") as f:  # a pipe would stay open in what the job has started
        job = subprocess.Popen(words, stdout=f, stderr=f)
    began = time.monotonic()
    while not kept(out):
        assert job.poll() is None and time.monotonic() < began + 200, errors.read_text()
        time.sleep(0.02)
    below = psutil.Process(job.pid).children(recursive=True)
    assert below
    job.send_signal(end)
    job.wait(60)
    gone, alive = psutil.wait_procs(below, timeout=170)  # Ray's agents notice a minute later that their parent is gone
    assert alive == [] and job.returncode != 0
    before = kept(out)
    made = build_index(photos, out, Grey(), quiet=True)
    assert made.changes["looked_at"] <= 61 - before + 1 and len(Index(out)) == 62
    COUNTS["jobs ended"] += 1


def kept(out):
    "Photos that an unfinished index has."
    try:
        with sqlite3.connect(f"file:{out}/index.sqlite?mode=ro", uri=True) as db:
            return db.execute("SELECT count(*) FROM photos").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_two_jobs_at_once(tmp_path):
    "The second one says so and ends; the first one's index is whole."
    photos, out = fill(tmp_path / "photos", range(10, 90, 10)), tmp_path / "idx"
    words = [sys.executable, "-c", JOB, *os.environ["PYTHONPATH"].split(os.pathsep), photos, out]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(*job.communicate(timeout=300), job.returncode) for job in jobs]
    assert "8\n" in [stdout for stdout, *_ in ends]
    for stdout, stderr, code in ends:
        assert code == 0 and stdout == "8\n" or "another process is writing this index" in stderr
    assert len(Index(out)) == 8 and Index(out).checksum()
