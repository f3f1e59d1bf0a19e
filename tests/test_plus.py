"Vermouth+ as a model for search: what an index uses where a model has scales for its parts."

import json
import pickle

import pytest
import torch

from vermouth.app.index import Index, build_index
from vermouth.app.search import query_vector
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth, open_model
from vermouth.zoo.plus import PlusEmbedder, for_search


@pytest.fixture(scope="module")
def toybox():
    return open_model("toybox", "cpu")


@pytest.fixture
def photos(tmp_path):
    for i, item in enumerate(Toybox("photo", split="all", n=6)):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        item.image.save(path)
    return tmp_path / "photos"


def test_an_index_takes_all_three_parts_and_finds_its_model_again(toybox, photos, tmp_path):
    index = build_index(photos, tmp_path / "idx", toybox, quiet=True)
    assert index.settings["dim"] == 3 * toybox.clip.dim
    assert index.settings["fingerprint"] == for_search(toybox).fingerprint != toybox.fingerprint
    reopened = Index(tmp_path / "idx", photos)
    assert reopened.search(str(photos / "3.png"), reopened.own_model("cpu"), 1)[0].path == "3.png"
    assert len(reopened.search("a cat", toybox, 3)) == 3
    assert query_vector("a cat", toybox).shape == (1, index.settings["dim"])


def test_a_model_without_scales_searches_by_its_head_alone(toybox, photos, tmp_path):
    bare = Vermouth.load("toybox", "cpu")
    bare.plus = None
    index = build_index(photos, tmp_path / "idx", bare, quiet=True)
    assert index.settings["dim"] == toybox.clip.dim
    assert index.settings["fingerprint"] == bare.fingerprint == toybox.fingerprint
    with pytest.raises(VermouthError, match="its weights or settings"):
        index.search("a cat", toybox)


def test_a_part_of_scale_zero_changes_nothing(toybox, photos):
    bare = Vermouth.load("toybox", "cpu")
    bare.plus = [1.0, 0.0, 0.0]
    images = [str(path) for path in sorted(photos.iterdir())[:2]]
    vectors = for_search(bare).embed(images)
    torch.testing.assert_close(vectors[:, : bare.clip.dim], toybox.embed(images))
    assert not vectors[:, bare.clip.dim :].any()


def test_it_can_be_pickled(toybox):
    again = pickle.loads(pickle.dumps(PlusEmbedder(toybox)))
    assert again.fingerprint == PlusEmbedder(toybox).fingerprint


ODD = [[], [1.0, 2.0], [0.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1e300, 1.0, 1.0], "abc", [None] * 3]


@pytest.mark.parametrize("plus", ODD)
def test_a_card_with_other_scales_is_damaged(toybox, tmp_path, plus):
    toybox.save(tmp_path / "model")
    card = tmp_path / "model/vermouth.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"plus": plus}))
    with pytest.raises(VermouthError, match="plus"):
        Vermouth.load(tmp_path / "model", "cpu")


def test_scales_are_kept_and_cards_without_them_load(toybox, tmp_path):
    toybox.save(tmp_path / "model")
    assert Vermouth.load(tmp_path / "model", "cpu").plus == toybox.plus
    card = tmp_path / "model/vermouth.json"
    kept = json.loads(card.read_text())
    del kept["plus"]
    card.write_text(json.dumps(kept))
    assert Vermouth.load(tmp_path / "model", "cpu").plus is None
