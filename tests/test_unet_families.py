"""SDXL, turbo and consistency models, and U-Nets of more channels as backbones, without their weights.

Random models of the published configurations, saved by diffusers' pipelines and loaded by name.
"""

import json
import shutil
import warnings

import pytest
import torch
from transformer_layout import drop_part
from unet_layout import FOLDERS, write_folder

from vermouth.backbone import load_backbone
from vermouth.checkpoint import build_model
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.families.adapters import family_of
from vermouth.hooks import list_taps, unet_places
from vermouth.model import Vermouth, open_model
from vermouth.store import FeatureStore, extract
from vermouth.visualize import word_maps

pytestmark = pytest.mark.slow
PROMPTS, SIZE = ["a photo of a cat", None], 64
FOUR, THREE = [160, 237, 237, 120], [237, 237, 120]  # channels of the pyramid at an eighth of the width
SDXL = ("sdxl", "sdxl-turbo", "sdxl-inpainting")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    return {name: write_folder(root / name, name) for name in FOLDERS}


@pytest.fixture(scope="module")
def backbones(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others are zero
        return {name: load_backbone(folder, "cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", FOLDERS)
def test_shapes_and_neighbours(name, backbones, images):
    bb = backbones[name]
    maps = bb.features(images, PROMPTS, size="keep")
    assert [m.shape[1] for m in maps] == bb.feature_dims() == (THREE if name in SDXL else FOUR)
    assert [m.shape[-1] for m in maps] == ([2, 4, 8] if name in SDXL else [1, 2, 4, 8])
    alone = bb.features(images.flip(0), PROMPTS[::-1], size="keep", batch_size=1)
    assert max(relative(a.flip(0), b) for a, b in zip(alone, maps, strict=True)) < 1e-5


def test_attention_over_words_at_every_level(backbones, images):
    for name, levels in (("sd1", (0, 1, 2, 3)), ("sdxl", (0, 1))):
        bb = backbones[name]
        bare, with_maps = (bb.features(images, PROMPTS, attention=a, size="keep") for a in ((), ("cross",)))
        for i, (b, w) in enumerate(zip(bare, with_maps, strict=True)):
            assert w.shape[1] - b.shape[1] == 77 * (i in levels) and relative(w[:, : b.shape[1]], b) < 1e-5
            if i in levels:
                assert torch.allclose(w[:, b.shape[1] :].sum(1), torch.ones(()), atol=1e-5)
    words = word_maps(backbones["sdxl"], images[0], "a photo of a cat", size=SIZE)
    assert [word for word, _ in words] == ["a", "photo", "of", "a", "cat"] and words[0][1].shape == (4, 4)
    with pytest.raises(VermouthError, match="level=3: no cross-attention there. Choose 1 or 2"):
        word_maps(backbones["sdxl"], images[0], "a cat", level=3, size=SIZE)


@pytest.mark.parametrize("name, channels", [("inpainting", 9), ("pix2pix", 8), ("depth", 5), ("sdxl-inpainting", 9)])
def test_more_channels_are_zero_and_said_once(name, channels, folders, images):
    with pytest.warns(UserWarning, match=f"unet: takes {channels} channels where the VAE makes 4; the others") as said:
        bb = load_backbone(folders[name], "cpu")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = bb.features(images, PROMPTS, size="keep")
        with torch.no_grad():
            bb.unet.conv_in.weight[:, 4:] = 7.0
        after = bb.features(images, PROMPTS, size="keep")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_one_block_at_a_time_gives_the_same_numbers(folders, backbones, images):
    names = ["up1.attn0.layer1.cross.map", "mid.attn0.layer1.self.q", "down1"]
    moved = load_backbone(folders["sdxl"], "cpu", offload=True)
    assert all(p.is_meta for p in moved.unet.parameters()) and moved.device.type == "cpu"
    for how in ({}, {"stages": names}):
        expected = backbones["sdxl"].features(images, PROMPTS, size="keep", **how)
        got = moved.features(images, PROMPTS, size="keep", **how)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert moved.fingerprint == backbones["sdxl"].fingerprint


def test_a_store_and_a_head(folders, backbones, toybox, photos, tmp_path):
    bb, items = backbones["sdxl"], Toybox("photo", n=3, seed=5)
    store = extract(bb, items, tmp_path / "store", size=SIZE, quiet=True)
    again = FeatureStore(tmp_path / "store")
    assert again.checksum() == store.checksum()
    for stored, read in zip(again[1], bb.features([items[1].image], "", size=SIZE), strict=True):
        assert relative(stored, read[0]) < 2e-3
    model = Vermouth.build(backbone=bb, clip=toybox.clip, expert="", prompt="empty", size=SIZE)
    before = model.uhead.pool.out.weight.detach().clone()
    optimizer = torch.optim.SGD(model.uhead.parameters(), 0.1)
    model(model.read(photos)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.uhead.pool.out.weight)
    assert model.embed(photos).shape == (len(photos), toybox.clip.dim)


def test_a_folder_is_a_model(folders, photos):
    vectors = open_model(folders["sdxl-turbo"], "cpu").embed(photos[:2])
    assert vectors.shape == (2, 160 + 160 + 120) and torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_missing_text_encoder(folders, images, tmp_path):
    shutil.copytree(folders["sdxl"], tmp_path / "xl")
    drop_part(tmp_path / "xl", "text_encoder")
    with pytest.warns(UserWarning, match="text_encoder: not there; its 96 channels of the caption are zero"):
        bb = load_backbone(tmp_path / "xl", "cpu")
    assert not bb.encode_text("a cat").context[..., :96].any()
    assert [m.shape[1] for m in bb.features(images, PROMPTS, size="keep")] == THREE
    assert [word for word, _ in word_maps(bb, images[0], "a cat", size=SIZE)] == ["a", "cat"]
    drop_part(tmp_path / "xl", "text_encoder_2")
    looks = "whose text_encoder_2 is missing. It looks like SDXL, which needs CLIPTextModelWithProjection"
    with pytest.raises(VermouthError, match=looks):
        load_backbone(tmp_path / "xl", "cpu")


def test_parts_of_another_family(folders, tmp_path):
    shutil.copytree(folders["sd1"], tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd/unet")
    shutil.copytree(f"{folders['sdxl']}/unet", tmp_path / "sd/unet")
    with pytest.raises(VermouthError, match="guided by 256 channels of text where the text encoder makes 96"):
        load_backbone(tmp_path / "sd", "cpu")
    config = tmp_path / "sd/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNetSpatioTemporalConditionModel"}))
    with pytest.raises(VermouthError, match="holds a model of the class UNetSpatioTemporalConditionModel. Give Stable"):
        load_backbone(tmp_path / "sd", "cpu")


def test_weights_that_the_configuration_does_not_have(folders, tmp_path):
    shutil.copytree(folders["sdxl"], tmp_path / "xl")
    config = tmp_path / "xl/text_encoder_2/config.json"
    for change, says in (
        ({"hidden_size": 2**20}, "text_encoder_2/"),
        ({"num_hidden_layers": 10**9}, "asks for more num_hidden_layers than its"),
        ({"architectures": ["BertModel"]}, "text_encoder_2/ holds a model of the class BertModel. Give SDXL"),
    ):
        good = config.read_text()
        config.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(VermouthError, match=says) as error:
            load_backbone(tmp_path / "xl", "cpu")
        assert "\n" not in str(error.value)
        config.write_text(good)


def test_full_sizes_are_the_published_ones():
    published = (("sdxl", 2567, (1280, 32, 32)), ("sd1", 860, (1280, 8, 8)), ("sd2.1", 866, (1280, 12, 12)))
    for size, millions, mid in published:
        with torch.device("meta"):
            unet = build_model("UNet2DConditionModel", family_of(size).published[size](1)["unet"])
        assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == millions
        side = unet.config.sample_size
        shapes = {tap.name: tap.shape for tap in list_taps(unet_places(unet), (side, side), 77)}
        assert shapes["mid"] == mid and shapes["up1"][0] == (640 if size == "sdxl" else 1280)
    assert shapes["up3.attn0.cross.map"] == (77, 96, 96)
