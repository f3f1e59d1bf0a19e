"A folder of photos is indexed, whatever is in it, and only what has changed is read again."

import os
import random
import shutil

import numpy as np
import pytest
from conftest import COUNTS
from odd_files import BAD, GOOD, Grey
from photo_folders import answers, build, drawn_photos, write_photos
from PIL import Image

from vermouth.app.search import Index, hits_page
from vermouth.core import VermouthError


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


# What is in the folder


def test_bad_files_are_set_aside_with_a_reason_and_odd_ones_are_read(tmp_path):
    first, second, *_ = drawn_photos()
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (make, _) in BAD.items():
        make(folder / name, first)
    for name, make in GOOD.items():
        make(folder / name, second)
    (folder / "below").mkdir()
    (folder / "below/up").symlink_to("..")  # a circle of folders
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.png").write_text("no photo")
    index = build(folder, tmp_path / "idx")
    assert index.paths == sorted(GOOD)
    assert [path for path, _ in index.skipped] == sorted(BAD)
    assert not {name: why for name, why in index.skipped if BAD[name][1] not in why}
    hits = index.nearest(Grey().embed([second]).numpy(), 100)
    page = hits_page(hits, tmp_path / "hits.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == len(GOOD) and "<b>'" not in page and "caf\\udce9.png" in page
    assert build(folder, tmp_path / "idx").changes["looked_at"] == 0
    COUNTS["inputs tried"] += len(BAD) + len(GOOD)


def test_a_photo_that_was_taken_sideways_is_upright(tmp_path):
    folder, exif = tmp_path / "photos", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6  # turn right to see it upright
    drawn_photos()[0].rotate(90).save(folder / "turned.png", exif=exif)
    hit = build(folder, tmp_path / "idx").nearest(Grey().embed([drawn_photos()[0]]).numpy(), 1)[0]
    assert hit.score > 0.999 and np.array_equal(np.asarray(hit.open()), np.asarray(drawn_photos()[0]))


def test_ten_thousand_copies_of_a_photo_are_embedded_once(tmp_path):
    folder, model = tmp_path / "photos", Grey()
    folder.mkdir()
    drawn_photos()[0].save(folder / "0000.png")
    for i in range(1, 10_000):
        os.link(folder / "0000.png", folder / f"{i:04}.png")
    index = build(folder, tmp_path / "idx", model, batch_size=1000)
    assert (len(index), model.seen) == (10_000, 1)
    found = index.nearest(model.embed([drawn_photos()[0]]).numpy(), 3)
    assert [hit.path for hit in found] == ["0000.png", "0001.png", "0002.png"], "of equal ones the first"
    assert build(folder, tmp_path / "idx", model).changes["looked_at"] == 0


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no photos in it. Give a folder with images"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.png").touch()),
            "none of 1 photos can be used ('a.png': not an image",
        ),
        (lambda folder: folder.write_text("a file"), "no such folder"),
    ],
)
def test_folders_without_photos_are_refused_and_leave_the_index_alone(photos, tmp_path, make, says):
    before = build(photos, tmp_path / "idx").checksum()
    shutil.rmtree(photos)
    make(photos)
    with pytest.raises(VermouthError) as refused:
        build(photos, tmp_path / "idx")
    assert says in str(refused.value) and Index(tmp_path / "idx").checksum() == before


def test_one_image_that_the_model_cannot_take_costs_only_itself(photos, tmp_path):
    class Fragile(Grey):
        def embed(self, images):
            found = super().embed(images)
            for i, image in enumerate(images):
                if image.getpixel((0, 0)) == (1, 2, 3):
                    found[i] = float("nan")
                if image.getpixel((0, 0)) == (3, 2, 1):
                    raise RuntimeError("mat1 and mat2 cannot be multiplied")
            return found

    for name, colour in (("nan", (1, 2, 3)), ("odd", (3, 2, 1))):
        Image.new("RGB", (9, 9), colour).save(photos / f"{name}.png")
    index = build(photos, tmp_path / "idx", Fragile())
    assert len(index) == 24
    assert index.skipped == [
        ("nan.png", "model: embed gives no unit vector for it"),
        ("odd.png", "RuntimeError: mat1 and mat2 cannot be multiplied"),
    ]
    assert build(photos, tmp_path / "idx").changes["looked_at"] == 2, "the model may be repaired"

    class Broken(Grey):
        def embed(self, images):
            raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        build(photos, tmp_path / "other", Broken())


def test_large_photos_are_embedded_in_smaller_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("vermouth.app.files.MAX_PIXELS", 10_000)
    write_photos(tmp_path / "photos")
    sizes = []

    class Counting(Grey):
        def embed(self, images):
            sizes.append(sum(image.width * image.height for image in images))
            return super().embed(images)

    build(tmp_path / "photos", tmp_path / "idx", Counting())
    assert len(sizes) == 12 and max(sizes) <= 10_000


def test_a_photo_is_hashed_and_decoded_from_the_same_bytes(photos, tmp_path, monkeypatch):
    "A file that is replaced while it is read cannot get the vector of the other under its own digest."
    from vermouth.app import files

    def replaced(folder, path, read=files.read_photo):
        data = read(folder, path)
        Image.new("RGB", (9, 9), "red").save(folder / path)
        return data

    expected = build(photos, tmp_path / "one").checksum()
    monkeypatch.setattr(files, "read_photo", replaced)
    assert build(photos, tmp_path / "two").checksum() == expected
    monkeypatch.undo()
    assert build(photos, tmp_path / "two").changes["changed"] == 24


def test_a_pipe_that_takes_a_photos_place_is_not_waited_for(photos, tmp_path, monkeypatch):
    from vermouth.app import index

    found = index.photos_below(photos)
    (photos / "0/00.png").unlink()
    os.mkfifo(photos / "0/00.png")
    monkeypatch.setattr(index, "photos_below", lambda folder: found)
    [(path, reason)] = build(photos, tmp_path / "idx").skipped
    assert path == "0/00.png" and reason.startswith("neither a file nor a folder")


# Only what changed


def test_only_what_changed_is_read(photos, tmp_path):
    out, model, dice = tmp_path / "idx", Grey(), random.Random(0)

    def again():
        before = model.seen
        index = build(photos, out, model)
        assert index.changes["looked_at"] == model.seen - before
        fresh = tmp_path / f"fresh{dice.random()}"
        assert index.checksum() == build(photos, fresh).checksum() and answers(out) == answers(fresh)
        return {what: n for what, n in index.changes.items() if n}

    assert again() == {"photos": 24, "new": 24, "looked_at": 24}
    times = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*[!lm]")}
    assert again() == {"photos": 24}
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("[!.]*[!lm]")}, "nothing changed or written"
    os.utime(photos / "0/00.png")
    os.utime(photos / "1/01.png", (0, 0))  # a clock that was moved back
    assert again() == {"photos": 24}
    shutil.copy(photos / "0/00.png", photos / "copy.png")
    shutil.move(photos / "1/01.png", photos / "moved.png")
    assert again() == {"photos": 25, "new": 2, "removed": 1}
    size = (photos / "0/03.png").stat().st_size
    (photos / "0/03.png").write_bytes(size * b"x")
    assert again() == {"photos": 24, "removed": 1, "set_aside": 1}
    drawn_photos()[3].save(photos / "0/03.png")
    drawn_photos()[5].rotate(90).save(photos / "2/05.png")
    (photos / "copy.png").unlink()
    assert again() == {"photos": 24, "new": 1, "changed": 1, "removed": 1, "looked_at": 2}


def test_a_folder_that_moved_keeps_its_vectors_and_another_one_is_refused(photos, tmp_path):
    before = build(photos, tmp_path / "idx").checksum()
    with pytest.raises(VermouthError, match="is the index of .*photos', which is still there"):
        build(photos / "0", tmp_path / "idx")
    moved = photos.rename(tmp_path / "elsewhere")
    index = build(moved, tmp_path / "idx")
    assert (index.changes["looked_at"], index.checksum()) == (0, before)
    index.nearest(np.eye(1, 64, dtype=np.float32), 1)[0].open()


def test_the_order_on_the_disk_does_not_matter(photos, tmp_path, monkeypatch):
    first = build(photos, tmp_path / "one", batch_size=5)
    walk = os.walk

    def shuffled(*args, **options):
        for parent, folders, files in walk(*args, **options):
            random.Random(1).shuffle(folders)
            random.Random(2).shuffle(files)
            yield parent, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    second = build(photos, tmp_path / "two", batch_size=24)
    assert second.checksum() == first.checksum() and answers(tmp_path / "two") == answers(tmp_path / "one")


def test_cells_are_chosen_by_the_number_of_photos_and_kept_while_photos_come_and_go(photos, tmp_path):
    small, large = build(photos, tmp_path / "idx"), build(photos, tmp_path / "large", exact=15)
    assert small.how == "24 photos, all compared"
    assert "24 photos in 8 cells" in large.how and "of the nearest found" in large.how
    assert small.checksum() == large.checksum() and answers(tmp_path / "idx") == answers(tmp_path / "large")
    for i in range(4):
        (photos / f"{i % 3}/{i:02}.png").unlink()
    drawn_photos()[0].rotate(90).save(photos / "new.png")
    updated = build(photos, tmp_path / "large", exact=15)
    assert (len(updated), updated.settings["trained"]) == (21, 24)
    build(photos, tmp_path / "fresh")
    assert answers(tmp_path / "large") == answers(tmp_path / "fresh")
    assert build(photos, tmp_path / "large").how == "21 photos, all compared", "the rule has changed"
