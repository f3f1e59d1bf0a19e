"""A disk that is full and a working folder that may not be written, in every command.

One sentence, exit code 2, nothing half written; commands that keep what is finished go on when there is room.
"""

import json
import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import COUNTS
from disks import locked, run_child, short_files, small_disk
from program import FEW, NAMES, TOYBOX, fill, run_here

PAGE = "from pathlib import Path\nPath(out_dir).mkdir(exist_ok=True)\n(Path(out_dir) / 'rows').write_text('x' * 9000)"


def writing(disk):
    "Commands that write, by name; each writes to `disk` only."
    return {
        "index": ["index", "photos", "--out", f"{disk}/new-idx", *TOYBOX],
        "search": ["search", "idx", "photos/cat/0.png", "--html", f"{disk}/new-hits.html", *TOYBOX],
        "extract": ["extract", "photos", "--out", f"{disk}/new-store", *FEW],
        "train": ["train", "photos", "--out", f"{disk}/new-trained", "--head", "linear", *TOYBOX],
        "segment": ["segment", "photos/cat/0.png", "--out", f"{disk}/new-mask.png", *NAMES, *TOYBOX],
        "run": ["run", "10_page.ipynb", "--out", f"{disk}/new-out", "-p", "out_dir", f"{disk}/new-results"],
    }


PRINTING = {
    "classify": ["classify", "photos", *NAMES, *TOYBOX, "--json"],
    "verify": ["verify", "store", "--json"],
    "check": ["check", "photos", "--json"],
    "bench": ["bench", "--width", "8", "--side", "64", "--dtype", "float32", "--json"],
    "info": ["info", "--json"],
}


@pytest.fixture(scope="module")
def made(toybox):
    "Photos of three classes, an index, a store and a page, in a folder that users other than root can enter."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield fill(folder, toybox, "out_dir = 'results'", PAGE, parameters=True)


@pytest.fixture
def place(made, program, quick_rate, monkeypatch):
    "The folder, with the Toybox loaded already."
    monkeypatch.chdir(made)
    return made


def ends_in_a_sentence(run, *says):
    "Exit code 2, nothing printed, and one sentence with one of these in it, below what the command has said before."
    sentence = run.stderr.splitlines()[-1]
    assert run.exit_code == 2 and not run.stdout, run.stderr
    assert "Traceback" not in run.stderr and sentence[-1] == ".", run.stderr
    assert any(text in sentence for text in says), sentence
    COUNTS["full disks"] += 1


FULL = ("No space left on device", "are free. Free some space", "disk is full", "File too large", "disk I/O error")


def left_whole(disk, command):
    "What is on a disk after a command could not go on, and after it has been given again with room."
    assert not list(disk.rglob("*.tmp"))
    if command in ("search", "segment"):
        assert not list(disk.iterdir()), "a file that is not whole"
    for page in disk.glob("new-out/*.ipynb"):
        nbformat.read(page, 4)


@pytest.mark.parametrize("most", [0, 1000], ids=["from the start", "after 1000 bytes"])
@pytest.mark.parametrize("command", writing(""))
def test_files_that_cannot_grow(place, command, most):
    "As on a full disk, for anybody."
    before = {path: path.read_bytes() for path in place.glob("[!i]*/**/*") if path.is_file()}
    with tempfile.TemporaryDirectory(dir=place) as disk:
        run = run_child(writing(disk)[command], lambda: short_files(most))
        if (command, most) == ("segment", 1000):
            assert run.exit_code == 0, "a mask is smaller"
            return
        ends_in_a_sentence(run, *FULL)
        left_whole(Path(disk), command)
        again = run_here(*writing(disk)[command])
        assert again.exit_code == 0, again.output
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("command", sorted(set(writing("")) - {"segment"}))
def test_a_full_disk(place, command):
    "A mask is smaller than a page of memory, and so than the smallest disk."
    with small_disk(place / "small", "4k"):
        run = run_child(writing("small")[command])
        ends_in_a_sentence(run, *FULL)
        left_whole(place / "small", command)


# What is printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("command", [*PRINTING, *writing("")])
def test_output_goes_to_a_full_disk(place, command):
    "As `vermouth classify … --json > file`."
    with tempfile.TemporaryDirectory(dir=place) as disk:
        words = PRINTING.get(command) or [*writing(disk)[command], "--json"]
        run = run_child(words, stdout="/dev/full")
    ends_in_a_sentence(run, "output: No space left on device. Free some space, or give a place that is yours.")


# A working folder that may not be written


@pytest.mark.parametrize("command", writing(""))
def test_an_unwritable_working_folder(place, command):
    "Of another user than root: for what reads only, it is no error."
    with tempfile.TemporaryDirectory(dir=place) as warm:
        assert run_here(*writing(warm)[command]).exit_code == 0
    with locked(place, ".", 0o555):
        ends_in_a_sentence(run_child(writing(".")[command]), "ermission denied")
    assert not list(place.glob("new-*"))


@pytest.mark.parametrize("command", PRINTING)
def test_commands_that_only_read_need_no_writable_folder(place, command):
    assert run_here(*PRINTING[command]).exit_code == 0  # loads what only root may read, if Python lies in its home
    with locked(place, ".", 0o555):
        run = run_child(PRINTING[command])
    assert run.exit_code == 0 and json.loads(run.stdout), run.stderr
