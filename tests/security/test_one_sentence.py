"""Input at which the program once ended in a traceback ends in one sentence.

Formulas of matplotlib and circular YAML stand in test_terminal.py.
"""

import json
import os
import shutil
import sys

import pytest
import torch
from program import NAMES
from traps import copy_head

from vermouth.app.files import image_paths
from vermouth.core import VermouthError
from vermouth.data import arrow
from vermouth.model import open_model
from vermouth.store import extract
from vermouth.zoo.embedders import ExpertEmbedder
from vermouth.zoo.linear import LinearClassifier, fit_linear


@pytest.mark.parametrize(
    "entries",
    [
        {"uhead": {"widths": [2**40] * 4}},
        {"uhead": {"widths": [32 * 10**30] * 4}},
        {"uhead": {"widths": [-32] * 4}},
        {"uhead": {"widths": []}},
        {"uhead": {"out_res": 2**62}},
        {"uhead": {"arch": "\x1b[2J"}},
        {"size": 10**18},
        {"settings": {"timesteps": [10**30]}},
        {"settings": {"seed": 10**400}},
        {"heads": {"mask": {"dim": 10**30}}},
        {"prompt": "\x1b[2J"},
        {"format": 10**400},
        {"kind": []},
        {"weights": "../../etc/passwd"},
    ],
)
def test_a_card_with_odd_entries(program, photos, entries):
    head = copy_head(program.folder / "head")
    card = json.loads((head / "vermouth.json").read_text())
    for key, value in entries.items():
        card[key] = card.get(key, {}) | value if isinstance(value, dict) else value
    (head / "vermouth.json").write_text(json.dumps(card))
    photos[0].save("photo.png")
    program.refuses("classify", "photo.png", *NAMES, "--model", "head", says="")


@pytest.mark.parametrize("shape", [[96, 2, -2], ["a", 2, 2], [10**30, 2, 2], [], None, [2**40, 2**40, 2**40]])
def test_shapes_in_a_store_whose_seal_is_right(program, whole, shape):
    info = shutil.copytree(whole.out, program.folder / "store") / "dataset_info.json"
    content = json.loads(info.read_text())
    del content["seal"]
    described = json.loads(content["description"])
    described["maps"] = dict.fromkeys(described["maps"], shape)
    arrow.put_sealed(info, content | {"description": json.dumps(described)})
    program.refuses("verify", "store", says="store")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names in another encoding")
def test_names_in_another_encoding_at_the_end_of_a_run(program, photos):
    os.mkdir("photos")
    photos[0].save(os.fsdecode(b"photos/caf\xe9.png"))
    with open(os.fsdecode(b"photos/bad\xe9.png"), "wb") as file:
        file.write(b"no image")
    for words in (
        ["index", "photos", "--out", "idx"],
        ["extract", "photos", "--out", "store", "--captioner", "none", "-p", "stages", "mid", "-p", "attention", "[]"],
        ["classify", "photos", *NAMES],
    ):
        [(name, reason)] = program(*words, "--model", "toybox", "--json", code=1)["set_aside"]
        assert "bad" in name and "not an image" in reason, words


def test_an_item_of_a_name_in_another_encoding(backbone, photos, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    photos[0].save(path)
    assert len(extract(backbone, [path], tmp_path / "store", stages="mid", attention=(), quiet=True)) == 1


# Trained classifiers


@pytest.fixture(scope="module")
def linear(toybox, tmp_path_factory):
    "The folder of a linear classifier on the Toybox expert."
    expert = ExpertEmbedder(toybox.expert)
    vectors = torch.eye(expert.expert.dims[0])[:4]
    training = {"task": "classify", "names": ["a", "b"], "data": "x", "metrics": {}, "calibration": [0.5, 0.9]}
    model = LinearClassifier(expert, fit_linear(vectors, torch.tensor([0, 1, 0, 1])), training)
    model.save(folder := tmp_path_factory.mktemp("linear") / "model")
    return folder


@pytest.mark.parametrize(
    "path, value",
    [(("features", "size"), value) for value in (None, [], 0, True, "x", "\x1b[2J", float("nan"), 10**30, -1)]
    + [(("features", "expert", "fingerprint"), None), (("features", "expert"), {"name": "toybox"})]
    + [(("weights",), value) for value in ("\ud800", "../model", "A" * 64, "")]
    + [(("training", "calibration"), [value]) for value in (float("nan"), 1e308, -0.1, True)]
    + [(("training", "names"), ["a", "\ud800"]), (("training", "data"), "\ud800")],
)
def test_a_card_of_a_classifier_with_odd_entries(linear, tmp_path, path, value):
    assert open_model(str(linear), "cpu").labels == ("a", "b")
    shutil.copytree(linear, tmp_path / "model")
    card = json.loads((linear / "vermouth.json").read_text())
    at = card
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "model/vermouth.json").write_text(json.dumps(card))
    with pytest.raises(VermouthError) as error:
        open_model(str(tmp_path / "model"), "cpu")
    assert "\n" not in str(error.value)


PATTERNS = {
    "a billion names": "{0..999999999}.png",
    "more digits than a number has": "{0.." + "9" * 30 + "}.png",
    "a million and more by doubling": "{a,b}" * 30,
    "hundreds of folders": "**/" * 300 + "*.png",
    "stars": "*" * 3000,
    "brackets": "[" * 5000,
    "half a surrogate": "\udcff*.png",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_stands_for_too_much_or_for_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VermouthError) as refused:
        image_paths([PATTERNS[name]])
    assert "\n" not in str(refused.value)
