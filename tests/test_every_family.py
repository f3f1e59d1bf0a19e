"""What a denoiser of every kind must do: each checkpoint is random, saved by diffusers' pipeline, and loaded by name.

All have the published configurations at an eighth of the width; of the transformers' layers some are left.
Shapes and neighbours in a batch are checked beside what is special to a family, in the other files.
"""

import warnings

import published_layout
import pytest
import torch
import torch.nn.functional as F
import unet_layout

from vermouth.backbone import FeatureSettings, load_backbone
from vermouth.data.toybox import Toybox
from vermouth.hooks import place_map
from vermouth.model import Vermouth
from vermouth.store import FeatureStore, extract
from vermouth.train import train_head

pytestmark = pytest.mark.slow
SIZE, T, PROMPTS = 64, 200, ["a photo of a cat", "a dog"]
U_NETS = ("sd1", "sd-turbo", "lcm", "inpainting", "depth", "sdxl", "sdxl-turbo")
KINDS = (*U_NETS, "cleandift", *published_layout.FOLDERS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "Load a kind's checkpoint by its folder's name; what is loaded twice stays."
    root, known = tmp_path_factory.mktemp("families"), {}

    def load(kind, dtype="float32"):
        if (kind, dtype) not in known:
            over, base = {}, "sd1" if kind == "cleandift" else kind
            folder, layout = str(root / base), unet_layout if base in U_NETS else published_layout
            if not (root / base).exists():
                layout.write_folder(folder, base)
            if kind == "cleandift":  # a U-Net alone, over the checkpoint that it was trained from
                unet_layout.pipeline(base, seed=1).unet.save_pretrained(root / kind)
                over = {"unet": root / kind}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of channels that are zero
                known[kind, dtype] = load_backbone(folder, "cpu", dtype, **over)
        return known[kind, dtype]

    return load


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_there_and_the_pass_may_end_at_each(kind, opened, images):
    bb = opened(kind)
    taps, latents, context = bb.taps(SIZE), bb.encode_images(images[:1]), bb.encode_text(PROMPTS[0])
    names, kept, ran = [tap.name for tap in taps], [], []
    everywhere = bb.features_from_latents(latents, context, FeatureSettings(T, names, (), "none"))
    assert [tuple(x.shape[1:]) for x in everywhere] == [tap.shape for tap in taps]
    blocks = [tap.name for tap in taps if tap.kind == "block"]
    name = blocks[len(blocks) // 3]
    place = bb.family.places()[name]
    handle = bb.family.blocks()[-1].register_forward_hook(lambda *_: ran.append(1))
    (alone,) = bb.features_from_latents(latents, context, FeatureSettings(T, [name], (), "none"))
    handle.remove()
    handle = place.module.register_forward_hook(lambda m, a, output: kept.append(place.take(output)))
    bb.predict(latents, T, context)  # all of it
    handle.remove()
    assert torch.equal(alone, place_map(kept[0], place, latents.shape[-2:])) and not ran
    # attention whose maps are read is computed in another way, which rounds otherwise
    torch.testing.assert_close(alone, everywhere[names.index(name)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_half_the_bits(kind, opened, images):
    maps = opened(kind).features(images, PROMPTS, T, size="keep")
    assert [m.shape[1] for m in maps] == opened(kind).feature_dims()
    flipped = opened(kind).features(images.flip(0), PROMPTS[::-1], T, size="keep", batch_size=1)
    short = opened(kind, "bfloat16").features(images, PROMPTS, T, size="keep")
    for whole, other, half in zip(maps, flipped, short, strict=True):
        torch.testing.assert_close(whole, other.flip(0), atol=2e-5, rtol=1e-4)
        assert half.dtype == torch.bfloat16
        assert F.cosine_similarity(whole.flatten(), half.float().flatten(), dim=0) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_and_one_step_of_training(kind, opened, toybox, tmp_path):
    bb, items = opened(kind), Toybox("photo", n=3, seed=5)
    store = extract(bb, items, tmp_path / "store", size=SIZE, quiet=True)
    again = FeatureStore(tmp_path / "store")
    assert again.checksum() == store.checksum()
    for stored, read in zip(again[1], bb.features([items[1].image], "", size=SIZE), strict=True):
        torch.testing.assert_close(stored.float(), read[0], atol=2e-3, rtol=2e-3)
    model = Vermouth.build(backbone=bb, clip=toybox.clip, expert="", prompt="empty", size=SIZE, uhead="pico")
    before = {name: x.clone() for name, x in model.uhead.named_parameters()}
    train_head(model, again, range(3), torch.eye(3, toybox.clip.dim), epochs=1, lr=1e-3, held=0, quiet=True)
    moved = [name for name, x in model.uhead.named_parameters() if not torch.equal(x, before[name])]
    assert len(moved) > len(before) / 2
    assert model.embed([item.image for item in items]).shape == (3, toybox.clip.dim)
