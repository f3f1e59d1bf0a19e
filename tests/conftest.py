"What the tests share."
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNTS = Counter()  # what the tests of abuse have tried; printed at the end


def pytest_terminal_summary(terminalreporter):
    if COUNTS: terminalreporter.write_line("; ".join(f"{n:,} {what}" for what, n in sorted(COUNTS.items())))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    "The repository as git would commit it now, copied away, so that what a test writes stays out of it."
    there = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if not (ROOT / name).exists(): continue  # deleted, and the deletion not committed yet
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, there / name, follow_symlinks=False)
    return there
