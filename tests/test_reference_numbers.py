"Stable Diffusion 1.x's features stay what they are, and an image that is encoded in tiles keeps its latents."

import pytest
import torch

from vermouth import backbone as module
from vermouth.backbone import load_backbone, random_backbone
from vermouth.data.toybox import Toybox
from vermouth.images import image_batch

# mean and mean square of the levels of `mid`, `up` with maps: SD 1.5's shapes at an eighth of the width, seed 0
LEVELS = (
    (-0.045740705, 0.51058805),
    (0.0046087089, 0.014420363),
    (-0.004747943, 0.074708261),
    (0.019011084, 0.22251599),
)


def test_features_of_stable_diffusion_1_are_what_they_were():
    bb = random_backbone("sd1", "cpu", seed=0, width=8)
    latents = torch.linspace(-2, 2, 4 * 16 * 16).view(1, 4, 16, 16).sin()
    context = torch.linspace(-2, 2, 77 * 96).view(1, 77, 96).cos()
    found = [[m.mean().item(), m.square().mean().item()] for m in bb.features_from_latents(latents, context)]
    assert torch.allclose(torch.tensor(found), torch.tensor(LEVELS), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def toybox():
    return load_backbone("toybox", "cpu")


def test_a_large_image_is_encoded_in_tiles_with_the_same_latents(toybox, monkeypatch):
    image = image_batch([Toybox("scene", n=1)[0].image], (320, 640))
    whole, seen = toybox.encode_images(image), []
    before = {key: value for key, value in vars(toybox.vae).items() if "til" in key}
    with toybox.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:]))):
        monkeypatch.setattr(module, "LARGE", 256 * 256)
        tiled = toybox.encode_images(image)
    assert len(seen) > 1 and max(max(shape) for shape in seen) <= 512
    assert tiled.shape == whole.shape
    # a tile has its own statistics in group normalisation, so the two are close, and not the same
    assert torch.nn.functional.cosine_similarity(tiled.flatten(), whole.flatten(), dim=0) > 0.98
    assert {key: value for key, value in vars(toybox.vae).items() if "til" in key} == before


def test_settings_of_tiles_are_restored_after_an_error(toybox, monkeypatch):
    before = {key: value for key, value in vars(toybox.vae).items() if "til" in key}
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(toybox.vae, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toybox.encode_images(torch.zeros(1, 3, 64, 64), value_range=(-1, 1))
    assert {key: value for key, value in vars(toybox.vae).items() if "til" in key} == before
