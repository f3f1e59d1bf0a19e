"From a folder of images to a saved model, through the program; models that do not fit say so."

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from program import run_here

from vermouth.data.toybox import Toybox


def noise(seed):
    "What no Toybox picture looks like."
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder of classes with one broken file, and a folder of noise."
    place = tmp_path_factory.mktemp("train")
    for i, item in enumerate(Toybox("photo", split="unseen", n=72, seed=4)):
        if item.label < 12:
            folder = place / "photos" / item.name
            folder.mkdir(parents=True, exist_ok=True)
            item.image.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    (place / "noise").mkdir()
    for i in range(3):
        noise(i).save(place / "noise" / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def trained(place):
    words = ["--out", place / "mine", "--model", "efficientnet_lite0", "--json"]
    result = run_here("train", place / "photos", *words)
    return result, json.loads(result.stdout)


def test_train_prints_what_was_measured_and_what_to_type(place, trained):
    result, document = trained
    assert result.exit_code == 1 and len(document["set_aside"]) == 1 and "broken.png" in document["set_aside"][0]
    methods = document["methods"]
    chance = 1 / len(document["names"])
    assert methods["chance"] == [None, chance] and methods["linear probe"][1] > 2 * chance
    assert document["next"] == f"vermouth classify NEW.jpg --model {place / 'mine'}"
    assert "no U-head: a U-head needs a denoiser and its CLIP" in result.stderr


def test_classify_needs_no_names_with_a_trained_model(place, trained):
    _, document = trained
    photo = sorted((place / "photos" / document["names"][0]).glob("*.png"))[0]
    found = json.loads(run_here("classify", photo, "--model", place / "mine", "--json").stdout)
    assert set(found["images"][0]["probabilities"]) == set(document["names"]) and found["warning"] is None
    two = document["names"][:2]
    few = json.loads(run_here("classify", photo, "--model", place / "mine", "--names", ",".join(two), "--json").stdout)
    assert set(few["images"][0]["probabilities"]) == set(two)
    refused = run_here("classify", photo, "--model", place / "mine", "--names", "house boat,cat")
    assert refused.exit_code == 2 and "Choose from" in refused.stderr


def test_reject_is_calibrated_with_the_test_images(place, trained):
    card = json.loads((place / "mine/vermouth.json").read_text())
    scores = card["training"]["calibration"]
    assert scores == sorted(scores) and len(scores) == card["training"]["metrics"]["test images"]
    words = ["--model", place / "mine", "--json"]
    strict = json.loads(run_here("classify", place / "photos", *words, "--reject", "0.5").stdout)
    share = np.mean([image["name"] == "none of these" for image in strict["images"]])
    assert 0.1 < share < 0.6
    least = 1 / (len(scores) + 1)
    refused = run_here("classify", place / "photos", *words, "--reject", f"{least / 2}")
    assert refused.exit_code == 2 and f"the model has {len(scores)} held-back images" in refused.stderr


def test_a_second_run_reads_the_features_of_the_first(place, trained, monkeypatch):
    from vermouth.zoo.embedders import ExpertEmbedder

    reads = []
    embed = ExpertEmbedder.embed
    monkeypatch.setattr(ExpertEmbedder, "embed", lambda self, *args: reads.append(args) or embed(self, *args))
    before = (place / "mine/vermouth.json").read_text()
    words = ["--out", place / "mine", "--model", "efficientnet_lite0", "--json"]
    run_here("train", place / "photos", *words)
    assert len(reads) == 1, "only the piece with the broken file"
    assert (place / "mine/vermouth.json").read_text() == before


@pytest.mark.slow
def test_both_heads_on_the_same_features(place, toybox):
    words = ["--out", place / "both", "--model", "toybox", "--shots", "3", "--json"]
    result = run_here("train", place / "photos", *words)
    methods = json.loads(result.stdout)["methods"]
    assert {"linear probe", "U-head"} <= set(methods), result.stderr
    held = {name: methods[name][0] for name in ("linear probe", "U-head")}
    kept = json.loads((place / "both/vermouth.json").read_text())["kind"]
    assert kept == ("linear" if held["linear probe"] >= held["U-head"] else "uhead")
    shutil.rmtree(place / "both")


def test_toybox_says_first_that_photographs_are_not_for_it(place, program, tmp_path):
    says = "toybox knows drawn pictures only; photographs will match at random. Use --model"
    images = sorted((place / "noise").glob("*.png"))
    made = run_here("index", place / "noise", "--out", tmp_path / "idx", "--model", "toybox", "--json")
    assert says in json.loads(made.stdout)["warning"] and says in made.stderr
    page = tmp_path / "hits.html"
    found = run_here("search", tmp_path / "idx", images[0], "--html", page, "--json")
    assert says in json.loads(found.stdout)["warning"] and says in found.stderr
    assert says in page.read_text() and '<a href="' in page.read_text()
    named = run_here("classify", *images, "--names", "cat,duck", "--model", "toybox")
    assert named.exit_code == 0 and says in named.stderr
    mask = ["--names", "cat,duck", "--out", tmp_path / "mask.png", "--model", "toybox", "--json"]
    assert says in json.loads(run_here("segment", images[0], *mask).stdout)["warning"]
    drawn = next((place / "photos").glob("*/[0-9]*.png"))
    fits = run_here("classify", drawn, "--names", "cat,duck", "--model", "toybox", "--json")
    assert json.loads(fits.stdout)["warning"] is None


def test_auto_gives_no_answer_at_random(place):
    refused = run_here("classify", place / "noise", "--names", "cat,duck")
    assert refused.exit_code == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "model='auto': only toybox is here for words" in refused.stderr


def test_auto_indexes_with_the_best_that_is_here_and_search_finds_it(place, tmp_path):
    made = run_here("index", place / "photos", "--out", tmp_path / "idx", "--json")
    assert "model: efficientnet_lite0 (auto: " in made.stderr
    assert json.loads(made.stdout)["model"] == "efficientnet_lite0"
    photo = next((place / "photos").glob("*/[0-9]*.png"))
    found = json.loads(run_here("search", tmp_path / "idx", photo, "--json").stdout)
    assert found["hits"][0]["score"] > 0.999 and found["model"] == "efficientnet_lite0"
    refused = run_here("search", tmp_path / "idx", "a cat")
    assert refused.exit_code == 2 and "it reads images, not words" in refused.stderr


@pytest.mark.slow
def test_masks_are_trained_and_the_model_knows_its_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("vermouth.app.train.STEPS", 20)
    for i, item in enumerate(Toybox("scene", n=8, seed=8)):
        for part in ("images", "masks"):
            (tmp_path / "scenes" / part).mkdir(parents=True, exist_ok=True)
        item.image.save(tmp_path / "scenes/images" / f"{i}.png")
        Image.fromarray(item.mask.astype(np.uint8) % 3).save(tmp_path / "scenes/masks" / f"{i}.png")
    (tmp_path / "scenes/classnames.txt").write_text("sky\ngrass\nwater\n")
    words = ["--task", "segment", "--out", tmp_path / "mine", "--model", "toybox", "--json"]
    result = run_here("train", tmp_path / "scenes", *words)
    methods = json.loads(result.stdout)["methods"]
    assert [*methods] == ["segmentation head", "training-free masks", "most frequent class", "chance"], result.stderr
    asked = ["--model", tmp_path / "mine", "--out", tmp_path / "mask.png", "--json"]
    cut = json.loads(run_here("segment", tmp_path / "scenes/images/0.png", *asked).stdout)
    assert [*cut["share"]] == ["sky", "grass", "water"] and sum(cut["share"].values()) == pytest.approx(1, abs=1e-3)
    refused = run_here("index", tmp_path / "scenes/images", "--out", tmp_path / "idx", "--model", tmp_path / "mine")
    assert refused.exit_code == 2 and "it was trained for masks, and its U-head was not" in refused.stderr
    unnamed = run_here("segment", tmp_path / "scenes/images/0.png", "--out", tmp_path / "mask.png", "--model", "toybox")
    assert unnamed.exit_code == 2 and "the model was not trained on masks. Give --names" in unnamed.stderr


@pytest.mark.slow
def test_a_linear_head_for_retrieval_needs_no_words(tmp_path):
    for kind in ("photo", "sketch"):
        for i, item in enumerate(Toybox(kind, split="unseen", n=36, seed=6)):
            folder = tmp_path / "pairs" / kind / item.name
            folder.mkdir(parents=True, exist_ok=True)
            item.image.save(folder / f"{i}.png")
    words = ["--task", "sbir", "--out", tmp_path / "mine", "--model", "efficientnet_lite0", "--json"]
    result = run_here("train", tmp_path / "pairs", *words)
    methods = json.loads(result.stdout)["methods"]
    assert [*methods] == ["linear head", "training-free", "chance"], result.stderr
    assert "no U-head: a U-head needs a denoiser and its CLIP" in result.stderr
    made = run_here("index", tmp_path / "pairs/photo", "--out", tmp_path / "idx", "--model", tmp_path / "mine")
    assert made.exit_code == 0, made.stderr
    refused = run_here("search", tmp_path / "idx", "a cat")
    assert refused.exit_code == 2 and "it reads images, not words" in refused.stderr
