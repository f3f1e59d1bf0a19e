"A results page in this process: what papermill does in a new one, without the seconds that loading torch takes there."

import os
import warnings
from pathlib import Path

import nbformat
import pandas as pd
from conftest import ROOT
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


def run_page(page, folder, **parameters):
    "Execute a page with parameters in a folder, and return its cells with their outputs. Raises what a cell raises."
    notebook = load_notebook_node(str(ROOT / "nbs" / page))
    notebook = parameterize_notebook(notebook, parameters, "parameters") if parameters else notebook
    nbformat.write(notebook, Path(folder) / "out.ipynb")
    return run_cells(read_nb(Path(folder) / "out.ipynb"), folder)


def run_cells(notebook, folder):
    "Execute a notebook in a folder, and return its cells with their outputs. Raises what a cell raises."
    before = os.getcwd()
    os.chdir(folder)
    try:
        # as many columns as in Jupyter, where pandas does not fit tables into a terminal
        with warnings.catch_warnings(), pd.option_context("display.max_columns", 20):
            warnings.simplefilter("ignore")
            CaptureShell(Path(folder)).run_all(notebook, exc_stop=True)
    finally:
        os.chdir(before)
    return notebook.cells


def shown_text(cells):
    "What cells show, output by output, as far as it is text: figures may differ in a pixel."
    outputs = [o for c in cells for o in c.get("outputs", []) if o.get("name") != "stderr"]
    data = [o.get("data", {"text/plain": o.get("text")}) for o in outputs]
    return [{k: "".join(v) for k, v in kinds.items() if k.startswith("text/")} for kinds in data]


def page_rows(page, folder, **parameters):
    "Execute a page with parameters in a folder, and return the rows that it wrote."
    run_page(page, folder, **parameters)
    return pd.read_csv(Path(folder) / "results" / f"{Path(page).stem}.csv")


def without_differences(rows):
    "The rows of methods, without those of paired differences of two, of which there must be some."
    apart = rows[rows.method.str.contains(" − ")]
    assert len(apart) and (apart.low <= apart.value).all() and (apart.value <= apart.high).all()
    return rows.drop(apart.index)


def page_text(cells):
    "What a page has printed and shown."
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [o.get("text", "") for o in outputs] + [o.get("data", {}).get("text/html", "") for o in outputs]
    return "\n".join(text if isinstance(text, str) else "".join(text) for text in texts)
