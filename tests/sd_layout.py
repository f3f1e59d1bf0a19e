"""Stable Diffusion 1.5 and 2.1 folders with random weights, laid out as the published ones.

Same files, same configurations, same names of weights: older diffusers and transformers wrote them, so attention in
the VAE and the text encoder have their old names. Widths are divided by `width`; 1 is the full size.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from vermouth.families.unet import text_config, unet_config, vae_config


def scheduler_config(kind):
    "PNDM for 1.5 and 2.1-base, DDIM with v-prediction for 2.1: what the repositories hold."
    common = dict(
        _diffusers_version="0.8.0",
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        clip_sample=False,
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        steps_offset=1,
        trained_betas=None,
    )
    if kind == "sd2.1":
        return dict(_class_name="DDIMScheduler", prediction_type="v_prediction", **common)
    return dict(
        _class_name="PNDMScheduler",
        skip_prk_steps=True,
        **common,
        **({"prediction_type": "epsilon"} if kind == "sd2.1-base" else {}),
    )


def old_vae_names(name):
    "Attention in the VAE as diffusers named it before 0.15."
    return re.sub(
        r"(mid_block\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.",
        lambda m: m[1] + {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}[m[2]] + ".",
        name,
    )


def write_tokenizer(folder, pad):
    "Write CLIP's tokenizer files: all byte symbols, two merges, and the special tokens at their published places."
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("c", "a"), ("ca", "t</w>")]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    words += [f"unused{i}</w>" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    token = dict(lstrip=False, normalized=True, rstrip=False, single_word=False)
    files = {
        "vocab.json": {w: i for i, w in enumerate(words)},
        "special_tokens_map.json": {**{k: dict(content=v, **token) for k, v in special.items()}, "pad_token": pad},
        "tokenizer_config.json": {
            **{k: dict(__type="AddedToken", content=v, **token) for k, v in special.items()},
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": "openai/clip-vit-large-patch14",
            "pad_token": pad,
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")


def rename(path, change):
    "Rename the weights of one file."
    weights = {change(k): v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def write_folder(folder, kind="sd1", width=8, seed=0, dtype=torch.float32):
    "A complete folder in diffusers format; returns its path as a string."
    folder = Path(folder)
    torch.manual_seed(seed)
    UNet2DConditionModel(**unet_config(kind, width)).to(dtype).save_pretrained(folder / "unet")
    AutoencoderKL(**vae_config(width)).to(dtype).save_pretrained(folder / "vae")
    rename(folder / "vae" / "diffusion_pytorch_model.safetensors", old_vae_names)
    CLIPTextModel(CLIPTextConfig(**text_config(kind, width))).to(dtype).save_pretrained(folder / "text_encoder")
    rename(
        folder / "text_encoder" / "model.safetensors", lambda k: k if k.startswith("text_model.") else f"text_model.{k}"
    )
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps(text_config(kind, width) | {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]})
    )
    write_tokenizer(folder / "tokenizer", pad="<|endoftext|>" if kind == "sd1" else "!")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(kind)))
    parts = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", scheduler_config(kind)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", **parts})
    )
    return str(folder)
