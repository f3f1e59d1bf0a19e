"The docs site as Quarto would get it: nbdev's processing of every page, with the processors of `app.pages`."

import os
import re
import subprocess
import sys
from pathlib import PurePosixPath

import nbformat
import pytest
import yaml
from conftest import ROOT
from house import NBS, PAGES, quarto, settings


@pytest.fixture(scope="module")
def site(checkout):
    "The processed pages by name: all of nbdev_docs that does not need Quarto."
    code = f"from nbdev.serve import proc_nbs\nproc_nbs(n_workers={os.cpu_count()})"
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return {page: nbformat.read(checkout / "_proc" / page, as_version=4).cells for page in PAGES}


def front_matter(cells):
    return yaml.safe_load(cells[0].source.strip().strip("-"))


def outputs(cells):
    "Each output of code cells with what it shows as text, by kind."
    for cell in cells:
        for output in cell.get("outputs", ()):
            yield cell, output, {kind: "".join(text) for kind, text in output.get("data", {}).items()}


def test_every_page_of_the_site_has_a_title_and_a_sentence(site):
    heads = {page: front_matter(cells) for page, cells in site.items()}
    bad = [page for page, head in heads.items() if not head.get("title") or not head.get("description")]
    assert not bad, bad


def test_no_two_pages_of_the_site_share_an_address(site):
    "nbdev drops the numbers: 05_uhead and 15_uhead would both become uhead.html, but results pages keep theirs."
    address = {
        page: (PurePosixPath(page).parent / front_matter(cells)["output-file"]).as_posix().lower()
        for page, cells in site.items()
    }
    clashes = [f"{page}: {a}" for page, a in address.items() if list(address.values()).count(a) > 1]
    assert not clashes, clashes
    assert address["20_paper.ipynb"] == "20_paper.html"


def test_no_code_fence_holds_a_link(site):
    texts = [(page, cell.source) for page, cells in site.items() for cell in cells if cell.cell_type == "markdown"]
    texts += [(page, kinds.get("text/markdown", "")) for page, cells in site.items() for *_, kinds in outputs(cells)]
    fences = [(page, fence) for page, text in texts for fence in re.findall(r"^```.*?^```", text, re.M | re.S)]
    assert fences
    bad = [f"{page}: {link}" for page, fence in fences for link in re.findall(r"\[`[^`]+`\]\([^)]*\)", fence)]
    assert not bad, bad


def test_signatures_of_classes_are_classes(site):
    shown = {p: [k.get("text/markdown", "") for *_, k in outputs(cells)] for p, cells in site.items()}
    assert any("class UHead(nn.Module):" in text for text in shown["library/05_uhead.ipynb"])
    bad = [found for texts in shown.values() for text in texts for found in re.findall(r"^def [A-Z]\w+\(", text, re.M)]
    assert not bad, bad


def test_no_page_loads_a_script_from_elsewhere(site):
    html = [(page, kinds.get("text/html", "")) for page, cells in site.items() for *_, kinds in outputs(cells)]
    bad = [page for page, text in html if "<script" in text or "<table" in text or "http" in text]
    assert not bad, f"HTML tables make Quarto load require.js and jQuery: {sorted(set(bad))}"


def test_progress_bars_leave_nothing_behind(site):
    bad = [page for page, cells in site.items() for _, output, _ in outputs(cells) if output.get("name") == "stderr"]
    assert not bad, sorted(set(bad))


def test_every_picture_says_what_it_shows(site):
    bad = [
        f"{page}: {cell.source[:60]!r}"
        for page, cells in site.items()
        for cell, _, kinds in outputs(cells)
        if "image/png" in kinds and "fig-alt" not in cell.source
    ]
    bad += [
        f"{page}: {picture}"
        for page, cells in site.items()
        for cell in cells
        if cell.cell_type == "markdown"
        for picture in re.findall(r"!\[\]\([^)]*\)", cell.source)
    ]
    assert not bad, bad


def test_checks_and_imports_are_folded(site):
    sources = [cell.source for cells in site.values() for cell in cells if cell.cell_type == "code"]
    for summary in ("Setup", "Checks", "Code"):
        assert sum(f'code-summary: "{summary}"' in source for source in sources) > 10, summary


def listed(contents):
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif "href" in entry:
            yield entry["href"]
        else:
            yield from listed(entry["contents"])


def test_the_site_lists_every_page_once():
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    website = quarto()["website"]
    entries = [page for sidebar in website["sidebar"] for page in listed(sidebar["contents"])]
    assert sorted(entries) == sorted(PAGES), (
        f"_quarto.yml lacks {sorted(set(PAGES) - set(entries))}, has in excess {sorted(set(entries) - set(PAGES))}"
    )
    assert {entry["href"] for entry in website["navbar"]["left"]} <= set(PAGES)


def test_the_site_agrees_with_settings():
    website, ours = quarto()["website"], settings()
    assert [website["title"], website["description"], website["repo-url"], website["repo-branch"]] == [
        ours[k] for k in ("title", "description", "git_url", "branch")
    ]
    assert quarto()["project"]["output-dir"] == ours["doc_path"]
