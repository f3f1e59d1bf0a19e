"The table of the security page names every kind of fault, and every file of this folder."

import re
from pathlib import Path

from conftest import ROOT
from house import cells


def test_every_kind_has_its_file_and_every_file_its_kind():
    text = "\n".join(cell.source for cell in cells("security.ipynb") if cell.cell_type == "markdown")
    rows = re.findall(r"^\| (\d+) \| .* \| `([^`|]*)` \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 22))
    folder = Path(__file__).parent
    named = {(ROOT if "/" in file else folder) / file for _, file in rows}
    assert [path for path in named if not path.is_file()] == []
    assert [path.name for path in folder.glob("test_*.py") if f"`{path.name}`" not in text] == []
