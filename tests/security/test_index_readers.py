"An index is read while it is updated: every read gives a whole state, and no reader is told to delete anything."

import os

import pytest
from conftest import COUNTS
from odd_files import Grey
from photo_folders import build, drawn_photos, run_forked, write_photos

from vermouth.app.search import Index


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


def test_readers_see_whole_states_during_fifty_updates(photos, tmp_path):
    "Of the 24 photos one is there or not, alternately; one reader opens the index again and again, one keeps it open."
    out, moving = tmp_path / "idx", photos / "0/00.png"
    build(photos, out)
    states, query = {}, Grey().embed([drawn_photos()[0]]).numpy()
    kept, data = Index(out), moving.read_bytes()

    def state(index):
        return [(hit.path, round(hit.score, 5)) for hit in index.nearest(query, 24)]

    states[24] = state(kept)
    states[23] = [hit for hit in states[24] if hit[0] != "0/00.png"]

    def update():
        for i in range(50):
            moving.unlink() if i % 2 == 0 else moving.write_bytes(data)
            build(photos, out, batch_size=1, exact=10 if i % 5 == 0 else 100)

    pid, reads, seen = run_forked(update), 0, set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        for index in (kept, Index(out)):
            found = state(index)
            assert found == states[len(found)], f"read {reads}"
            seen.add(len(found))
            reads += 1
    assert reads > 20 and seen == {23, 24}
    COUNTS["reads during updates"] += reads
    assert state(kept) == state(Index(out)) and kept.checksum() == Index(out).checksum()
