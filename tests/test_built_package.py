"The built package: complete, and importable where there is no repository."

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SUFFIXES = (".py", ".typed", ".json", ".csv", ".txt", ".safetensors")
WHOLE_FOLDERS = {"toybox", "static"}
STATIC = {"canvas.html", "canvas.js", "page.css", "hits.html", "hits.css", "card.html"}


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    "The folder with a source archive, and with the wheel built from it: what the archive lacks, the wheel lacks."
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder into which the wheel, and nothing else, was installed."
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder)]
    run = subprocess.run([*pip, *map(str, built.glob("*.whl"))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_wheel_holds_every_module_and_all_data(checkout, built):
    [wheel] = built.glob("*.whl")
    files = [p for p in (checkout / "vermouth").rglob("*") if p.is_file()]
    files = [p for p in files if p.suffix in SUFFIXES or WHOLE_FOLDERS & set(p.parts)]
    expected = {p.relative_to(checkout).as_posix() for p in files if "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    assert {"vermouth/core.py", "vermouth/py.typed", *(f"vermouth/app/static/{name}" for name in STATIC)} <= expected
    assert not expected - names, f"missing in {wheel.name}: {sorted(expected - names)}"
    strangers = {n for n in names if not n.startswith("vermouth") or "ipynb" in n}
    assert not strangers, f"not part of the package: {sorted(strangers)}"


def test_licence_and_settings_travel(built):
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z:
        assert any(n.endswith("LICENSE") for n in z.namelist())
    with tarfile.open(archive) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py"} <= names
    assert not any(n.startswith(("nbs/", "tests/")) for n in names)


def test_imports_away_from_the_repository(checkout, installed, tmp_path):
    paths = [p.relative_to(checkout).with_suffix("") for p in sorted((checkout / "vermouth").rglob("*.py"))]
    modules = [".".join(p.parts).removesuffix(".__init__") for p in paths if p.name != "_modidx"]
    code = f"""
import gc, importlib, sys
gc.disable()  # it would take a quarter of the time
sys.path.insert(0, {str(installed)!r})  # before the checkout that an editable install has put there
for name in {modules!r}: print(importlib.import_module(name).__file__)
"""
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    places = [Path(line) for line in run.stdout.split()]
    assert len(places) == len(modules) and all(p.is_relative_to(installed) for p in places), places
