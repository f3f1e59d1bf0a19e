"The small network behind `vermouth index --fast`: that it stands for its teacher only, and what is refused."

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from photo_folders import write_two_classes
from program import run_here
from safetensors.torch import load_file, save_file

from vermouth.app.index import Index, build_index
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import open_model
from vermouth.pretrain.common import family_folder
from vermouth.zoo.distilled import student_of

DATA = os.environ.get("VERMOUTH_DATA", "")
SHIPPED = family_folder() / "student"


@pytest.fixture(scope="module")
def student():
    return student_of("toybox", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Photos of two classes, and their index by the student."
    place = tmp_path_factory.mktemp("student")
    write_two_classes(place / "photos", 16)
    made = run_here("index", place / "photos", "--out", place / "idx", "--model", "toybox", "--fast", "--json")
    assert json.loads(made.stdout)["model"].startswith("student of toybox"), made.stderr
    return place


def copied(folder, change=lambda card: None, state=None):
    "The shipped student in a folder, with another card, or with other weights under their right digest."
    folder.mkdir(parents=True)
    card = json.loads((SHIPPED / "vermouth.json").read_text())
    [weights] = SHIPPED.glob("*.safetensors")
    if state is None:
        data = weights.read_bytes()
    else:
        save_file(load_file(weights) | state, folder / "all")
        data = (folder / "all").read_bytes()
        (folder / "all").unlink()
    card["weights"] = hashlib.sha256(data).hexdigest()
    change(card)
    (folder / f"model-{card['weights'][:16]}.safetensors").write_bytes(data)
    (folder / "vermouth.json").write_text(json.dumps(card))
    return folder


def test_the_shipped_student_is_that_of_the_shipped_model_and_small(toybox, student):
    assert student_of(toybox, "cpu").fingerprint == student.fingerprint
    assert sum(p.numel() for p in student.net.parameters()) <= 3_000_000
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 1_000_000


def test_it_gives_nearly_the_teacher_s_vectors(toybox, student):
    for kind in ("photo", "sketch"):
        pictures = [item.image for item in Toybox(kind, "unseen", n=24, seed=77)]
        assert (toybox.embed(pictures) * student.embed(pictures)).sum(1).mean() > 0.8
        torch.testing.assert_close(student.embed(pictures[:1]), student.embed(pictures)[:1], atol=1e-5, rtol=0)


def test_it_is_kept_and_opened_by_every_name(student, tmp_path):
    student.save(tmp_path / "mine/student")
    picture = Toybox("photo", n=1)[0].image
    for name in (tmp_path / "mine/student", "toybox/student"):
        again = open_model(name, "cpu")
        assert (again.fingerprint, again.name) == (student.fingerprint, student.name)
        assert torch.equal(again.embed(picture), student.embed(picture))
    assert student_of(tmp_path / "mine", "cpu").source == str(tmp_path / "mine/student")


def test_it_answers_words_and_says_which_pictures_it_does_not_know(student):
    drawn = [item.image for item in Toybox("photo", "unseen", n=24, seed=78)]
    assert student.misfit(drawn) == "" and student.classify(drawn[:2], ["a cat", "a boat"]).shape == (2, 2)
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert "trained on other pictures" in student.misfit(noise, value_range=(0, 1))
    assert torch.allclose(student.embed_text("a fish").norm(), torch.ones(1))


def test_an_index_of_the_student_is_searched_with_it_unasked(place):
    assert Index(place / "idx").settings["source"] == "toybox/student"
    for query in (next((place / "photos/fish").iterdir()), "a fish"):
        found = json.loads(run_here("search", place / "idx", query, "--json", "-k", "3").stdout)
        assert found["model"].startswith("student of toybox") and len(found["hits"]) == 3
    photo = next((place / "photos/fish").iterdir())
    found = json.loads(run_here("search", place / "idx", photo, "--json").stdout)
    assert found["hits"][0]["score"] > 0.999 and found["hits"][0]["path"] == f"fish/{photo.name}"


def test_an_index_of_the_student_refuses_the_teacher(place, program):
    photo = str(next((place / "photos/fish").iterdir()))
    says = "Give --fast to update it, leave --model out to search it"
    program.refuses("search", str(place / "idx"), photo, "--model", "toybox", says=says)
    program.refuses("index", str(place / "photos"), "--out", str(place / "idx"), "--model", "toybox", says=says)
    again = program("index", place / "photos", "--out", place / "idx", "--fast", "--json")
    assert again["photos"] == 16 and again["looked_at"] == 0


def test_an_index_of_the_student_refuses_another_student(place, tmp_path):
    other = student_of(copied(tmp_path / "other", state={"net.out.bias": torch.ones(128).half()}), "cpu")
    with pytest.raises(VermouthError, match="are not those that made the index"):
        Index(place / "idx").search(Toybox("photo", n=1)[0].image, other)


def test_auto_takes_the_only_student(place, tmp_path):
    made = run_here("index", place / "photos", "--out", tmp_path / "idx", "--fast")
    assert made.exit_code == 0 and "model: toybox/student (auto: the only student that ships)" in made.stderr


def test_a_model_without_a_student_says_what_there_is(place, program):
    words = ["index", str(place / "photos"), "--out", "idx", "--fast", "--model"]
    says = "it has no student for --fast. toybox has one; another is made by vermouth.pretrain.student.distil"
    for model in ("efficientnet_lite0", "nowhere", str(place)):
        program.refuses(*words, model, says=says)
    program.refuses(*words, "toybox", "--lora", "style.safetensors", says="has no denoiser to put it over")
    with pytest.raises(VermouthError, match="it has no student for --fast"):
        build_index(place / "photos", place / "no", object(), fast=True)


def test_a_student_of_a_teacher_that_was_trained_again_is_refused(toybox, student, tmp_path):
    toybox.save(tmp_path / "mine")
    card = json.loads((tmp_path / "mine/vermouth.json").read_text())
    copied(tmp_path / "mine/student", lambda student: student["teacher"].update(weights=card["weights"]))
    assert student_of(tmp_path / "mine", "cpu").fingerprint == student.fingerprint
    toybox.save(tmp_path / "mine", "float16")
    with pytest.raises(VermouthError, match="was distilled from other weights. Distil it again, or leave --fast out"):
        student_of(tmp_path / "mine", "cpu")


def test_no_head_is_trained_on_a_student(place, program):
    words = ["train", str(place / "photos"), "--out", "mine", "--model", "toybox/student"]
    program.refuses(*words, says="a student is for search. Train on its teacher")


HOSTILE = {
    "widths of another network": ({"widths": [32, 48, 96, 64]}, "of another architecture than vermouth.json says"),
    "widths that fill the memory": ({"widths": [4096] * 6}, "of another architecture than vermouth.json says"),
    "a width beyond all bounds": ({"widths": [32, 10**12]}, "its network cannot be built: widths="),
    "thousands of levels": ({"widths": [8] * 5000}, "its network cannot be built: widths="),
    "no width": ({"widths": []}, "its network cannot be built: widths="),
    "vectors without a number": ({"dim": 0}, "its network cannot be built: widths="),
    "images that fill the memory": ({"size": 10**9}, "size is 1000000000, not 8 to 1024"),
    "text for a number": ({"dim": "128"}, "dim is not of type int"),
    "an entry too many": ({"run": "this"}, "run is unknown"),
    "a part of the hub": ({"clip": {"name": "hf-hub:a/b", "fingerprint": "0" * 16}}, ""),
}


@pytest.mark.parametrize("change, says", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_card_is_refused(change, says, tmp_path):
    folder = copied(tmp_path / "bad", lambda card: card.update(change))
    if says:
        with pytest.raises(VermouthError, match=says):
            open_model(folder, "cpu")
    else:  # nothing is fetched, and images need no CLIP
        model = open_model(folder, "cpu")
        model.embed(Toybox("photo", n=1)[0].image)
        with pytest.raises(VermouthError, match="it would fetch what is no folder here and only its card names: clip"):
            model.embed_text("a fish")


@pytest.mark.parametrize("shape", [(128, 128, 2), (1,), (10**4, 128)], ids=str)
def test_weights_of_a_hostile_shape_are_refused(shape, tmp_path):
    folder = copied(tmp_path / "bad", state={"net.out.weight": torch.zeros(shape).half()})
    with pytest.raises(VermouthError, match="has net.out.weight of shape"):
        open_model(folder, "cpu")


def test_damaged_students_are_refused(tmp_path):
    nan = copied(tmp_path / "nan", state={"net.out.bias": torch.full((128,), torch.nan).half()})
    cut, gone, pickled = (copied(tmp_path / name) for name in ("cut", "gone", "pickled"))
    [weights] = cut.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    for folder in (gone, pickled):
        next(folder.glob("*.safetensors")).unlink()
    (pickled / "model.bin").write_bytes(pickle.dumps(print))
    refused = {nan: "holds NaN", cut: "not a whole file in safetensors", gone: "is missing", pickled: "is missing"}
    for folder, says in refused.items():
        with pytest.raises(VermouthError, match=says):
            student_of(folder, "cpu")


@pytest.mark.skipif(not DATA, reason="real Sketchy photos: set VERMOUTH_DATA")
def test_real_photographs_are_indexed_and_found_with_a_warning(tmp_path):
    photos, classes = tmp_path / "photos", sorted(Path(DATA).glob("sbir/Sketchy/256x256/photo/*/*"))[:4]
    for folder in classes:
        for path in sorted(folder.iterdir())[:8]:
            (photos / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, photos / folder.name)
    made = run_here("index", photos, "--out", tmp_path / "idx", "--model", "toybox", "--fast", "--json")
    made = json.loads(made.stdout)
    assert made["photos"] == 32 and "trained on other pictures than these" in made["warning"]
    photo = sorted(photos.rglob("*.jpg"))[0]
    found = json.loads(run_here("search", tmp_path / "idx", photo, "--json").stdout)
    assert found["hits"][0]["path"] == photo.relative_to(photos).as_posix() and found["warning"] == made["warning"]
