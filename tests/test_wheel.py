"The built package: complete, and importable where there is no repository."
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PACKAGE_DATA = (".json", ".csv", ".txt", ".safetensors")


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    "The folder with a source archive, and with the wheel built from that archive: what the archive lacks, the wheel lacks."
    out = tmp_path_factory.mktemp("dist")
    run = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder into which the wheel, and nothing else, was installed."
    there = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(there), *map(str, built.glob("*.whl"))]
    run = subprocess.run(pip, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return there


def test_wheel_holds_every_module_and_all_data(checkout, built):
    [wheel] = built.glob("*.whl")
    files = [p for p in (checkout / "vermouth").rglob("*") if p.is_file() and (p.suffix in (".py", *PACKAGE_DATA) or "toybox" in p.parts)]
    expected = {p.relative_to(checkout).as_posix() for p in files if "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    assert "vermouth/core.py" in expected
    assert not expected - names, f"missing in {wheel.name}: {sorted(expected - names)}"
    strangers = {n for n in names if not n.startswith("vermouth") or "ipynb" in n}
    assert not strangers, f"not part of the package: {sorted(strangers)}"


def test_licence_and_settings_travel(built):
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z: assert any(n.endswith("LICENSE") for n in z.namelist())
    with tarfile.open(archive) as t: names = {n.partition("/")[2] for n in t.getnames()}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py"} <= names
    assert not any(n.startswith(("nbs/", "tests/")) for n in names)


def test_imports_away_from_the_repository(checkout, installed, tmp_path):
    modules = [".".join(p.relative_to(checkout).with_suffix("").parts) for p in sorted((checkout / "vermouth").rglob("*.py"))]
    modules = [m.removesuffix(".__init__") for m in modules if not m.endswith("_modidx")]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(installed)!r})  # before the checkout that an editable install has put there
for name in {modules!r}: print(importlib.import_module(name).__file__)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    places = [Path(line) for line in run.stdout.split()]
    assert len(places) == len(modules) and all(p.is_relative_to(installed) for p in places), places
