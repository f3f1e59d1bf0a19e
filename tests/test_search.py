"A folder of photos is indexed and searched, whatever is in it and whatever happens to it."
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import COUNTS
from odd_files import BAD, GOOD, Grey, damaged
from PIL import Image
from typer.testing import CliRunner

from vermouth.app import indexing
from vermouth.app.gallery import MANIFEST, Index, used
from vermouth.app.nearest import RECALL, cell_count, exact, inverted, make_cells, probed, recall, tuned
from vermouth.app.photos import photos_below
from vermouth.app.search import Hit, build_index, hits_page
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth

DATA = os.environ.get("VERMOUTH_DATA")


@pytest.fixture(scope="module")
def world(): return [item.image for item in Toybox("photo", n=24, seed=3)]


@pytest.fixture
def photos(tmp_path, world):
    "24 photos in three folders."
    for i, image in enumerate(world):
        (tmp_path / f"photos/{i % 3}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / f"photos/{i % 3}/{i:02}.png")
    return tmp_path / "photos"


def build(folder, out, model=None, **more): return build_index(folder, out, model or Grey(), quiet=True, **more)


# What is in the folder


def test_bad_files_are_set_aside_with_a_reason_and_odd_ones_are_read(tmp_path, world):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (make, _) in BAD.items(): make(folder / name, world[0])
    for name, make in GOOD.items(): make(folder / name, world[1])
    (folder / "below").mkdir()
    (folder / "below/up").symlink_to("..")  # a circle of folders
    (folder / "notes.txt").write_text("no photo"), (folder / ".hidden.png").write_text("no photo")
    index = build(folder, tmp_path / "idx")
    assert index.paths == sorted(GOOD)
    assert [path for path, _ in index.set_aside] == sorted(BAD)
    reasons = {path: why for path, why in index.set_aside}
    assert not {name: reasons[name] for name, (_, why) in BAD.items() if why not in reasons[name]}
    page = hits_page([hit for hit in index.nearest(Grey().embed([world[1]]).numpy(), 100)], tmp_path / "hits.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == len(GOOD) and "<b>'" not in page and "caf?.png" in page
    COUNTS["inputs tried"] += len(BAD) + len(GOOD)


def test_a_photo_that_was_taken_sideways_is_upright(tmp_path, world):
    folder, exif = tmp_path / "photos", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6  # turn right to see it upright
    world[0].rotate(90).save(folder / "turned.png", exif=exif)
    assert build(folder, tmp_path / "idx").nearest(Grey().embed([world[0]]).numpy(), 1)[0].score > 0.999


def test_ten_thousand_photos_in_one_folder(tmp_path, world):
    "All of them twins: one look is enough."
    folder, model = tmp_path / "photos", Grey()
    folder.mkdir()
    world[0].save(folder / "0000.png")
    for i in range(1, 10_000): os.link(folder / "0000.png", folder / f"{i:04}.png")
    index = build(folder, tmp_path / "idx", model, batch_size=1000)
    assert (len(index), model.seen) == (10_000, 1)
    assert [hit.path for hit in index.nearest(model.embed([world[0]]).numpy(), 3)] == ["0000.png", "0001.png", "0002.png"], "of equal ones the first"
    assert build(folder, tmp_path / "idx", model).changes["looked_at"] == 0


@pytest.mark.parametrize("make, says", [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no photos in it. Give a folder with images"),
    (lambda folder: (folder.mkdir(), (folder / "a.png").touch()), "none of 1 photos can be used ('a.png': not an image"),
    (lambda folder: folder.write_text("a file"), "no such folder"),
])
def test_folders_without_photos_are_refused_and_leave_the_index_alone(photos, tmp_path, make, says):
    before = build(photos, tmp_path / "idx").checksum()
    shutil.rmtree(photos)
    make(photos)
    with pytest.raises(VermouthError) as refused: build(photos, tmp_path / "idx")
    assert says in str(refused.value) and Index(tmp_path / "idx").checksum() == before


def test_one_image_that_the_model_cannot_take_costs_only_itself(photos, tmp_path, world):
    class Fragile(Grey):
        def embed(self, images):
            found = super().embed(images)
            for i, image in enumerate(images):
                if image.getpixel((0, 0)) == (1, 2, 3): found[i] = float("nan")
                if image.getpixel((0, 0)) == (3, 2, 1): raise RuntimeError("mat1 and mat2 cannot be multiplied")
            return found
    for name, colour in (("nan", (1, 2, 3)), ("odd", (3, 2, 1))): Image.new("RGB", (9, 9), colour).save(photos / f"{name}.png")
    index = build(photos, tmp_path / "idx", Fragile())
    assert len(index) == 24
    assert index.set_aside == [("nan.png", "model: embed gives no unit vector for it"), ("odd.png", "RuntimeError: mat1 and mat2 cannot be multiplied")]
    class Broken(Grey):
        def embed(self, images): raise RuntimeError("no such device")
    with pytest.raises(RuntimeError, match="no such device"): build(photos, tmp_path / "other", Broken())


# Only what changed


def test_only_what_changed_is_looked_at(photos, tmp_path, world):
    out, model = tmp_path / "idx", Grey()
    def again():
        before = model.seen
        index = build(photos, out, model)
        assert index.changes["looked_at"] == model.seen - before
        assert index.checksum() == build(photos, tmp_path / f"fresh{random.random()}").checksum(), "as if made anew"
        return {what: n for what, n in index.changes.items() if n}
    assert again() == {"photos": 24, "new": 24, "looked_at": 24}
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert again() == {"photos": 24} and files == {path: path.stat().st_mtime_ns for path in out.iterdir()}, "nothing changed, nothing written"
    os.utime(photos / "0/00.png"), os.utime(photos / "1/01.png", (0, 0))  # now, and a clock moved back
    assert again() == {"photos": 24}
    shutil.copy(photos / "0/00.png", photos / "copy.png"), shutil.move(photos / "1/01.png", photos / "moved.png")
    assert again() == {"photos": 25, "new": 2, "removed": 1}
    was = (photos / "0/03.png").stat()
    (photos / "0/03.png").write_bytes(was.st_size * b"x")
    assert again() == {"photos": 24, "removed": 1, "set_aside": 1}
    world[3].save(photos / "0/03.png"), world[5].rotate(90).save(photos / "2/05.png"), (photos / "copy.png").unlink()
    assert again() == {"photos": 24, "new": 1, "changed": 1, "removed": 1, "looked_at": 2}


def test_a_folder_that_moved_keeps_its_vectors_and_another_one_is_refused(photos, tmp_path):
    before = build(photos, tmp_path / "idx").checksum()
    with pytest.raises(VermouthError, match="is the index of .*photos', which is still there"): build(photos / "0", tmp_path / "idx")
    moved = photos.rename(tmp_path / "elsewhere")
    index = build(moved, tmp_path / "idx")
    assert (index.changes["looked_at"], index.checksum()) == (0, before)
    index.nearest(np.eye(1, 64, dtype=np.float32), 1)[0].look()


def test_the_order_on_the_disk_does_not_matter(photos, tmp_path, monkeypatch):
    def shuffled(place, real=os.scandir):
        entries = list(real(place))
        random.Random(len(entries)).shuffle(entries)
        class Listed(list):
            def __enter__(self): return iter(self)
            def __exit__(self, *_): pass
            def __next__(self): return self.pop() if self else next(iter(()))
        return Listed(entries)
    first = build(photos, tmp_path / "one", batch_size=5)
    monkeypatch.setattr(os, "scandir", shuffled)
    second = build(photos, tmp_path / "two", batch_size=24)
    assert second.manifest["photos"] == first.manifest["photos"] and second.checksum() == first.checksum()


# Whatever happens in between


def forked(work):
    "Run in a process that can be killed."
    pid = os.fork()
    if pid: return pid
    try: work()
    except BaseException: os._exit(1)
    os._exit(0)


def test_kill_9_twenty_times(photos, tmp_path):
    (photos / "broken.png").write_text("no image")
    whole, out, dice = build(photos, tmp_path / "whole", batch_size=2), tmp_path / "idx", random.Random(0)
    class Slow(Grey):
        def embed(self, images): time.sleep(0.02); return super().embed(images)
    kills = early = finished = 0
    while kills < 20:
        pid = forked(lambda: build(photos, out, Slow(), batch_size=2))
        time.sleep(dice.uniform(0.02, 0.25))  # undisturbed it takes more than 0.24 seconds
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        early += os.WIFSIGNALED(status) and not (out / MANIFEST).exists()
        if not (out / MANIFEST).exists(): continue
        assert Index(out).checksum() == whole.checksum()
        shutil.rmtree(out)
        finished += 1
    index = build(photos, out, batch_size=2)
    assert early >= 10 and index.checksum() == whole.checksum() and used(index.manifest) == used(whole.manifest), "the same to the last byte"
    COUNTS["kills survived"] += kills
    print(f"{kills} kills survived, {early} of them before the index was there; {finished + 1} indexes finished, all the same")


def test_a_crash_at_every_write_and_removal(photos, tmp_path, monkeypatch):
    "First the batches, then the vectors, the cells, the manifest, and what is no longer needed goes."
    calls, stop = 0, 0
    def dying(real):
        def call(*args, **more):
            nonlocal calls
            calls += 1
            if calls == stop: raise KeyboardInterrupt
            return real(*args, **more)
        return call
    for owner, name in ((os, "replace"), (Path, "unlink")): monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    whole = build(photos, tmp_path / "whole", batch_size=8, exact=10)
    points = calls
    for point in range(1, points + 1):
        calls, stop = 0, point
        with pytest.raises(KeyboardInterrupt): build(photos, tmp_path / f"{point}", batch_size=8, exact=10)
        stop = 0
        index = build(photos, tmp_path / f"{point}", batch_size=8, exact=10)
        assert index.checksum() == whole.checksum() and sorted(p.name for p in index.out.iterdir()) == sorted([".lock", MANIFEST, *used(whole.manifest)])
    assert points >= 12
    print(f"{points} crashes")


def test_damaged_batches_are_made_again(photos, tmp_path):
    "What a crash has left is not trusted either."
    whole, dice, cases = build(photos, tmp_path / "whole", batch_size=4), random.Random(1), 60
    class Tired(Grey):
        def embed(self, images):
            if self.seen >= 12: raise KeyboardInterrupt
            return super().embed(images)
    with pytest.raises(KeyboardInterrupt): build(photos, tmp_path / "cut", Tired(), batch_size=4)
    for _ in range(cases):
        shutil.rmtree(tmp_path / "idx", ignore_errors=True)
        shutil.copytree(tmp_path / "cut", tmp_path / "idx")
        path = dice.choice(sorted((tmp_path / "idx").glob("part-*")))
        path.write_bytes(damaged(path.read_bytes(), dice))
        index = build(photos, tmp_path / "idx", batch_size=4)
        assert index.checksum() == whole.checksum() and used(index.manifest) == used(whole.manifest) and index.changes["looked_at"] == 16
    COUNTS["fuzz cases"] += cases


def test_a_full_disk_loses_nothing(photos, tmp_path, monkeypatch):
    model, written = Grey(), []
    def full(path, data, real=indexing.write_whole):
        written.append(path)
        if len(written) > 3: raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "write_whole", full)
        with pytest.raises(VermouthError, match="No space left on device.*Free some space and index again; what was finished is kept"): build(photos, tmp_path / "idx", model, batch_size=4)
    assert build(photos, tmp_path / "idx", model, batch_size=4).changes["looked_at"] == 12


def test_two_writers_and_other_models_and_other_folders_are_refused(photos, tmp_path):
    from vermouth.shards import sole_writer
    out, other = tmp_path / "idx", Grey()
    index, other.name, other.fingerprint = build(photos, out), "mine", "f" * 16
    with sole_writer(out), pytest.raises(VermouthError, match="another process is writing this index"): build(photos, out)
    for use in (lambda: build(photos, out, other), lambda: index.search(Image.new("RGB", (9, 9)), other)):
        with pytest.raises(VermouthError) as refused: use()
        assert "model='mine'" in str(refused.value) and "'grey' (0123456789abcdef)" in str(refused.value)
    with pytest.raises(VermouthError, match="no part of an index. Give a new or an empty folder"): build(photos, photos)
    (tmp_path / "file").touch()
    with pytest.raises(VermouthError, match="cannot be written"): build(photos, tmp_path / "file")


# Nothing in an index is trusted


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "0/../../secret.png", "link/hostname", "a\0b", ""])
def test_nothing_outside_of_the_folder_is_opened(photos, tmp_path, path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (photos / "link").symlink_to("/etc")
    with pytest.raises(VermouthError, match="the index holds"): Hit(path, 1.0, photos).look()
    assert "not there any more" in hits_page([Hit(path, 1.0, photos)], tmp_path / "hits.html").read_text()


# The nearest of many


@pytest.fixture(scope="module")
def many():
    "20,000 vectors around 200 centres in two parts, and 100 fresh ones."
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 64))
    x = centres[rng.integers(0, 200, 20_100)] + 0.7 * rng.normal(size=(20_100, 64))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return [x[:12_345], x[12_345:20_000]], x[20_000:]


def test_exact_is_exact(many):
    parts, queries = many
    scores, rows = exact(parts, queries, 50)
    plain = queries @ np.vstack(parts).T
    assert np.array_equal(rows, np.argsort(-plain, axis=1, kind="stable")[:, :50]) or np.allclose(np.take_along_axis(plain, rows, 1), -np.sort(-plain)[:, :50], atol=1e-6)
    assert np.allclose(scores, -np.sort(-plain)[:, :50], atol=1e-5)


def test_cells_find_what_they_promise(many):
    parts, queries = many
    cells = tuned(parts, make_cells(parts))
    index, truth = inverted(parts, cells), exact(parts, queries, 100)[0]
    found = recall(probed(index, parts, queries, 100, cells.probes)[0], truth)
    print(f"{len(cells.centres)} cells, {cells.probes} looked into: recall@100 {found:.3f} on fresh queries, {cells.recall:.3f} promised")
    assert len(cells.centres) == cell_count(20_000) and cells.probes <= len(cells.centres) / 8
    assert cells.recall >= RECALL and found >= 0.95
    assert np.array_equal(make_cells(parts).home, make_cells(parts).home), "the same every time"


def test_twins_and_zeros_do_not_trouble_the_cells():
    for vectors in (np.tile(np.eye(1, 16, dtype=np.float32), (2000, 1)), np.eye(16, dtype=np.float32)[np.arange(2000) % 16] * np.where(np.arange(2000) % 2, 1, -1).astype(np.float32)[:, None]):
        cells = tuned([vectors], make_cells([vectors]))
        scores, rows = probed(inverted([vectors], cells), [vectors], vectors[:1], 2000, cells.probes)
        assert cells.recall >= RECALL and sorted(rows[0]) == list(range(2000)) and np.isfinite(scores).all()


def test_cells_are_chosen_by_the_number_of_photos_and_said(photos, tmp_path):
    small, large = build(photos, tmp_path / "idx"), build(photos, tmp_path / "large", exact=23)
    assert small.how == "24 photos, all compared" and "24 photos in 8 cells" in large.how and "of the nearest found" in large.how
    assert small.checksum() == large.checksum()
    assert [hit.path for hit in small.nearest(small.parts[0][:1], 24)] == [hit.path for hit in large.nearest(small.parts[0][:1], 24)]
    assert build(photos, tmp_path / "large").cells is None, "the rule has changed, so it is made again"


# Real photos


@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
def test_real_photos(tmp_path):
    folder = Path(DATA) / "sbir/Sketchy/256x256/photo"
    found, aside = photos_below(folder)
    assert len(found) > 1000 and not aside
    few = tmp_path / "photos"
    few.mkdir()
    for i, photo in enumerate(found[::40]): shutil.copy(folder / photo.path, few / f"{i:03}{Path(photo.path).suffix}")
    index = build(few, tmp_path / "idx")
    assert len(index) == len(found[::40]) and not index.set_aside
    for path in index.paths[::10]: assert index.nearest(Grey().embed([Hit(path, 0, few).look()]).numpy(), 1)[0].path == path


# From a shell

PROGRAM = Path(sys.executable).with_name("vermouth")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    "24 photos and one broken one, indexed by the program with a model of random weights: a photo finds itself with any."
    place = tmp_path_factory.mktemp("shell")
    (place / "photos").mkdir()
    for item in Toybox("photo", n=24, seed=3): item.image.save(place / f"photos/{item.name}.png")
    Image.open(place / "photos/cat.png").rotate(5).save(place / "drawing.png")
    (place / "photos/broken.png").write_text("no image")
    Vermouth.build(captioner=None, expert=None, prompt="empty").save(place / "model")
    made = fresh(place, "index", "photos", "--out", "idx", "--json")
    assert made.returncode == 1, made.stderr  # something was set aside
    return place, json.loads(made.stdout)


def fresh(place, *words):
    "The program in a process of its own."
    return subprocess.run([PROGRAM, *words, "--model", "model"], cwd=place, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)


def shell(place, *words):
    "The same without the seconds that a new process takes to load torch."
    from vermouth.app.cli import app
    with contextlib.chdir(place): return CliRunner().invoke(app, [*words, "--model", "model"])


def test_index_from_a_shell(indexed):
    place, said = indexed
    assert (said["photos"], said["looked_at"], said["how"]) == (24, 24, "24 photos, all compared")
    assert said["set_aside"] == [["broken.png", "not an image Pillow can read. Convert it to PNG or JPEG."]]
    again = shell(place, "index", "photos", "--out", "idx")
    assert again.exit_code == 1 and again.stdout == f"24 photos are in idx, checksum {said['checksum']}\n"
    assert "set aside: 'broken.png'" in again.stderr


def test_search_from_a_shell(indexed):
    place, _ = indexed
    drawn = fresh(place, "search", "idx", "drawing.png", "-k", "5", "--html", "hits.html")
    assert drawn.returncode == 0 and len(drawn.stdout.splitlines()) == 5, drawn.stderr
    assert drawn.stdout.splitlines()[0].split()[1] == "cat.png"
    assert (place / "hits.html").read_text().count("data:image/jpeg;base64,") == 6, "five hits and the drawing"
    words = shell(place, "search", "idx", "a red boat", "-k", "100", "--json")
    hits = json.loads(words.stdout)["hits"]
    assert words.exit_code == 0 and len(hits) == 24 and [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)


@pytest.mark.parametrize("words, says", [
    (["search", "nowhere", "a cat"], "index='nowhere': no index.json to read in it"),
    (["search", "idx", "none.png"], "image='none.png': no such file"),
    (["search", "idx", " "], "query=' ': empty. Draw something"),
    (["search", "idx", "a cat", "-k", "0"], "k=0: a whole number from 1"),
    (["search", "idx", "photos/broken.png"], "not an image Pillow can read"),
    (["search", "idx", "a cat", "--html", "no/hits.html"], "out_html='no/hits.html': cannot be written"),
    (["index", "none", "--out", "other"], "folder='none': no such folder"),
    (["index", "photos", "--out", "photos"], "which is no part of an index"),
])
def test_what_is_refused_from_a_shell(indexed, words, says):
    refused = shell(indexed[0], *words)
    assert refused.exit_code == 2 and says in refused.stderr and refused.stderr.count("\n") == 1 and refused.stdout == "", refused.stderr
