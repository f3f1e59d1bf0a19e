"""An index as a Parquet file: odd names, forged rows and settings, places that may not be written, kills.

Who writes an index by hand can seal what he likes: digests are no signatures. What is forged here has fitting seals.
"""

import json
import os
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COUNTS
from disks import locked, short_files
from PIL import Image

from vermouth.app import database, search
from vermouth.app.index import Index, build_index
from vermouth.core import VermouthError, file_digest, write_atomic

NAMES = [b"a.png", b"\xff.png", b"\xfe.png", b"=cmd|calc'!A0.png", b"\x1b[2J.png", b"a\nb.png", b"x" * 250 + b".png"]


class Grey:
    "A model of four numbers."

    name, fingerprint = "grey", "0" * 16

    def embed(self, images):
        pixels = [[*image.getpixel((0, 0)), 1.0] for image in (images if isinstance(images, list) else [images])]
        return torch.nn.functional.normalize(torch.tensor(pixels), dim=1)


@pytest.fixture(scope="module")
def place():
    "Photos and their index, in a folder that users other than root can enter."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "photos").mkdir()
        for i, name in enumerate(NAMES):
            picture = folder / "picture.png"
            Image.new("RGB", (32, 32), (i * 30, 20, 9)).save(picture)
            os.rename(picture, os.path.join(os.fsencode(folder / "photos"), name))
        build_index(folder / "photos", folder / "idx", Grey(), quiet=True)
        yield folder


def test_every_name_is_a_text_of_its_own(place, tmp_path):
    Index(place / "idx").export(tmp_path / "photos.parquet")
    table = pd.read_parquet(tmp_path / "photos.parquet")
    expected = [os.fsdecode(name) for name in NAMES]
    shown = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in expected]
    assert sorted(table.path) == sorted(shown) and "\\xff.png" in shown
    assert {vector.dtype for vector in table.vector} == {np.dtype("float32")}
    COUNTS["exports"] += len(NAMES)


# Forged


def forged(place, folder, change):
    "The index with a change in its database, and seals that fit."
    shutil.copytree(place / "idx", folder, dirs_exist_ok=True)
    db = sqlite3.connect(folder / database.FILE, isolation_level=None)
    db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    settings = database.read_settings(db)
    change(db, settings)
    for i, *row in db.execute(f"SELECT id, {database.COLUMNS} FROM photos").fetchall():
        db.execute("UPDATE photos SET seal = ? WHERE id = ?", [database.seal(row), i])
    listed = "SELECT path, sha256 FROM photos WHERE reason IS NULL AND id <= ? ORDER BY path"
    found = db.execute(listed, [min(settings["last"], 2**62)]).fetchall()
    settings["checksum"] = database.seal([settings["fingerprint"], *found])
    database.write_settings(db, **settings)
    db.close()
    return folder


def row(column, value):
    return lambda db, settings: db.execute(f"UPDATE photos SET {column} = ? WHERE id = 2", [value])


def without_faiss(change):
    "The database alone counts where the other file is missing."

    def both(db, settings):
        change(db, settings)
        settings["neighbours"] = "neighbours-new.faiss"

    return both


def every_vector(db, settings):
    db.execute("UPDATE photos SET vector = ?", [np.full(4, np.nan, np.float32).tobytes()])


def setting(name, value):
    return lambda db, settings: settings.update({name: value})


FORGED = {
    "a vector that is NaN": row("vector", np.full(4, np.nan, np.float32).tobytes()),
    "vectors that are NaN": every_vector,
    "a vector of three bytes": without_faiss(row("vector", b"abc")),
    "a vector that is too long": row("vector", bytes(64)),
    "no vector": row("vector", None),
    "a width of text": row("width", "=1+1"),
    "a width of bytes": row("width", b"x"),
    "an infinite width": row("width", 1e400),
    "no photos": setting("count", 0),
    "no last row": setting("last", 0),
    "a last row beyond SQLite's numbers": setting("last", 2**70),
    "vectors without numbers": setting("dim", 0),
    "other vectors": setting("dim", 3),
    "a recall that is no number": setting("recall", float("nan")),
    "an infinite similarity": setting("nearest", float("inf")),
    "settings in settings": setting("overlay", {"a": json.loads("[" * 900 + "]" * 900)}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_index_ends_in_a_sentence_and_writes_nothing(what, place, tmp_path):
    out, query = forged(place, tmp_path / "idx", FORGED[what]), Image.new("RGB", (32, 32), (99, 9, 9))
    target = tmp_path / "photos.parquet"
    target.write_bytes(b"PAR1 of before")
    calls = [
        lambda: Index(out).export(target),
        lambda: Index(out).search(query, Grey(), k=7),
        lambda: Index(out).checksum(),
        lambda: build_index(place / "photos", out, Grey(), quiet=True),
    ]
    for i, call in enumerate(calls):
        COUNTS["forged indexes read"] += 1
        try:
            found = call()
        except VermouthError as e:
            assert "\n" not in str(e)
        else:
            assert i or what == "settings in settings", "it was exported"
            assert i != 1 or np.isfinite([hit.score for hit in found]).all()
    assert what == "settings in settings" or target.read_bytes() == b"PAR1 of before"


def test_a_faiss_file_of_other_vectors(place, tmp_path):
    "Its name is the digest of its bytes, which are another's."

    def other(db, settings):
        made, _ = database.make_neighbours(np.arange(1, 8), lambda ids: np.ones((len(ids), 3), np.float32))
        settings["neighbours"] = database.write_neighbours(tmp_path / "idx", made)
        settings["dim"] = 3

    (tmp_path / "idx").mkdir()
    out = forged(place, tmp_path / "idx", other)
    assert file_digest(out / Index(out).settings["neighbours"]) in Index(out).settings["neighbours"]
    with pytest.raises(VermouthError, match=r"The index .* is of \(1, 3\)"):
        Index(out).search(Image.new("RGB", (32, 32)), Grey())
    with pytest.raises(VermouthError, match="numbers instead of 3"):
        Index(out).export(tmp_path / "photos.parquet")
    COUNTS["forged indexes read"] += 2


@pytest.mark.parametrize("vector", [np.ones((1, 3)), np.ones(4), np.full((1, 4), np.nan), np.ones((2, 4))], ids=str)
def test_vectors_that_are_none(vector, place):
    with pytest.raises(VermouthError, match="vector: "):
        Index(place / "idx").nearest(vector.astype(np.float32), 3)


# Where it is written


def test_nothing_is_replaced_but_an_older_export(place, tmp_path):
    index, photo = Index(place / "idx"), place / "photos/a.png"
    before = {path: path.read_bytes() for path in [photo, *sorted((place / "idx").iterdir())]}
    for target in before:
        with pytest.raises(VermouthError, match="no Parquet file|inside of the index"):
            index.export(target)
    with pytest.raises(VermouthError, match="inside of the index"):
        index.export(place / "idx/photos.parquet")
    (tmp_path / "way").symlink_to(place / "idx")
    with pytest.raises(VermouthError, match="inside of the index"):
        index.export(tmp_path / "way/photos.parquet")
    assert {path: path.read_bytes() for path in before} == before
    assert build_index(place / "photos", place / "idx", Grey(), quiet=True).changes["new"] == 0
    for kept in ("empty", "link"):
        target = tmp_path / kept
        target.touch() if kept == "empty" else target.symlink_to(tmp_path / "empty")
        index.export(target)
        index.export(target)
    assert (tmp_path / "link").is_symlink() and len(pd.read_parquet(tmp_path / "empty")) == len(NAMES)
    COUNTS["exports"] += len(before) + 6


@pytest.mark.parametrize("target", [".", "none/photos.parquet", "s3://bucket/photos.parquet", "a.png/b", "x" * 300])
def test_places_that_cannot_be_written(target, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(VermouthError, match="cannot be written"):
        Index(place / "idx").export(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    COUNTS["exports"] += 1


def test_devices_stay(place):
    Index(place / "idx").export("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(VermouthError, match="cannot be written .No space left"):
        Index(place / "idx").export("/dev/full")
    COUNTS["exports"] += 2


def test_a_folder_of_another_user(place):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Index(place / "idx").export(folder / "old.parquet")  # loads what is needed, and is there before
        before = (folder / "old.parquet").read_bytes()
        with locked(folder, ".", 0o555), pytest.raises(VermouthError, match="ermission denied"):
            Index(place / "idx").export(folder / "new.parquet")
        assert [path.name for path in folder.iterdir()] == ["old.parquet"]
        assert (folder / "old.parquet").read_bytes() == before


def in_a_fork(do):
    "Exit code of a fork that does something; below zero: the signal that ended it."
    if not (pid := os.fork()):
        try:
            do()
            os._exit(0)
        except VermouthError as e:
            os._exit(2 if "File too large" in str(e) else 3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_full_disk_leaves_the_old_file(place, tmp_path, monkeypatch):
    index, target = Index(place / "idx"), tmp_path / "photos.parquet"
    index.export(target)
    before = target.read_bytes()

    def short(path, data):
        short_files(100)  # SQLite needs more to read an index
        write_atomic(path, data)

    monkeypatch.setattr(search, "write_atomic", short)
    assert in_a_fork(lambda: index.export(target)) == 2 and target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    COUNTS["full disks"] += 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(call, place, tmp_path, monkeypatch):
    index, target = Index(place / "idx"), tmp_path / "photos.parquet"
    target.write_bytes(b"PAR1 of before")
    monkeypatch.setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert in_a_fork(lambda: index.export(target)) == -signal.SIGKILL
    assert target.read_bytes() == b"PAR1 of before"
    COUNTS["kills of export"] += 1


def test_an_export_during_an_update_is_one_whole_state(place, tmp_path):
    "Rows are read in one transaction: what is written meanwhile is not in it."
    here, seen = tmp_path / "copy", []
    shutil.copytree(place / "photos", here / "photos")
    build_index(here / "photos", here / "idx", Grey(), quiet=True)
    index, real = Index(here / "idx"), database.read_rows

    def changing(*given):
        for i, found in enumerate(real(*given)):
            if i == 2 and not seen:
                seen.append(1)
                Image.new("RGB", (32, 32), (1, 2, 3)).save(here / "photos/new.png")
                (here / "photos/a.png").unlink()
                build_index(here / "photos", here / "idx", Grey(), quiet=True)
            yield found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(database, "read_rows", changing)
        index.export(tmp_path / "during.parquet")
    index.export(tmp_path / "after.parquet")
    during, after = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("during", "after"))
    assert seen and "a.png" in [*during.path] and "new.png" not in [*during.path] and len(during) == len(NAMES)
    assert "a.png" not in [*after.path] and "new.png" in [*after.path] and len(after) == len(NAMES)
    COUNTS["exports"] += 2
