"What is installed and what may publish: pinned actions, a lock file that fits, declared imports, no package of others."

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
import yaml
from conftest import ROOT
from house import settings, texts
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]
KINDS = [key for key in settings() if key == "requirements" or key.endswith("_requirements")]


def required(*kinds):
    return [Requirement(text) for kind in kinds for text in settings()[kind].split()]


# Workflows


def test_there_are_workflows():
    assert {"test.yml", "docs.yml"} <= set(WORKFLOWS)


@pytest.mark.parametrize("name, job", JOBS)
def test_actions_are_pinned_and_keep_no_token(name, job):
    for step in WORKFLOWS[name]["jobs"][job]["steps"]:
        if uses := step.get("uses"):
            assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", uses), uses
            assert "checkout" not in uses or step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name, job", JOBS)
def test_what_runs_our_code_may_not_publish(name, job):
    "And what publishes runs no code of ours."
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True], "YAML reads `on` as True"
    steps = workflow["jobs"][job]["steps"]
    rights = workflow["jobs"][job].get("permissions", {})
    ours = [step for step in steps if "run" in step or "checkout" in step.get("uses", "")]
    assert not (ours and rights), f"{job} runs {ours[0]} with {rights}"


@pytest.mark.parametrize("name, job", JOBS)
def test_steps_are_programs_that_a_shell_can_read(name, job):
    for step in WORKFLOWS[name]["jobs"][job]["steps"]:
        assert ("run" in step) != ("uses" in step), step
        read = subprocess.run(["bash", "-n"], input=step.get("run", ""), capture_output=True, text=True)
        assert read.returncode == 0, read.stderr


# Versions


def locked():
    "Version of each package in the lock file, and its hashes; of two versions for two Pythons, the first."
    found = {}
    text = (ROOT / ".github/requirements-ci.txt").read_text()
    for name, version, rest in re.findall(r"^([\w.-]+)==([\w.+!]+)(.*(?:\n    --hash.*)+)", text, re.M):
        found.setdefault(canonicalize_name(name), (version, rest.count("--hash=sha256:")))
    assert len(found) == len({line.split("==")[0] for line in text.splitlines() if re.match(r"[\w.-]+==", line)})
    return found


def test_the_lock_file_fits_what_is_required():
    "Renew it with .github/lock when settings.ini changes."
    lock = locked()
    wanted = required("requirements", "dev_requirements")
    missing = [str(r) for r in wanted if canonicalize_name(r.name) not in lock]
    wrong = [
        f"{r} is locked to {lock[canonicalize_name(r.name)][0]}"
        for r in wanted
        if str(r) not in missing and lock[canonicalize_name(r.name)][0] not in r.specifier
    ]
    assert not missing + wrong, "run .github/lock"
    assert all(hashes for _, hashes in lock.values())


def test_what_a_major_version_has_broken_is_bounded():
    wanted = {r.name: str(r.specifier) for r in required(*KINDS)}
    for name in ("nbdev", "execnb", "fastcore", "ghapi", "gradio", "diffusers", "transformers", "datasets"):
        assert "<" in wanted[name], name


def test_tests_declare_what_they_import():
    "Packages that a test imports, or skips without, stand in settings.ini: required, for development, or an extra."
    files = sorted((ROOT / "tests").rglob("*.py"))
    ours = {path.stem for path in files} | {"vermouth"}
    declared = {canonicalize_name(r.name) for r in required(*KINDS)}
    providers = {top: {canonicalize_name(d) for d in found} for top, found in packages_distributions().items()}
    undeclared = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                names += [word.value for word in node.args if isinstance(word, ast.Constant)]
            for top in {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names):
                if not providers.get(top, {canonicalize_name(top)}) & declared:
                    undeclared.add(f"{path.name}: {top}")
    assert not undeclared, f"not in settings.ini: {sorted(undeclared)}"


# The name of somebody else


def test_nobody_is_told_to_install_a_package_by_our_name():
    """On the public index it is a stranger's. Only pages that say so mention it; everything else names the checkout or
    a wheel."""
    warned = {"nbs/index.ipynb", "README.md", "nbs/faq.ipynb"}
    pattern = re.compile(r"pip3? install (?:-\S+ )*[\"'`]?vermouth(?!-\d|\S*\.whl)[^\n]{0,20}")
    found = [(name, m[0]) for name, text in texts() for m in pattern.finditer(text)]
    wrong = [(name, text) for name, text in found if name not in warned or "vermouth[" in text]
    wrong = [pair for pair in wrong if not pair[0].endswith("test_supply_chain.py")]
    assert not wrong, wrong
