"Maps of several time steps side by side: read, stored, weighed by a head that mixes, saved and loaded."

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vermouth.backbone import FeatureSettings
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth
from vermouth.store import FeatureStore, extract
from vermouth.tasks.fewshot import untrained_copy
from vermouth.text import class_embeddings
from vermouth.train import train_head
from vermouth.uhead import UHead

TWO = FeatureSettings((100, 400), trajectory="each")
ITEMS = Toybox("photo", n=8, seed=5)


@pytest.fixture(scope="module")
def stored(toybox, tmp_path_factory):
    out = tmp_path_factory.mktemp("times") / "store"
    return extract(toybox.backbone, ITEMS, out, expert=toybox.expert, quiet=True, **vars(TWO))


@pytest.fixture(scope="module")
def mixing(toybox):
    "A model of random weights that weighs two time steps, with the Toybox's expert."
    parts = {"backbone": toybox.backbone, "clip": toybox.clip, "expert": toybox.expert}
    return Vermouth.build(**parts, uhead="mix", settings=TWO, prompt="empty")


def test_a_store_holds_each_time_step_in_the_order_of_denoising(toybox, stored):
    bb, again = toybox.backbone, FeatureStore(stored.out)
    image, levels = [ITEMS[3].image], len(bb.feature_dims())
    later, earlier = (bb.features(image, "", timesteps=t) for t in (400, 100))
    wanted = [m for pair in zip(later, earlier, strict=True) for m in pair]
    found = again[3][: 2 * levels]
    assert [len(m) for m in found] == bb.dims(TWO) == [c for c in bb.feature_dims() for _ in range(2)]
    for stored_map, read in zip(found, wanted, strict=True):
        torch.testing.assert_close(stored_map.float(), read[0], atol=2e-3, rtol=1e-3)
    assert (again[3][0] - again[3][1]).abs().max() > 0.01
    assert again.checksum() == stored.checksum()


@pytest.mark.parametrize("change", [{"trajectory": "independent"}, {"timesteps": (100, 300)}])
def test_the_key_contains_it(toybox, stored, change):
    assert (stored.settings["trajectory"], stored.settings["timesteps"]) == ("each", [400, 100])
    other = vars(replace(TWO, **change))
    with pytest.raises(VermouthError, match=f"{next(iter(change))}="):
        extract(toybox.backbone, ITEMS, stored.out, expert=toybox.expert, quiet=True, **other)


def test_a_head_learns_the_shares_of_a_store(mixing, stored, tmp_path):
    names = sorted({item.name for item in ITEMS})
    labels, classes = [names.index(item.name) for item in ITEMS], class_embeddings(names, mixing.clip)
    before = mixing.uhead.shares()
    assert before.shape == (2, 4) and torch.equal(before, torch.full((2, 4), 1 / 8))
    losses = train_head(mixing, stored, labels, classes, epochs=20, lr=2e-3, held=0, quiet=True).train_loss
    after = mixing.uhead.shares()
    assert losses.iloc[-1] < losses.iloc[0] and (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after.sum(), torch.tensor(1.0))
    mixing.save(tmp_path)
    parts = {"backbone": mixing.backbone, "clip": mixing.clip, "expert": mixing.expert}
    loaded = Vermouth.load(tmp_path, **parts)
    assert torch.equal(loaded.uhead.shares(), after) and loaded.uhead.times == 2
    images = [ITEMS[i].image for i in range(2)]
    assert torch.equal(loaded.embed(images), mixing.eval().embed(images))
    assert untrained_copy(loaded, 1).uhead.times == 2


def test_a_linear_map_beside_it_takes_all_maps(mixing):
    images = [ITEMS[i].image for i in range(2)]
    before = mixing.eval().embed(images)
    skip = mixing.add_skip()
    assert skip.in_features == sum(mixing.backbone.dims(TWO)) + sum(mixing.expert.dims)
    assert torch.equal(mixing.embed(images), before)
    mixing.skip = None


def test_a_mixture_is_its_sum_written_out():
    torch.manual_seed(0)
    head = UHead((5, 5, 5, 6, 6, 6), 16, "mix", widths=(32, 32), out_res=2, times=3).eval()
    with torch.no_grad():
        head.mixing.normal_()
        maps = [torch.randn(2, c, s, s) for c, s in ((5, 2), (6, 4)) for _ in range(3)]
        w, total = head.state_dict(), 0
        for i, share in enumerate(w["mixing"].exp() / w["mixing"].exp().sum()):
            at = f"levels.{i // 3}.enter"  # the time steps of a level share its convolution
            x = F.conv2d(maps[i], w[f"{at}.0.weight"])
            x = F.silu(F.group_norm(x, 32, w[f"{at}.1.weight"], w[f"{at}.1.bias"]))
            total = total + share * F.adaptive_avg_pool2d(x, 2)
        torch.testing.assert_close(head(maps), head.pool(total), rtol=0, atol=1e-6)
    assert torch.equal(head.shares()[1], head.mixing.detach().softmax(0)[[1, 4]])


def test_what_does_not_fit_is_refused(toybox):
    parts = {"backbone": toybox.backbone, "clip": toybox.clip, "expert": None, "prompt": "empty"}
    with pytest.raises(VermouthError, match="times=2: 'tiny' takes one time step. Use arch='mix', or trajectory="):
        Vermouth.build(**parts, uhead="tiny", settings=TWO)
    head = UHead(toybox.backbone.dims(TWO), toybox.clip.dim, "mix")
    with pytest.raises(VermouthError, match="uhead: takes 1 maps of each level, the settings give 2. Build it with"):
        Vermouth(toybox.backbone, head, toybox.clip, settings=TWO, prompt="empty")
    with pytest.raises(VermouthError, match="trajectory='apart': unknown. Choose from sequential, independent"):
        FeatureSettings(trajectory="apart")
