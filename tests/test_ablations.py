"The ablation pages' committed outputs: what a page shows is what its table holds. nbdev_test runs the pages."

import re

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from vermouth.experiments.report import summary
from vermouth.experiments.tables import ROW

PAGES = sorted(p.stem for kind in ("1[3-8]", "21") for p in (ROOT / "nbs").glob(f"{kind}_*.ipynb"))
RESULTS = ROOT / "nbs" / "results"


def newest(page):
    "The rows of the last run, with the settings as the page shows them."
    rows = pd.read_csv(RESULTS / f"{page}.csv")
    if "seeds" not in rows:
        pytest.skip("measured before numbers had intervals, as the page says at its top")
    rows = rows[rows.finished == rows.finished.max()]
    return rows.assign(setting=rows.setting.str.split(" | ", regex=False).str[0])


def shown(page, code):
    "The HTML under the one cell that ends in this line."
    cells = nbformat.read(ROOT / "nbs" / f"{page}.ipynb", as_version=4).cells
    [cell] = [c for c in cells if c.cell_type == "code" and c.source.splitlines()[-1:] == [code]]
    return next(o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {}))


def test_there_are_seven():
    assert [p[:2] for p in PAGES] == ["13", "14", "15", "16", "17", "18", "21"]


@pytest.mark.parametrize("page", PAGES)
def test_the_table_on_the_page_is_the_table_in_the_file(page):
    rows = newest(page)
    cells = re.findall(r"<td>(.*?)</td>", summary(rows[rows.value.notna()]).to_html())
    table = re.findall(r"<td>(.*?)</td>", shown(page, "summary(rows, ablation.chance)"))
    assert cells and table[: len(cells)] == cells
    chance = [float(cell) for cell in table[len(cells) :] if cell]
    assert chance and all(5 < level < 15 for level in chance), "twelve classes: the last row"


@pytest.mark.parametrize("page", PAGES)
def test_rows_are_complete_and_say_where_they_come_from(page):
    rows = newest(page)
    assert set(ROW) < set(rows) and rows.versions.str.contains("torch=").all()
    assert rows.commit.notna().all() and rows.device.notna().all()
    skipped = rows[rows.value.isna()]
    assert skipped.method.str.startswith("skipped: ").all(), "a row without a number says why"
    measured = rows.drop(skipped.index)
    assert measured.value.between(0, 1).all() and (measured.n > 0).all()
    sure = measured.dropna(subset="low")
    assert len(sure) and (sure.low <= sure.value).all() and (sure.value <= sure.high).all()
    runs = measured.groupby(["task", "setting", "method"]).seeds.max()
    assert runs.min() == runs.max() >= 3, "every setting was measured with the same number of seeds, three at least"


@pytest.mark.parametrize("page", PAGES)
def test_the_figure_is_small_and_no_blank(page):
    path = RESULTS / f"{page}.png"
    assert path.stat().st_size < 150_000
    assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10
