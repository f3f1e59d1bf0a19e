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

pytestmark = pytest.mark.slow
PROMPTS, LAYERS = ["a photo of a cat", "a dog"], ["to_q", "to_v", "to_out.0"]
ENDS = r".*transformer_blocks\.[09]\..*(to_q|to_v|to_out\.0)"  # in the first layer and the tenth


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
    _, weights = tuned(pipe.unet, ENDS)
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


def flux_lora(rows, rank=6):
    "A random LoRA in the names of FLUX's original code, as kohya's scripts write it, for layers of these sizes."
    torch.manual_seed(3)
    lora = {}
    for layer, (outputs, inputs) in rows.items():
        lora[f"{layer}.lora_down.weight"] = torch.randn(rank, inputs)
        lora[f"{layer}.lora_up.weight"] = torch.randn(outputs, rank)
        lora[f"{layer}.alpha"] = torch.tensor(rank / 4)
    return lora


def test_a_flux_lora_in_the_original_codes_names_is_merged_as_diffusers_does(transformer_folders, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(transformer_folders["flux"])
    width, double, single = pipe.transformer.inner_dim, "lora_unet_double_blocks_1", "lora_unet_single_blocks_2"
    text = "lora_te1_text_model_encoder_layers_1_self_attn"
    layers = {f"{double}_{stream}_attn_qkv": (3 * width, width) for stream in ("img", "txt")}
    layers |= {f"{double}_{stream}_attn_proj": (width, width) for stream in ("img", "txt")}
    layers |= {f"{double}_img_mlp_0": (4 * width, width), f"{double}_txt_mlp_2": (width, 4 * width)}
    layers |= {f"{double}_img_mod_lin": (6 * width, width), f"{single}_linear2": (width, 5 * width)}
    layers |= {f"{single}_modulation_lin": (3 * width, width)}
    layers |= {f"{text}_q_proj": (16, 16), f"{text}_out_proj": (16, 16)}
    kohya, plain = flux_lora(layers), DiffusionPipeline.from_pretrained(transformer_folders["flux"])
    sparse = kohya[f"{double}_img_attn_qkv.lora_up.weight"]  # two ranks of six for each of query, key and value
    sparse.mul_(torch.block_diag(*[torch.ones(width, 2)] * 3))
    save_file(kohya, tmp_path / "kohya.safetensors")
    ours = load_backbone(transformer_folders["flux"], "cpu", lora=tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    pipe.fuse_lora(components=["transformer", "text_encoder"])
    pipe.unload_lora_weights()
    changed = set()
    for part in ("transformer", "text_encoder"):
        found, before = ours.family.parts[part].state_dict(), getattr(plain, part).state_dict()
        for name, x in getattr(pipe, part).state_dict().items():
            torch.testing.assert_close(found[name], x, atol=1e-5, rtol=1e-5)
            if not torch.equal(x, before[name]):
                changed.add(name)
    assert len(changed) == 2 * 3 + len(layers) - 2


SPELLINGS = {  # of a layer and a half
    "kohya": ("lora_unet_double_blocks_0_img_attn_{}.lora_{}.weight", ("down", "up")),
    "comfy": ("diffusion_model.double_blocks.0.img_attn.{}.lora_{}.weight", ("down", "up")),
    "peft": ("base_model.model.double_blocks.0.img_attn.{}.lora_{}.weight", ("A", "B")),
    "xlabs": ("double_blocks.0.processor.{}_lora1.{}.weight", ("down", "up")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_original_names_gives_the_same_sum(spelling, transformer_folders, tmp_path):
    flux, (form, halves) = transformer_folders["flux"], SPELLINGS[spelling]
    plain, lora, sums = load_backbone(flux, "cpu").transformer, {}, {}
    for layer, outputs in (("qkv", 3 * plain.inner_dim), ("proj", plain.inner_dim)):
        a, b = torch.randn(4, plain.inner_dim), torch.randn(outputs, 4)
        lora |= dict(zip([form.format(layer, half) for half in halves], (a, b), strict=True))
        sums[layer] = b @ a
    save_file(lora, tmp_path / "x.safetensors")
    changed = load_backbone(flux, "cpu", lora=tmp_path / "x.safetensors").transformer
    new, old = changed.transformer_blocks[0].attn, plain.transformer_blocks[0].attn
    parts = [getattr(new, name).weight - getattr(old, name).weight for name in ("to_q", "to_k", "to_v")]
    torch.testing.assert_close(torch.cat(parts), sums["qkv"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new.to_out[0].weight - old.to_out[0].weight, sums["proj"], atol=1e-5, rtol=1e-4)


def test_a_flux_lora_keeps_the_factor_of_its_last_layer_or_is_refused(transformer_folders, tmp_path):
    flux, place = transformer_folders["flux"], tmp_path / "x.safetensors"
    plain = load_backbone(flux, "cpu").transformer
    width, last = plain.inner_dim, "lora_unet_final_layer_linear"
    kohya = flux_lora({"lora_unet_double_blocks_0_img_attn_proj": (width, width), last: (64, width)})
    save_file(kohya, place)
    product = kohya[f"{last}.lora_up.weight"] @ kohya[f"{last}.lora_down.weight"] / 4
    moved = load_backbone(flux, "cpu", lora=place).transformer.proj_out.weight - plain.proj_out.weight
    torch.testing.assert_close(moved, product, atol=1e-5, rtol=1e-4)
    for layer, why in {"single_blocks_0_linear1": "layers or sizes than FLUX", "double_blocks_0_x": "_0_x"}.items():
        save_file(flux_lora({f"lora_unet_{layer}": (7 * width, width)}), place)
        with pytest.raises(VermouthError, match=f"names of FLUX's original code, as .*cannot convert it .*{why}"):
            load_backbone(flux, "cpu", lora=place)
    save_file(flux_lora({"lora_unet_joint_blocks_0_x_block_attn_qkv": (width, width)}), place)
    with pytest.raises(VermouthError, match="Stable Diffusion 3's original code.*knows FLUX's names only.*as unet="):
        load_backbone(transformer_folders["sd3"], "cpu", lora=place)


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
