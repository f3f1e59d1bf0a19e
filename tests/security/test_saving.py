"A model that is saved over another one: a kill at any step leaves the old model or the new one, and nothing else."

import os
import signal

import pytest
import torch
from conftest import COUNTS
from photo_folders import run_forked

from vermouth.model import Vermouth
from vermouth.zoo.saving import read_card, read_state, weights_name, write_model

STEPS = ["fsync", "replace", "unlink"]  # what os does to a disk while a model is saved
BIAS = "uhead.pool.out.bias"


@pytest.fixture
def saved(toybox, tmp_path):
    toybox.save(tmp_path / "model")
    return tmp_path / "model"


def die_at(step):
    "Replace the functions of os by ones of which the call with this number is the last thing that the process does."
    left = iter(range(step, -1, -1))
    def counted(real):
        def call(*args, **options):
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def test_a_kill_at_any_step_leaves_the_old_model_or_the_new_one(toybox, saved):
    card, old = toybox.card(), toybox.state_dict()[BIAS]
    state = {name: value + 1 if name == BIAS else value for name, value in toybox.state_dict().items()}
    kills, found = 0, set()
    while True:
        toybox.save(saved)
        pid = run_forked(lambda step=kills: (die_at(step), write_model(saved, state, card)))
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        bias = read_state(saved, read_card(saved))[BIAS]
        assert torch.equal(bias, old) or torch.equal(bias, old + 1), "a model is lost"
        found.add(torch.equal(bias, old))
    assert status == 0 and kills >= 4 and found == {True, False}
    COUNTS["kills of Vermouth.save"] += kills
    names = sorted(path.name for path in saved.glob("*"))
    assert {"vermouth.json", weights_name(read_card(saved)["weights"])} <= set(names), names
    assert not [name for name in names if name.endswith(".tmp")] and len(list(saved.glob("model*"))) == 1, names
    parts = {name: getattr(toybox, name) for name in ("backbone", "clip", "captioner", "expert")}
    assert torch.equal(Vermouth.load(saved, "cpu", **parts).state_dict()[BIAS], old + 1)
