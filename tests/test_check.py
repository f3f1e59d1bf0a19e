"`vermouth check`: what a path is, what is wrong, exit code 0 or 2."

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from program import run_here
from safetensors.torch import save_file
from test_data_kinds import HALF, class_tree, folder_of, litter
from transformer_layout import pipeline

from vermouth.app.check import check

TOYBOX = ROOT / "vermouth/toybox"


def ways(root):
    "Things of every kind in a folder each, with the kind and a word of the problem, empty for none."

    def without(part):
        others = shutil.ignore_patterns("captioner", "clip", "expert", "vermouth", part)
        shutil.copytree(TOYBOX, root / "sd", ignore=others)
        return root / "sd"

    def written(name, content):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        return root

    def tensors(name, **shapes):
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, root / name)
        return root / name

    def lora(width, name="lora.safetensors"):
        layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        return tensors(name, **{f"{layer}.lora_A.weight": (4, width), f"{layer}.lora_B.weight": (320, 4)})

    def transformer(kind):
        pipeline(kind).transformer.save_pretrained(root / "transformer")
        return root / "transformer"

    def kohya(layer):
        return tensors("a.safetensors", **{f"{layer}.lora_down.weight": (2, 8), f"{layer}.lora_up.weight": (24, 2)})

    def packed():
        Image.new("RGB", (4, 4)).save(root / "a.png")
        with tarfile.open(root / "a.tar", "w") as tar:
            tar.add(root / "a.png", "cat/a.png")
        return root / "a.tar"

    def hub(folder):
        for name in ("blobs", "refs", "snapshots"):
            (root / name).mkdir()
        folder.rename(root / "snapshots/0123")
        return root

    def photos(*suffixes):
        return class_tree(root / "p", [""], ["2025", "2026"], suffixes)

    single, colours = {"model.diffusion_model.x": (1,)}, np.dstack([HALF] * 3)
    sketches, photos_only = "sketch retrieval data", ["photo/"]
    return {
        "checkpoint": (lambda: without("none"), "checkpoint", ""),
        "checkpoint without an index": (lambda: without("model_index.json"), "checkpoint", ""),
        "checkpoint without a part": (lambda: without("vae"), "checkpoint", "lacks vae/"),
        "part of a checkpoint": (lambda: TOYBOX / "text_encoder", "unknown", "a part of the checkpoint"),
        "U-Net": (lambda: TOYBOX / "unet", "U-Net", ""),
        "U-Net, its file": (lambda: TOYBOX / "unet/diffusion_pytorch_model.safetensors", "U-Net", ""),
        "transformer": (lambda: transformer("flux"), "transformer", ""),
        "transformer in a folder": (lambda: transformer("pixart").parent, "transformer", ""),
        "transformer, its file": (lambda: next(transformer("sd3").glob("*.safetensors")), "transformer", ""),
        "CLIP": (lambda: TOYBOX / "clip", "CLIP", ""),
        "captioner": (lambda: TOYBOX / "captioner", "captioner", ""),
        "expert": (lambda: TOYBOX / "expert", "expert", ""),
        "trained model": (lambda: TOYBOX / "vermouth", "trained model", ""),
        "trained model, damaged": (lambda: written("vermouth.json", b"[]"), "trained model", "is damaged"),
        "LoRA": (lambda: lora(768), "LoRA", ""),
        "LoRA in a folder": (lambda: lora(1024, "my.safetensors").parent, "LoRA", ""),
        "LoRA of a stranger": (lambda: lora(4096), "LoRA", "texts of width 4096"),
        "LoRA in FLUX's own names": (lambda: kohya("lora_unet_double_blocks_0_img_attn_qkv"), "LoRA", ""),
        "LoRA in SD3's own names": (lambda: kohya("lora_unet_joint_blocks_0_x_block_attn_qkv"), "LoRA", "FLUX's names"),
        "single file of FLUX": (
            lambda: tensors("a.safetensors", **{"double_blocks.0.x": (1,)}),
            "unknown",
            "FluxTransformer2DModel.from_single_file",
        ),
        "single file": (lambda: tensors("a.safetensors", **single), "unknown", "from_single_file"),
        "other weights": (lambda: tensors("a.safetensors", a=(1,)), "unknown", "of an unknown model"),
        "damaged weights": (lambda: written("a.safetensors", b"no") / "a.safetensors", "unknown", "not a whole file"),
        "toybox by its name": (lambda: "toybox", "checkpoint", ""),
        "photos in a folder called photo": (lambda: class_tree(root, ["photo/"]), "few-shot data", ""),
        "folder around a model": (lambda: without("none").parent, "unknown", "the checkpoint is in"),
        "the hub's cache": (lambda: hub(without("none")), "unknown", "the checkpoint is in"),
        "folder of pickles": (lambda: written("unet.bin", b""), "unknown", "unet.bin is pickled"),
        "archive": (lambda: written("a.zip", b"PK") / "a.zip", "unknown", "Unpack it"),
        "pickle": (lambda: written("a.ckpt", b"") / "a.ckpt", "unknown", "pickled weights are not read"),
        "index, damaged": (lambda: written("index.sqlite", b"no"), "photo index", "is damaged"),
        "sketches and photos": (lambda: class_tree(root / "s"), sketches, ""),
        "one class missing": (lambda: class_tree(class_tree(root / "s"), photos_only, ["x"]), sketches, "'x'"),
        "classes": (lambda: class_tree(root / "c", [""]), "few-shot data", ""),
        "classes, nested": (lambda: class_tree(root / "c/c", [""]).parent, "few-shot data", ""),
        "train and test": (lambda: class_tree(root / "c", ["train/", "test/"]), "few-shot data", ""),
        "photos by year": (lambda: photos("png"), "photos", ""),
        "masks of 0 and 255": (lambda: folder_of(root / "m", HALF * 255), "segmentation data", "255: building"),
        "images and masks": (lambda: folder_of(root / "m", HALF), "segmentation data", ""),
        "masks without names": (lambda: folder_of(root / "m", HALF, b""), "segmentation data", "no lines"),
        "masks alone": (lambda: folder_of(root / "m", HALF) / "masks", "masks", ""),
        "masks in colours": (lambda: folder_of(root / "m", colours) / "masks", "masks", "a picture in RGB"),
        "tar file": (packed, "images in a tar file", ""),
        "tar file, damaged": (lambda: written("a.tar", b"no") / "a.tar", "images in a tar file", "not a plain"),
        "image": (lambda: packed().with_name("a.png"), "image", ""),
        "image, damaged": (lambda: written("a.png", b"no") / "a.png", "image", "not an image"),
        "text": (lambda: written("a.txt", b"no") / "a.txt", "unknown", "no kind of file that is read"),
        "empty folder": (lambda: root, "unknown", "it holds nothing"),
        "nothing": (lambda: root / "none", "unknown", "no such file or folder"),
    }


@pytest.mark.parametrize("case", ways(ROOT))
def test_every_kind_is_recognised(case, tmp_path):
    make, kind, problem = ways(tmp_path)[case]
    verdict = check(make())
    assert (verdict.kind, verdict.ok) == (kind, not problem), verdict
    assert problem in " ".join(verdict.problems) and bool(verdict.commands) == (verdict.ok and kind != "image")


def test_official_layouts_are_recognised(tmp_path):
    from test_fewshot_data import make_split
    from test_sbir_data import make_tree

    make_tree(tmp_path / "a", "tuberlin")
    folder, _ = make_split(tmp_path / "b", "dtd")
    found = [check(path) for path in (tmp_path / "a", tmp_path / "b", folder)]
    assert [verdict.kind for verdict in found] == ["sketch retrieval data", "few-shot data", "few-shot data"]
    assert [verdict.about.split(":")[0] for verdict in found] == ["tuberlin", "dtd", "dtd"]
    assert found[1].commands == found[2].commands


def test_what_is_left_out_is_a_warning(tmp_path):
    class_tree(tmp_path, [""], ["cat", "dog"])
    (tmp_path / "cat/bad.png").write_bytes(b"no")
    (tmp_path / "cat/a.nef").touch()
    litter(tmp_path)
    verdict = check(tmp_path)
    assert verdict.ok and sorted(text.split(".")[0] for text in verdict.warnings) == [
        "1 of 5 images cannot be read",
        "cat: 1 ",
    ]


def test_the_command_prints_one_document_and_exits_with_0_or_2(tmp_path):
    folder_of(tmp_path / "houses", HALF * 255)
    told = run_here("check", tmp_path / "houses", "--json")
    document = json.loads(told.stdout)
    assert (told.exit_code, document["ok"], document["kind"]) == (2, False, "segmentation data")
    (tmp_path / "houses/classnames.txt").write_text("0: background\n255: a\x1b[31m$\\foo$\n")
    told = run_here("check", tmp_path / "houses")
    assert told.exit_code == 0 and "\x1b" not in told.stdout and "2 classes" in told.stdout
