"The commands of `vermouth` as a shell sees them: what they print, where, and with which exit code."

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from disks import run_child
from photo_folders import forget_ours
from program import run_here, run_process

from vermouth.store import FeatureStore

# Help


def test_help_is_quick():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = run_process("--help")
        times.append(time.perf_counter() - started)
    assert result.returncode == 0 and "run" in result.stdout and "info" in result.stdout
    assert min(times) < 1, f"vermouth --help takes {min(times):.2f} s"


def test_help_loads_nothing_heavy():
    code = """import sys
from typer.testing import CliRunner
from vermouth.app.cli import app
assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "papermill", "diffusers"} & set(loaded)


def test_a_command_keeps_pythons_collector_from_its_imports_and_its_end(tmp_path):
    code = """import atexit, gc, sys
from vermouth.app.cli import app
for _ in range(2):
    app(["check", sys.argv[1]], standalone_mode=False)
print(gc.get_threshold()[0], gc.isenabled())
atexit.register(lambda: print(gc.get_freeze_count()))
sys.modules["triton"] = None
atexit._run_exitfuncs()
del sys.modules["triton"]
app(["check", sys.argv[1]], standalone_mode=False)
atexit._run_exitfuncs()
print(gc.get_freeze_count() > 10_000)"""
    (tmp_path / "a.txt").write_text("no image")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], capture_output=True, text=True, check=False)
    assert [line for line in run.stdout.splitlines() if ":" not in line] == ["10000 True", "0", "True"], run


@pytest.mark.parametrize("words", [["runn"], ["run"], ["run", "x", "-p"], ["run", "x", "-p", "shots"]])
def test_usage_errors_end_in_2(words):
    assert run_here(*words).exit_code == 2


# info


def test_info_for_people_and_for_scripts():
    printed, found = run_here("info"), json.loads(run_here("info", "--json").stdout)
    assert set(found["toybox"]) >= {"captioner", "clip", "expert", "text_encoder", "unet", "vae"}
    assert min(found["toybox"].values()) > 1e5
    assert found["packages"]["torch"] in printed.stdout and "published/paper_results.csv" in printed.stdout
    assert found["device"]["type"] in ("cpu", "cuda", "mps")


def test_info_finds_weights_in_the_hub_cache(tmp_path):
    commit = tmp_path / "hub/models--timm--resnet18.tv_in1k/snapshots/0123"
    commit.mkdir(parents=True)
    (commit / "model.safetensors").write_bytes(bytes(1000))

    def prepare():
        os.environ["HF_HUB_CACHE"] = str(tmp_path / "hub")
        forget_ours("vermouth", "huggingface_hub")  # which read it when they are imported

    found = json.loads(run_child(["info", "--json"], prepare).stdout)
    assert [name for name, repo in found["hub"].items() if repo["bytes"]] == ["timm/resnet18.tv_in1k"]


# extract, verify


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Five Toybox pictures in two sub-folders, a broken image, and two files to be ignored."
    from vermouth.data.toybox import Toybox

    folder = tmp_path_factory.mktemp("photos")
    for i, item in enumerate(Toybox("photo", n=5)):
        (folder / f"{i % 2}").mkdir(exist_ok=True)
        item.image.save(folder / f"{i % 2}/{item.name} {i}.png")
    (folder / "0/broken.png").write_text("not an image")
    for name in ("0/.hidden.png", "notes.txt"):
        (folder / name).touch()
    return folder


FEW = ("-p", "stages", "mid", "-p", "attention", "[]")
PLAIN = ("--captioner", "none", "--json", *FEW)


def test_extract_a_folder_and_verify_it(photos, tmp_path):
    made = run_child(["extract", photos, "--out", tmp_path / "store", *FEW])
    assert made.exit_code == 1 and made.stdout.startswith("5 of 6 images are in"), made.stderr
    assert "0/broken.png" in made.stderr and "image/s" in made.stderr, "what was skipped, and a bar with the rate"
    verified = run_child(["verify", tmp_path / "store"])
    checksum = verified.stdout.strip()
    assert verified.exit_code == 0 and len(checksum) == 64 and checksum in made.stdout
    again = run_here("extract", photos, "--out", tmp_path / "store", *FEW, "--json")
    assert (again.exit_code, json.loads(again.stdout)["checksum"]) == (1, checksum)


def test_extract_reads_shards_of_a_webdataset(photos, tmp_path):
    names = sorted(photos.glob("0/[!b.]*.png"))
    for k in (0, 1):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as shard:
            for name in names[k::2]:
                shard.add(name, f"{name.stem}.png")
                shard.add(__file__, f"{name.stem}.txt")
    made = run_here("extract", tmp_path / "*.tar", "--out", tmp_path / "packed", *PLAIN)
    run_here("extract", *names[0::2], *names[1::2], "--out", tmp_path / "files", *PLAIN)
    packed, files = (FeatureStore(tmp_path / name) for name in ("packed", "files"))
    assert json.loads(made.stdout)["items"] == len(names) > 1
    assert packed.ids[0] == f"0.tar/{names[0].stem}.png"
    for a, b in zip(packed.batch(range(len(packed))), files.batch(range(len(files))), strict=True):
        assert torch.equal(a, b)


def test_extract_takes_patterns_and_a_list(photos, tmp_path):
    listed = "\n".join(map(str, sorted(photos.glob("0/[!b.]*.png"))))
    made = run_here("extract", "-", f"{photos}/1/*.png", "--out", tmp_path / "store", *PLAIN, input=listed)
    assert made.exit_code == 0 and json.loads(made.stdout)["items"] == 5, made.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "no such file"),
        ([".", "-p", "stage", "mid"], "Did you mean 'stages'?"),
        ([".", "--model", "toybx"], "unknown"),
        (["1", "--size", "63"], "multiples"),
    ],
)
def test_extract_refuses(photos, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(photos)
    refused = run_here("extract", *words, "--out", tmp_path / "store", "--captioner", "none")
    assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
    assert not (tmp_path / "store/manifest.json").exists()


# classify, segment


def test_classify_a_folder(photos):
    result = run_child(["classify", photos, "--names", "cat, duck,fish", "-k", "2", "--model", "toybox"])
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.exit_code == 1 and [len(line) for line in lines] == [3] * 5, result.stderr
    assert all(Path(line[0]).is_file() for line in lines)
    assert "broken.png" in result.stderr
    assert result.stderr.count("\n") == 1, "one line for the one bad file"
    again = run_here("classify", photos, "--names", "cat,duck,fish", "--batch-size", "2", "--json")
    document = json.loads(again.stdout)
    assert [image["name"] for image in document["images"]] == [line[1].split()[0] for line in lines]
    assert len(document["set_aside"]) == 1
    assert all(abs(sum(image["probabilities"].values()) - 1) < 1e-5 for image in document["images"])


def test_segment_writes_a_mask_of_numbers(tmp_path):
    from PIL import Image

    Image.new("RGB", (50, 30), "green").save(tmp_path / "image.png")
    words = ("--names", "sky,grass,water", "--out", tmp_path / "mask.png", "--json", "--model", "toybox")
    result = run_child(["segment", tmp_path / "image.png", *words])
    assert result.exit_code == 0 and not result.stderr, result.stderr
    with Image.open(tmp_path / "mask.png") as mask:
        counts = {n: c / 1500 for c, n in mask.getcolors()}
    share = {name: round(counts.get(i, 0), 4) for i, name in enumerate(("sky", "grass", "water"))}
    assert mask.size == (50, 30) and share == json.loads(result.stdout)["share"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["classify", "0/broken.png", "--names", "a,b"], "not an image"),
        (["classify", "1", "--names", "a,,b"], "number 1 is empty"),
        (["classify", "1", "--names", "cat"], "one name, which everything would get"),
        (["classify", "1"], "Give --names, two or more"),
        (["classify", "1", "--names", "leopard,motorcycle"], "look the same to this CLIP"),
        (["classify", "1", "--names", "cat,duck", "--reject", "0.1"], "the model was not trained on classes"),
        (["classify", "1", "--names", "cat,duck", "--model", "efficientnet_lite0"], "vermouth train ROOT"),
        (["train", "nowhere", "--out", "model"], "root='nowhere': no such folder"),
        (["train", ".", "--out", "model", "--task", "rank"], "task='rank': unknown"),
        (["classify", "1", "--names", "a,b", "--model", "nowhere"], "no such folder, and no name that is known"),
        (["classify", "1", "--names", "a,b", "--model", "1"], "vermouth.json is missing"),
        (["segment", "0/broken.png", "--names", "a,b", "--out", "mask.png"], "not an image"),
        (["segment", "FIRST", "--names", "a,b", "--out", "mask.jpg"], "ends in .png"),
        (["segment", "FIRST", "--names", "a,b", "--out", "nowhere/mask.png"], "cannot be written"),
        (["segment", "FIRST", "--names", "a,a", "--out", "mask.png"], "Make the classes different"),
    ],
)
def test_classify_and_segment_refuse(photos, monkeypatch, words, message):
    monkeypatch.chdir(photos)
    first = str(next(photos.glob("1/*.png")))
    refused = run_here(*(first if word == "FIRST" else word for word in words))
    assert refused.exit_code == 2 and refused.stdout == "", refused.stderr
    assert message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
