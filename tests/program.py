"The program `vermouth` for tests: in a process of its own, or in this one."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from conftest import COUNTS
from typer.testing import CliRunner

PROGRAM = Path(sys.executable).with_name("vermouth")
CHOICE = re.compile(r"dtype='auto': (float32|bfloat16); \w+ multiplies bfloat16 [\d.]+ times as fast as float32\.")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


def run_process(*words, env=OFFLINE, **options):
    "The finished process; `options` are those of subprocess.run."
    return subprocess.run([PROGRAM, *map(str, words)], env=env, capture_output=True, text=True, **options)


def run_here(*words, **options):
    "The same without the seconds that a new process takes to load torch."
    from vermouth.app.cli import app

    return CliRunner().invoke(app, [str(word) for word in words], **options)


def without_choice(stderr):
    "The lines on standard error but the one that says which type --dtype auto takes."
    assert stderr.endswith("\n") or not stderr
    lines = stderr.splitlines()
    return lines[1:] if lines and CHOICE.fullmatch(lines[0]) else lines


CLASSES = ["cat", "fish", "tree"]
NAMES = ["--names", ",".join(CLASSES)]
CLASSIFY = ["classify", ".", *NAMES, "--json"]
EXTRACT = ["extract", "in", "--out", "store", "--captioner", "none", "-p", "stages", "mid", "-p", "attention", "[]"]
INDEX = ["index", "photos", "--out", "idx", "--json"]


class Program:
    "Runs commands in a folder whose files no command may change."

    def __init__(self, folder):
        self.folder = folder

    def files(self):
        readable = [
            p
            for p in self.folder.rglob("*")
            if p.is_file() and not p.is_symlink() and os.access(p, os.R_OK, effective_ids=True)
        ]
        return {p: p.read_bytes() for p in readable}

    def __call__(self, *words, code=0):
        "The JSON that a command prints. It ends with this exit code and leaves every file as it was."
        result = self._run(words)
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout)

    def refuses(self, *words, says):
        "The command ends in one sentence that holds `says`, exit code 2, and prints only its choice of a type besides."
        result = self._run(words)
        assert result.exit_code == 2, result.stdout + result.stderr
        [sentence] = without_choice(result.stderr)
        assert says in sentence and sentence[-1] in ".!?", result.stderr
        assert result.stdout == ""

    def _run(self, words):
        before = self.files()
        result = run_here(*words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        after = self.files()
        assert not [p for p, data in before.items() if after.get(p) != data], "an input was changed"
        COUNTS["inputs tried"] += 1
        return result
TOYBOX = ["--model", "toybox"]
FEW = [*EXTRACT[4:], "--dtype", "float32"]


def fill(folder, toybox, *cells, parameters=False):
    "Photos of three classes, their index, a store, and a page of these cells; the first may hold its parameters."
    from vermouth.app.search import build_index
    from vermouth.data.toybox import Toybox
    from vermouth.store import extract

    for i, item in enumerate(Toybox("photo", n=9, seed=4)):
        (folder / f"photos/{CLASSES[i % 3]}").mkdir(parents=True, exist_ok=True)
        item.image.save(folder / f"photos/{CLASSES[i % 3]}/{i}.png")
    build_index(folder / "photos", folder / "idx", toybox, quiet=True)
    paths = sorted(folder.glob("photos/*/*"))
    extract(toybox.backbone, paths, folder / "store", stages="mid", attention=(), quiet=True)
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    page.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    if parameters:
        page.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(page, folder / "10_page.ipynb")
    return folder
