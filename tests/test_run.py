"`vermouth run`: results notebooks with other parameters, one or all of them, resumed after a failure or a kill."

import json
import os
import signal
import subprocess
import time

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from disks import run_child
from photo_folders import run_forked
from program import run_here

SAVE = """from pathlib import Path
file = Path(out_dir) / "NAME.csv"  # as experiments.tables.append_rows would, but it loads torch first
file.parent.mkdir(exist_ok=True)
header = "" if file.exists() else "task,dataset,method,setting,metric,value,seed,n,versions\\n"
with file.open("a") as f: f.write(f"{header}t,d,m,,shots,{shots},0,1,torch=2\\n")"""
SLEEP = """from pathlib import Path
import time
if not Path("go").exists():
    Path("started").touch()
    time.sleep(600)"""


def write_page(path, parameters, *cells):
    "A notebook with a `parameters` cell."
    page = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)],
        metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
    )
    page.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(page, path)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "Something like a clone of the repository, with three results pages, the second of them broken."
    (tmp_path / "settings.ini").touch()
    for name in ("10_first", "12_third"):
        parameters = "shots = 4  # 0 = all\nout_dir = 'results'"
        write_page(tmp_path / f"nbs/{name}.ipynb", parameters, SAVE.replace("NAME", name))
    write_page(tmp_path / "nbs/11_second.ipynb", "seed = 0", "raise KeyError('no data')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unknown_parameter_is_refused_in_one_sentence(clone):
    refused = run_child(["run", "10_first", "-p", "shot", "5"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "parameter='shot': unknown. Choose from shots, out_dir. Did you mean 'shots'?\n"
    assert not (clone / "out").exists(), "nothing ran"


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "10_frst"], "Did you mean '10_first'?"),
        (["run", "nowhere/10_first.ipynb"], "no such file"),
        (["run", "10_first", "-p", "shots", "[1, 2"], "starts like a list"),
        (["run", "10_first", "-f", "none.yaml"], "none.yaml': cannot be read"),
        (["run", "10_first", "--out", "nbs"], "would be overwritten"),
        (["run", "all", "--notebooks", "out"], "no results notebook in it"),
        (["run", "all", "-p", "epoch", "1"], "Choose from shots, out_dir, seed"),
    ],
)
def test_what_cannot_be_run_is_refused(clone, words, message):
    refused = run_here(*words)
    assert refused.exit_code == 2 and message in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_one_page_with_values_from_file_and_shell(clone, monkeypatch):
    parameters, check = "shots = 0\nstages = []\nlimit = 0", "assert (shots, stages, limit) == (-1, ['mid', 'up'], 7)"
    write_page(clone / "nbs/13_values.ipynb", parameters, check)
    (clone / "few.yaml").write_text("limit: 7\nshots: 3\n")
    monkeypatch.chdir(clone / "nbs")
    values = ("-f", "../few.yaml", "-p", "shots", "-1", "-p", "stages", "[mid, up]")
    ran = run_here("run", "13_values", *values, "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout)["ok"], ran.stderr
    assert (clone / "out/13_values.ipynb").exists()
    pages = ("10_first", "11_second", "12_third", "13_values")
    assert sorted(os.listdir(clone / "nbs")) == [f"{page}.ipynb" for page in pages]


def test_the_parameters_of_every_results_page_are_seen():
    "As Python sees them: papermill's own parser loses a line with a second = in its comment."
    from vermouth.app.run import page_parameters, results_pages

    for path in results_pages(ROOT / "nbs"):
        [cell] = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        values = {}
        exec(cell.source, values)
        assert page_parameters(path) == [name for name in values if name != "__builtins__"], path.name


def test_what_runs_leave_behind_is_ignored_by_git():
    files = ["out/run.json", "out/10_sbir.ipynb", "results/10_sbir.csv"]
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == files


@pytest.mark.slow
def test_all_goes_on_after_a_failure_and_takes_up_where_it_stopped(clone):
    first = run_child(["run", "all", "-p", "shots", "2"])
    assert first.exit_code == 1 and "11_second" in first.stderr and "KeyError: 'no data'" in first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()[:2]] == ["10_first", "12_third"]
    table = pd.read_csv(clone / "out/results.csv")
    assert table[["page", "value"]].values.tolist() == [["10_first", 2], ["12_third", 2]]
    assert set(table.versions) == {"torch=2"}
    write_page(clone / "nbs/11_second.ipynb", "seed = 0", "'mended'")
    second = json.loads(run_here("run", "all", "-p", "shots", "2", "--json").stdout)
    assert [(p["skipped"], p["ok"]) for p in second["pages"]] == [(True, True), (False, True), (True, True)]
    assert len(pd.read_csv(clone / "results/10_first.csv")) == 1, "skipped means not run"
    third = json.loads(run_here("run", "all", "-p", "shots", "3", "--json").stdout)
    skipped = [p["skipped"] for p in third["pages"]]
    assert skipped == [False, True, False], "other parameters run again; a page that does not know them does not"
    table = pd.read_csv(clone / "out/results.csv")
    assert third["rows"] == 2 and table.value.tolist() == [3, 3], "of a number measured twice, the newest"


@pytest.mark.slow
def test_all_survives_being_killed(clone):
    write_page(clone / "nbs/11_second.ipynb", "seed = 0", SLEEP)
    running = run_forked(lambda: [os.setsid(), run_here("run", "all")])
    try:
        until = time.time() + 900  # a busy machine
        while not (clone / "started").exists() and time.time() < until and not os.waitpid(running, os.WNOHANG)[0]:
            time.sleep(0.1)
        assert (clone / "started").exists(), "the second page never started"
    finally:
        os.killpg(running, signal.SIGKILL)
    os.waitpid(running, 0)
    (clone / "go").touch()
    after = json.loads(run_here("run", "all", "--json").stdout)
    assert [(p["notebook"], p["skipped"], p["ok"]) for p in after["pages"]] == [
        ("10_first", True, True),
        ("11_second", False, True),
        ("12_third", False, True),
    ]
