"The same tables again: in fresh processes, with other batch sizes and other thread counts."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("small_tables.py")


def table(batch_size, threads):
    "What the script prints, by name."
    words = [sys.executable, "-W", "ignore", str(SCRIPT), str(batch_size), str(threads)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first():
    return table(32, 1)


def test_the_same_settings_give_the_same_numbers(first):
    assert table(32, 1) == first


@pytest.mark.parametrize("batch_size, threads", [(5, 1), (32, 2), (7, 2)])
def test_batch_size_and_threads_change_no_table(first, batch_size, threads):
    other = table(batch_size, threads)
    assert other.keys() == first.keys() and len(first) >= 5
    different = {name: value for name, value in other.items() if abs(value - first[name]) >= 0.001}
    assert different == {}, f"{first} before"
