"""Copies of the Toybox family with a Python file in one of their folders, which leaves a mark when it runs.

`KINDS` names the ways to lay the trap. Each function lays it under `root` and returns the folder of the part that holds
it. `UNSAFE` says, in Python, how that folder is loaded by someone who trusts its code: then the file runs.
"""

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

TOYBOX = Path(str(files("vermouth") / "toybox"))


def link_weights(source, target):
    return os.symlink(source, target) if source.endswith(".safetensors") else shutil.copy2(source, target)


def copy_family(root):
    "The Toybox family without its trained head; weights are links."
    shutil.copytree(TOYBOX, root, copy_function=link_weights, ignore=shutil.ignore_patterns("vermouth"))
    return root


def copy_head(folder, **parts):
    "The trained head, whose card names these parts: argument → name."
    shutil.copytree(TOYBOX / "vermouth", folder)
    card = json.loads((folder / "vermouth.json").read_text())
    for part, name in parts.items():
        card[part]["name"] = str(name)
    (folder / "vermouth.json").write_text(json.dumps(card))
    return folder


def merge(path, entries):
    "Set entries of a JSON file, in nested mappings too; the file is made if it is missing."
    values = json.loads(path.read_text()) if path.exists() else {}

    def update(old, new):
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                update(old[key], value)
            else:
                old[key] = value

    update(values, entries)
    path.write_text(json.dumps(values))


def write_code(folder, marker, name="trap.py"):
    "A module with a class and a function, as transformers looks for them; importing it writes the marker."
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
        "class Trap:\n    pass\n\n\ndef generate(*args, **kwargs):\n    pass\n"
    )
    return folder


AUTO_TOKENIZER = {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}
AUTO_CONFIG = {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap"}}


def clip_options(root, marker):
    merge(root / "clip/tokenizer_config.json", AUTO_TOKENIZER)
    options = {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}
    merge(root / "clip/open_clip_config.json", {"model_cfg": options})
    return write_code(root / "clip", marker)


def clip_tokenizer(root, marker):
    merge(root / "clip/tokenizer_config.json", AUTO_TOKENIZER)
    return write_code(root / "clip", marker)


def clip_config(root, marker):
    merge(root / "clip/config.json", AUTO_CONFIG)
    return write_code(root / "clip", marker)


def captioner_config(root, marker):
    merge(root / "captioner/config.json", AUTO_CONFIG)
    return write_code(root / "captioner", marker)


def captioner_tokenizer(root, marker):
    merge(root / "captioner/tokenizer_config.json", AUTO_TOKENIZER)
    return write_code(root / "captioner", marker)


def captioner_processor(root, marker):
    auto_map = {"AutoProcessor": "trap.Trap", "AutoImageProcessor": ["trap.Trap", "trap.Trap"]}
    image_processor = {"image_processor_type": "Trap", "auto_map": auto_map}
    merge(root / "captioner/processor_config.json", {"auto_map": auto_map, "processor_class": "Trap"})
    merge(root / "captioner/processor_config.json", {"image_processor": image_processor})
    merge(root / "captioner/preprocessor_config.json", image_processor)
    return write_code(root / "captioner", marker)


def captioner_generation(root, marker):
    return write_code(root / "captioner", marker, "custom_generate/generate.py")


def backbone_tokenizer(root, marker):
    merge(root / "tokenizer/tokenizer_config.json", AUTO_TOKENIZER)
    return write_code(root / "tokenizer", marker)


def backbone_tokenizer_config(root, marker):
    merge(root / "tokenizer/config.json", AUTO_CONFIG)
    return write_code(root / "tokenizer", marker)


def backbone_text_encoder(root, marker):
    merge(root / "text_encoder/config.json", AUTO_CONFIG)
    return write_code(root / "text_encoder", marker)


def expert_config(root, marker):
    merge(root / "expert/config.json", AUTO_CONFIG)
    return write_code(root / "expert", marker)


KINDS = {
    function.__name__: function
    for function in (
        clip_options,
        clip_tokenizer,
        clip_config,
        captioner_config,
        captioner_tokenizer,
        captioner_processor,
        captioner_generation,
        backbone_tokenizer,
        backbone_tokenizer_config,
        backbone_text_encoder,
        expert_config,
    )
}
UNSAFE = {
    "clip_options": "open_clip.get_tokenizer(f'local-dir:{folder}')",
    "clip_tokenizer": "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    "captioner_tokenizer": "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    "captioner_processor": "AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
    "captioner_generation": "BlipForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)",
    "backbone_tokenizer": "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
} | {
    kind: "AutoConfig.from_pretrained(folder, trust_remote_code=True)"
    for kind in KINDS
    if kind.endswith(("_config", "_text_encoder"))
}
