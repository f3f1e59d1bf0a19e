"Checkpoints as people have them: half precision, shards, wrapped names, overlays; settings of a wrong kind."

import json
import math
import resource
import shutil
from importlib.resources import files
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from vermouth.backbone import load_backbone
from vermouth.checkpoint import load_part, load_scheduler
from vermouth.core import VermouthError

TOYBOX = Path(str(files("vermouth") / "toybox"))
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


def weights_of(part):
    return next((TOYBOX / part).glob("*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    "The Toybox checkpoint, whose files a test may replace; weights are links."
    for part in PARTS:
        shutil.copytree(TOYBOX / part, tmp_path / "sd" / part, copy_function=shutil.copy2, symlinks=True)
    shutil.copy2(TOYBOX / "model_index.json", tmp_path / "sd")
    return tmp_path / "sd"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_weights(folder, part, files):
    "Write other files of weights instead: name → tensors."
    (folder / part / weights_of(part).name).unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / part / name, metadata={"format": "pt"})


def equal(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LAYOUTS = {
    "half precision only": ["{}.fp16.safetensors"],
    "shards": ["{}-00001-of-00002.safetensors", "{}-00002-of-00002.safetensors"],
    "shards of a variant": ["{}.fp16-00001-of-00002.safetensors", "{}.fp16-00002-of-00002.safetensors"],
    "shards of a variant as they were": ["{}-00001-of-00002.fp16.safetensors", "{}-00002-of-00002.fp16.safetensors"],
    "another name": ["ema_weights.safetensors"],
    "another variant": ["{}.non_ema.safetensors"],
}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_files_of_weights_are_found_under_every_name(layout, part, folder):
    stem, tensors = weights_of(part).name.removesuffix(".safetensors"), load_file(weights_of(part))
    names = sorted(tensors)
    split = [names] if len(layout) == 1 else [names[::2], names[1::2]]
    replace_weights(folder, part, {f.format(stem): {k: tensors[k] for k in keys} for f, keys in zip(layout, split)})
    assert equal(load_part(folder, part, torch.float32), load_part(TOYBOX, part, torch.float32))


def test_missing_shards_are_counted(folder):
    replace_weights(folder, "vae", {"diffusion_pytorch_model-00002-of-00003.safetensors": {"x": torch.zeros(1)}})
    with pytest.raises(VermouthError, match="holds 1 of 3 shards of weights. Fetch the others"):
        load_part(folder, "vae", torch.float32)


def test_a_variant_is_taken_where_it_exists(folder):
    tensors = load_file(weights_of("unet"))
    save_file({k: v + 1 for k, v in tensors.items()}, folder / "unet/diffusion_pytorch_model.ema.safetensors")
    plain, ema = (load_backbone(folder, "cpu", variant=variant) for variant in (None, "ema"))
    assert equal(plain.vae, ema.vae) and not equal(plain.unet, ema.unet)
    with pytest.raises(VermouthError, match="variant='fp16': .* has only ema"):
        load_backbone(folder, "cpu", variant="fp16")


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_prefixes_of_wrappers_are_removed_with_one_line(wrap, folder):
    tensors = {wrap.format(k): v for k, v in load_file(weights_of("text_encoder")).items()}
    replace_weights(folder, "text_encoder", {"model.safetensors": tensors})
    with pytest.warns(UserWarning, match="the prefix of a wrapper is removed") as said:
        model = load_part(folder, "text_encoder", torch.float32)
    assert len([w for w in said if "wrapper" in str(w.message)]) == 1
    assert equal(model, load_part(TOYBOX, "text_encoder", torch.float32))


def test_a_trainers_folder_without_an_index_is_read(folder):
    (folder / "model_index.json").unlink()
    assert load_backbone(folder, "cpu").fingerprint == load_backbone("toybox", "cpu").fingerprint


@pytest.mark.parametrize("size, side", [([16, 24], 16), (None, 64), (16, 16)])
def test_sample_size_is_one_number(size, side, folder):
    change(folder / "unet/config.json", sample_size=size)
    assert load_backbone(folder, "cpu").unet.config.sample_size == side


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_named_with_its_place(part, folder):
    shutil.rmtree(folder / part)
    with pytest.raises(VermouthError, match=f"lacks {part}/. Copy that folder from the checkpoint"):
        load_backbone(folder, "cpu")


def test_what_trainers_leave_alone_says_what_it_goes_over(folder, tmp_path):
    for place in ("trained/unet", "ema/unet_ema", "bare"):
        shutil.copytree(folder / "unet", tmp_path / place)
        with pytest.raises(VermouthError, match=r"A denoiser alone goes over its base: load_backbone\(base, unet="):
            load_backbone(tmp_path / Path(place).parts[0], "cpu")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").touch()
    with pytest.raises(VermouthError, match=r"It holds a LoRA: load_backbone\(base, lora="):
        load_backbone(tmp_path / "lora", "cpu")


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
WORDS = "encoder.layers.0.self_attn.q_proj"


def low_rank(size, scale=1.0):
    g = torch.Generator().manual_seed(0)
    return {kind: torch.randn(*shape, generator=g) * scale for kind, shape in size.items()}


def test_a_lora_is_added_to_the_unet_and_the_text_encoder(folder, tmp_path):
    plain = load_backbone("toybox", "cpu")
    images, text = plain.unet.get_submodule(LAYER), plain.text_encoder.get_submodule(WORDS)
    (c, d), (e, f) = images.weight.shape, text.weight.shape
    a, b = torch.randn(2, d), torch.randn(c, 2)
    u, v = torch.randn(2, f), torch.randn(e, 2)
    flat = LAYER.replace(".", "_"), WORDS.replace(".", "_")
    tensors = {
        f"lora_unet_{flat[0]}.lora_down.weight": a,
        f"lora_unet_{flat[0]}.lora_up.weight": b,
        f"lora_unet_{flat[0]}.alpha": torch.tensor(1.0),
        f"lora_te_text_model_{flat[1]}.lora_down.weight": u,
        f"lora_te_text_model_{flat[1]}.lora_up.weight": v,
    }
    save_file(tensors, tmp_path / "style.safetensors")
    tuned = load_backbone(folder, "cpu", lora=tmp_path / "style.safetensors")
    assert torch.allclose(tuned.unet.get_submodule(LAYER).weight, images.weight + b @ a / 2, atol=1e-5)
    assert torch.allclose(tuned.text_encoder.get_submodule(WORDS).weight, text.weight + v @ u, atol=1e-5)
    assert "style.safetensors" in tuned.name
    twice = load_backbone(folder, "cpu", lora=[tmp_path / "style.safetensors"] * 2)
    assert torch.allclose(twice.unet.get_submodule(LAYER).weight, images.weight + b @ a, atol=1e-4)


def test_a_lora_that_changes_no_sign_changes_the_fingerprint(tmp_path):
    plain = load_backbone("toybox", "cpu")
    c, d = plain.unet.get_submodule(LAYER).weight.shape
    pair = {f"unet.{LAYER}.lora_A.weight": torch.full((1, d), 1e-6), f"unet.{LAYER}.lora_B.weight": torch.ones(c, 1)}
    save_file(pair, tmp_path / "pytorch_lora_weights.safetensors")
    tuned = load_backbone("toybox", "cpu", lora=tmp_path)
    signs = [torch.signbit(x) for model in (plain.unet, tuned.unet) for x in model.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(signs[: len(signs) // 2], signs[len(signs) // 2 :], strict=True))
    assert plain.fingerprint != tuned.fingerprint


def test_adapters_of_peft_bring_their_own_factor(tmp_path):
    plain = load_backbone("toybox", "cpu")
    weight = plain.unet.get_submodule(LAYER).weight
    c, d = weight.shape
    a, b = torch.randn(4, d), torch.randn(c, 4)
    pair = {f"base_model.model.{LAYER}.lora_A.weight": a, f"base_model.model.{LAYER}.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    for settings, factor in (
        ({"r": 4, "lora_alpha": 8}, 2),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        tuned = load_backbone("toybox", "cpu", lora=tmp_path).unet.get_submodule(LAYER).weight
        assert torch.allclose(tuned, weight + factor * b @ a, atol=1e-4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": "many"}))
    with pytest.raises(VermouthError, match="its lora_alpha is 'many'"):
        load_backbone("toybox", "cpu", lora=tmp_path)


def test_another_unet_goes_over_the_checkpoint(folder, tmp_path, monkeypatch):
    tensors = {k: v * 1.5 for k, v in load_file(weights_of("unet")).items()}
    other = tmp_path / "hub/models--someone--unets/snapshots" / ("0" * 40)
    shutil.copytree(folder / "unet", other / "ema")
    for name in ("ema/diffusion_pytorch_model.safetensors", "clean.safetensors"):
        save_file(tensors, other / name)
    refs = tmp_path / "hub/models--someone--unets/refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    names = (other / "ema", other / "clean.safetensors", "someone/unets/ema", "someone/unets/clean.safetensors")
    made = [load_backbone("toybox", "cpu", unet=name) for name in names]
    want = load_backbone("toybox", "cpu").unet.conv_in.weight * 1.5
    assert all(torch.allclose(one.unet.conv_in.weight, want, atol=1e-3) for one in made)
    assert len({one.fingerprint for one in made}) == 1
    assert [one.name for one in made] == [f"toybox + unet={n}" for n in ("ema", "clean.safetensors", *names[2:])]
    with pytest.raises(VermouthError, match="unet='someone/else': neither a folder nor a .safetensors file"):
        load_backbone("toybox", "cpu", unet="someone/else")


def test_the_guidance_of_a_consistency_model_is_given_to_it(folder):
    config = {k: v for k, v in UNet2DConditionModel.load_config(folder / "unet").items() if k[0] != "_"}
    torch.manual_seed(0)
    lcm = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 32}).eval()
    (folder / "unet" / weights_of("unet").name).unlink()
    lcm.save_pretrained(folder / "unet")
    half = torch.exp(-math.log(1e4) * torch.arange(16) / 15) * 1000 * (8.5 - 1)
    guidance = torch.cat([half.sin(), half.cos()])[None]
    x, text = torch.randn(1, lcm.config.in_channels, 16, 16), torch.randn(1, 4, lcm.config.cross_attention_dim)
    with torch.no_grad():
        want = lcm(x, 200, text, timestep_cond=guidance).sample
    assert torch.allclose(load_backbone(folder, "cpu").predict(x, 200, text), want, atol=1e-4)


WRONG = [
    ("unet/config.json", {"cross_attention_dim": 2**19}),
    ("unet/config.json", {"block_out_channels": [10**9] * 4}),
    ("unet/config.json", {"block_out_channels": "wide"}),
    ("unet/config.json", {"layers_per_block": 10**9}),
    ("unet/config.json", {"norm_num_groups": 0}),
    ("unet/config.json", {"down_block_types": ["NoBlock2D"] * 4}),
    ("unet/config.json", {"in_channels": -4}),
    ("unet/config.json", {"attention_head_dim": None}),
    ("vae/config.json", {"latent_channels": 10**12}),
    ("vae/config.json", {"block_out_channels": []}),
    ("vae/config.json", {"scaling_factor": math.nan}),
    ("text_encoder/config.json", {"vocab_size": 2**40}),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
    ("text_encoder/config.json", {"hidden_size": "96"}),
    ("text_encoder/config.json", {"hidden_act": "system"}),
    ("text_encoder/config.json", {"architectures": ["BertModel"]}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**13}),
    ("scheduler/scheduler_config.json", {"beta_end": math.inf}),
    ("scheduler/scheduler_config.json", {"beta_end": 4.0}),
    ("scheduler/scheduler_config.json", {"beta_start": "small"}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "unknown"}),
]


@pytest.mark.parametrize("file, values", WRONG, ids=[f"{file.split('/')[0]} {list(v)[0]}" for file, v in WRONG])
def test_settings_of_a_wrong_kind_end_in_one_sentence_and_take_no_memory(file, values, folder):
    change(folder / file, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VermouthError) as error:
        load_backbone(folder, "cpu")
    assert "\n" not in str(error.value) and file.split("/")[0] in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


ODD_JSON = ["[1, 2]", "null", "[" * 10**5, '{"a": NaN}', '{"a": 1e999}', '{"a": 9', "\x00\xff", ""]


@pytest.mark.parametrize("text", ODD_JSON)
def test_json_of_any_kind_ends_in_one_sentence(text, folder):
    (folder / "vae/config.json").write_text(text, encoding="latin-1")
    with pytest.raises(VermouthError, match=r"vae/config.json cannot be read \([^\n]+\). Fetch it again") as error:
        load_part(folder, "vae", torch.float32)
    assert "\n" not in str(error.value)


def test_a_huge_json_is_not_read(folder):
    with open(folder / "vae/config.json", "wb") as f:
        f.truncate(10**10)  # a hole, no bytes on disk
    with pytest.raises(VermouthError, match="larger than 20 MB"):
        load_backbone(folder, "cpu")


def test_weights_that_are_not_finite_are_refused(folder):
    for part in ("vae", "unet", "text_encoder"):
        tensors = load_file(weights_of(part))
        tensors[sorted(tensors)[-1]].view(-1)[0] = math.nan
        save_file(tensors, folder / part / weights_of(part).name, metadata={"format": "pt"})
        with pytest.raises(VermouthError, match=f"{part}/: NaN or infinite numbers"):
            load_part(folder, part, torch.float32)


def test_a_schedule_without_steps_is_refused(folder):
    change(folder / "scheduler/scheduler_config.json", num_train_timesteps=0)
    with pytest.raises(VermouthError, match="num_train_timesteps is 0"):
        load_scheduler(folder)
