"""PixArt, Stable Diffusion 3 and FLUX as backbones, without their weights."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from transformer_layout import FLUX, drop_part, pipeline, write_folder

from vermouth.backbone import load_backbone, random_backbone
from vermouth.checkpoint import load_parts
from vermouth.core import VermouthError
from vermouth.families.adapters import adapt, family_of
from vermouth.families.base import random_parts
from vermouth.hooks import list_taps, table_dims
from vermouth.model import Vermouth
from vermouth.train import train_head
from vermouth.visualize import word_maps

SIZE, T = 64, 200
ONE_OF_EACH = ["pixart", "sd3", "flux"]
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


@pytest.mark.parametrize("kind", ["pixart", "sd3.5", "flux"])
def test_every_name_resolves_and_a_pass_that_ends_early_gives_the_same(kind, backbones, images):
    bb = backbones[kind]
    taps = bb.taps(SIZE)
    names = [tap.name for tap in taps]
    assert len(names) == len(set(names))
    assert {"block", "modulated", "attention.cross", "map", "q", "k", "v", "mlp"} <= {tap.kind for tap in taps}
    together = bb.features(images, PROMPTS, T, names, size="keep")  # ends with the last place
    for tap, x in zip(taps, together, strict=True):
        assert tuple(x.shape[1:]) == tap.shape, tap
    counted = []
    handle = bb.family.blocks()[-1].register_forward_hook(lambda *_: counted.append(1))
    for i in (0, len(names) // 3, len(names) // 2):
        (alone,) = bb.features(images, PROMPTS, T, [names[i]], size="keep")
        assert torch.equal(alone, together[i]), names[i]
    handle.remove()
    assert not counted, "the pass went on to the last block"
    with pytest.raises(VermouthError, match="no such place"):
        bb.features(images, PROMPTS, T, ["block99.mlp"], size="keep")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_features_do_not_depend_on_the_batch(kind, backbones, images):
    bb = backbones[kind]
    options = {"stages": ("modulated", "discard"), "attention": ("cross",), "size": "keep"}
    both = bb.features(images, PROMPTS, T, **options)
    flipped = bb.features(images.flip(0), PROMPTS[::-1], T, **options)
    single = bb.features(images[1:], PROMPTS[1], T, **options)
    assert [m.shape[1] for m in both] == bb.feature_dims(("modulated", "discard"), ("cross",))
    assert [m.shape[-1] for m in both] == [SIZE // s for s in (64, 32, 16, 8)]
    for a, b, c in zip(both, flipped, single, strict=True):
        torch.testing.assert_close(a, b.flip(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a[1:], c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_an_inversion_ends_near_where_the_noise_is(kind, backbones, images):
    bb = backbones[kind]
    latents, states = bb.encode_images(images), bb.encode_text(PROMPTS)
    up = bb.ddim(latents, list(range(0, 401, 40)), states)
    down = bb.ddim(up, list(range(400, -1, -40)), states)
    assert (down - latents).norm() < 0.4 * (up - latents).norm()
    maps = bb.features(images, PROMPTS, T, noise="ddim", ddim_steps=3, size="keep")
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_head_trains_on_it(kind, folders, toybox, photos):
    bare = {"expert": "", "captioner": "", "prompt": "empty"}
    model = Vermouth.build(folders[kind], clip=toybox.clip, size=SIZE, device="cpu", **bare)
    maps = model.backbone.features(photos, "", size=SIZE)
    before = {name: x.clone() for name, x in model.uhead.state_dict().items()}
    history = train_head(model.uhead, maps, range(5), torch.eye(5, toybox.clip.dim), epochs=1, held=0, quiet=True)
    assert np.isfinite(history.train_loss).all()
    moved = [name for name, x in model.uhead.named_parameters() if not torch.equal(x, before[name])]
    assert len(moved) > len(before) / 2
    assert model.embed(photos).shape == (len(photos), toybox.clip.dim)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_words_have_maps(kind, backbones, images):
    maps = word_maps(backbones[kind], images[0], "a photo of a cat", size=SIZE)
    assert [word for word, _ in maps] == ["a", "photo", "of", "a", "cat"]
    # "cat" is the fifth token of T5; of CLIP, which spells "photo" and "of" here, the eleventh
    bb, channels = backbones[kind], {"s": [10, 77 + 4]}.get(kind[0], [4])
    level = bb.features(images[0], "a photo of a cat", T, ("mid", "up"), ("up_cross",), size=SIZE)[2]
    torch.testing.assert_close(maps[4][1], level[0, -bb.tokens :][channels].sum(0))
    assert level[0, -bb.tokens :].sum(0).max() < 1.0001


def test_a_long_caption_counts_to_its_end(backbones, images):
    long = "a dog and " * 45 + "a cat"
    for kind in ("pixart-sigma", "sd3", "flux"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # T5 reads all of it
            whole = backbones[kind].features(images, long, T, ["block1"], size="keep")[0]
            other = backbones[kind].features(images, long[:-3] + "dog", T, ["block1"], size="keep")[0]
        assert not torch.equal(whole, other)


def test_sd3_without_t5_says_so_and_reads_zeros(folders, images, tmp_path):
    folder = write_folder(tmp_path / "without", "sd3")
    drop_part(folder, "text_encoder_3")
    with pytest.warns(UserWarning, match="T5 is missing") as caught:
        bb = load_backbone(folder, "cpu")
        states = bb.encode_text(PROMPTS)
        maps = bb.features(images, PROMPTS, T, ["block1"], size="keep")
    assert len([w for w in caught if "T5" in str(w.message)]) == 1
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(states.context, theirs)
    torch.testing.assert_close(states.extra["pooled"], pooled)
    whole = load_backbone(folders["sd3"], "cpu").features(images, PROMPTS, T, ["block1"], size="keep")
    assert not torch.equal(maps[0], whole[0])


# parameters in billions, as published; width, patches a side at the published size, tokens of a caption
FULL = {
    "pixart-512": (0.61, 1152, 32, 120),
    "pixart-sigma": (0.61, 1152, 64, 300),
    "sd3-medium": (2.03, 1536, 64, 333),
    "sd3.5-large": (8.06, 2432, 64, 333),
    "flux-dev": (11.90, 3072, 64, 512),
    "flux-schnell": (11.89, 3072, 64, 512),
}


@pytest.mark.parametrize("size", FULL)
def test_full_sizes_are_the_published_ones(size):
    billions, width, side, tokens = FULL[size]
    family = adapt(random_parts(family_of(size), size, device="meta"))
    assert round(sum(p.numel() for p in family.denoiser.parameters()) / 1e9, 2) == billions
    taps = list_taps(family.places(), family.sample_size, family.tokens)
    shapes = {tap.name: tap.shape for tap in taps}
    assert shapes["block0"] == shapes["block1.modulated.discard"] == (width, side, side)
    assert {shapes[name] for name in shapes if name.endswith(".map")} == {(tokens, side, side)}
    if size.startswith("flux"):
        assert shapes["single37.mlp"] == (4 * width, side, side) and len(family.blocks()) == 57
    channels = {name: place.channels for name, place in family.places().items()}
    dims = table_dims(channels, family.table, family.tokens, ("mid", "up"), ("up_cross",))
    assert dims == [width, width + tokens, width + tokens, width]


def test_a_random_one_of_a_published_size_is_read():
    bb = random_backbone("pixart-1024", width=8)
    maps = bb.features(torch.zeros(1, 3, 128, 128), size="keep", value_range=(-1, 1))
    assert [m.shape[1] for m in maps] == bb.feature_dims()


OTHERS = {
    "HunyuanDiTPipeline": ({"transformer": "HunyuanDiT2DModel", "text_encoder": "BertModel"}, "is HunyuanDiT2DModel"),
    "WanPipeline": ({"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}, "is WanTransformer3DModel"),
    "KandinskyV22Pipeline": ({"unet": "UNet2DConditionModel", "movq": "VQModel"}, "vae is missing"),
    "Flux2Pipeline": ({"transformer": "Flux2Transformer2DModel"}, "is Flux2Transformer2DModel"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_named(name, tmp_path):
    parts, missing = OTHERS[name]
    index = {"_class_name": name} | {part: ["diffusers", value] for part, value in parts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(VermouthError, match=rf"holds a {name} whose .*{missing}.*Give one of: .*FLUX"):
        load_backbone(tmp_path)


def test_parts_that_do_not_fit_are_refused(folders):
    parts = {kind: load_parts(folders[kind], torch.float32)[0] for kind in ("sd3", "flux")}
    for kind in parts:
        parts[kind].pop("name")
    with pytest.raises(VermouthError, match="takes 64 channels of packed latents where the VAE makes 16"):
        adapt(parts["flux"] | {"vae": pipeline("pixart").vae})
    with pytest.raises(VermouthError, match="takes 40 channels of pooled text where the pair of CLIPs makes 48"):
        adapt(parts["sd3"] | {"text_encoder": parts["sd3"]["text_encoder_2"]})
    wide = FluxTransformer2DModel(**FLUX, in_channels=96, out_channels=64)
    with pytest.raises(VermouthError, match="Fill, Canny and Depth"):
        adapt(parts["flux"] | {"transformer": wide})


def test_pictures_without_positions_are_refused(backbones):
    with pytest.raises(VermouthError, match="more than 384 pixels a side have no positions here. Pass size=384"):
        backbones["sd3"].features(torch.zeros(1, 3, 448, 64), size="keep", value_range=(-1, 1))


def test_pickled_weights_are_not_read(folders, tmp_path):
    shutil.copytree(folders["flux"], tmp_path / "flux")
    for path in (tmp_path / "flux" / "transformer").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(VermouthError, match="no safetensors weights in transformer/"):
        load_backbone(tmp_path / "flux")


def test_one_block_at_a_time_reads_the_same(folders, backbones, images):
    for kind in ONE_OF_EACH:
        names = ["block1", "block1.modulated"]
        there = load_backbone(folders[kind], "cpu", offload=True).features(images, PROMPTS, T, names, size="keep")
        for a, b in zip(there, backbones[kind].features(images, PROMPTS, T, names, size="keep"), strict=True):
            torch.testing.assert_close(a, b)
