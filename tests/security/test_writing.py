"A file that is written keeps its links, permissions and owner; devices and pipes stay what they are."

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from vermouth.core import write_atomic

NOBODY = 65534


def left(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("there", [True, False])
def test_links_stay_links(tmp_path, steps, there):
    "Relative ones, chains of them, and those that lead nowhere yet."
    (tmp_path / "below").mkdir()
    target = tmp_path / "below/file"
    if there:
        target.write_bytes(b"old")
    to = "below/file"
    for i in range(steps):
        (tmp_path / f"link{i}").symlink_to(to)
        to = f"link{i}"
    write_atomic(tmp_path / to, b"new")
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert all((tmp_path / f"link{i}").is_symlink() for i in range(steps)) and left(target.parent) == ["file"]


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomic(tmp_path / "a", b"new")
    assert left(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_and_owner_stay(tmp_path, mode):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    if not os.getuid():
        os.chown(file, NOBODY, NOBODY)
    file.chmod(mode)
    before = file.stat()
    write_atomic(file, b"new")
    after = file.stat()
    assert file.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_new_file_is_as_open_would_make_it(tmp_path):
    (tmp_path / "usual").open("wb").close()
    write_atomic(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path):
    "Though its folder may be."
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(0o444)
    if not os.getuid():
        tmp_path.chmod(0o777)
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError, match="Permission denied"):
            write_atomic(file, b"new")
    finally:
        if not os.getuid():
            os.seteuid(0)
    assert file.read_bytes() == b"old" and left(tmp_path) == ["file"]


def test_a_device_stays_a_device():
    before = os.stat(os.devnull)
    write_atomic(os.devnull, b"page")
    after = os.stat(os.devnull)
    assert stat.S_ISCHR(after.st_mode) and (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_device_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        write_atomic("/dev/full", b"page")


def test_a_pipe_gets_what_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_atomic(tmp_path / "pipe", b"page" * 50_000)
    reader.join(10)
    assert got == [b"page" * 50_000] and left(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such name on this system")
@pytest.mark.parametrize("redirected", [True, False], ids=["into a file", "into a pipe"])
def test_the_output_of_a_program_is_written_in_place(tmp_path, redirected):
    "After what it has printed, and the file into which a shell has redirected it stays the same."
    out = tmp_path / "out"
    read, write = (None, os.open(out, os.O_WRONLY | os.O_CREAT)) if redirected else os.pipe()
    inode = out.stat().st_ino if redirected else None
    if not (pid := os.fork()):  # a program, without the seconds that loading one takes
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        print("before")
        write_atomic("/dev/stdout", b"page")
        os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    assert (out.read_bytes() if redirected else os.read(read, 99)) == b"before\npage"
    assert not redirected or out.stat().st_ino == inode


def test_names_as_long_as_a_disk_allows(tmp_path):
    for name in ("x" * 255, "猫" * 85, os.fsdecode(b"\xe9" * 255)):
        write_atomic(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(left(tmp_path)) == 3


def test_threads_that_write_one_file_leave_a_whole_one(tmp_path):
    contents = [bytes([65 + i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=[tmp_path / "file", data]) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents and left(tmp_path) == ["file"]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    "Somebody else in a shared folder knows the name of the temporary file."
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("vermouth.core.secrets.token_hex", lambda n: "known")
    Path(tmp_path / "file.known.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file", b"new")
    assert victim.read_bytes() == b"precious"
