"The docs site as Quarto would get it: nbdev's processing of every page, with the processors of `app.pages`."

import gc
import os
import re
from pathlib import PurePosixPath

import nbformat
import pytest
from house import PAGES, RESULTS, default_exp, quarto, settings
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from photo_folders import run_forked
from site_pages import front_matter, letters_shown, longest_word, outputs, sections, tables, words_shown

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(checkout):
    "The processed pages by name: all of nbdev_docs that does not need Quarto."

    def process():
        gc.disable()  # it would take a fifth of the time
        os.chdir(checkout)
        get_config.cache_clear()
        proc_nbs(n_workers=0)

    assert os.waitpid(run_forked(process), 0)[1] == 0, "the reason is printed above"
    return {page: nbformat.read(checkout / "_proc" / page, as_version=4).cells for page in PAGES}


def test_every_page_of_the_site_has_a_title_and_a_sentence(site):
    heads = {page: front_matter(cells) for page, cells in site.items()}
    bad = [page for page, head in heads.items() if not head.get("title") or not head.get("description")]
    assert not bad, bad
    bad = [page for page, head in heads.items() if re.fullmatch(r"[a-z_.]+", head["title"])]
    assert not bad, f"titles are for readers; give these a text in _quarto.yml: {bad}"


def test_no_two_pages_of_the_site_share_an_address(site):
    "nbdev drops the numbers: 05_uhead and 15_uhead would both become uhead.html, but results pages keep theirs."
    files = {page: PurePosixPath(page).parent / front_matter(cells)["output-file"] for page, cells in site.items()}
    address = {page: file.as_posix().lower() for page, file in files.items()}
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
    for page, cells in site.items():
        shown = ["".join([*kinds.values(), *output.get("text", "")]) for _, output, kinds in outputs(cells)]
        bad += [page] if any(mark in text for text in shown for mark in ("█", "[00:00<", "GB are free")) else []
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
    for page in ("paper.ipynb", "features.ipynb", "security.ipynb"):  # where a reader would scroll past it
        assert 'code-summary: "Setup"' in next(c.source for c in site[page] if c.cell_type == "code"), page


def test_no_link_stands_inside_a_link(site):
    prose = [(page, words_shown(cells)) for page, cells in site.items()]
    links = [(page, link) for page, text in prose for link in re.findall(r"\[[^]!]*\[[^]]*\]\([^)]*\)[^][]*\]\(", text)]
    assert not [f"{page}: {link}" for page, link in links if not link.startswith("[![")]
    commands = [page for page, text in prose if "app/cli.html#" in text and page != "app/08_cli.ipynb"]
    assert not commands, f"a command is linked where a function is meant: {commands}"


def test_names_lead_to_their_own_definition(site):
    "On the table of all names and beside each signature: to the module of the section or page."
    from vermouth._modidx import d as index

    api = "\n".join(kinds.get("text/markdown", "") for *_, kinds in outputs(site["api.ipynb"]))
    sections = re.findall(r"^## \[(vermouth[\w.]+)\].*?\n(.*?)(?=^## |\Z)", api, re.M | re.S)
    rows = [(m, *row) for m, text in sections for row in re.findall(r"^\| \[`([\w.]+)`\]\((\S+?)\)", text, re.M)]
    assert len(rows) > 300
    bad = [f"{m}.{name}: {to}" for m, name, to in rows if not to.endswith("/" + index["syms"][m][f"{m}.{name}"][0])]
    assert not bad, bad
    assert ("vermouth.store", "extract") in [row[:2] for row in rows]
    for page, cells in site.items():
        module = default_exp(page)
        shown = [kinds.get("text/markdown", "") for *_, kinds in outputs(cells)] if module else []
        files = [to for text in shown for to in re.findall(r"^\[source\]\(\S+?/blob/\w+/(\S+?\.py)", text, re.M)]
        bad += [f"{page}: {file}" for file in files if file != f"vermouth/{module.replace('.', '/')}.py"]
    assert not bad, bad


def test_rows_of_results_are_no_classes(site):
    text = "\n".join(words_shown(site[page]) for page in RESULTS)
    assert "`Vermouth`" in text and "[`Vermouth`](" not in text


def test_what_stands_below_is_there(site):
    "A cell that is exported is hidden, unless it says `#| show_source`."
    bad = []
    for page, cells in site.items():
        for i, cell in enumerate(cells):
            said = re.search(r"(?i)\b(table|patterns|those|formats) below\b", cell.source)
            if said and cell.cell_type == "markdown":
                rest = [c for c in cells[i:] if c.cell_type == "code" or "\n|" in c.source[said.end() * (c is cell) :]]
                bad += [] if rest else [f"{page}: {said[0]}"]
    assert not bad, bad
    for page, name in (
        ("library/01_images", "FORMATS"),
        ("library/05_uhead", "DETAILS"),
        ("library/06_seghead", "DECODERS"),
        ("families/08_folders", "def _patterns"),
        ("families/09_adapters", "ADAPTERS"),
    ):
        sources = [c.source for c in site[f"{page}.ipynb"] if c.cell_type == "code"]
        assert any(re.search(rf"^{name}\b", source, re.M) for source in sources), page


def test_every_section_of_a_library_page_shows_something(site):
    "Code, a table or sections of its own; a helper's section shows its code by `#| show_source`."
    bare = [
        f"{page}: {title}"
        for page, cells in site.items()
        if "/" in page
        for title, level, following in sections(cells)
        if following is None or (isinstance(following, int) and following <= level)
    ]
    assert not bare, bare


def test_what_to_try_comes_first(site):
    "Before any code of a library's page."
    late = [
        page
        for page, cells in site.items()
        if "/" in page and any(cell.source.startswith("## Try it") for cell in cells)
        for cell in cells[: next(i for i, cell in enumerate(cells) if cell.source.startswith("## Try it"))]
        if cell.cell_type == "code"
    ]
    assert not late, sorted(set(late))


def test_tables_fit_the_column_of_text(site):
    "A cell breaks between words: the longest word of each column and two characters of space, 96 characters in all."
    bad = []
    for page, cells in site.items():
        for rows in tables(words_shown(cells)):
            width = sum(2 + max(map(longest_word, column)) for column in zip(*rows, strict=False))
            if width > 96:
                bad.append(f"{page}: {width} characters at least: {rows[0][:4]}")
    assert not bad, "\n".join(bad)


def test_cells_break_between_words_and_options_keep_their_hyphens(site):
    "A browser breaks at plain spaces, so an interval has none; Quarto makes a dash of two hyphens outside of code."
    texts = [(page, words_shown(cells, plain="")) for page, cells in site.items()]
    shown = [(page, cell) for page, text in texts for rows in tables(text) for row in rows[2:] for cell in row]
    assert sum("\u00a0" in cell for _, cell in shown) > 100
    bad = [f"{page}: {cell}" for page, cell in shown if re.search(r"^[^`]*\[[-−+]?[\d.]+, [-−+]?[\d.]+\][^`]*$", cell)]
    prose = [(page, re.sub(r"`[^`]*`|<!--.*?-->|\$[^$]+\$", "", text)) for page, text in texts]
    bad += [f"{page}: {found}" for page, text in prose for found in re.findall(r"(?<![\w\\-])--[a-z][\w-]+", text)]
    bad += [f"{page}: {found}" for page, text in texts for found in re.findall(r"^\(\w\) .{20}", text, re.M)]
    assert not bad, bad


def test_no_table_is_a_dump_of_rows_with_provenance(site):
    "What a reader learns from a date, a commit and a list of versions stands once, on the page beside the paper."
    bad = [
        page
        for page in RESULTS
        for rows in tables(words_shown(site[page]))
        if {"versions", "finished"} & {cell.strip() for cell in rows[0]}
    ]
    assert not bad, bad


def test_tables_name_their_rows(site):
    "By methods, not by a running number, and each part of a wide table begins with the name of its group."
    texts = [(page, words_shown(cells)) for page, cells in site.items()]
    shown = [(page, rows[0], rows[2:]) for page, text in texts for rows in tables(text) if len(rows) > 4]
    bad = [page for page, head, rows in shown if not head[0].strip() and rows[0][0].strip() == "0"]
    bad += [page for page, head, rows in shown if head[0].strip() == "from" and not rows[0][0].strip()]
    assert any(head[0].strip() == "from" for _, head, _ in shown) and not bad, bad


def test_equations_fit_the_column_of_text(site):
    lines = [
        (page, line)
        for page, cells in site.items()
        for cell in cells
        if cell.cell_type == "markdown"
        for equation in re.findall(r"\$\$(.*?)\$\$", cell.source, re.S)
        for line in equation.split(r"\\")
    ]
    assert len(lines) > 40
    assert not [f"{page}: {line}" for page, line in lines if letters_shown(line) > 66]


def test_every_page_says_enough_to_be_one(site):
    thin = {page: len(words_shown(cells).split()) for page, cells in site.items()}
    assert not {page: n for page, n in thin.items() if n < 120}


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("mAP", "library/02_metrics.ipynb"),
        ("extract features", "features.ipynb"),
        ("commands", "commands.ipynb"),
        ("sketch retrieval", "tasks/00_sbir.ipynb"),
        ("roofline", "experiments/05_roofline.ipynb"),
        ("glossary", "glossary.ipynb"),
    ],
)
def test_search_offers_the_page_that_is_meant(site, query, first):
    "As Quarto's search weighs: a word in a title counts twice what it counts in the text, here the page's sentence."

    def score(cells):
        head = front_matter(cells)
        parts = [(20, head["title"]), (10, head["description"])]
        # a word in a short title says more than one in a long sentence
        return sum(
            weight / len(text.split()) ** 0.5
            for weight, text in parts
            for word in query.lower().split()
            if re.search(rf"\b{word}", text.lower())
        )

    ranked = sorted(site, key=lambda page: -score(site[page]))
    assert ranked[0] == first and score(site[ranked[0]]) > score(site[ranked[1]]), ranked[:3]


@pytest.mark.parametrize("page", ["start", "features", "own_data", "10_sbir", "11_fewshot", "12_segmentation"])
def test_pages_open_in_colab(site, page):
    "The link leads to the page itself, whose hidden cell installs the package before anything imports it."
    link = f"https://colab.research.google.com/github/vermouth/vermouth/blob/main/nbs/{page}.ipynb"
    assert any(link in cell.source for cell in site[f"{page}.ipynb"] if cell.cell_type == "markdown")
    sources = [cell.source for cell in nbformat.read(PAGES[f"{page}.ipynb"], as_version=4).cells]
    [install] = [i for i, source in enumerate(sources) if "%pip install" in source]
    assert sources[install].startswith("#| hide") and f"git+{settings()['git_url']}" in sources[install]
    assert install < next(i for i, source in enumerate(sources) if re.search(r"^from vermouth", source, re.M))
    assert not any("%pip" in cell.source for cell in site[f"{page}.ipynb"])


def test_the_site_in_markdown(checkout, site, tmp_path):
    from vermouth.app.docs import write_site_markdown

    files = write_site_markdown(checkout / "_proc", tmp_path)
    listed = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    copies = re.findall(rf"^- \[.+?\]\({quarto()['website']['site-url']}/(\S+)\): \S", listed, re.M)
    assert len(copies) == len(site) == len(set(copies)) and len(files) == len(site) + 1
    broken = []
    for name in copies:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith("# ") and "iVBORw0KGgo" not in text, name  # no picture as letters
        prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
        links = [link.partition("#")[0] for link in re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)", prose)]
        folder = (tmp_path / name).parent
        broken += [f"{name}: {link}" for link in links if link.endswith(".md") and not (folder / link).exists()]
        broken += [f"{name}: {link}" for link in links if link.endswith(".ipynb")]
    assert not broken, broken
