"How an expert joins the pyramid under the paper's protocol, against the same steps written out."

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import vermouth.expert
from vermouth.expert import TIMM_NAMES, Adapters, load_expert

DIMS, STRIDES = (24, 20, 16, 12), (64, 32, 16, 8)
SIDES = (4, 8, 16, 32)  # of the levels, for images of 256 px


@pytest.fixture(scope="module")
def images():
    "Of double precision, as the networks below: two ways to sum then agree to 1e-6 after any number of layers."
    return (torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(3)) * 2 - 1).double()


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(4)
    return [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip(DIMS, SIDES, strict=True)]


def normalised(images):
    "As torchvision's networks take them."
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]


def adapted(adapters, level, x):
    down, up = (p for p in adapters.adapters[str(level)].parameters())
    assert down.shape == (x.shape[1] // 4, x.shape[1], 1, 1) and up.shape == (x.shape[1], x.shape[1] // 4, 1, 1)
    return F.conv2d(F.relu(F.conv2d(x, down)), up)


def joined(x, m, normalise):
    if normalise:
        x, m = x / x.norm(dim=1, keepdim=True), m / m.norm(dim=1, keepdim=True)
    return torch.cat([x, m], 1)


@pytest.mark.parametrize("normalise", [False, True])
def test_resnet_18_joins_the_three_upper_levels(images, pyramid, normalise):
    expert = load_expert("resnet18", pretrained=False, device="cpu", protocol="paper").double()
    adapters = Adapters(expert, DIMS, STRIDES, protocol="paper", normalise=normalise).eval().double()
    plain = torchvision.models.resnet18().eval().double()
    plain.load_state_dict(expert.net.state_dict() | {k: v for k, v in plain.state_dict().items() if k[:3] == "fc."})
    with torch.no_grad():
        x = plain.layer1(plain.maxpool(plain.relu(plain.bn1(plain.conv1(normalised(images))))))
        finest = plain.layer2(x)
        middle = plain.layer3(finest)
        lowest = plain.layer4(middle)
        want = [pyramid[0]]
        for level, m in ((1, lowest), (2, middle), (3, finest)):
            want.append(joined(pyramid[level], adapted(adapters, level, m), normalise))
        got = adapters(pyramid, expert(images))
    assert adapters.joined_dims == (24, 20 + 512, 16 + 256, 12 + 128)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_published_weights_are_torchvision_s_first():
    assert TIMM_NAMES["resnet18"] == "resnet18.tv_in1k"


def blocks_of(net, x, after):
    "A plain vision transformer: patches, class token, positions, blocks; each map without the class token."
    grid = [n // net.patch_embed.patch_size[0] for n in x.shape[-2:]]
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), net.patch_embed.proj(x).flatten(2).mT], 1) + net.pos_embed
    maps = []
    for block in net.blocks:
        x = block(x)
        maps.append(after(x)[:, 1:].mT.unflatten(2, grid))
    return [maps[i] for i in (11, 8, 5, 2)]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("final", [True, False], ids=["as DINO", "as DINOv2"])
def test_a_transformer_joins_all_four_levels(images, pyramid, final, normalise, monkeypatch):
    "A small one in the place of ViT-B: 12 blocks too. Of DINO the maps pass the final normalisation."
    name = "vit_tiny_patch16_224.augreg_in21k"
    monkeypatch.setattr(vermouth.expert, "NORMALISED", (name,) if final else ())
    torch.manual_seed(5)
    expert = load_expert(name, pretrained=False, device="cpu", protocol="paper").double()
    plain = timm.create_model(name).eval().double()
    lacking = plain.load_state_dict(expert.net.model.state_dict(), strict=False).missing_keys
    assert lacking == [*(() if final else ("norm.weight", "norm.bias")), "head.weight", "head.bias"]
    if final:
        with torch.no_grad():
            for p in (*plain.norm.parameters(), *expert.net.model.norm.parameters()):
                p.copy_(torch.linspace(0.5, 2, len(p)))
    adapters = Adapters(expert, DIMS, STRIDES, protocol="paper", normalise=normalise).eval().double()
    with torch.no_grad():
        small = F.interpolate(images.float(), (224, 224), mode="bilinear", align_corners=False, antialias=False)
        maps = blocks_of(plain, small.double(), plain.norm if final else lambda x: x)  # this one was trained on [-1, 1]
        want = []
        for level, (m, side) in enumerate(zip(maps, SIDES, strict=True)):
            m = F.interpolate(m, (side, side), mode="bilinear", align_corners=False)
            want.append(joined(pyramid[level], adapted(adapters, level, m), normalise))
        got = adapters(pyramid, expert(images))
    assert adapters.joined_dims == tuple(c + 192 for c in DIMS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_final_normalisation_is_dino_s_and_not_dinov2_s():
    assert list(vermouth.expert.NORMALISED) == [TIMM_NAMES["dino_vitb16"]]


def test_what_reads_otherwise_has_another_fingerprint():
    "A store of one protocol's maps is not taken for the other's; ResNets are read alike."
    prints = {}
    for name in ("vit_tiny_patch16_224", "resnet10t"):
        for protocol in ("ours", "paper"):
            torch.manual_seed(0)
            prints[name, protocol] = load_expert(name, pretrained=False, device="cpu", protocol=protocol).fingerprint
    assert prints["vit_tiny_patch16_224", "ours"] != prints["vit_tiny_patch16_224", "paper"]
    assert prints["resnet10t", "ours"] == prints["resnet10t", "paper"]


def test_ours_is_what_it_was(images, pyramid):
    "Biases, and the adapter before the resize."
    expert = load_expert("resnet10t", pretrained=False, device="cpu").double()
    adapters = Adapters(expert, DIMS, STRIDES).double()
    maps = expert(images[..., :200, :200])
    with torch.no_grad():
        got = adapters(pyramid, maps)
        for level, index in enumerate(adapters.pairs):
            if index is None:
                assert torch.equal(got[level], pyramid[level])
                continue
            m = F.adaptive_avg_pool2d(adapters.adapters[str(level)](maps[index]), SIDES[level])
            if m.shape[-1] <= maps[index].shape[-1]:
                torch.testing.assert_close(got[level][:, DIMS[level] :], m)
    assert [n for n, _ in adapters.named_parameters()][:2] == ["adapters.1.0.weight", "adapters.1.0.bias"]
