"An index is read on read-only media and with SQLite alone; other writers and foreign indexes are refused."

import os
import sqlite3
import stat
from contextlib import closing

import numpy as np
import pytest
from filelock import FileLock
from odd_files import Grey
from photo_folders import answers, build, write_photos
from PIL import Image

from vermouth.app import database
from vermouth.app.database import FILE, OURS
from vermouth.app.search import Index
from vermouth.core import VermouthError


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


# Other processes, models and folders


def test_two_writers_and_other_models_and_other_folders_are_refused(photos, tmp_path):
    out, other = tmp_path / "idx", Grey()
    index, other.name, other.fingerprint = build(photos, out), "mine", "f" * 16
    with FileLock(out / ".lock"), pytest.raises(VermouthError, match="another process is writing this index"):
        build(photos, out)
    for use in (lambda: build(photos, out, other), lambda: index.search(Image.new("RGB", (9, 9)), other)):
        with pytest.raises(VermouthError) as refused:
            use()
        assert "model='mine'" in str(refused.value) and "'grey' (0123456789abcdef)" in str(refused.value)
    with pytest.raises(VermouthError, match="no part of an index. Give a new or an empty folder"):
        build(photos, photos)
    (tmp_path / "file").touch()
    with pytest.raises(VermouthError, match="cannot be written"):
        build(photos, tmp_path / "file")


@pytest.mark.parametrize("leftover", [False, True])
def test_an_index_on_a_read_only_medium_is_searched(photos, tmp_path, leftover):
    expected = build(photos, tmp_path / "idx").checksum()
    if leftover:
        Index(tmp_path / "idx")  # a reader may leave an empty log
    for path in (tmp_path / "idx").iterdir():
        path.chmod(0o444)
    (tmp_path / "idx").chmod(0o555)
    modes = {above: stat.S_IMODE(above.stat().st_mode) for above in (tmp_path, *tmp_path.parents)}
    for above, mode in modes.items():
        if mode & 0o011 != 0o011:
            above.chmod(mode | 0o011)
    root = os.getuid() == 0
    try:
        os.seteuid(65534 if root else os.getuid())
        assert Index(tmp_path / "idx").checksum() == expected
        assert len(Index(tmp_path / "idx").nearest(np.eye(1, 64, dtype=np.float32), 3)) == 3
        with pytest.raises(VermouthError, match="cannot be written"):
            build(photos, tmp_path / "idx")
    finally:
        os.seteuid(os.getuid())
        (tmp_path / "idx").chmod(0o755)
        for above, mode in modes.items():
            above.chmod(mode)


def test_the_database_can_be_read_with_sqlite_alone(photos, tmp_path):
    (photos / "broken.png").write_text("no image")
    build(photos, tmp_path / "idx")
    with closing(sqlite3.connect(tmp_path / "idx/index.sqlite")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA user_version").fetchone() == (database.FORMAT,)
        assert db.execute("SELECT count(*), sum(vector IS NULL) FROM photos").fetchone() == (25, 1)
        rows = db.execute("SELECT width, height, length(sha256), length(vector) FROM photos WHERE reason IS NULL")
        assert set(rows) == {(64, 64, 64, 4 * 64)}


# Foreign


def forge(out, command, *values):
    "Change a database as its author could, with seals that fit."
    db = sqlite3.connect(out / FILE, isolation_level=None)
    db.execute(command, values)
    settings = {k: v for k, v in db.execute("SELECT name, value FROM settings ORDER BY name") if k != "seal"}
    db.execute("UPDATE settings SET value = ? WHERE name = 'seal'", [database.seal(settings.items())])
    db.close()


@pytest.mark.parametrize(
    "command, says",
    [
        ("CREATE TRIGGER more AFTER INSERT ON photos BEGIN SELECT 1; END", "is damaged (its tables are not those"),
        ("PRAGMA user_version = 9", "of format 9, this version reads 3"),
        ("PRAGMA application_id = 0", "is no index of photos"),
        ("UPDATE settings SET value = 'null' WHERE name = 'count'", "is damaged (its settings are not those"),
        ("UPDATE settings SET value = '{' WHERE name = 'count'", "is damaged"),
        ("UPDATE settings SET value = '\"../secret\"' WHERE name = 'neighbours'", ""),
        ("UPDATE settings SET value = '[1]' WHERE name = 'model'", "is damaged (its settings are not those"),
        ("UPDATE photos SET vector = x'00'", "is damaged (a row is not what was written"),
        ("UPDATE photos SET path = 7", "is damaged (a row is not what was written"),
        ("DELETE FROM settings", "not finished"),
    ],
)
def test_a_database_that_was_made_with_a_plan_is_refused(photos, tmp_path, command, says):
    out = tmp_path / "idx"
    build(photos, out)
    expected = answers(out)
    forge(out, command)
    if not says:
        assert answers(out) == expected, "the file of another place is not opened"
        return
    with pytest.raises(VermouthError) as refused:
        answers(out)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"SQLite format 3\0", os.urandom(5000), b"\0" * 8192])
def test_what_is_no_database_is_refused(photos, tmp_path, data):
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / FILE).write_bytes(data)
    with pytest.raises(VermouthError, match=FILE):
        Index(tmp_path / "idx")
    if not data:  # where SQLite begins
        assert len(build(photos, tmp_path / "idx")) == 24
        return
    with pytest.raises(VermouthError, match=FILE):
        build(photos, tmp_path / "idx")


def test_an_index_of_version_0_1_is_refused(photos, tmp_path):
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx/index.json").write_text("{}")
    for use in (lambda: Index(tmp_path / "idx"), lambda: build(photos, tmp_path / "idx")):
        with pytest.raises(VermouthError, match="made by 0.1: index again"):
            use()


def test_only_names_of_an_index_are_taken_for_its_own():
    own = (".lock", FILE, f"{FILE}-wal", "neighbours-new.faiss", f"neighbours-{'0' * 64}.faiss")
    assert all(map(OURS.fullmatch, own))
    assert not any(map(OURS.fullmatch, ("index.sqlite.bak", "../neighbours-new.faiss", f"neighbours-{'x' * 64}.faiss")))
