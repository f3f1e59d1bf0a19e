"An index may come from anywhere: the folder that it names never decides which files are opened or shown."

import base64
import json
import re
import sqlite3
from contextlib import closing

import pytest
from odd_files import Grey
from photo_folders import build, drawn_photos, write_photos
from PIL import Image

from vermouth.app.database import FILE, seal
from vermouth.app.index import Index
from vermouth.app.search import Hit, hits_page
from vermouth.core import VermouthError

LEADING_OUT = ["../secret.png", "/etc/hostname", "a/../../secret.png", "link.png", "link/secret.png", "..", "", "a\0b"]


@pytest.fixture
def place(tmp_path):
    "Photos, their index, and beside them a private image, to which two links lead."
    write_photos(tmp_path / "photos", 6)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    (tmp_path / "photos/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "photos/link").symlink_to(tmp_path)
    build(tmp_path / "photos", tmp_path / "idx")
    return tmp_path


@pytest.mark.parametrize("path", LEADING_OUT)
def test_a_path_that_leads_out_of_the_folder_is_refused(place, path):
    with pytest.raises(VermouthError, match="the index holds"):
        Hit(path, 1.0, folder=place / "photos").open()


def test_links_are_not_indexed(place):
    index = Index(place / "idx")
    assert len(index.paths) == 6 and not [path for path in index.paths if "link" in path]


def test_without_a_folder_of_the_caller_no_photo_is_opened(place):
    index = Index(place / "idx")
    assert index.settings["folder"] == str(place / "photos") and index.folder is None
    with pytest.raises(VermouthError, match="in which folder. Pass Index"):
        Hit(index.paths[0], 1.0, folder=index.folder).open()


@pytest.mark.parametrize("claimed", ["/", "/etc", ""])
def test_an_index_that_names_another_folder_opens_nothing_there(place, claimed):
    "Written by a stranger, with a seal that is right: the folder is the root of the disk, photos are private files."
    claimed = claimed or str(place)
    with closing(sqlite3.connect(place / "idx" / FILE)) as db:
        found = dict(db.execute("SELECT name, value FROM settings ORDER BY name")) | {"folder": json.dumps(claimed)}
        del found["seal"]
        found["seal"] = seal(found.items())
        db.executemany("REPLACE INTO settings VALUES (?, ?)", found.items())
        db.commit()
    index = Index(place / "idx")
    assert index.settings["folder"] == claimed and index.folder is None
    hits = index.nearest(Grey().embed([drawn_photos()[0]]).numpy(), 3)
    for hit in [*hits, Hit("secret.png", 1.0, folder=index.folder)]:
        with pytest.raises(VermouthError, match="in which folder"):
            hit.open()
    hits = Index(place / "idx", place / "photos").nearest(Grey().embed([drawn_photos()[0]]).numpy(), 3)
    assert [hit.open().size for hit in hits] == [(64, 64)] * 3, "the folder is the caller's"
    with pytest.raises(VermouthError, match="Give another out, or delete this one"):
        build(place / "photos", place / "idx")


def test_a_page_of_hits_shows_thumbnails_of_the_index_and_nothing_else(place):
    hits = [Hit(path, 1.0, b"not a photo", place / "photos") for path in LEADING_OUT if path]
    page = hits_page(hits, place / "hits.html").read_text()
    shown = {base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)}
    assert shown == {b"not a photo"}
