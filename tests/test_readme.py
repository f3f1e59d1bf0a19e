"README.md is made from the front page, its tables from the results, its commands are those that are checked."

import re

import pytest
from conftest import ROOT
from execnb.nbio import new_nb
from house import MODULES, NBS, code_cells, markdown
from page_runs import run_cells, shown_text


def test_readme_is_made_from_the_front_page():
    from vermouth.app.docs import readme_text  # here, so that a broken module fails this test and not the whole file

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(NBS / "index.ipynb", ROOT), (
        "run: python -m vermouth.app.docs"
    )


def test_readme_is_short_and_says_first_how_to_install():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert any(line.startswith("pip install -e .") for line in text.splitlines()[:15])


def test_the_api_page_has_every_module_with_public_names():
    "In every folder of pages; run nbs/api.ipynb again after one has come, gone or been renamed."
    from vermouth.app.docs import api_tables

    public = {name for name, path in MODULES.items() if not re.search(r"^__all__ = \[\]", path.read_text(), re.M)}
    for text in (api_tables(ROOT), markdown("api.ipynb")):
        assert set(re.findall(r"^## \[(vermouth[\w.]+)\]", text, re.M)) == public


@pytest.mark.parametrize("page", ["index.ipynb", "scale.ipynb"])
def test_tables_made_of_results_files_equal_them(page, monkeypatch):
    "The cells that read results run again; what they show must be what the page shows (20_paper: in test_figures)."
    monkeypatch.setenv("IN_TEST", "1")  # figures go elsewhere
    reading = [c for c in code_cells(page) if page != "index.ipynb" or "results" in c.source]
    again = run_cells(new_nb([c.source for c in reading]), NBS)
    assert reading and shown_text(again) == shown_text(reading), (
        f"run nbs/{page} again, then: python -m vermouth.app.docs"
    )


def test_readme_gives_the_commands_that_are_checked():
    readme, script, workflow = [
        (ROOT / p).read_text(encoding="utf-8") for p in ("README.md", ".ci/run", ".github/workflows/test.yml")
    ]
    lines = readme.splitlines()
    assert 'pip install -e ".[dev]" && papermill nbs/10_sbir.ipynb out.ipynb -p shots 5' in lines
    [test_command] = [
        line for line in lines if re.fullmatch(r"pip install -e .* && nbdev_test && pytest -q tests", line)
    ]
    [pattern] = re.findall(r"grep -x '([^']+)' README.md", script)  # the script takes its command from there
    assert re.fullmatch(pattern, test_command)
    assert all(part in workflow for part in test_command.split(" && ")[1:])  # there it installs from the lock
