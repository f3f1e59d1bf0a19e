"The results pages as papermill runs them: from a shell's point of view, in a folder of their own."

import os
from pathlib import Path

import pandas as pd
import papermill
import pytest
from conftest import ROOT
from page_runs import page_rows, without_differences

from vermouth.core import VermouthError

DATA = os.environ.get("VERMOUTH_DATA")
METHODS = {
    "Vermouth",
    "Vermouth without expert",
    "U-head on random weights",
    "U-head on random weights without expert",
    "training-free backbone",
    "training-free, random weights",
    "expert only",
    "CLIP image tower",
    "expert, trained bottleneck",
    "CLIP image tower, trained bottleneck",
    "caption only",
    "raw pixels",
    "Vermouth, ridge start (ours)",
    "Vermouth without expert, ridge start (ours)",
    "Vermouth+ (ours)",
    "chance",
}


def papermill_rows(page, folder, **parameters):
    "Execute a page with papermill in `folder`; the rows it wrote."
    source, output = ROOT / "nbs" / page, folder / "out.ipynb"
    papermill.execute_notebook(str(source), str(output), parameters=parameters, cwd=str(folder), progress_bar=False)
    return pd.read_csv(folder / "results" / f"{Path(page).stem}.csv")


@pytest.mark.slow
def test_sbir_writes_every_method_with_its_origin(tmp_path):
    few = {"shots": 1, "epochs": 1, "limit": 12, "size": 32, "protocol": "ours", "seed": 0}
    rows = papermill_rows("10_sbir.ipynb", tmp_path, **few)
    methods = without_differences(rows)
    assert set(methods.method) == METHODS | {f"EfficientNet-Lite0{kind}" for kind in (" only", ", trained bottleneck")}
    assert methods.value.between(0, 1).all() and (rows.n == 12).all()
    sure = rows[rows.method != "chance"]
    assert (sure.low <= sure.value).all() and (sure.value <= sure.high).all() and (rows.seeds == 1).all()
    assert rows.versions.str.contains("torch=").all() and rows.device.notna().all() and (rows.seconds > 0).all()
    assert (tmp_path / "results" / "10_sbir.png").stat().st_size > 10_000
    again = page_rows("10_sbir.ipynb", tmp_path, **few)
    assert len(again) == 2 * len(rows), "a second run appends"
    assert again.value[len(rows) :].tolist() == rows.value.tolist(), "the same seed gives the same numbers"


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="VERMOUTH_DATA names no folder with the real data packs")
def test_sbir_reads_real_sketches(tmp_path):
    root = str(Path(DATA) / "sbir" / "Sketchy")
    few = {"shots": 1, "epochs": 1, "limit": 25, "size": 32, "uhead": "pico", "protocol": "ours", "seed": 0}
    rows = page_rows("10_sbir.ipynb", tmp_path, dataset="sketchy_split1", root=root, **few)
    assert set(without_differences(rows).method) == METHODS and (rows.n == 25).all()


def test_a_wrong_name_says_which_are_right(tmp_path):
    with pytest.raises(VermouthError, match="dataset='sketchi'.*Choose from"):
        page_rows("10_sbir.ipynb", tmp_path, dataset="sketchi")
