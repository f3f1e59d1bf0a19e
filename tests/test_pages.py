"The form of the pages: titles, cells, parameters, links and names, and the site that is made of them."

import ast
import json
import re
from functools import cache
from statistics import median

import nbformat
from conftest import ROOT
from house import (
    MODULES,
    NBS,
    PAGES,
    RESULTS,
    cells,
    code_cells,
    default_exp,
    directive,
    exports,
    markdown,
    python,
    tree,
)

PARAMETERS = {
    *("model", "captioner", "expert", "dataset", "root", "shots", "timesteps", "stages", "attention", "prompt"),
    *("uhead", "epochs", "batch_size", "seed", "device", "dtype", "limit", "out_dir"),
    *("protocol", "noise", "scale", "temperature", "decoder", "networks", "size", "save_model"),
}


def test_every_cell_has_an_id():
    "Without ids nbdev_export invents new ones each time, and the module never comes out the same."
    bare = [
        page
        for page, path in PAGES.items()
        if any("id" not in c for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    ]
    assert not bare, f"run nbdev_clean, then nbdev_export: {bare}"


def test_every_page_starts_with_a_title_and_a_sentence():
    "Exactly these: nbdev makes the page's title and subtitle of the first cell and drops the rest of it."
    first = {page: cells(page)[0] for page in PAGES}
    bad = [
        page
        for page, c in first.items()
        if c.cell_type != "markdown" or not re.fullmatch(r"# \S.*\n\n> \S.*", c.source.strip())
    ]
    assert not bad, f"the first cell is not `# title` and one line `> sentence`: {bad}"


def test_export_cells_are_short():
    sizes = {(page, c.source): len(c.source.splitlines()) for page in PAGES for c in exports(page)}
    long = [f"{page}: {n} lines ({source.splitlines()[1][:60]})" for (page, source), n in sizes.items() if n > 40]
    assert not long, long
    assert median(sizes.values()) <= 12, f"median of {len(sizes)} export cells: {median(sizes.values())} lines"


def test_committed_pages_ran_well():
    errors = [
        f"{page}: {o.ename}" for page in PAGES for c in code_cells(page) for o in c.outputs if o.output_type == "error"
    ]
    assert not errors, errors
    large = [
        f"{page}: {path.stat().st_size // 1000} kB" for page, path in PAGES.items() if path.stat().st_size > 1_500_000
    ]
    assert not large, large


def test_results_pages_take_parameters():
    "papermill finds them by the tag; a misspelt or lost tag makes it ignore what it is given."
    bad = []
    for page in RESULTS:
        tagged = [c for c in code_cells(page) if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1:
            bad.append(f"{page}: {len(tagged)} cells tagged parameters")
            continue
        if tagged[0] is not code_cells(page)[0]:
            bad.append(f"{page}: the parameters are not the first code cell")
        for node in python(tagged[0].source).body:
            names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            if not isinstance(node, ast.Assign) or not names:
                bad.append(f"{page}: not a plain assignment: {ast.unparse(node)}")
                continue
            try:
                ast.literal_eval(node.value)
            except ValueError:
                bad.append(f"{page}: not a plain value: {ast.unparse(node)}")
            bad += [f"{page}: {name} is not one of the shared parameters" for name in names if name not in PARAMETERS]
    assert not bad, bad


def test_results_pages_tell_and_do_not_define():
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bad = [
        f"{page}: defines {node.name}"
        for page in RESULTS
        for c in code_cells(page)
        for node in ast.walk(python(c.source))
        if isinstance(node, defining)
    ]
    bad += [f"{page}: exports to {default_exp(page)}" for page in RESULTS if default_exp(page)]
    shown = {page: [c for c in code_cells(page) if not directive(c, "hide|echo: false")] for page in RESULTS}
    bad += [f"{page}: {len(cells)} code cells, more than 15" for page, cells in shown.items() if len(cells) > 15]
    assert not bad, bad


def test_what_a_page_says_of_its_numbers_is_what_it_shows():
    "Prose that holds on Toybox only is a string in a code cell, so that papermill leaves it out for other data."
    bad = []
    for page in RESULTS:
        for c in (c for c in code_cells(page) if "reading(text" in c.source):
            text = ast.literal_eval(python(c.source).body[0].value)
            if [o.data.get("text/markdown") for o in c.outputs] != [text]:
                bad.append(f"{page} {c.id}: the stored output is not the text. Run the cell again.")
            given = {node.id for node in ast.walk(python(c.source).body[-1]) if isinstance(node, ast.Name)}
            if not {"model", "dataset"} <= given:
                bad.append(f"{page} {c.id}: reading() is not told model and dataset")
    assert not bad, bad


def test_pages_name_their_kernel():
    "papermill needs kernelspec.language."
    bad = [
        page
        for page, path in PAGES.items()
        if nbformat.read(path, as_version=4).metadata.get("kernelspec", {}).get("language") != "python"
    ]
    assert not bad, bad


LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)|src=\"(?![a-z]+:)([^\"]+)\"")


def links(text):
    return [a or b for a, b in LINK.findall(re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S))]


def test_relative_links_resolve():
    pages = [(f"nbs/{page}", path.parent, markdown(page)) for page, path in PAGES.items()]
    broken = [f"{name}: {to}" for name, folder, text in pages for to in links(text) if not (folder / to).exists()]
    broken += [
        f"{name}: {to} (not on the docs site)"
        for name, folder, text in pages
        for to in links(text)
        if not (folder / to).resolve().is_relative_to(NBS)
    ]
    broken += [
        f"{p.name}: {to}"
        for p in ROOT.glob("*.md")
        for to in links(p.read_text(encoding="utf-8"))
        if not (p.parent / to).exists()
    ]
    assert not broken, broken


@cache
def names(module):
    "What stands at a module's top level."
    found = set()
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def exists(dotted):
    "Is this a module or a package of ours, or a name in a module?"
    if any(f"{m}.".startswith(f"{dotted}.") for m in MODULES):
        return True
    return any(dotted.removeprefix(f"{m}.").split(".")[0] in names(m) for m in MODULES if dotted.startswith(f"{m}."))


def mentioned(text, blocks):
    "Our dotted names in back-ticks (vermouth.json is a file), and what code blocks import from us."
    yield from re.findall(r"`(vermouth(?:\.\w+)+)(?<!\.json)(?:\([^`]*)?`", text)
    for node in (n for block in blocks for n in ast.walk(python(block))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "vermouth")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vermouth":
            yield from (f"{node.module}.{a.name}" for a in node.names)


def fences(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_names_of_ours_that_are_mentioned_exist():
    said = {
        page: mentioned(markdown(page), [*fences(markdown(page)), *(c.source for c in code_cells(page))])
        for page in PAGES
    }
    said |= {
        p.name: mentioned(p.read_text(encoding="utf-8"), fences(p.read_text(encoding="utf-8")))
        for p in ROOT.glob("*.md")
    }
    unknown = [f"{name}: {dotted}" for name, all_said in said.items() for dotted in all_said if not exists(dotted)]
    assert not unknown, unknown
