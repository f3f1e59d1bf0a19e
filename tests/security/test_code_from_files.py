"Loading a model runs no code of its folder and fetches no name that only one of its files contains."

import ast
import inspect
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import diffusers
import huggingface_hub.constants as hub
import open_clip
import pytest
import timm
import torch
from photo_folders import run_forked
from PIL import Image
from program import run_here
from transformers import dynamic_module_utils
from traps import KINDS, TOYBOX, UNSAFE, copy_family, copy_head, merge

from vermouth.backbone import load_backbone
from vermouth.core import VermouthError
from vermouth.expert import load_expert
from vermouth.model import Vermouth
from vermouth.text import load_captioner, load_clip

ROOT = Path(__file__).resolve().parents[2]
LOADERS = {
    "clip": lambda root: load_clip(root / "clip", "cpu"),
    "captioner": lambda root: load_captioner(root / "captioner", "cpu"),
    "backbone": lambda root: load_backbone(root, "cpu"),
    "expert": lambda root: load_expert(root / "expert", device="cpu"),
}


def build(root):
    return Vermouth.build(str(root), captioner=str(root / "captioner"), expert=str(root / "expert"), device="cpu")


def load_head(root):
    parts = {"backbone": root, **{part: root / part for part in ("clip", "captioner", "expert")}}
    return Vermouth.load(copy_head(root.parent / "head", **parts), "cpu", allow=("folder",))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def questions(monkeypatch):
    "Every question that is asked, and answered with yes."
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "yes")
    return asked


@pytest.fixture
def cached(tmp_path, monkeypatch):
    "Put a folder into an empty cache of the hub under an id."
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    return put


def load_safely(load, root, marker, questions):
    "Load, or fail with one sentence; either way nothing has run, and nothing was asked."
    try:
        load(root)
    except VermouthError as error:
        assert "\n" not in str(error)
    assert not marker.exists()
    assert not questions


def test_every_trap_works_where_code_is_trusted(tmp_path):
    "In a process that ends afterwards."
    loading = "from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BlipForConditionalGeneration"

    def load_all():
        dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path / "modules")
        exec(f"import open_clip\n{loading}", names := {})
        for kind, lay in KINDS.items():
            names["folder"] = str(lay(copy_family(tmp_path / kind), tmp_path / f"{kind}.ran"))
            with suppress(Exception):
                exec(UNSAFE[kind], names)

    assert os.waitpid(run_forked(load_all), 0)[1] == 0
    assert [kind for kind in KINDS if not (tmp_path / f"{kind}.ran").exists()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_loader_runs_code_of_a_folder(kind, tmp_path, marker, questions):
    KINDS[kind](root := copy_family(tmp_path / "family"), marker)
    load_safely(LOADERS[kind.split("_")[0]], root, marker, questions)


@pytest.mark.parametrize("load", [build, load_head])
@pytest.mark.parametrize("kind", KINDS)
def test_no_model_runs_code_of_the_folders_it_is_built_from(kind, load, tmp_path, marker, questions):
    KINDS[kind](root := copy_family(tmp_path / "family"), marker)
    load_safely(load, root, marker, questions)


def test_options_of_a_tokenizer_are_refused_by_name(tmp_path, marker):
    folder = KINDS["clip_options"](copy_family(tmp_path / "family"), marker)
    with pytest.raises(VermouthError, match="has 'tokenizer_kwargs.trust_remote_code', which is not part of"):
        load_clip(folder, "cpu")


@pytest.mark.parametrize("kind", ["clip_options", "clip_tokenizer", "captioner_config"])
def test_the_program_runs_no_code_and_asks_no_question(kind, tmp_path, marker):
    KINDS[kind](root := copy_family(tmp_path / "family"), marker)
    parts = {"backbone": root, **{part: root / part for part in ("clip", "captioner", "expert")}}
    head, image = copy_head(tmp_path / "head", **parts), tmp_path / "image.png"
    Image.new("RGB", (64, 64), "red").save(image)
    done = run_here("classify", image, "--names", "cat,fish", "--model", head, input="yes\n" * 9)
    assert done.exit_code and "[y/N]" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not marker.exists()


def test_a_clip_of_the_hub_is_checked_and_brings_its_own_tokenizer(tmp_path, marker, questions, cached):
    root = copy_family(tmp_path / "family")
    merge(root / "clip/open_clip_config.json", {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "someone/else"}}})
    cached(root / "clip", "someone/good")
    clip, toybox = load_clip("hf-hub:someone/good", "cpu"), load_clip("toybox", "cpu")
    assert torch.equal(clip.tokenizer(["a photo of a fish"]), toybox.tokenizer(["a photo of a fish"]))
    cached(KINDS["clip_options"](root, marker), "someone/bad")
    with pytest.raises(VermouthError, match="clip='hf-hub:someone/bad': .* has 'tokenizer_kwargs.trust_remote_code'"):
        load_clip("hf-hub:someone/bad", "cpu")
    assert not marker.exists() and not questions


def test_a_kernel_that_a_configuration_names_is_not_fetched(tmp_path):
    root = copy_family(tmp_path / "family")
    kernel = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    merge(root / "captioner/config.json", kernel | {"text_config": kernel, "vision_config": kernel})
    merge(root / "text_encoder/config.json", kernel)
    config = load_captioner(root / "captioner", "cpu").model.config
    assert {c._attn_implementation for c in (config, config.text_config, config.vision_config)} == {"eager"}
    assert load_backbone(root, "cpu").text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("part, load", {"captioner": "captioner", "text_encoder": "backbone"}.items())
def test_the_base_model_of_an_adapter_is_not_fetched(part, load, tmp_path):
    root = copy_family(tmp_path / "family")
    merge(root / part / "adapter_config.json", {"base_model_name_or_path": "someone/base"})
    with pytest.raises(VermouthError, match="is an adapter. Merge it into its base model first"):
        LOADERS[load](root)


def test_a_configuration_of_a_timm_network_names_no_other_weights(tmp_path):
    root = copy_family(tmp_path / "family")
    elsewhere = {"hf_hub_id": "someone/expert", "url": "https://example.org/x.pth", "custom_load": True}
    merge(root / "expert/config.json", {"pretrained_cfg": elsewhere | {"hf_hub_filename": "x.bin", "file": "/x.pth"}})
    assert load_expert(root / "expert", device="cpu").fingerprint == load_expert("toybox", device="cpu").fingerprint


NAMES = {
    "backbone": "someone/backbone",
    "clip": "hf-hub:someone/clip",
    "captioner": "someone/captioner",
    "expert": "hf-hub:someone/expert",
}


@pytest.mark.parametrize("part, name", NAMES.items())
def test_names_in_a_card_are_not_fetched_unless_that_is_allowed(part, name, tmp_path, monkeypatch):
    head, fetched = copy_head(tmp_path / "head", **{part: name}), []
    loaders = {"backbone": load_backbone, "clip": load_clip, "captioner": load_captioner, "expert": load_expert}

    def load(source, *args, **options):
        if source == name:
            fetched.append(source)
            source = "toybox"
        return loaders[part](source, *args, **options)

    monkeypatch.setattr(f"vermouth.model.load_{part}", load)
    with pytest.raises(VermouthError, match=re.escape(f"only its card names: {part} {name!r}.")):
        Vermouth.load(head, "cpu")
    assert not fetched
    assert Vermouth.load(head, "cpu", allow=("hub",)) and fetched == [name]


COMMANDS = {
    "classify": ["classify", "photo.png", "--names", "cat,fish"],
    "segment": ["segment", "photo.png", "--names", "cat,fish", "--out", "mask.png"],
    "index": ["index", "photos", "--out", "idx"],
    "train": ["train", "photos", "--out", "mine"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_program_says_what_it_would_fetch_and_fetches_it_only_when_told(command, photos, tmp_path, monkeypatch):
    "Without a network: the names are in no cache, so that fetching ends in another sentence."
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in ("photo.png", "photos/a.png"):
        photos[0].save(path)
    copy_head(tmp_path / "head", clip="hf-hub:someone/clip", captioner="someone/captioner")
    words = [*COMMANDS[command], "--model", "head"]
    stopped, told = run_here(*words), run_here(*words, "--fetch")
    assert (stopped.exit_code, stopped.stdout, stopped.stderr.count("\n")) == (2, "", 1), stopped.stderr
    says = "it would fetch what is no folder here and only its card names: clip 'hf-hub:someone/clip', captioner "
    assert says + "'someone/captioner'." in stopped.stderr and "--fetch" in stopped.stderr
    assert (told.exit_code, told.stdout) == (2, "") and "clip='hf-hub:someone/clip': cannot be loaded" in told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "photo.png", "photos"]


def test_a_part_that_the_caller_passes_stands_for_its_name(tmp_path):
    head = copy_head(tmp_path / "head", clip="hf-hub:someone/clip")
    assert Vermouth.load(head, "cpu", clip=load_clip("toybox", "cpu"))


# callees that take no trust_remote_code: they have no way to run a file
WITHOUT = {
    "timm.create_model": timm.create_model,
    "open_clip.create_model_and_transforms": open_clip.create_model_and_transforms,
    "AutoencoderKL.from_pretrained": diffusers.AutoencoderKL.from_pretrained,
    "UNet2DConditionModel.from_pretrained": diffusers.UNet2DConditionModel.from_pretrained,
}
LOADING = re.compile(
    r"(from_pretrained|get_tokenizer|create_model\w*|HFTokenizer|\bpipeline|torch\.hub\.load)$|^Auto[A-Z]"
)


def loading_calls():
    for path in sorted((ROOT / "vermouth").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and LOADING.search(name := ast.unparse(node.func)):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, node


def test_every_call_that_could_run_code_says_that_it_must_not():
    found, wrong = 0, []
    for place, name, node in loading_calls():
        found += 1
        trust = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
        of_diffusers = name == "cls.from_pretrained" and place.startswith("vermouth/checkpoint.py")
        if trust != ["False"] and name not in WITHOUT and not of_diffusers:
            wrong.append(f"{place} {name}")
    assert found > 8 and wrong == []


def test_the_other_callees_take_no_such_option():
    for name, callee in WITHOUT.items():
        assert "trust_remote_code" not in inspect.getsource(callee), name
    assert "trust_remote_code" not in inspect.getsource(open_clip.factory.create_model)
    assert not (TOYBOX / "trap.py").exists() and json.loads((TOYBOX / "clip/open_clip_config.json").read_text())


NAMED = [{"backbone": "evil/b"}, {"expert": "evil/e"}, {"clip": "evil/c"}, {"allow": ["hub"]}, {"device": "x"}]


@pytest.mark.parametrize("config", [*NAMED, [1], "x", None])
def test_a_config_beside_a_card_names_no_parts(tmp_path, monkeypatch, config):
    "config.json is there for the hub, which counts downloads by it; huggingface_hub would pass it on as arguments."
    head, passed = copy_head(tmp_path / "head"), {}
    (head / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Vermouth, "load", classmethod(lambda cls, folder, **options: passed.update(options)))
    Vermouth.from_pretrained(head, allow=())
    for damaged in (b"{", b"\xff", b"[" * 100_000):
        (head / "config.json").write_bytes(damaged)
        Vermouth.from_pretrained(head, allow=())
    assert passed == {"allow": ()}
