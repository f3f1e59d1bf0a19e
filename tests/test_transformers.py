"""PixArt, Stable Diffusion 3 and FLUX read what modules of diffusers' own pipelines compute."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformer_layout import KINDS

from vermouth.diffusion import noise_like

SIZE, T = 64, 200
PROMPTS = ["A photo of a cat", "a dog"]


@pytest.fixture
def folders(transformer_folders):
    return transformer_folders


@pytest.fixture
def backbones(transformers):
    return transformers


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noised(pipe, images):
    "Latents at time step 200 as the pipeline's own parts make them, with what the transformer is told about the time."
    latents = pipe.vae.encode(images).latent_dist.mean
    latents = (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    noise = noise_like(latents)
    if "PixArt" in type(pipe).__name__:
        training = DDPMScheduler.from_config(pipe.scheduler.config)
        return training.add_noise(latents, noise, torch.tensor([T])), torch.tensor([T, T])
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 1000), mu=calculate_shift(latents[0, 0].numel() // 4))
    sigma = pipe.scheduler.sigmas[999 - T]
    return (1 - sigma) * latents + sigma * noise, torch.stack([sigma, sigma]) * 1000


def run_pixart(pipe, latents, time):
    states, mask, *_ = pipe.encode_prompt(PROMPTS, False, max_sequence_length=pipe.tokenizer.model_max_length)
    conditions = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == 128:
        conditions = {"resolution": torch.tensor([[SIZE, SIZE]] * 2), "aspect_ratio": torch.ones(2, 1)}
    return pipe.transformer(
        latents,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=time,
        added_cond_kwargs=conditions,
    ).sample[:, :4]


def run_sd3(pipe, latents, time):
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    return pipe.transformer(latents, timestep=time, encoder_hidden_states=states, pooled_projections=pooled).sample


def run_flux(pipe, latents, time):
    states, pooled, text_ids = pipe.encode_prompt(PROMPTS)
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, *latents.shape),
        timestep=time / 1000,
        guidance=torch.full([2], 3.5) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(2, latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float32),
    ).sample
    return pipe._unpack_latents(out, SIZE, SIZE, 8)


RUN = {"p": run_pixart, "s": run_sd3, "f": run_flux}
# place → module of diffusers, which of its outputs or what it is given, and whether the text comes first in it
MODULES = {
    "p": {
        "block0": ("transformer_blocks.0", 0, False),
        "block0.modulated": ("transformer_blocks.1.attn1", "given", False),
        "block4.modulated": ("proj_out", "given", False),
        "block1.self": ("transformer_blocks.1.attn1", 0, False),
        "block1.self.k": ("transformer_blocks.1.attn1.to_k", 0, False),
        "block2.cross": ("transformer_blocks.2.attn2", 0, False),
        "block2.cross.q": ("transformer_blocks.2.attn2.to_q", 0, False),
        "block3.mlp": ("transformer_blocks.3.ff", 0, False),
        "block4": ("transformer_blocks.4", 0, False),
    },
    "s": {
        "block0": ("transformer_blocks.0", 1, False),
        "block0.modulated": ("transformer_blocks.1.norm1", 0, False),
        "block1.joint": ("transformer_blocks.1.attn", 0, False),
        "block2.joint.q": ("transformer_blocks.2.attn.to_q", 0, False),
        "block3.joint.v": ("transformer_blocks.3.attn.to_v", 0, False),
        "block3.mlp": ("transformer_blocks.3.ff", 0, False),
        "block4": ("transformer_blocks.4", 1, False),
        "block4.modulated": ("norm_out", 0, False),
    },
    "f": {
        "block0": ("transformer_blocks.0", 1, False),
        "block1.joint": ("transformer_blocks.1.attn", 0, False),
        "block1.joint.k": ("transformer_blocks.1.attn.to_k", 0, False),
        "block1.mlp": ("transformer_blocks.1.ff", 0, False),
        "block1.modulated": ("single_transformer_blocks.0.norm", 0, True),
        "single0.joint": ("single_transformer_blocks.0.attn", 0, True),
        "single1.joint.q": ("single_transformer_blocks.1.attn.to_q", 0, True),
        "single1.mlp": ("single_transformer_blocks.1.act_mlp", 0, True),
        "single2": ("single_transformer_blocks.2", 1, False),
        "single2.modulated": ("norm_out", 0, False),
    },
}


def plainly(pipe, images, modules):
    "What diffusers' modules return in a full pass, as (B,C,h,w), and what the transformer predicts."
    kept = {}

    def keep(name, index, after_text):
        def hook(module, args, output):
            x = args[0] if index == "given" else output[index] if isinstance(output, tuple) else output
            kept[name] = x[:, -((SIZE // 16) ** 2) :] if after_text else x

        return hook

    named = dict(pipe.transformer.named_modules())
    handles = [named[m].register_forward_hook(keep(name, i, text)) for name, (m, i, text) in modules.items()]
    with torch.no_grad():
        prediction = RUN[{"P": "p", "S": "s", "F": "f"}[type(pipe).__name__[0]]](pipe, *noised(pipe, images))
    for handle in handles:
        handle.remove()
    return {name: x.mT.unflatten(2, (SIZE // 16, SIZE // 16)) for name, x in kept.items()}, prediction


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_what_diffusers_modules_return(kind, folders, backbones, images):
    pipe, modules = DiffusionPipeline.from_pretrained(folders[kind]), MODULES[kind[0]]
    theirs, prediction = plainly(pipe, images, modules)
    bb = backbones[kind]
    for name in modules:
        (ours,) = bb.features(images, PROMPTS, T, [name], size="keep")
        torch.testing.assert_close(ours, theirs[name], atol=2e-5, rtol=2e-5)
    together = bb.features(images, PROMPTS, T, list(modules), size="keep")
    for name, ours in zip(modules, together, strict=True):
        torch.testing.assert_close(ours, theirs[name], atol=2e-5, rtol=2e-5)
    latents, _ = noised(pipe, images)
    torch.testing.assert_close(bb.predict(latents, T, bb.encode_text(PROMPTS)), prediction, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_softmax_of_diffusers_attention(kind, folders, backbones, images, monkeypatch):
    pipe, weights = DiffusionPipeline.from_pretrained(folders[kind]), []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, **options):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        weights.append((scores if attn_mask is None else scores + attn_mask).softmax(-1).mean(1))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    bb, places = backbones[kind], (SIZE // 16) ** 2
    with torch.no_grad():
        latents, time = noised(pipe, images)
        run = RUN[kind[0]]
        encode = pipe.encode_prompt  # of which no attention is recorded

        def encode_first(*args, **options):
            out = encode(*args, **options)
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
            return out

        monkeypatch.setattr(pipe, "encode_prompt", encode_first)
        run(pipe, latents, time)
        monkeypatch.undo()
    if kind[0] == "p":
        wanted = {f"block{i}.cross.map": w for i, w in enumerate(weights[1::2])}
    elif kind[0] == "s":  # the image stands first in its attention
        joint = [w for w in weights if w.shape[-1] > places]
        wanted = {f"block{i}.joint.map": w[:, :places, places:] for i, w in enumerate(joint)}
    else:  # and last in this one
        names = [f"block{i}" for i in range(2)] + [f"single{i}" for i in range(3)]
        text = bb.tokens
        wanted = {f"{name}.joint.map": w[:, text:, :text] for name, w in zip(names, weights, strict=True)}
    assert len(wanted) == 5
    for name, theirs in wanted.items():
        (ours,) = bb.features(images, PROMPTS, T, [name], size="keep")
        torch.testing.assert_close(ours.flatten(2).mT, theirs, atol=2e-6, rtol=2e-5)
    table = bb.family.table.attention["cross"]
    pyramid = bb.features(images, PROMPTS, T, ("blocks",), ("cross",), size="keep")
    (own,) = bb.features(images, PROMPTS, T, [table[2] + "." + next(iter(wanted)).split(".", 1)[1]], size="keep")
    torch.testing.assert_close(pyramid[2][:, -bb.tokens :], own)
