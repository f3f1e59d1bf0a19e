"The page for a user's own photos and drawings, on real ones."

import os
import shutil
from pathlib import Path

import pytest
from page_runs import page_text, run_page

DATA = os.environ.get("VERMOUTH_DATA", "")


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA is not set: no real photos and sketches")
def test_real_photos_and_sketches(tmp_path):
    ready = {
        kind: Path(DATA) / "sbir" / "Sketchy" / "256x256" / kind / "tx_000000000000_ready"
        for kind in ("photo", "sketch")
    }
    for name in ("airplane", "apple", "bear", "bicycle", "castle", "cat"):
        for kind, folder in ready.items():
            (tmp_path / "my" / kind / name).mkdir(parents=True)
            for image in sorted((folder / name).iterdir())[:6]:
                shutil.copy(image, tmp_path / "my" / kind / name)
    parameters = {"root": str(tmp_path / "my"), "out_dir": str(tmp_path / "mine"), "shots": 4, "epochs": 2}
    printed = page_text(run_page("own_data.ipynb", tmp_path, **parameters))
    assert "36 photos indexed" in printed and "4 seen classes, 16 sketches, 16 photos; 2 unseen" in printed
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"model", "index"}
