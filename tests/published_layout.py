"""Transformers of the published configurations at an eighth of the width, saved by diffusers' own pipelines.

Two things do not shrink with the width: a head's channels (72, 64, and 128 in FLUX, whose positions divide them) and
the number of layers, which makes 187 million weights of FLUX's 57. So some of the layers are left, the head is whole.
"""

import diffusers
import torch
from diffusers import FluxPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline
from transformer_layout import clip_tokenizer, stir_norms, t5_tokenizer

from vermouth.checkpoint import build_model
from vermouth.families.adapters import family_of
from vermouth.families.kinds import tokenizer_of

FLUX = {"num_layers": 2, "num_single_layers": 4}  # of 19 and 38
# kind → published size, pipeline, what is left of the layers, tokens of T5's tokenizer
FOLDERS = {
    "pixart": ("pixart-512", PixArtAlphaPipeline, {"num_layers": 7}, 120),
    "pixart-sigma": ("pixart-sigma", PixArtSigmaPipeline, {"num_layers": 7}, 300),
    "sd3": ("sd3-medium", StableDiffusion3Pipeline, {"num_layers": 6}, 512),
    "sd3.5": ("sd3.5-medium", StableDiffusion3Pipeline, {"num_layers": 6, "dual_attention_layers": (0, 1, 2)}, 512),
    "flux": ("flux-dev", FluxPipeline, FLUX, 512),
    "flux-schnell": ("flux-schnell", FluxPipeline, FLUX, 512),
}


def text_parts(encoder, name, config, length):
    "A text encoder and its tokenizer, with a small vocabulary."
    clip = name != "T5EncoderModel"
    words = clip_tokenizer("!" if encoder == "text_encoder_2" else "<|endoftext|>") if clip else t5_tokenizer(length)
    own = {"vocab_size": len(words)}
    if clip:
        own |= {"bos_token_id": len(words) - 2, "pad_token_id": len(words) - 1}
    return {encoder: build_model(name, config | own).eval(), tokenizer_of(encoder): words}


def write_folder(folder, kind, seed=0):
    "A complete folder in diffusers format; returns its path as a string."
    size, made_by, left, length = FOLDERS[kind]
    family = family_of(size)
    configs = family.published[size](8)
    configs["transformer"] |= left
    parts = {"scheduler": getattr(diffusers, family.kind.scheduler)(**configs["scheduler"])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, (name, *_) in family.kind.weights.items():
            if part in family.kind.encoders:
                parts |= text_parts(part, name, configs[part], length)
            else:
                parts[part] = build_model(name, configs[part]).eval()
        stir_norms(parts["transformer"])
    made_by(**parts).save_pretrained(folder)
    return str(folder)
