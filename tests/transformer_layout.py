"""PixArt, Stable Diffusion 3 and FLUX folders with random weights, saved by diffusers' own pipelines.

The configurations are the published ones with fewer and narrower layers, and with small vocabularies.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

KINDS = ("pixart", "pixart-1024", "pixart-sigma", "sd3", "sd3.5", "flux", "flux-schnell")
HEADS, HEAD_DIM, TEXT = 3, 16, 32  # of transformers, and channels of T5

# where they differ from each other and from diffusers' defaults
PIXART = dict(caption_channels=TEXT, num_layers=5, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)
PIXART |= dict(cross_attention_dim=HEADS * HEAD_DIM, sample_size=8)
SD3 = dict(num_layers=5, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, joint_attention_dim=TEXT)
SD3 |= dict(caption_projection_dim=HEADS * HEAD_DIM, pooled_projection_dim=16 + 24, sample_size=8)
SD3 |= dict(pos_embed_max_size=24)
FLUX = dict(num_layers=2, num_single_layers=3, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)
FLUX |= dict(joint_attention_dim=TEXT, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6))


def t5_tokenizer(length):
    "T5's tokenizer with single letters and a few words; `length` is its model_max_length."
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-"
    words = ["▁", *letters, *(f"▁{c}" for c in letters), "▁cat", "▁dog", "▁photo", "▁of", "▁a"]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -2.0 - 0.01 * i) for i, w in enumerate(words))]
    return T5Tokenizer(vocab=scores, extra_ids=0, additional_special_tokens=None, model_max_length=length)


def clip_tokenizer(pad="<|endoftext|>"):
    "CLIP's tokenizer with the symbols of all bytes and one word."
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(s + "</w>" for s in symbols), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=77)


def t5(words):
    "T5 v1.1's encoder."
    settings = dict(d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=words)
    return T5EncoderModel(T5Config(**settings, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()


def clip(words, width, projected, activation="quick_gelu"):
    "CLIP's text encoder, with its projection or without; end of text is the last word."
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=width,
        vocab_size=words,
        bos_token_id=words - 2,
        eos_token_id=2,  # as published: the highest token is the end
        pad_token_id=words - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels, **settings):
    "A VAE of 8 pixels a latent."
    quantised = {} if channels == 4 else {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        block_out_channels=[8, 8, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **quantised,
        **settings,
    ).eval()


def pixart(kind):
    sigma, words = kind == "pixart-sigma", t5_tokenizer(300 if kind == "pixart-sigma" else 120)
    more = {"pixart-1024": {"sample_size": 128}, "pixart-sigma": {"interpolation_scale": 2}}.get(kind, {})
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=words,
        text_encoder=t5(len(words)),
        vae=vae(4, scaling_factor=0.13025 if sigma else 0.18215),
        transformer=PixArtTransformer2DModel(**PIXART | more).eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def sd3(kind):
    words, first, second = t5_tokenizer(512), clip_tokenizer(), clip_tokenizer("!")
    more = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)} if kind == "sd3.5" else {}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3 | more).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(len(first), 16, True),
        tokenizer=first,
        text_encoder_2=clip(len(second), 24, True, "gelu"),
        tokenizer_2=second,
        text_encoder_3=t5(len(words)),
        tokenizer_3=words,
    )


def flux(kind):
    words, first, dev = t5_tokenizer(512), clip_tokenizer(), kind == "flux"
    shift = dict(shift=3.0, use_dynamic_shifting=True) if dev else dict(shift=1.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(len(first), 16, False),
        tokenizer=first,
        text_encoder_2=t5(len(words)),
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(**FLUX, guidance_embeds=dev).eval(),
    )


def stir_norms(transformer):
    "Let AdaLN layers do something, as in a trained model."
    with torch.no_grad():
        for name, x in transformer.named_parameters():
            if "norm" in name or "adaln" in name:
                x.add_(0.05 * torch.randn_like(x))


def pipeline(kind, seed=0):
    "A tiny pipeline of one of `KINDS`."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {"p": pixart, "s": sd3, "f": flux}[kind[0]](kind)
        stir_norms(made.transformer)
    made.set_progress_bar_config(disable=True)
    return made


def write_folder(folder, kind, seed=0):
    "A complete folder in diffusers format; returns its path as a string."
    pipeline(kind, seed).save_pretrained(folder)
    return str(folder)


def drop_part(folder, part):
    "Remove a text encoder and its tokenizer, as people do to save memory."
    index = json.loads((Path(folder) / "model_index.json").read_text())
    for name in (part, part.replace("text_encoder", "tokenizer")):
        index[name] = [None, None]
        for path in (Path(folder) / name).iterdir():
            path.unlink()
        (Path(folder) / name).rmdir()
    (Path(folder) / "model_index.json").write_text(json.dumps(index))
