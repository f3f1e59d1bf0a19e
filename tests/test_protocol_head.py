"The U-head under both protocols against the same recursion written out, sharing no code with it."

import pytest
import torch
import torch.nn.functional as F

from vermouth.seghead import DenseHead
from vermouth.uhead import ARCHS, UHead

DIMS, EMBED = (40, 72, 36, 20), 24
WIDTHS = {"tiny": (128, 96, 64, 32), "pico": (64,) * 4, "small": (128, 96, 64, 32), "add": (64,) * 4, "none": (128,)}
WIDTHS["mix"] = (64,) * 4


def maps_of(side=4, dims=DIMS, batch=3):
    torch.manual_seed(1)
    return [torch.randn(batch, c, side * 2**i, side * 2**i) for i, c in enumerate(dims)]


def built(arch, protocol):
    "A head whose normalisations and biases are drawn too, so that each of them counts."
    torch.manual_seed(0)
    head = UHead(DIMS, EMBED, arch, widths=WIDTHS[arch], protocol=protocol).eval()
    with torch.no_grad():
        for name, p in head.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.3 + name.endswith("weight"))
    return head


def block(x, convolution, normalisation):
    x = F.conv2d(x, convolution, padding=convolution.shape[-1] // 2)
    return F.silu(F.group_norm(x, 32, normalisation[0], normalisation[1]))


def level(w, i, x, protocol):
    "One level, by the names of the saved weights."

    def norm(at):
        return w[f"{at}.weight"], w[f"{at}.bias"]

    x = block(x, w[f"levels.{i}.enter.0.weight"], norm(f"levels.{i}.enter.1"))
    if f"levels.{i}.again.0.0.weight" in w:
        x = x + block(x, w[f"levels.{i}.again.0.0.weight"], norm(f"levels.{i}.again.0.1"))
        x = F.silu(x) if protocol == "paper" else x
    return x


def pooled(w, x, heads):
    "CLIP's attention pooling by torch's own multi-head attention; one query, the mean."
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + w["pool.position"][:, None]
    out, _ = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        x.shape[1],
        heads,
        None,
        torch.cat([w[f"pool.{k}.bias"] for k in "qkv"]),
        None,
        None,
        False,
        0.0,
        w["pool.out.weight"],
        w["pool.out.bias"],
        training=False,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=w["pool.q.weight"],
        k_proj_weight=w["pool.k.weight"],
        v_proj_weight=w["pool.v.weight"],
    )
    return out[0]


def plain(w, maps, arch, protocol):
    paper = protocol == "paper"
    if arch == "add" and paper:
        side = maps[0].shape[-1]
        x = [F.conv2d(m, w[f"levels.{i}.enter.0.weight"]) for i, m in enumerate(maps)]
        finer = [F.interpolate(m, (side, side), mode="bilinear", align_corners=False) for m in x[1:]]
        x = sum(finer, x[0]) / 4
    elif arch == "add":
        x = sum(F.adaptive_avg_pool2d(level(w, i, m, protocol), 4) for i, m in enumerate(maps)) / 4
    elif arch == "mix":
        x = [level(w, i, m, protocol) for i, m in enumerate(maps)]
        x = [F.interpolate(m, (4, 4), mode="bilinear") if paper else F.adaptive_avg_pool2d(m, 4) for m in x]
        shares = w["mixing"].exp() / w["mixing"].exp().sum()
        x = sum(share * m for share, m in zip(shares, x, strict=True))
    elif arch == "none":
        x = level(w, 0, maps[0], protocol)
    else:
        x = level(w, 3, maps[3], protocol)
        for i in (2, 1, 0):
            x = level(w, i, torch.cat([maps[i], F.avg_pool2d(x, 2)], 1), protocol)
    heads = 8 if paper else max(1, x.shape[1] // 64)
    return pooled(w, F.adaptive_avg_pool2d(x, 4), heads)


@pytest.mark.parametrize("protocol", ["paper", "ours"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_head_is_the_recursion_written_out(arch, protocol):
    head = built(arch, protocol)
    maps = maps_of()
    with torch.no_grad():
        torch.testing.assert_close(head(maps), plain(head.state_dict(), maps, arch, protocol), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [2, 8])
def test_the_lowest_map_is_pooled_to_its_side_where_it_has_another(side):
    head = built("tiny", "paper")
    maps = maps_of(side)
    with torch.no_grad():
        torch.testing.assert_close(head(maps), plain(head.state_dict(), maps, "tiny", "paper"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", ["tiny", "small", "add"])
def test_the_protocols_differ(arch):
    heads = [built(arch, protocol) for protocol in ("ours", "paper")]
    with torch.no_grad():
        a, b = (head(maps_of()) for head in heads)
    assert (a - b).norm() / a.norm() > 0.01


def test_published_shapes():
    "With Stable Diffusion's channels: what has a bias, which kernels, how many heads."
    with torch.device("meta"):
        heads = {arch: UHead((1280, 1357, 1357, 960), 768, arch, protocol="paper") for arch in ARCHS}
    small = [tuple(p.shape) for n, p in heads["small"].named_parameters() if ".again." in n and p.ndim == 4]
    assert small == [(1024, 1024, 1, 1), (768, 768, 1, 1), (512, 512, 3, 3), (256, 256, 3, 3)]
    assert [n for n, _ in heads["add"].levels.named_parameters()] == [f"{i}.enter.0.weight" for i in range(4)]
    for arch, head in heads.items():
        assert head.pool.heads == 8, arch
        assert not [m for m in head.levels.modules() if isinstance(m, torch.nn.Conv2d) and m.bias is not None], arch


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_at_the_start(arch):
    "Kaiming normal: deviation √(2 / fan in) and a normal's fourth moment; torch's default is 2.45 times smaller."
    torch.manual_seed(0)
    for protocol, gain in (("paper", 2**0.5), ("ours", 3**-0.5)):
        head = UHead((320, 340, 340, 240), 192, arch, protocol=protocol).requires_grad_(False)
        for m in head.levels.modules():
            if isinstance(m, torch.nn.Conv2d):
                fan_in = m.weight[0].numel()
                assert m.weight.std() * fan_in**0.5 == pytest.approx(gain, rel=0.03)
                kurtosis = (m.weight**4).mean() / (m.weight**2).mean() ** 2
                assert kurtosis == pytest.approx(3 if protocol == "paper" else 1.8, rel=0.05)
        channels = head.pool.position.shape[1]
        assert head.pool.position.std() * channels**0.5 == pytest.approx(1, rel=0.05)
        for layer in (head.pool.q, head.pool.k, head.pool.v, head.pool.out):
            assert layer.weight.std() * channels**0.5 == pytest.approx(1, rel=0.05)
            assert not layer.bias.any()


@pytest.mark.parametrize("protocol", ["paper", "ours"])
def test_the_segmentation_head_is_its_decoder_written_out(protocol):
    "A 1×1 block a level, a 3×3 block before each enlargement, the sum of the levels, a last 1×1 convolution."
    torch.manual_seed(0)
    head, paper = DenseHead(DIMS, EMBED, 64, protocol=protocol).eval(), protocol == "paper"
    with torch.no_grad():
        for name, p in (*head.named_parameters(), *head.named_buffers()):
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5 * (not name.endswith("bias")))
    w, total = head.state_dict(), 0
    for i, x in enumerate(maps_of(2)):
        x = block(x, w[f"levels.{i}.enter.0.weight"], [w[f"levels.{i}.enter.1.{n}"] for n in ("weight", "bias")])
        assert x.shape[1] == (256 if paper else 64)
        for j in range(max(1, 3 - i)):
            at = f"levels.{i}.blocks.{j}"
            x = F.conv2d(x, w[f"{at}.0.weight"], padding=1)
            scale, shift = w[f"{at}.1.weight"], w[f"{at}.1.bias"]
            if paper:
                x = F.batch_norm(x, w[f"{at}.1.running_mean"], w[f"{at}.1.running_var"], scale, shift)
            else:
                x = F.group_norm(x, 32, scale, shift)
            x = F.relu(x)
            if i < 3:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    if not paper:
        total = F.interpolate(total, scale_factor=2, mode="bilinear", align_corners=False)
    want = F.conv2d(total, w["out.weight"], w["out.bias"])
    with torch.no_grad():
        torch.testing.assert_close(head(maps_of(2)), want, rtol=0, atol=1e-6)
    assert head.config == {"width": 64, "protocol": protocol, "dropout": 0.1 if paper else 0.0}
