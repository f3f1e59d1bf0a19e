"The rules of the house: what pages and modules may contain, and how they hang together. Each test lists every offender."
import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import PurePosixPath
from statistics import median

import nbformat
import pytest
import yaml
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NBS, LIB = ROOT / "nbs", ROOT / "vermouth"
PAGES = {name: p for p in sorted(NBS.rglob("*.ipynb")) if not re.search(r"(^|/)[._]", name := p.relative_to(NBS).as_posix())}
RESULTS = [name for name in PAGES if re.match(r"[1-9]\d_", name)]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(LIB.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}

# What each room may import. A top-level room is a notebook's number: 02_ and 02a_ are one room.
ROOMS = {"00": "core", "01": "hooks", "02": "backbone", "03": "text", "04": "expert", "05": "uhead", "06": "metrics", "07": "store", "08": "model", "09": "train"}
LIBRARY = set(ROOMS.values())
MAY_IMPORT = {
    "core": set(),
    "hooks": {"core"},
    "backbone": {"core", "hooks"},
    "text": {"core"},
    "expert": {"core"},
    "uhead": {"core"},
    "metrics": {"core"},
    "store": {"core", "backbone", "text"},
    "model": {"core", "backbone", "text", "expert", "uhead"},
    "train": {"core", "metrics", "store", "model"},
    "data": {"core", "data.things", "data.toybox", "data.item", "data.masks"},  # the readers offer the Toybox world beside the official layouts
    "tasks": LIBRARY | {"data"},
    "app": LIBRARY | {"data", "tasks", "app"},
    "pretrain": {"core", "data.toybox", "pretrain"},
}
MAY_IMPORT_DIFFUSERS = {"hooks", "backbone", "pretrain"}
PARAMETERS = set("model captioner expert dataset root shots timesteps stages attention prompt uhead epochs batch_size seed device dtype limit out_dir".split())


# Reading pages


@cache
def cells(page): return nbformat.reads(PAGES[page].read_text(encoding="utf-8"), as_version=4).cells


def code_cells(page): return [c for c in cells(page) if c.cell_type == "code"]
def directive(cell, name): return re.search(rf"^#\|\s*{name}\b[ \t]*(\S*)", cell.source, re.M)
def exports(page): return [c for c in code_cells(page) if directive(c, "exports?i?")]
def python(source): return ast.parse(TransformerManager().transform_cell(source))  # %magics become plain calls


@cache
def default_exp(page): return next((m[1] for c in code_cells(page) if (m := directive(c, "default_exp"))), None)


def markdown(page):
    "All that a page says in prose, its shown Markdown included."
    shown = (o.data["text/markdown"] for c in code_cells(page) for o in c.outputs if "text/markdown" in o.get("data", {}))
    return "\n\n".join([*(c.source for c in cells(page) if c.cell_type == "markdown"), *shown])


def texts():
    "Every text of the repository with a name to report: sources, and what pages show but for pictures."
    for page in PAGES:
        shown = [o.get("text", "") + "".join(str(v) for k, v in o.get("data", {}).items() if not k.startswith("image/")) for c in code_cells(page) for o in c.outputs]
        yield f"nbs/{page}", "\n".join([*(c.source for c in cells(page)), *shown])
    kinds = ["vermouth/**/*.py", "tests/*.py", "*.md", "*.py", "*.ini", "*.yml", "*.toml", "*.in", "nbs/**/*.css", "nbs/results/*.csv", ".ci/*", ".github/**/*.yml"]
    for path in sorted({p for kind in kinds for p in ROOT.glob(kind)}): yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


# Reading modules


@cache
def tree(module): return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module):
    "The absolute names a module imports, inside functions too; `from a import b` gives `a` and `a.b`."
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from [base, *(f"{base}.{alias.name}" for alias in node.names)]


@cache
def page_of(module): return next((page for page in PAGES if f"vermouth.{default_exp(page)}" == module), None)


def room(module):
    "core, backbone, … by the notebook's number; in a folder data.toybox, tasks.sbir, …"
    name = module.removeprefix("vermouth.")
    return name if "." in name else ROOMS.get((page_of(module) or "")[:2], name)


def may_import(module, other):
    if room(module) == room(other): return True  # the parts of a split room
    return any(room(other) == a or room(other).startswith(f"{a}.") for a in MAY_IMPORT.get(room(module).partition(".")[0], set()))


# Modules


def test_every_module_imports_alone():
    def alone(module): return subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool: runs = dict(zip(MODULES, pool.map(alone, MODULES)))
    failed = {module: run.stderr[-800:] for module, run in runs.items() if run.returncode}
    assert not failed, "\n".join(f"{m}: {err}" for m, err in failed.items())


def test_importing_the_package_is_quick():
    code = "import time; t = time.perf_counter(); import vermouth; print(time.perf_counter() - t)"
    best = min(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert best < 0.3, f"import vermouth takes {best:.2f} s"


def test_imports_point_downwards():
    unknown = [m for m in MODULES if room(m).partition(".")[0] not in MAY_IMPORT]
    assert not unknown, f"modules of no room: {unknown}"
    upward = [f"{m} imports {o}" for m in MODULES for o in sorted(set(imports(m)) & set(MODULES)) if o != m and not may_import(m, o)]
    assert not upward, upward


def test_diffusers_stays_below():
    strangers = [m for m in MODULES if any(i.split(".")[0] == "diffusers" for i in imports(m)) and room(m).partition(".")[0] not in MAY_IMPORT_DIFFUSERS]
    assert not strangers, f"only {sorted(MAY_IMPORT_DIFFUSERS)} import diffusers, not {strangers}"


def test_no_pickles():
    pickling = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "torch.load", "torch.save"}
    bad = [f"{m}: {i}" for m in MODULES for i in imports(m) if i in pickling]
    for m in MODULES:
        calls = [node for node in ast.walk(tree(m)) if isinstance(node, ast.Call)]
        bad += [f"{m}: {ast.unparse(c.func)}" for c in calls if ast.unparse(c.func) in pickling]
        bad += [f"{m}: {ast.unparse(c)[:60]}" for c in calls for k in c.keywords if k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)]
    assert not bad, bad


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def distribution(requirement): return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_what_is_imported_is_declared_and_the_other_way_round():
    declared = {distribution(r) for kind in ("requirements", "web_requirements") for r in settings()[kind].split()}
    providers = {top: {distribution(d) for d in dists} for top, dists in packages_distributions().items()}
    tops = {i.split(".")[0]: m for m in MODULES for i in imports(m)}
    tops = {top: m for top, m in tops.items() if top not in sys.stdlib_module_names and top != "vermouth"}
    undeclared = [f"{m} imports {top}" for top, m in tops.items() if not providers.get(top, {top}) & declared]
    assert not undeclared, f"not in settings.ini's requirements: {undeclared}"
    used = set().union(*(providers.get(top, {top}) for top in tops)) | {"papermill", "accelerate"}  # README's first command; what diffusers and transformers load full-size models with
    assert not declared - used, f"required, never imported: {sorted(declared - used)}"


# Modules and their notebooks


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    orphans = [m for m in MODULES if page_of(m) is None]
    assert not orphans, f"modules that no notebook writes: {orphans}"
    exported = [default_exp(page) for page in PAGES if default_exp(page)]
    missing = [e for e in exported if f"vermouth.{e}" not in MODULES]
    assert not missing, f"default_exp without a module (run nbdev_export): {missing}"
    assert len(exported) == len(set(exported)), f"two notebooks export to one module: {sorted(e for e in exported if exported.count(e) > 1)}"
    homeless = [page for page in PAGES if exports(page) and not default_exp(page)]
    assert not homeless, f"export cells without default_exp: {homeless}"


def test_every_cell_has_an_id():
    "Without ids nbdev_export invents new ones each time, and the module never comes out the same."
    bare = [page for page, path in PAGES.items() if any("id" not in c for c in json.loads(path.read_text(encoding="utf-8"))["cells"])]
    assert not bare, f"run nbdev_clean, then nbdev_export: {bare}"


def test_every_page_starts_with_a_title_and_a_sentence():
    "Exactly these: nbdev makes the page's title and subtitle of the first cell and drops the rest of it."
    first = {page: cells(page)[0] for page in PAGES}
    bad = [page for page, c in first.items() if c.cell_type != "markdown" or not re.fullmatch(r"# \S.*\n\n> \S.*", c.source.strip())]
    assert not bad, f"the first cell is not `# title` and one line `> sentence`: {bad}"


def test_export_cells_are_short():
    sizes = {(page, c.source): len(c.source.splitlines()) for page in PAGES for c in exports(page)}
    long = [f"{page}: {n} lines ({source.splitlines()[1][:60]})" for (page, source), n in sizes.items() if n > 40]
    assert not long, long
    assert median(sizes.values()) <= 12, f"median of {len(sizes)} export cells: {median(sizes.values())} lines"


def test_committed_pages_ran_well():
    errors = [f"{page}: {o.ename}" for page in PAGES for c in code_cells(page) for o in c.outputs if o.output_type == "error"]
    assert not errors, errors
    large = [f"{page}: {path.stat().st_size // 1000} kB" for page, path in PAGES.items() if path.stat().st_size > 1_500_000]
    assert not large, large


def test_no_star_imports():
    stars = [f"{name}: {line.strip()}" for name, text in texts() if name.endswith((".py", ".ipynb")) for line in text.splitlines() if re.match(r"\s*from\s+\S+\s+import\s+\*", line)]
    assert not stars, stars


def test_no_absolute_paths():
    path = re.compile(r"(?<![\w.:/~}])/(?:home|root|work|tmp|Users|mnt|opt|var|farm)/[\w.]+")
    found = [f"{name}: {m[0]}" for name, text in texts() for m in path.finditer(text)]
    assert not found, found


# Results notebooks


def test_results_pages_take_parameters():
    "papermill finds them by the tag; a misspelt or lost tag makes it ignore what it is given."
    bad = []
    for page in RESULTS:
        tagged = [c for c in code_cells(page) if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1: bad.append(f"{page}: {len(tagged)} cells tagged parameters"); continue
        if tagged[0] is not code_cells(page)[0]: bad.append(f"{page}: the parameters are not the first code cell")
        for node in python(tagged[0].source).body:
            names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            if not isinstance(node, ast.Assign) or not names: bad.append(f"{page}: not a plain assignment: {ast.unparse(node)}"); continue
            try: ast.literal_eval(node.value)
            except ValueError: bad.append(f"{page}: not a plain value: {ast.unparse(node)}")
            bad += [f"{page}: {name} is not one of the shared parameters" for name in names if name not in PARAMETERS]
    assert not bad, bad


def test_results_pages_tell_and_do_not_define():
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bad = [f"{page}: defines {node.name}" for page in RESULTS for c in code_cells(page) for node in ast.walk(python(c.source)) if isinstance(node, defining)]
    bad += [f"{page}: exports to {default_exp(page)}" for page in RESULTS if default_exp(page)]
    bad += [f"{page}: {len(code_cells(page))} code cells, more than 12" for page in RESULTS if len(code_cells(page)) > 12]
    assert not bad, bad


def test_pages_name_their_kernel():
    "papermill needs kernelspec.language."
    bad = [page for page, path in PAGES.items() if nbformat.read(path, as_version=4).metadata.get("kernelspec", {}).get("language") != "python"]
    assert not bad, bad


# Links, names and the site


LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)|src=\"(?![a-z]+:)([^\"]+)\"")


def links(text): return [a or b for a, b in LINK.findall(re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S))]


def test_relative_links_resolve():
    pages = [(f"nbs/{page}", path.parent, markdown(page)) for page, path in PAGES.items()]
    broken = [f"{name}: {to}" for name, folder, text in pages for to in links(text) if not (folder / to).exists()]
    broken += [f"{name}: {to} (not on the docs site)" for name, folder, text in pages for to in links(text) if not (folder / to).resolve().is_relative_to(NBS)]
    broken += [f"{p.name}: {to}" for p in ROOT.glob("*.md") for to in links(p.read_text(encoding="utf-8")) if not (p.parent / to).exists()]
    assert not broken, broken


@cache
def names(module):
    "What stands at a module's top level."
    found = set()
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)): found |= {alias.asname or alias.name for alias in node.names}
        else: found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def exists(dotted):
    "Is this a module or a package of ours, or a name in a module?"
    if any(f"{m}.".startswith(f"{dotted}.") for m in MODULES): return True
    return any(dotted.removeprefix(f"{m}.").split(".")[0] in names(m) for m in MODULES if dotted.startswith(f"{m}."))


def mentioned(text, blocks):
    "Our dotted names in back-ticks (vermouth.json is a file), and what code blocks import from us."
    yield from re.findall(r"`(vermouth(?:\.\w+)+)(?<!\.json)(?:\([^`]*)?`", text)
    for node in (n for block in blocks for n in ast.walk(python(block))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split(".")[0] == "vermouth")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vermouth": yield from (f"{node.module}.{a.name}" for a in node.names)


def fences(text): return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_names_of_ours_that_are_mentioned_exist():
    said = {page: mentioned(markdown(page), [*fences(markdown(page)), *(c.source for c in code_cells(page))]) for page in PAGES}
    said |= {p.name: mentioned(p.read_text(encoding="utf-8"), fences(p.read_text(encoding="utf-8"))) for p in ROOT.glob("*.md")}
    unknown = [f"{name}: {dotted}" for name, all_said in said.items() for dotted in all_said if not exists(dotted)]
    assert not unknown, unknown


def quarto(): return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def listed(contents):
    for entry in contents:
        if isinstance(entry, str): yield entry
        else: yield from listed(entry["contents"])


def test_the_site_lists_every_page_once():
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    entries = list(listed(quarto()["website"]["sidebar"]["contents"]))
    assert sorted(entries) == sorted(PAGES), f"_quarto.yml lacks {sorted(set(PAGES) - set(entries))}, has in excess {sorted(set(entries) - set(PAGES))}"


def test_the_site_agrees_with_settings():
    site, ours = quarto()["website"], settings()
    assert [site["title"], site["description"], site["repo-url"], site["repo-branch"]] == [ours[k] for k in ("title", "description", "git_url", "branch")]
    assert quarto()["project"]["output-dir"] == ours["doc_path"]


@pytest.fixture(scope="module")
def site(checkout):
    "The YAML of every page as Quarto would get it: all of nbdev_docs that does not need Quarto."
    code = f"from nbdev.serve import proc_nbs\nproc_nbs(n_workers={os.cpu_count()})"
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    heads = {page: nbformat.read(checkout / "_proc" / page, as_version=4).cells[0].source for page in PAGES}
    return {page: yaml.safe_load(head.strip().strip("-")) for page, head in heads.items()}


def test_every_page_of_the_site_has_a_title_and_a_sentence(site):
    bad = [page for page, head in site.items() if not head.get("title") or not head.get("description")]
    assert not bad, bad


def test_no_two_pages_of_the_site_share_an_address(site):
    "nbdev drops the numbers: 05_uhead and 15_uhead would both become uhead.html."
    address = {page: (PurePosixPath(page).parent / head["output-file"]).as_posix().lower() for page, head in site.items()}
    clashes = [f"{page}: {a}" for page, a in address.items() if list(address.values()).count(a) > 1]
    assert not clashes, clashes


# README.md


def test_readme_is_made_from_the_front_page():
    from vermouth.app.readme import readme_text  # here, so that a broken module fails this test and not the whole file
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(NBS / "index.ipynb", ROOT), "run: python -m vermouth.app.readme"


def test_readme_tables_equal_the_results_files():
    "The cells that read results run again; what they show must be what the page shows."
    reading = [c for c in code_cells("index.ipynb") if "results" in c.source]
    again = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.source) for c in reading])
    NotebookClient(again, timeout=600, startup_timeout=600, resources={"metadata": {"path": str(NBS)}}).execute()
    def shown(cs): return [o.data.get("text/markdown") for c in cs for o in c.outputs]
    assert reading and shown(again.cells) == shown(reading), "run nbs/index.ipynb again, then: python -m vermouth.app.readme"


def test_readme_gives_the_commands_that_are_checked():
    readme, script, workflow = [(ROOT / p).read_text(encoding="utf-8") for p in ("README.md", ".ci/run", ".github/workflows/test.yml")]
    lines = readme.splitlines()
    assert 'pip install -e ".[dev]" && papermill nbs/10_sbir.ipynb out.ipynb -p shots 5' in lines
    [test_command] = [line for line in lines if re.fullmatch(r"pip install -e .* && nbdev_test && pytest -q tests", line)]
    [pattern] = re.findall(r"grep -x '([^']+)' README.md", script)  # the script takes its command from there
    assert re.fullmatch(pattern, test_command)
    assert all(part in workflow for part in test_command.split(" && "))


# The Toybox family's weights


def test_shipped_weights_are_small_and_half_precision():
    from safetensors import safe_open
    files = [p for p in (LIB / "toybox").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24_000_000
    full = []
    for path in (p for p in files if p.suffix == ".safetensors"):
        with safe_open(path, "pt") as f: full += [f"{path.name}: {k} {f.get_slice(k).get_dtype()}" for k in f.keys() if f.get_slice(k).get_dtype() in ("F32", "F64")]
    assert not full, full[:5]
    foreign = [p.name for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert not foreign, foreign
