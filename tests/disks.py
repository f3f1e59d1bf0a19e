"Small disks, missing permissions, and commands in processes of their own that run into them."

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import traceback
import warnings
from types import SimpleNamespace

import faiss
import pytest
import torch

NOBODY = 65534


@contextlib.contextmanager
def small_disk(folder, size):
    "A file system in memory of so many bytes, mounted on `folder`."
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("only root mounts a small disk, and not in every container")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


@contextlib.contextmanager
def not_root(folder):
    "Another user than root for a while, who owns the folder."
    if os.getuid():
        yield
        return
    modes = {above: stat.S_IMODE(above.stat().st_mode) for above in folder.parents}
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    for above, mode in modes.items():
        if mode & 0o011 != 0o011:
            above.chmod(mode | 0o011)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for above, mode in modes.items():
            if stat.S_IMODE(above.stat().st_mode) != mode:
                above.chmod(mode)


@contextlib.contextmanager
def locked(folder, path, mode=0):
    "A file or folder without permissions."
    path = folder / path
    with not_root(folder):
        path.chmod(mode)
        try:
            yield
        finally:
            path.chmod(0o755)


def one_thread():
    """Let a fork compute in one thread. A team of OpenMP threads does not survive a fork: the child would wait for it.

    torch makes its pool anew at the first use after a fork, and two threads that do so at once would break it.
    """
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)


def show_warnings():
    "Print warnings as Python does where pytest does not collect them."

    def show(message, category, *place, **more):
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))

    for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    warnings.showwarning = show


def run_child(words, prepare=lambda: None, stdout=None):
    """A command in a fork of this process, which has loaded what takes seconds to load: its exit code, stdout, stderr.

    `prepare` runs before it in the fork alone; `stdout` is a path to print to.
    """
    pipes = [os.pipe(), os.pipe()]
    if not (pid := os.fork()):
        one_thread()
        code = 70
        try:
            with open(stdout or os.devnull, "wb") as file:
                os.dup2(file.fileno() if stdout else pipes[0][1], 1)
            os.dup2(pipes[1][1], 2)
            for pipe in pipes:
                os.close(pipe[0]), os.close(pipe[1])
            sys.stdin = open(os.devnull)  # noqa: SIM115
            written = {"closefd": False, "errors": "backslashreplace"}
            sys.stdout, sys.stderr = (open(n, "w", **written) for n in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            show_warnings()
            prepare()
            from vermouth.app.cli import app

            app([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else bool(end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code)
    texts = []
    for pipe in pipes:
        os.close(pipe[1])
    for pipe in pipes:  # what is printed fits into one
        with open(pipe[0], encoding="utf-8", errors="replace") as f:
            texts.append(f.read())
    status = os.waitpid(pid, 0)[1]
    return SimpleNamespace(exit_code=os.waitstatus_to_exitcode(status), stdout=texts[0], stderr=texts[1])


def short_files(most):
    "Let no file of this process grow beyond so many bytes, as on a full disk; nobody but root can mount one."
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
