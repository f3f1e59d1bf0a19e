"Random paths, and saved models with random damage."

import atexit
import os
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from conftest import COUNTS
from fuzz import REFUSED, attempt, often
from hypothesis import strategies as st
from odd_files import damaged

from vermouth.app.files import inside
from vermouth.backbone import FeatureSettings
from vermouth.zoo.saving import read_card, read_state, write_model


@often(
    100,
    path=st.lists(
        st.sampled_from(["..", ".", "a", "link", "/", "//", "~", "\0", "a.png"]) | st.text(max_size=4), max_size=5
    ).map("/".join),
)
def test_no_path_leads_out_of_its_folder(path):
    found = attempt(inside, outer() / "photos", path)
    if found is not REFUSED:
        assert str(found).startswith(str(outer() / "photos") + os.sep)


@cache
def outer():
    "A folder of photos with a link that leads out of it."
    folder = Path(tempfile.mkdtemp()).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "photos").mkdir()
    (folder / "photos/link").symlink_to(folder)
    return folder


def test_damaged_weights_of_a_model_are_found(tmp_path):
    "Its card is read with a schema; what the schema allows is not sealed, so a change to a setting is not found."
    part, dice, cases = {"name": "toybox", "fingerprint": "0" * 16}, random.Random(5), 200
    card = {
        "kind": "uhead",
        "training": None,
        "protocol": "ours",
        "normalise": False,
        "start": None,
        "logits": {"scale": 4.6052, "temperature": 0.2},
        "backbone": part,
        "clip": part,
        "captioner": None,
        "expert": None,
        "settings": FeatureSettings().plain(),
        "prompt": "empty",
        "size": 64,
        "uhead": {"arch": "pico", "fuse": "high2low", "out_res": 4, "widths": [32]},
        "heads": {},
    }
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4)}
    write_model(tmp_path, state, card)
    for i in range(cases):
        path = (tmp_path / "vermouth.json", next(tmp_path.glob("model-*")))[i % 2]
        good = path.read_bytes()
        while (worse := damaged(good, dice)) == good:
            pass
        path.write_bytes(worse)
        card_read = attempt(read_card, tmp_path)
        found = attempt(read_state, tmp_path, card_read) if card_read is not REFUSED else REFUSED
        assert found is REFUSED or i % 2 == 0 and all(torch.equal(found[k], state[k]) for k in state)
        path.write_bytes(good)
    COUNTS["fuzz cases"] += cases
