"The same tables again: in a fresh process, with other batch sizes and other thread counts."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("small_tables.py")


SETTINGS = ["32,1", "5,1", "32,2", "7,2"]  # batch size and threads


def tables(*settings):
    "What the script prints for each setting, all in one process: values by name."
    words = [sys.executable, "-W", "ignore", str(SCRIPT), *settings]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    run = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()[-len(settings) :]]


@pytest.fixture(scope="module")
def measured():
    return dict(zip(SETTINGS, tables(*SETTINGS), strict=True))


def test_the_same_settings_give_the_same_numbers_in_another_process(measured):
    assert tables(SETTINGS[0]) == [measured[SETTINGS[0]]]


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_batch_size_and_threads_change_no_table(measured, setting):
    first, other = measured[SETTINGS[0]], measured[setting]
    assert other.keys() == first.keys() and len(first) >= 5
    different = {name: value for name, value in other.items() if abs(value - first[name]) >= 0.001}
    assert different == {}, f"{first} before"
