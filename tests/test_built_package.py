"The built package: complete, and importable where there is no repository."

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from photo_folders import forget_ours, found_forked

SUFFIXES = (".py", ".typed", ".json", ".csv", ".txt", ".safetensors")
WHOLE_FOLDERS = {"toybox", "static"}
STATIC = {"canvas.html", "canvas.js", "page.css", "hits.html", "hits.css", "card.html"}


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    "The folder with a source archive, and with the wheel built from it: what the archive lacks, the wheel lacks."
    out = tmp_path_factory.mktemp("dist")
    options = ["--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
    command = [sys.executable, "-m", "build", *options, str(checkout)]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_licence_and_settings_travel(built):
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z:
        assert any(n.endswith("LICENSE") for n in z.namelist())
    with tarfile.open(archive) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py"} <= names
    assert not any(n.startswith(("nbs/", "tests/")) for n in names)


@pytest.mark.slow
def test_imports_away_from_the_repository(checkout, installed, tmp_path):
    paths = [p.relative_to(checkout).with_suffix("") for p in sorted((checkout / "vermouth").rglob("*.py"))]
    modules = [".".join(p.parts).removesuffix(".__init__") for p in paths if p.name != "_modidx"]

    def imported():
        forget_ours()
        os.chdir(tmp_path)
        sys.path.insert(0, str(installed))  # before the checkout that an editable install has put there
        return [importlib.import_module(name).__file__ for name in modules]

    places = [Path(file) for file in found_forked(imported)]
    assert len(places) == len(modules) and all(p.is_relative_to(installed) for p in places), places
