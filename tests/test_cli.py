"The program `vermouth` as a shell sees it: what it prints, where, and with which exit code."
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import ROOT
from typer.testing import CliRunner

from vermouth.shards import FeatureStore

PROGRAM = Path(sys.executable).with_name("vermouth")
QUIET = os.environ | {"HF_HUB_OFFLINE": "1"}
SAVE = """from pathlib import Path
file = Path(out_dir) / "NAME.csv"  # as core.append_rows would, but it loads torch first
file.parent.mkdir(exist_ok=True)
head = "" if file.exists() else "task,dataset,method,setting,metric,value,seed,n,versions\\n"
with file.open("a") as f: f.write(f"{head}t,d,m,,shots,{shots},0,1,torch=2\\n")"""


def fresh(*words, cwd=None, **more):
    "The program in a process of its own."
    return subprocess.run([PROGRAM, *map(str, words)], cwd=cwd, env=QUIET, capture_output=True, text=True, **more)


def shell(*words, **more):
    "The same without the seconds that a new process takes to load torch."
    from vermouth.app.cli import app
    return CliRunner().invoke(app, [str(w) for w in words], **more)


def page(path, parameters, *cells):
    "A notebook with a `parameters` cell."
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)], metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    made.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "Something like a clone of the repository, with three results pages, the second of them broken."
    (tmp_path / "settings.ini").touch()
    for name in ("10_first", "12_third"): page(tmp_path / f"nbs/{name}.ipynb", "shots = 4  # 0 = all\nout_dir = 'results'", SAVE.replace("NAME", name))
    page(tmp_path / "nbs/11_second.ipynb", "seed = 0", "raise KeyError('no data')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Help


def test_help_is_quick():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        told = fresh("--help")
        times.append(time.perf_counter() - started)
    assert told.returncode == 0 and "run" in told.stdout and "info" in told.stdout
    assert min(times) < 1, f"vermouth --help takes {min(times):.2f} s"


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom typer.testing import CliRunner\nfrom vermouth.app.cli import app\nassert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "papermill", "diffusers"} & set(loaded)


def test_usage_errors_end_in_2():
    assert [shell(*words).exit_code for words in (["runn"], ["run"], ["run", "x", "-p"], ["run", "x", "-p", "shots"])] == [2] * 4


# info


def test_info_for_people_and_for_scripts():
    told, found = shell("info"), json.loads(shell("info", "--json").stdout)
    assert set(found["toybox"]) >= {"captioner", "clip", "expert", "text_encoder", "unet", "vae"} and min(found["toybox"].values()) > 1e5
    assert found["packages"]["torch"] in told.stdout and "published/paper_results.csv" in told.stdout
    assert found["device"]["type"] in ("cpu", "cuda", "mps")


def test_info_finds_weights_in_the_hub_cache(tmp_path):
    commit = tmp_path / "hub/models--timm--resnet18.a1_in1k/snapshots/0123"
    commit.mkdir(parents=True)
    (commit / "model.safetensors").write_bytes(bytes(1000))
    found = json.loads(subprocess.run([PROGRAM, "info", "--json"], env=QUIET | {"HF_HUB_CACHE": str(tmp_path / "hub")}, capture_output=True, text=True, check=True).stdout)
    assert [name for name, repo in found["hub"].items() if repo["bytes"]] == ["timm/resnet18.a1_in1k"]


# extract, verify


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of Toybox pictures in two sub-folders, one file that is no picture, and two that are none of our business."
    from vermouth.data.toybox import Toybox
    there = tmp_path_factory.mktemp("photos")
    for i, item in enumerate(Toybox("photo", n=5)):
        (there / f"{i % 2}").mkdir(exist_ok=True)
        item.image.save(there / f"{i % 2}/{item.name} {i}.png")
    (there / "0/broken.png").write_text("not an image")
    for name in ("0/.hidden.png", "notes.txt"): (there / name).touch()
    return there


FEW = ("-p", "stages", "mid", "-p", "attention", "[]")


def test_extract_a_folder_and_verify_it(photos, tmp_path):
    made = fresh("extract", photos, "--out", tmp_path / "store", *FEW)
    assert made.returncode == 1 and made.stdout.startswith("5 of 6 images are in"), made.stderr
    assert "0/broken.png" in made.stderr and "image/s" in made.stderr, "what was set aside, and a bar with the rate"
    checksum = fresh("verify", tmp_path / "store")
    assert checksum.returncode == 0 and len(checksum.stdout.strip()) == 64 and checksum.stdout.strip() in made.stdout
    again = shell("extract", photos, "--out", tmp_path / "store", *FEW, "--json")
    assert (again.exit_code, json.loads(again.stdout)["checksum"]) == (1, checksum.stdout.strip())


def test_extract_reads_shards_of_a_webdataset(photos, tmp_path):
    names = sorted(photos.glob("0/[!b.]*.png"))
    for k in (0, 1):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as shard:
            for name in names[k::2]: shard.add(name, f"{name.stem}.png"); shard.add(__file__, f"{name.stem}.txt")
    said = json.loads(shell("extract", tmp_path / "*.tar", "--out", tmp_path / "packed", "--captioner", "none", "--json", *FEW).stdout)
    shell("extract", *names[0::2], *names[1::2], "--out", tmp_path / "files", "--captioner", "none", "--json", *FEW)
    packed, files = (FeatureStore(tmp_path / name) for name in ("packed", "files"))
    assert said["items"] == len(names) > 1 and packed.ids[0] == f"0.tar/{names[0].stem}.png"
    for a, b in zip(packed.batch(range(len(packed))), files.batch(range(len(files))), strict=True): assert torch.equal(a, b)


def test_extract_takes_patterns_and_a_list(photos, tmp_path):
    said = shell("extract", "-", f"{photos}/1/*.png", "--out", tmp_path / "store", "--captioner", "none", "--json", *FEW, input="\n".join(map(str, sorted(photos.glob("0/[!b.]*.png")))))
    assert said.exit_code == 0 and json.loads(said.stdout)["items"] == 5, said.stderr


@pytest.mark.parametrize("words, says", [
    (["nowhere"], "no such file"),
    ([".", "-p", "stage", "mid"], "Did you mean 'stages'?"),
    ([".", "--model", "toybx"], "unknown"),
    (["1", "--size", "63"], "multiples"),
])
def test_extract_refuses(photos, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(photos)
    refused = shell("extract", *words, "--out", tmp_path / "store", "--captioner", "none")
    assert refused.exit_code == 2 and says in refused.stderr and not (tmp_path / "store/manifest.json").exists(), refused.stderr


# classify, segment


def test_classify_a_folder(photos):
    seen = fresh("classify", photos, "--names", "cat, duck,fish", "-k", "2")
    lines = [line.split("\t") for line in seen.stdout.splitlines()]
    assert seen.returncode == 1 and [len(line) for line in lines] == [3] * 5 and all(Path(line[0]).is_file() for line in lines), seen.stderr
    assert seen.stderr.count("\n") == 1 and "broken.png" in seen.stderr, "one line for the one bad file, and no noise of libraries"
    again = json.loads(shell("classify", photos, "--names", "cat,duck,fish", "--batch-size", "2", "--json").stdout)
    assert [image["name"] for image in again["images"]] == [line[1].split()[0] for line in lines] and len(again["set_aside"]) == 1
    assert all(abs(sum(image["probabilities"].values()) - 1) < 1e-5 for image in again["images"])


def test_segment_writes_a_mask_of_numbers(tmp_path):
    from PIL import Image
    Image.new("RGB", (50, 30), "green").save(tmp_path / "image.png")
    cut = fresh("segment", tmp_path / "image.png", "--names", "sky,grass,water", "--out", tmp_path / "mask.png", "--json")
    assert cut.returncode == 0 and not cut.stderr, cut.stderr
    with Image.open(tmp_path / "mask.png") as mask: counts = {n: c / 1500 for c, n in mask.getcolors()}
    assert mask.size == (50, 30) and {name: round(counts.get(i, 0), 4) for i, name in enumerate(("sky", "grass", "water"))} == json.loads(cut.stdout)["share"]


@pytest.mark.parametrize("words, says", [
    (["classify", "0/broken.png", "--names", "a,b"], "not an image"),
    (["classify", "1", "--names", "a,,b"], "number 1 is empty"),
    (["classify", "1", "--names", "a,b", "--model", "nowhere"], "vermouth.json is missing"),
    (["segment", "0/broken.png", "--names", "a,b", "--out", "mask.png"], "not an image"),
    (["segment", "FIRST", "--names", "a,b", "--out", "mask.jpg"], "ends in .png"),
    (["segment", "FIRST", "--names", "a,b", "--out", "nowhere/mask.png"], "cannot be written"),
    (["segment", "FIRST", "--names", "a,a", "--out", "mask.png"], "Make the classes different"),
])
def test_classify_and_segment_refuse(photos, monkeypatch, words, says):
    monkeypatch.chdir(photos)
    refused = shell(*(str(next(photos.glob("1/*.png"))) if w == "FIRST" else w for w in words))
    assert refused.exit_code == 2 and refused.stdout == "" and says in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


# run


def test_an_unknown_parameter_is_refused_in_one_sentence(clone):
    refused = fresh("run", "10_first", "-p", "shot", "5", cwd=clone)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "parameter='shot': unknown. Choose from shots, out_dir. Did you mean 'shots'?\n"
    assert not (clone / "out").exists(), "nothing ran"


@pytest.mark.parametrize("words, says", [
    (["run", "10_frst"], "Did you mean '10_first'?"),
    (["run", "nowhere/10_first.ipynb"], "no such file"),
    (["run", "10_first", "-p", "shots", "[1, 2"], "starts like a list"),
    (["run", "10_first", "-f", "none.yaml"], "none.yaml': cannot be read"),
    (["run", "10_first", "--out", "nbs"], "would be overwritten"),
    (["run", "all", "--notebooks", "out"], "no results notebook in it"),
    (["run", "all", "-p", "epoch", "1"], "Choose from shots, out_dir, seed"),
])
def test_what_cannot_be_run_is_refused(clone, words, says):
    refused = shell(*words)
    assert refused.exit_code == 2 and says in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_one_page_with_values_from_file_and_shell(clone, monkeypatch):
    page(clone / "nbs/13_values.ipynb", "shots = 0\nstages = []\nlimit = 0", "assert (shots, stages, limit) == (-1, ['mid', 'up'], 7)")
    (clone / "few.yaml").write_text("limit: 7\nshots: 3\n")
    monkeypatch.chdir(clone / "nbs")
    ran = shell("run", "13_values", "-f", "../few.yaml", "-p", "shots", "-1", "-p", "stages", "[mid, up]", "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout)["ok"], ran.stderr
    assert (clone / "out/13_values.ipynb").exists() and sorted(os.listdir(clone / "nbs")) == sorted(f"{n}.ipynb" for n in ("10_first", "11_second", "12_third", "13_values"))


def test_the_parameters_of_every_results_page_are_seen():
    "As Python sees them: papermill's own parser loses a line with a second = in its comment."
    from vermouth.app.run import page_parameters, results_pages
    for path in results_pages(ROOT / "nbs"):
        [cell] = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        values = {}
        exec(cell.source, values)
        assert page_parameters(path) == [name for name in values if name != "__builtins__"], path.name


def test_what_runs_leave_behind_is_ignored_by_git():
    ignored = subprocess.run(["git", "check-ignore", "out/run.json", "out/10_sbir.ipynb", "results/10_sbir.csv"], cwd=ROOT, capture_output=True, text=True)
    assert len(ignored.stdout.split()) == 3


def test_all_goes_on_after_a_failure_and_takes_up_where_it_stopped(clone):
    first = fresh("run", "all", "-p", "shots", "2", cwd=clone)
    assert first.returncode == 1 and "11_second" in first.stderr and "KeyError: 'no data'" in first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()[:2]] == ["10_first", "12_third"]
    table = pd.read_csv(clone / "out/results.csv")
    assert table[["page", "value"]].values.tolist() == [["10_first", 2], ["12_third", 2]] and set(table.versions) == {"torch=2"}
    page(clone / "nbs/11_second.ipynb", "seed = 0", "'mended'")
    second = json.loads(shell("run", "all", "-p", "shots", "2", "--json").stdout)
    assert [(p["skipped"], p["ok"]) for p in second["pages"]] == [(True, True), (False, True), (True, True)]
    assert len(pd.read_csv(clone / "results/10_first.csv")) == 1, "skipped means not run"
    third = json.loads(shell("run", "all", "-p", "shots", "3", "--json").stdout)
    assert [p["skipped"] for p in third["pages"]] == [False, True, False], "other parameters run again; a page that does not know them does not"
    assert third["rows"] == 2 and pd.read_csv(clone / "out/results.csv").value.tolist() == [3, 3], "of a number measured twice, the newest"


def test_all_survives_being_killed(clone):
    page(clone / "nbs/11_second.ipynb", "seed = 0", "from pathlib import Path\nimport time\nif not Path('go').exists(): Path('here').touch(); time.sleep(600)")
    running = subprocess.Popen([PROGRAM, "run", "all"], cwd=clone, env=QUIET, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.time() + 900  # a busy machine
        while not (clone / "here").exists() and running.poll() is None and time.time() < until: time.sleep(0.1)
        assert (clone / "here").exists(), "the second page never started"
    finally: os.killpg(running.pid, signal.SIGKILL)
    (clone / "go").touch()
    after = json.loads(shell("run", "all", "--json").stdout)
    assert [(p["notebook"], p["skipped"], p["ok"]) for p in after["pages"]] == [("10_first", True, True), ("11_second", False, True), ("12_third", False, True)]
