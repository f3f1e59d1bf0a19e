"""Ctrl-C at two moments of every command: while torch is loaded, and in the middle of its work.

Exit code 130, one sentence, no traceback; commands that keep what is finished say so, and go on with it.
"""

import os
import signal
import subprocess
import sys

import pytest
from conftest import COUNTS
from disks import run_child
from program import FEW, NAMES, OFFLINE, TOYBOX, fill, run_here

from vermouth.app import cli

COMMANDS = {
    "index": ["index", "photos", "--out", "new-idx", "--batch-size", "1", *TOYBOX],
    "search": ["search", "idx", "photos/cat/0.png", "--html", "hits.html", *TOYBOX],
    "extract": ["extract", "photos", "--out", "new-store", "--batch-size", "1", *FEW],
    "classify": ["classify", "photos", "--batch-size", "1", *NAMES, *TOYBOX],
    "train": ["train", "photos", "--out", "trained", "--head", "linear", *TOYBOX],
    "segment": ["segment", "photos/cat/0.png", "--out", "mask.png", *NAMES, *TOYBOX],
    "run": ["run", "10_page.ipynb", "--out", "out"],
    "verify": ["verify", "store"],
    "check": ["check", "photos"],
    "bench": ["bench", "--width", "8", "--side", "64", "--dtype", "float32"],
    "info": ["info"],
    "web": ["web", "idx"],
}
RESUMED = {"index", "extract", "train", "run"}
KEPT = "What is finished is kept: give the same command again."


def sentence(command):
    return f"{command}: interrupted. {KEPT if command in RESUMED else 'Give the same command again.'}\n"


# While torch is loaded

LOADING = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.default_int_handler)
from vermouth.app.cli import app
app(sys.argv[1:])
"""


def test_the_table_has_every_command():
    assert set(COMMANDS) == {command.callback.__name__ for command in cli.app.registered_commands}


@pytest.mark.parametrize("command", COMMANDS)
def test_while_torch_is_loaded(command, tmp_path):
    words = [sys.executable, "-c", LOADING, *COMMANDS[command]]
    run = subprocess.run(words, cwd=tmp_path, env=OFFLINE, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", sentence(command))
    assert not list(tmp_path.iterdir())
    COUNTS["interrupts"] += 1


# In the middle of its work


@pytest.fixture(scope="module")
def place(toybox, tmp_path_factory):
    "Photos of three classes, an index, a store, and a page that interrupts who runs it."
    cell = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    return fill(tmp_path_factory.mktemp("interrupts"), toybox, cell)


def interrupt_at(owner, name, call):
    "Ctrl-C comes with this call of a function."
    real, left = getattr(owner, name), iter(range(call - 1, -1, -1))

    def interrupted(*args, **options):
        if not next(left, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    setattr(owner, name, interrupted)


def moment(command, toybox):
    "Owner and name of a function that the command calls in the middle of its work, and which call of it."
    if command == "verify":
        from vermouth.store import FeatureStore

        return FeatureStore, "checksum", 1
    if command == "check":
        from vermouth.app import check

        return check, "check", 1
    if command == "info":
        return cli, "_installation", 1
    return type(toybox.backbone.unet), "forward", 2 if command in ("index", "extract", "classify") else 1


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"web"}))
def test_in_the_middle_of_its_work(command, program, place, toybox, monkeypatch):
    monkeypatch.chdir(place)
    before = {*place.rglob("*")}
    prepare = (lambda: None) if command == "run" else lambda: interrupt_at(*moment(command, toybox))
    run = run_child(COMMANDS[command], prepare)
    assert (run.exit_code, run.stdout) == (130, ""), run.stderr
    assert f"\n{run.stderr}".endswith(f"\n{sentence(command)}") and "Traceback" not in run.stderr
    new = {path.relative_to(place).parts[0] for path in set(place.rglob("*")) - before}
    assert new <= {"new-idx", "new-store", "trained", "out"} and not list(place.rglob("*.tmp"))
    COUNTS["interrupts"] += 1
    if command in ("index", "extract", "train"):
        assert run_here(*COMMANDS[command]).exit_code == 0
