"What the tests share."

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

# Before torch is loaded: two test processes side by side take one thread each, and threads that wait do not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
COUNTS = Counter()  # what the tests of bad input have tried; printed at the end
KILLS = int(os.environ.get("VERMOUTH_KILLS", "4"))  # of each command that may be killed at any moment

# Python's collector would take a quarter of the time that the libraries' imports take, and walk through their million
# objects ever after, in this process and in those that split from it.
gc.disable()

# nbformat imports jsonschema, which would spend two seconds on a grammar of addresses that no notebook is checked for.
sys.modules.setdefault("rfc3987_syntax", None)

# A shell that starts the tests in the background makes them ignore Ctrl-C, which many of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_number_of_threads():
    "A test that sets the number of torch's threads sets it for all after it, and the last bits of features with it."
    yield
    threads, torch = int(os.environ["OMP_NUM_THREADS"]), sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_collection_finish():
    gc.freeze()  # what the tests' files have imported
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    "A worker of pytest-xdist hands its counts to the process that prints."
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = dict(COUNTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    COUNTS.update(getattr(node, "workeroutput", {}).get("counts", {}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Keep what a browser shows when a test with one fails, in the folder VERMOUTH_FAILED."
    report = yield
    browser, folder = getattr(item, "funcargs", {}).get("browser"), os.environ.get("VERMOUTH_FAILED")
    if report.failed and browser and folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for i, page in enumerate(page for context in browser.contexts for page in context.pages):
            with suppress(Exception):  # the page may be what has failed
                page.screenshot(path=f"{folder}/{re.sub(r'[^0-9A-Za-z_-]+', '_', item.name)}-{i}.png")
    return report


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.write_line("; ".join(f"{n:,} {what}" for what, n in sorted(COUNTS.items())))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    "The repository as git would commit it now, copied away, so that what a test writes stays out of it."
    there = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not (ROOT / name).exists():
            continue  # deleted, and the deletion not committed yet
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, there / name, follow_symlinks=False)
    return there


@pytest.fixture(scope="session")
def toybox():
    "The shipped model, loaded once for all tests of a process."
    from vermouth.model import Vermouth

    return Vermouth.load("toybox", "cpu")


@pytest.fixture(scope="module")
def backbone(toybox):
    return toybox.backbone


@pytest.fixture(scope="module")
def small():
    "A backbone with all kinds of blocks and layers, as few as possible."
    import torch
    from diffusers import UNet2DConditionModel

    from vermouth.backbone import Backbone, random_backbone

    bb = random_backbone(width=8)
    torch.manual_seed(0)
    config = dict(bb.unet.config) | {"block_out_channels": (16,) * 4, "layers_per_block": 1, "attention_head_dim": 2}
    parts = {"vae": bb.vae, "unet": UNet2DConditionModel.from_config(config), "text_encoder": bb.text_encoder}
    return Backbone.from_components(**parts, tokenizer=bb.tokenizer, scheduler=bb.scheduler)


@pytest.fixture(scope="module")
def latents(small):
    "Latents and a caption for it."
    import torch

    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), small.encode_text("a cat")


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    "A small feature store that was made in one go; not to be changed."
    from store_helpers import FEW, ITEMS

    from vermouth.store import extract

    return extract(backbone, ITEMS, tmp_path_factory.mktemp("stores") / "whole", **FEW)


@pytest.fixture(scope="session")
def transformer_folders(tmp_path_factory) -> dict[str, str]:
    "Tiny PixArt, SD3 and FLUX checkpoints by kind; not to be changed."
    from transformer_layout import KINDS, write_folder

    root = tmp_path_factory.mktemp("transformers")
    return {kind: write_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def transformers(transformer_folders) -> dict:
    "Their backbones."
    from vermouth.backbone import load_backbone

    return {kind: load_backbone(folder, "cpu") for kind, folder in transformer_folders.items()}


@pytest.fixture(scope="session")
def photos() -> list:
    "Five Toybox photos as PIL images."
    from vermouth.data.toybox import Toybox

    return [item.image for item in Toybox("photo", n=5, seed=3)]


@pytest.fixture
def quick_rate(monkeypatch):
    "The machine's rate in a product of small matrices, and each time is taken once: the benchmark's own takes seconds."
    from vermouth.experiments import bench

    monkeypatch.setattr(bench, "matrix_rate", partial(bench.matrix_rate, side=256))
    monkeypatch.setattr(bench, "best_seconds", lambda work, repeats, device: bench.elapsed_seconds(work, device))


@pytest.fixture
def program(toybox, tmp_path, monkeypatch):
    "The program in this process and in an empty folder, with the Toybox loaded already."
    from program import Program

    from vermouth import backbone, model, text

    def instead(owner, name, ready):
        load = getattr(owner, name)

        def loaded(name="toybox", *args, **kwargs):
            return ready if str(name) == "toybox" and not kwargs else load(name, *args, **kwargs)

        monkeypatch.setattr(owner, name, loaded)

    instead(model.Vermouth, "load", toybox)
    instead(backbone, "load_backbone", toybox.backbone)
    instead(text, "load_captioner", toybox.captioner)
    monkeypatch.chdir(tmp_path)
    return Program(tmp_path)
