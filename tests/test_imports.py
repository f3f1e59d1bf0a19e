"Every module imports alone, and the package quickly."

import importlib
import json
import os
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT
from house import MODULES, imports
from photo_folders import forget_ours, found_forked, run_forked, write_photos
from program import run_here

RUN_ALONE = """
import gc, json, os, sys
gc.disable()
import vermouth.expert  # torch and timm: loaded once, before the process splits
from vermouth.app.cli import app
large = {"diffusers", "open_clip", "transformers", "torch._dynamo", "sympy"}
for i, words in enumerate(json.load(sys.stdin)):
    if i == int(sys.argv[1]):  # the commands from here on need CLIP
        from vermouth.text import load_clip
        load_clip("toybox", "cpu")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = app(words, standalone_mode=False) or 0
        finally:
            print(words, code, sorted(large & sys.modules.keys()), file=sys.stderr, flush=True)
            os._exit(0)
    os.waitpid(pid, 0)
"""


def failing():
    "Modules that cannot be imported alone."
    forget_ours()
    return [m for m in MODULES if os.waitpid(run_forked(partial(importlib.import_module, m)), 0)[1]]


@pytest.mark.slow
def test_every_module_imports_alone():
    "Each in a process of its own, in which no other module of ours was loaded before."
    ours = {"vermouth", "gradio", "fastapi", "uvicorn", "ray", "pillow_heif"}
    others = {i for m in MODULES for i in imports(m) if i.split(".")[0] not in ours}
    for name in sorted(others):  # what every module waits for: loaded once, before the process splits
        above, _, last = name.rpartition(".")
        if not (above and hasattr(importlib.import_module(above), last)):
            importlib.import_module(name)
    assert not found_forked(failing), "the reason is printed above"


LITE0 = ["--model", "efficientnet_lite0"]
PLAIN = [  # commands without a denoiser
    ["index", "photos", "--out", "idx", *LITE0],
    ["search", "idx", "photos/0/00.png"],
    ["classify", "photos/0/00.png", "--model", "mine"],
    *(["check", what] for what in ("photos", "idx", "mine")),
    ["verify", "idx"],
    ["info"],
]
WORDS = [  # and with CLIP
    ["index", "photos", "--out", "words", "--model", "clip:toybox"],
    ["search", "words", "a photo of a duck"],
    ["classify", "photos/0/00.png", "--names", "cat,duck", "--model", "clip:toybox"],
]
ALL = [["classify", "photos", "--names", "cat,duck", "--model", "toybox"]]  # and with a denoiser
SAYS = ("index: ", "12 photos, all compared", "model: its training reached")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "Each command with its exit code and the large libraries that its process has imported, in words."
    folder = tmp_path_factory.mktemp("commands")
    write_photos(folder / "photos", 12)
    trained = run_here("train", folder / "photos", "--out", folder / "mine", "--shots", "2", *LITE0)  # needs them all
    assert trained.exit_code == 0, trained.output
    given = {"input": json.dumps(PLAIN + WORDS + ALL), "cwd": folder, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", RUN_ALONE, str(len(PLAIN))], **given)
    lines = [line for line in run.stderr.splitlines() if line.startswith("['")]
    assert run.returncode == 0 and len(lines) == len(PLAIN + WORDS + ALL), run.stderr[-3000:]
    noise = [line for line in run.stderr.splitlines() if line and line not in lines and not line.startswith(SAYS)]
    assert not noise, "libraries say something that is not for users"
    return lines


@pytest.mark.slow
def test_commands_without_a_denoiser_import_no_large_library(ended):
    "Each in a process of its own: what takes seconds to import is for models that need it."
    assert ended[: len(PLAIN)] == [f"{command} 0 []" for command in PLAIN]


@pytest.mark.slow
def test_words_need_no_compiler(ended):
    "CLIP is open_clip's, which imports transformers; torch's compiler would take as long again."
    lines = ended[len(PLAIN) : -len(ALL)]
    assert [line.partition("]")[0] for line in lines] == [str(command).rstrip("]") for command in WORDS]
    assert not [line for line in lines if "torch._dynamo" in line or "diffusers" in line], lines


def test_importing_the_package_is_quick():
    code = "import time; t = time.perf_counter(); import vermouth; print(time.perf_counter() - t)"
    best = min(
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert best < 0.3, f"import vermouth takes {best:.2f} s"
