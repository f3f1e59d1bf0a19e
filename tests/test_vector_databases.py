"The blocks of the page on scale that hand an index to a vector database, run as they stand there."

import json
import re
from pathlib import Path

import pytest

from vermouth.app.index import build_index
from vermouth.app.search import query_vector
from vermouth.data.toybox import Toybox

PAGE = Path(__file__).parent.parent / "nbs" / "scale.ipynb"


def block(word):
    "The Python block of the page that mentions a word."
    cells = json.loads(PAGE.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if word in code]
    return found


@pytest.fixture(scope="module")
def exported(toybox, tmp_path_factory):
    "A folder with an index and its Parquet file, and the vector of one of its photos."
    folder = tmp_path_factory.mktemp("databases")
    (folder / "photos").mkdir()
    for i, item in enumerate(Toybox("photo", n=20)):
        item.image.save(folder / "photos" / f"{i:02d}.png")
    build_index(folder / "photos", folder / "idx", toybox)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        exec(block("Index("), {})
    return folder, query_vector(folder / "photos" / "07.png", toybox)[0]


@pytest.mark.parametrize("library", ["qdrant_client", "lancedb"])
def test_a_photo_finds_itself_in_a_vector_database(library, exported, monkeypatch):
    pytest.importorskip(library, reason=f"needs {library}: pip install {library.replace('_', '-')}")
    folder, query = exported
    monkeypatch.chdir(folder)
    names = {"query": query}
    exec(block(library), names)
    assert names["found"][0] == "07.png" and len(names["found"]) == 5
