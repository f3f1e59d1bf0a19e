"""Folders of U-Net families with random weights, saved by diffusers' own pipelines.

The configurations are the published ones at an eighth of the width, with small vocabularies.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformer_layout import clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from vermouth.families.adapters import family_of

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
UNCHECKED = dict(safety_checker=None, feature_extractor=None)
LCM = dict(time_cond_proj_dim=32)

# name → published size, pipeline, scheduler, what the U-Net has instead, parts that the pipeline wants beside
FOLDERS = {
    "sd1": ("sd1", StableDiffusionPipeline, PNDMScheduler, {}, UNCHECKED),
    "sd-turbo": ("sd2.1-base", StableDiffusionPipeline, EulerDiscreteScheduler, {}, UNCHECKED),
    "lcm": ("sd1", LatentConsistencyModelPipeline, LCMScheduler, LCM, UNCHECKED),
    "inpainting": ("sd1", StableDiffusionInpaintPipeline, PNDMScheduler, dict(in_channels=9), UNCHECKED),
    "pix2pix": ("sd1", StableDiffusionInstructPix2PixPipeline, PNDMScheduler, dict(in_channels=8), UNCHECKED),
    "depth": (
        "sd2.1-base",
        StableDiffusionDepth2ImgPipeline,
        PNDMScheduler,
        dict(in_channels=5),
        dict(depth_estimator=None, feature_extractor=None),
    ),
    "sdxl": ("sdxl", StableDiffusionXLPipeline, EulerDiscreteScheduler, {}, {}),
    "sdxl-turbo": ("sdxl-turbo", StableDiffusionXLPipeline, EulerAncestralDiscreteScheduler, {}, {}),
    "sdxl-inpainting": ("sdxl", StableDiffusionXLInpaintPipeline, DDIMScheduler, dict(in_channels=9), {}),
}


def text_model(settings, words, projected):
    "A text encoder of CLIP's with a small vocabulary."
    config = CLIPTextConfig(**settings | dict(vocab_size=words, bos_token_id=words - 2, pad_token_id=words - 1))
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def pipeline(name, seed=0):
    "A pipeline of one of `FOLDERS`."
    size, made_by, scheduler, changes, beside = FOLDERS[name]
    configs, tokenizer = family_of(size).published[size](8), clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(**configs["unet"] | changes).eval(),
            "vae": AutoencoderKL(**configs["vae"]).eval(),
            "text_encoder": text_model(configs["text_encoder"], len(tokenizer), False),
            "tokenizer": tokenizer,
            "scheduler": scheduler(**SCHEDULE),
        }
        if "text_encoder_2" in configs:
            second = clip_tokenizer("!")
            parts["text_encoder_2"] = text_model(configs["text_encoder_2"], len(second), True)
            parts["tokenizer_2"] = second
    return made_by(**parts, **beside)


def write_folder(folder, name, seed=0):
    "A complete folder in diffusers format; returns its path as a string."
    pipeline(name, seed).save_pretrained(folder)
    return str(folder)
