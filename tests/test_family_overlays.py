"""Other weights over SDXL's and over transformers: folders, LoRAs as diffusers and trainers write them, variants.

What diffusers' own pipelines compute with the same files is the reference.
"""

import re
from copy import deepcopy

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from unet_layout import write_folder

from vermouth.backbone import load_backbone
from vermouth.core import VermouthError

PROMPTS, LAYERS = ["a photo of a cat", "a dog"], ["to_q", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("overlays") / "sdxl", "sdxl")


def tuned(model, layers, seed=0):
    "A model with a random LoRA beside its layers, and the LoRA's weights as PEFT names them."
    peft = pytest.importorskip("peft")
    model = deepcopy(model)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=layers)
    beside = peft.get_peft_model(model, config)
    weights = peft.get_peft_model_state_dict(beside)
    return model.eval(), {name.removeprefix("base_model.model."): x.contiguous() for name, x in weights.items()}


def predicted(bb, latents, prompts=PROMPTS):
    return bb.predict(latents, 200, bb.encode_text(prompts))


def test_an_sdxl_lora_is_merged_as_diffusers_runs_it(sdxl, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    unet, weights = tuned(pipe.unet, LAYERS)
    texts = [tuned(model, ["q_proj", "v_proj"], 1) for model in (pipe.text_encoder, pipe.text_encoder_2)]
    names = ("unet_lora_layers", "text_encoder_lora_layers", "text_encoder_2_lora_layers")
    pipe.save_lora_weights(tmp_path, **dict(zip(names, [weights, *(w for _, w in texts)], strict=True)))
    plain, ours = load_backbone(sdxl, "cpu"), load_backbone(sdxl, "cpu", lora=tmp_path)
    theirs = DiffusionPipeline.from_pretrained(sdxl, unet=unet, text_encoder=texts[0][0], text_encoder_2=texts[1][0])
    states, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    condition = ours.encode_text(PROMPTS)
    torch.testing.assert_close(condition.context, states, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(condition.extra["pooled"], pooled, atol=1e-5, rtol=1e-4)
    latents, sizes = torch.randn(2, 4, 8, 8), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = unet(latents, 200, encoder_hidden_states=states, added_cond_kwargs=added).sample
    torch.testing.assert_close(predicted(ours, latents), expected, atol=1e-4, rtol=1e-4)
    assert (predicted(plain, latents) - expected).abs().max() > 0.01 and plain.fingerprint != ours.fingerprint


def original_name(name):
    "A layer of SDXL's U-Net as the original code, and trainers that follow it, call it."
    name = re.sub(r"mid_block\.attentions\.0", "middle_block.1", name)
    down, up = (re.match(rf"{way}_blocks\.(\d)\.attentions\.(\d)", name) for way in ("down", "up"))
    if down:
        name = name.replace(down[0], f"input_blocks.{1 + 3 * int(down[1]) + int(down[2])}.1")
    if up:
        name = name.replace(up[0], f"output_blocks.{3 * int(up[1]) + int(up[2])}.1")
    return name.replace(".", "_")


def test_a_trainers_names_of_blocks_are_those_of_diffusers(sdxl, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    _, weights = tuned(pipe.unet, LAYERS)
    pipe.save_lora_weights(tmp_path / "diffusers", unet_lora_layers=weights)
    kohya = {}
    for name, x in load_file(tmp_path / "diffusers/pytorch_lora_weights.safetensors").items():
        layer, half = re.fullmatch(r"unet\.(.+)\.lora_(A|B)\.weight", name).groups()
        kohya[f"lora_unet_{original_name(layer)}.lora_{'down' if half == 'A' else 'up'}.weight"] = x
    assert {name.split("_")[2] for name in kohya} == {"input", "middle", "output"}
    save_file(kohya, tmp_path / "kohya.safetensors")
    a, b = (load_backbone(sdxl, "cpu", lora=tmp_path / name) for name in ("diffusers", "kohya.safetensors"))
    for x, y in zip(a.unet.state_dict().values(), b.unet.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")  # diffusers reads the same
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, x in pipe.unet.state_dict().items():
        torch.testing.assert_close(b.unet.state_dict()[name], x, atol=1e-6, rtol=1e-5)


def test_another_unet_and_a_variant_over_sdxl(sdxl, tmp_path):
    other = DiffusionPipeline.from_pretrained(write_folder(tmp_path / "turbo", "sdxl-turbo", seed=1))
    other.unet.save_pretrained(tmp_path / "alone")
    other.save_pretrained(tmp_path / "short", variant="fp16")
    latents = torch.randn(2, 4, 8, 8)
    expected = predicted(load_backbone(tmp_path / "turbo", "cpu"), latents)
    for place in ("alone", "turbo", "alone/diffusion_pytorch_model.safetensors"):
        over = load_backbone(sdxl, "cpu", unet=tmp_path / place)
        assert torch.equal(over.unet.conv_out.weight, other.unet.conv_out.weight)
        assert over.name == f"sdxl + unet={place.rpartition('/')[2]}" and over.opened["overlay"]["unet"]
    short = load_backbone(tmp_path / "short", "cpu", variant="fp16")
    torch.testing.assert_close(predicted(short, latents), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(VermouthError, match="variant='fp16': .* has no variants. Leave variant= away"):
        load_backbone(sdxl, "cpu", variant="fp16")


@pytest.mark.parametrize("kind", ["pixart", "sd3", "flux"])
def test_another_transformer_and_a_lora_over_one(kind, transformer_folders, tmp_path):
    folder = transformer_folders[kind]
    pipe = DiffusionPipeline.from_pretrained(folder)
    transformer, weights = tuned(pipe.transformer, ["to_q", "to_v"])
    lora = tmp_path / "lora"
    if hasattr(pipe, "save_lora_weights"):
        pipe.save_lora_weights(lora, transformer_lora_layers=weights)
    else:
        lora.mkdir()
        named = {f"base_model.model.{name}": x for name, x in weights.items()}
        save_file(named, lora / "adapter_model.safetensors")
    ours, plain = load_backbone(folder, "cpu", lora=lora), load_backbone(folder, "cpu")
    latents = torch.randn(2, plain.vae.config.latent_channels, 8, 8)
    plain_output = predicted(plain, latents)
    merged = predicted(ours, latents)
    assert (merged - plain_output).abs().max() > 1e-3
    plain.family.denoiser = transformer  # with PEFT's own layers
    torch.testing.assert_close(merged, predicted(plain, latents), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    over = load_backbone(folder, "cpu", unet=tmp_path)
    assert torch.equal(over.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
    assert over.name.endswith(f"unet={tmp_path.name}") and over.opened["overlay"]["unet"] == str(tmp_path)


def test_overlays_of_another_family_are_refused(sdxl, transformer_folders, tmp_path):
    looks = "unet=.*: holds a model of the class FluxTransformer2DModel. Give SDXL in diffusers format"
    with pytest.raises(VermouthError, match=looks):
        load_backbone(sdxl, "cpu", unet=f"{transformer_folders['flux']}/transformer")
    with pytest.raises(
        VermouthError, match="holds a model of the class UNet2DConditionModel. Give FLUX.1 in diffusers"
    ):
        load_backbone(transformer_folders["flux"], "cpu", unet=f"{sdxl}/unet")
    pair = {"unet.mid_block.a.lora_A.weight": torch.ones(1, 4), "unet.mid_block.a.lora_B.weight": torch.ones(4, 1)}
    save_file(pair, tmp_path / "style.safetensors")
    with pytest.raises(VermouthError, match="changes unet, which this checkpoint does not have. Pass a LoRA"):
        load_backbone(transformer_folders["flux"], "cpu", lora=tmp_path / "style.safetensors")
    with pytest.raises(VermouthError, match="mid_block_a is not in this unet. Pass a LoRA that was trained on"):
        load_backbone(sdxl, "cpu", lora=tmp_path / "style.safetensors")
