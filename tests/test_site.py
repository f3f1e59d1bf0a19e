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
from house import NBS, PAGES, RESULTS, quarto, settings


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
    bad = [page for page, head in heads.items() if re.fullmatch(r"[a-z_.]+", head["title"])]
    assert not bad, f"titles are for readers; give these a text in _quarto.yml: {bad}"


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


def test_no_link_stands_inside_a_link(site):
    texts = [(page, cell.source) for page, cells in site.items() for cell in cells if cell.cell_type == "markdown"]
    prose = [(page, re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)) for page, text in texts]
    links = [(page, link) for page, text in prose for link in re.findall(r"\[[^]!]*\[[^]]*\]\([^)]*\)[^][]*\]\(", text)]
    assert not [f"{page}: {link}" for page, link in links if not link.startswith("[![")]
    commands = [page for page, text in prose if "app/cli.html#" in text and page != "app/08_cli.ipynb"]
    assert not commands, f"a command is linked where a function is meant: {commands}"


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


def test_the_bar_leads_to_what_a_reader_wants():
    website = quarto()["website"]
    assert [entry["text"] for entry in website["navbar"]["left"]] == ["Start", "Use", "Paper", "Results", "API"]
    assert all(sidebar["collapse-level"] == 1 for sidebar in website["sidebar"])
    assert website["sidebar"][-1]["contents"][-1]["section"] == "Internals"


def words_shown(cells):
    "All words of a page: prose and what code shows, without fences."
    shown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    shown += [kinds.get("text/markdown", kinds.get("text/plain", "")) for *_, kinds in outputs(cells)]
    return re.sub(r"^```.*?^```", "", "\n".join(shown), flags=re.M | re.S)


def tables(text):
    "The tables of a Markdown text as lists of rows."
    for block in re.findall(r"(?:^\|.*\|[ ]*\n?)+", text, re.M):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        if len(rows) > 1 and re.fullmatch(r"[ :-]+", rows[1][0]):
            yield rows


def longest_word(cell):
    "Of a cell as it is shown: without the address of a link or the marks of code."
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").replace("*", "")
    return max(map(len, re.split(r"[\s/\-]+", shown)), default=0)


def test_tables_fit_the_column_of_text(site):
    "A cell breaks between words: the longest word of each column and two characters of space, 96 characters in all."
    bad = []
    for page, cells in site.items():
        for rows in tables(words_shown(cells)):
            width = sum(2 + max(map(longest_word, column)) for column in zip(*rows, strict=False))
            if width > 96:
                bad.append(f"{page}: {width} characters at least: {rows[0][:4]}")
    assert not bad, "\n".join(bad)


def test_no_table_is_a_dump_of_rows_with_provenance(site):
    "What a reader learns from a date, a commit and a list of versions stands once, on the page beside the paper."
    bad = [
        page
        for page in RESULTS
        for rows in tables(words_shown(site[page]))
        if {"versions", "finished"} & {cell.strip() for cell in rows[0]}
    ]
    assert not bad, bad


def test_equations_fit_the_column_of_text(site):
    def letters(line):
        "About as many characters as are shown side by side."
        line = re.sub(r"\\tag\{[^}]*\}|\\(begin|end)\{\w+\}", "", line)
        line = re.sub(r"\\(?:text|texttt|math\w+|operatorname)\{([^{}]*)\}", r"\1", line)
        line = re.sub(r"\\(?:[dt]?frac|sqrt|bar|left|right|[bB]igg?[lr]?|underbrace)\b", "", line)
        return len(re.sub(r"\\[a-zA-Z]+", "x", re.sub(r"\\[^a-zA-Z]|[{}$&_^\s]", "", line)))

    lines = [
        (page, line)
        for page, cells in site.items()
        for cell in cells
        if cell.cell_type == "markdown"
        for equation in re.findall(r"\$\$(.*?)\$\$", cell.source, re.S)
        for line in equation.split(r"\\")
    ]
    assert len(lines) > 40
    assert not [f"{page}: {line}" for page, line in lines if letters(line) > 66]


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


def test_pictures_of_the_gallery_lead_to_their_pages(site):
    text = "\n".join(cell.source for cell in site["gallery.ipynb"])
    pictures = re.findall(r"\[!\[([^]]+)\]\(([^)]+)\)\]\(([^)]+)\)", text)
    assert len(pictures) > 9 and text.count("![") == len(pictures)
    assert all((NBS / picture).is_file() and page in PAGES for _, picture, page in pictures)


def test_styles_fetch_nothing():
    style = (NBS / "styles.css").read_text(encoding="utf-8")
    assert not re.findall(r"@import|url\(", style)
