"What the tests of the project's form share: reading pages and modules."

import ast
import re
from configparser import ConfigParser
from functools import cache

import nbformat
import yaml
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager

NBS, LIB = ROOT / "nbs", ROOT / "vermouth"
PAGES = {
    name: p for p in sorted(NBS.rglob("*.ipynb")) if not re.search(r"(^|/)[._]", name := p.relative_to(NBS).as_posix())
}
RESULTS = [name for name in PAGES if re.match(r"[1-9]\d_", name)]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in sorted(LIB.rglob("*.py"))
    if p.name not in ("__init__.py", "_modidx.py")
}

@cache
def cells(page):
    return nbformat.reads(PAGES[page].read_text(encoding="utf-8"), as_version=4).cells


def code_cells(page):
    return [c for c in cells(page) if c.cell_type == "code"]


def directive(cell, name):
    return re.search(rf"^#\|\s*{name}\b[ \t]*(\S*)", cell.source, re.M)


def exports(page):
    return [c for c in code_cells(page) if directive(c, "exports?i?")]


def python(source):
    return ast.parse(TransformerManager().transform_cell(source))  # %magics become plain calls


@cache
def default_exp(page):
    return next((m[1] for c in code_cells(page) if (m := directive(c, "default_exp"))), None)


def markdown(page):
    "All that a page says in prose, its shown Markdown included."
    shown = (
        o.data["text/markdown"] for c in code_cells(page) for o in c.outputs if "text/markdown" in o.get("data", {})
    )
    return "\n\n".join([*(c.source for c in cells(page) if c.cell_type == "markdown"), *shown])


def texts():
    "Every text of the repository with a name to report: sources, and what pages show but for pictures."
    for page in PAGES:
        shown = [
            o.get("text", "") + "".join(str(v) for k, v in o.get("data", {}).items() if not k.startswith("image/"))
            for c in code_cells(page)
            for o in c.outputs
        ]
        yield f"nbs/{page}", "\n".join([*(c.source for c in cells(page)), *shown])
    kinds = [
        "vermouth/**/*.py",
        "tests/*.py",
        "*.md",
        "*.py",
        "*.ini",
        "*.yml",
        "*.toml",
        "*.in",
        "nbs/**/*.css",
        "nbs/results/*.csv",
        ".ci/*",
        ".github/**/*.yml",
    ]
    for path in sorted({p for kind in kinds for p in ROOT.glob(kind)}):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@cache
def tree(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module):
    "The absolute names a module imports, inside functions too; `from a import b` gives `a` and `a.b`."
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from [base, *(f"{base}.{alias.name}" for alias in node.names)]


def short(module):
    return module.removeprefix("vermouth.")


def public(module):
    "The names in a module's `__all__`."
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


@cache
def page_of(module):
    return next((page for page in PAGES if f"vermouth.{default_exp(page)}" == module), None)


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def quarto():
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def code_texts():
    "Python with a name to report: modules, tests and the code cells of pages."
    for path in [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for page in PAGES:
        for cell in code_cells(page):
            yield f"nbs/{page} {cell.get('id')}", cell.source
