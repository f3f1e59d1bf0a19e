"Full and read-only disks, missing permissions and wrong clocks: one sentence each, and nothing is lost."

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import program as commands
import pytest
from disks import locked, small_disk
from program import NAMES, Program, run_here

# by name: what is best here is looked for in a cache that another user may not read
TOYBOX = ["--model", "toybox"]
EXTRACT = [*commands.EXTRACT, *TOYBOX, "--dtype", "float32", "--json"]
INDEX = [*commands.INDEX, *TOYBOX, "--dtype", "float32"]


def out(words, folder):
    "The same command with another output."
    words = list(words)
    words[words.index("--out") + 1] = folder
    return words


@pytest.fixture
def program(program, photos, monkeypatch):
    "As in conftest, in a folder that users other than root can enter, with photos to extract and to index."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        monkeypatch.chdir(folder)
        for name in ("in", "photos"):
            Path(folder, name).mkdir()
            for i, image in enumerate(photos[:3]):
                image.save(Path(folder, name, f"{i}.png"))
        yield Program(Path(folder))


# Disks


def test_a_disk_too_small_for_a_store_is_refused(program):
    with small_disk(program.folder / "disk", "4k"):
        program.refuses(*out(EXTRACT, "disk/store"), says="are free. Free some space")


def test_an_index_goes_on_when_a_full_disk_gets_room(program):
    for i in range(3, 40):
        Path(f"photos/{i}.png").write_bytes(Path("photos/0.png").read_bytes() + bytes(i))
    words = [*out(INDEX, "disk/idx"), "--batch-size", "1", "--model", "efficientnet_lite0"]
    with small_disk(program.folder / "disk", "128k"):
        full = run_here(*words)
        assert full.exit_code == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left on device" in full.stderr or "disk is full" in full.stderr
        subprocess.run(["mount", "-o", "remount,size=8m", "disk"], check=True)
        again = run_here(*words)
        assert again.exit_code == 0, again.stderr
        found = json.loads(again.stdout)
        assert found["photos"] == 40 and found["looked_at"] < 40, "what was finished is not done again"


# Permissions


@pytest.mark.parametrize(
    "words, path, done",
    [(EXTRACT, "in/1.png", 2), (INDEX, "photos/1.png", 2), (INDEX, "photos/below", 3)],
    ids=["extract", "index", "index, a folder"],
)
def test_what_may_not_be_read_is_skipped(program, words, path, done):
    if not Path(path).exists():
        Path(path).mkdir()
    assert run_here(*out(words, "warm")).exit_code == 0  # loads what only root may read, if Python lies in its home
    with locked(program.folder, path):
        document = program(*words, code=1)
    [(_, reason)] = document["set_aside"]
    assert "ermission denied" in reason
    assert document.get("items", document.get("photos")) == done


@pytest.mark.parametrize(
    "words, name",
    [(EXTRACT, "store"), (INDEX, "idx"), (["segment", "in/0.png", *NAMES, *TOYBOX, "--out", "mask.png"], "mask.png")],
    ids=["store", "index", "mask"],
)
def test_a_read_only_output_is_refused(program, words, name):
    Path("shut").mkdir()
    assert run_here(*out(words, f"warm-{name}")).exit_code == 0
    with locked(program.folder, "shut", 0o555):
        program.refuses(*out(words, f"shut/{name}"), says=f"out='shut/{name}': cannot be written (Permission denied)")


# Clocks


@pytest.mark.parametrize("words, folder", [(EXTRACT, "in"), (INDEX, "photos")], ids=["store", "index"])
def test_wrong_clocks_change_nothing(program, monkeypatch, words, folder):
    "Files from the future and from before 1970, and a clock that runs backwards."
    for i in range(3):
        os.utime(f"{folder}/{i}.png", ns=((i - 1) * 2**61, (i - 1) * 2**61))
    ticks = iter(range(2**31, 0, -100))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    first = json.loads(run_here(*words).stdout)
    os.utime(f"{folder}/1.png", (0, 0))
    again = json.loads(run_here(*words).stdout)
    assert again["checksum"] == first["checksum"]
    assert again.get("items", again.get("photos")) == 3 and not again.get("looked_at")


# Damage


def test_verify_refuses_a_store_with_a_changed_byte(program):
    program(*EXTRACT)
    shard = next(Path("store").glob("data-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    program.refuses("verify", "store", says="is not what was written")


def test_shards_of_two_processes_make_one_store(program):
    whole = program(*EXTRACT)
    halves = [json.loads(run_here(*out(EXTRACT, "halves"), "--shard-of", k, 2).stdout or "{}") for k in (0, 1)]
    assert halves[-1]["checksum"] == whole["checksum"]
