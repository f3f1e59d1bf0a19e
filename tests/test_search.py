"Queries, hits, their page and the nearest of many vectors; the same from a shell."

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from disks import run_child
from odd_files import Grey
from photo_folders import build, drawn_photos, write_photos
from PIL import Image
from program import run_here

from vermouth.app.database import RECALL, find_nearest, make_neighbours, read_neighbours, write_neighbours
from vermouth.app.files import photos_below
from vermouth.app.search import Hit, Index, hits_page
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth

DATA = os.environ.get("VERMOUTH_DATA")


# Hits


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "0/../../secret.png", "link/hostname", "a\0b", ""])
def test_nothing_outside_of_the_folder_is_opened(tmp_path, path):
    photos = write_photos(tmp_path / "photos", 1)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (photos / "link").symlink_to("/etc")
    with pytest.raises(VermouthError, match="the index holds"):
        Hit(path, 1.0, folder=photos).open()
    with pytest.raises(VermouthError, match="in which folder?"):
        Hit(path, 1.0).open()
    page = hits_page([Hit(path, 1.0, folder=photos)], tmp_path / "hits.html").read_text()
    assert page.count('src="data:image/jpeg;base64,"') == 1


def test_a_search_opens_no_photo_and_its_page_works_without_them(tmp_path):
    photos = write_photos(tmp_path / "photos")
    build(photos, tmp_path / "idx")
    shutil.rmtree(photos)
    hits = Index(tmp_path / "idx", folder=photos).nearest(Grey().embed([drawn_photos()[0]]).numpy(), 3)
    assert hits[0].path == "0/00.png" and hits[0].image.size == (64, 64)
    assert np.abs(np.asarray(hits[0].image, float) - np.asarray(drawn_photos()[0], float)).mean() < 10
    assert hits_page(hits, tmp_path / "hits.html").read_text().count("data:image/jpeg;base64,/9j/") == 3
    with pytest.raises(VermouthError, match="No such file"):
        hits[0].open()


def test_names_cannot_change_the_page(tmp_path):
    names = ["<script>alert(1)</script>.png", "\"' onerror='x", "$style ${cards} $$", "caf\udce9", "\x1b[31mred"]
    page = hits_page([Hit(name, 0.5) for name in names], tmp_path / "hits.html", query="$title <b>").read_text()
    assert "<script" not in page and " onerror='" not in page and "default-src 'none'" in page
    assert "$style ${cards} $$" in page and "“$title &lt;b&gt;”" in page
    assert r"caf\udce9" in page and r"\x1b[31mred" in page and "\x1b" not in page


# The nearest of many


@pytest.fixture(scope="module")
def many():
    "20,000 vectors around 200 centres, and 100 fresh ones."
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 64))
    x = centres[rng.integers(0, 200, 20_100)] + 0.7 * rng.normal(size=(20_100, 64))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:20_000], x[20_000:]


def test_comparing_all_is_exact(many):
    vectors, queries = many
    everything, recall = make_neighbours(np.arange(20_000), vectors.__getitem__)
    scores, ids = find_nearest(everything, queries, 50)
    plain = queries @ vectors.T
    assert recall == 1 and np.allclose(scores, -np.sort(-plain)[:, :50], atol=1e-5)
    assert np.allclose(np.take_along_axis(plain, ids, 1), -np.sort(-plain)[:, :50], atol=1e-6)


def test_cells_find_what_they_promise(many, tmp_path):
    vectors, queries = many
    ids = np.arange(20_000) + 7
    cells, promised = make_neighbours(ids, lambda some: vectors[some - 7], exact=1000)
    truth = -np.sort(-queries @ vectors.T)[:, :100]
    scores, found = find_nearest(cells, queries, 100)
    recall = float((scores >= truth[:, -1:] - 1e-4).mean())
    print(f"{cells.nprobe} of {cells.nlist} cells: recall@100 {recall:.3f} on fresh queries, {promised:.3f} promised")
    assert cells.nlist == 256 and cells.nprobe <= 32 and promised >= RECALL and recall >= 0.95
    assert np.allclose(scores[0], vectors[found[0] - 7] @ queries[0], atol=1e-3)
    again, _ = make_neighbours(ids, lambda some: vectors[some - 7], exact=1000)
    assert np.array_equal(find_nearest(again, queries, 100)[1], found), "the same every time"
    kept = {"neighbours": write_neighbours(tmp_path, cells), "count": 20_000, "dim": 64}
    assert np.array_equal(find_nearest(read_neighbours(tmp_path, kept), queries, 100)[1], found), "from the file, too"


@pytest.mark.parametrize(
    "vectors",
    [
        np.tile(np.eye(1, 16, dtype=np.float32), (2000, 1)),
        (np.eye(16)[np.arange(2000) % 16] * np.where(np.arange(2000) % 2, 1, -1)[:, None]).astype(np.float32),
    ],
)
def test_twins_and_zeros_do_not_trouble_the_cells(vectors):
    cells, recall = make_neighbours(np.arange(2000), vectors.__getitem__, exact=10)
    scores, ids = find_nearest(cells, vectors[:1], 2000)
    assert recall >= RECALL and sorted(ids[0]) == list(range(2000)) and np.isfinite(scores).all()


# Real photos


@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
def test_real_photos(tmp_path):
    folder = Path(DATA) / "sbir/Sketchy/256x256/photo"
    found, skipped = photos_below(folder)
    assert len(found) > 1000 and not skipped
    few = tmp_path / "photos"
    few.mkdir()
    for i, photo in enumerate(found[::40]):
        shutil.copy(folder / photo.path, few / f"{i:03}{Path(photo.path).suffix}")
    index = build(few, tmp_path / "idx")
    assert len(index) == len(found[::40]) and not index.skipped
    for path in index.paths[::10]:
        image = Hit(path, 0, folder=few).open()
        assert index.nearest(Grey().embed([image]).numpy(), 1)[0].path == path


# From a shell

MODEL = ["--model", "model"]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    "24 photos and a broken one, indexed by the program with random weights: a photo finds itself with any."
    place = tmp_path_factory.mktemp("shell")
    (place / "photos").mkdir()
    for item in Toybox("photo", n=24, seed=3):
        item.image.save(place / f"photos/{item.name}.png")
    Image.open(place / "photos/cat.png").rotate(5).save(place / "drawing.png")
    (place / "photos/broken.png").write_text("no image")
    Vermouth.build(captioner=None, expert=None, prompt="empty").save(place / "model")
    made = run_child(["index", "photos", "--out", "idx", "--json", *MODEL], lambda: os.chdir(place))
    assert made.exit_code == 1, made.stderr  # something was set aside
    return place, json.loads(made.stdout)


@pytest.fixture
def shell(indexed, monkeypatch):
    monkeypatch.chdir(indexed[0])
    return lambda *words: run_here(*words, *MODEL)


def test_index_from_a_shell(indexed, shell):
    document = indexed[1]
    assert (document["photos"], document["looked_at"], document["how"]) == (24, 24, "24 photos, all compared")
    what = "not an image Pillow can read (empty, or of another kind)"
    assert document["set_aside"] == [["broken.png", f"{what}. Convert it to PNG or JPEG."]]
    again = shell("index", "photos", "--out", "idx")
    assert again.exit_code == 1 and again.stdout == f"24 photos are in idx, checksum {document['checksum']}\n"
    assert "set aside: 'broken.png'" in again.stderr
    assert run_here("verify", "idx").stdout.strip() == document["checksum"]


def test_search_from_a_shell(indexed, shell):
    place, _ = indexed
    drawn = shell("search", "idx", "drawing.png", "-k", "5", "--html", "hits.html")
    assert drawn.exit_code == 0 and len(drawn.stdout.splitlines()) == 5, drawn.stderr
    assert drawn.stdout.splitlines()[0].split()[1] == "cat.png"
    page = (place / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6, "five hits and the drawing"
    words = shell("search", "idx", "a red boat", "-k", "100", "--json")
    scores = [hit["score"] for hit in json.loads(words.stdout)["hits"]]
    assert words.exit_code == 0 and len(scores) == 24 and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "words, says",
    [
        (["search", "nowhere", "a cat"], "index='nowhere': no index.sqlite to read in it"),
        (["search", "idx", "none.png"], "image='none.png': no such file"),
        (["search", "idx", " "], "query=' ': empty. Draw something"),
        (["search", "idx", "a cat", "-k", "0"], "k=0: a whole number from 1"),
        (["search", "idx", "photos/broken.png"], "not an image Pillow can read"),
        (["search", "idx", "a cat", "--html", "no/hits.html"], "out_html='no/hits.html': cannot be written"),
        (["index", "none", "--out", "other"], "folder='none': no such folder"),
        (["index", "photos", "--out", "photos"], "which is no part of an index"),
    ],
)
def test_what_is_refused_from_a_shell(shell, words, says):
    refused = shell(*words)
    assert refused.exit_code == 2 and refused.stdout == "", refused.stderr
    assert says in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
