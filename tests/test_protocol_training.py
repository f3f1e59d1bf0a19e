"Losses and batches of both protocols: the logits written out, and one epoch of each benchmark's published totals."

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vermouth.baselines import Bottleneck
from vermouth.core import VermouthError
from vermouth.train import NameClassifier, mixed_batches, paired_batches, train_head
from vermouth.uhead import LOGITS

# sketches and photos in all; what a step of the released code takes of each
TOTALS = {
    "Sketchy": (75_471, 73_002, (32, 32)),
    "TU-Berlin": (20_000, 204_489, (6, 54)),
    "QuickDraw": (330_000, 204_000, (32, 32)),
}


class Mean(torch.nn.Module):
    "The smallest head: the mean of one map."

    def __init__(self, channels, embed_dim):
        super().__init__()
        self.out = torch.nn.Linear(channels, embed_dim, bias=False)

    def forward(self, maps):
        return self.out(maps[0].mean((2, 3)))


def drawn():
    torch.manual_seed(0)
    return Mean(6, 8), torch.randn(12, 6, 3, 3), torch.arange(12) % 3, F.normalize(torch.randn(3, 8), dim=-1)


@pytest.mark.parametrize(
    ("task", "factor"), [("retrieval", 4.6052 / 0.2), ("few-shot", 1 / 0.2), ("segmentation", 1 / 0.02)]
)
def test_the_published_loss_of_each_task(task, factor):
    head, maps, labels, classes = drawn()
    head, maps, classes = head.double(), maps.double(), classes.double()
    vectors = maps.mean((2, 3)) @ head.out.weight.T
    cosines = (vectors / vectors.norm(dim=1, keepdim=True)) @ classes.T
    want = -torch.log_softmax(factor * cosines, 1)[torch.arange(12), labels].mean()
    got = F.cross_entropy(NameClassifier(head, classes, **LOGITS["paper"][task])(maps), labels)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_training_takes_the_scale_and_the_temperature():
    "One step of plain AdamW on the whole list, written out."
    head, maps, labels, classes = drawn()
    plain, *_ = drawn()
    train_head(head, [maps], labels, classes, lr=0.01, held=0, quiet=True, **LOGITS["paper"]["few-shot"])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=5e-4)
    F.cross_entropy(5 * F.normalize(plain([maps]), dim=-1) @ classes.T, labels).backward()
    optimizer.step()
    torch.testing.assert_close(head.out.weight, plain.out.weight, rtol=0, atol=1e-6)


def single(batches, groups):
    return [i for i, batch in enumerate(batches) if len(set(groups[batch].tolist())) == 1]


@pytest.mark.parametrize("name", TOTALS)
def test_no_step_of_an_epoch_sees_one_domain_only(name):
    sketches, photos, sizes = TOTALS[name]
    groups = np.repeat([0, 1], [sketches, photos])
    mixed = mixed_batches(groups, 64, random.Random(1).sample)
    assert single(mixed, groups) == []
    assert sorted(p for batch in mixed for p in batch) == list(range(len(groups)))
    share = 64 * sketches / len(groups)
    assert max(abs((groups[batch] == 0).sum() - share) for batch in mixed[:-2]) <= 1
    paired = paired_batches(groups, sizes, random.Random(1).sample)
    assert single(paired, groups) == []
    assert len(paired) == min(-(-sketches // sizes[0]), -(-photos // sizes[1]))
    taken = [p for batch in paired for p in batch]
    assert len(taken) == len(set(taken))


@pytest.mark.parametrize("seed", range(60))
def test_any_two_groups_meet_in_every_step_that_can_hold_both(seed):
    draw = random.Random(seed)
    few, many, size = draw.randint(8, 40), draw.randint(40, 200), draw.randint(8, 64)
    groups = np.array([0] * few + [1] * many)
    batches = mixed_batches(groups, size, draw.sample)
    assert sorted(p for batch in batches for p in batch) == list(range(few + many))
    assert max(map(len, batches)) <= size
    if few / (few + many) * size >= 2:
        assert single(batches, groups) == []


def test_groups_of_one_length_take_turns():
    groups = np.array([0, 1] * 10)
    for batch in mixed_batches(groups, 6, random.Random(0).sample):
        assert groups[batch].tolist() == [0, 1] * (len(batch) // 2)


def test_training_in_pairs_ends_with_the_shorter_list():
    "Three of five and one of three: two steps; a size for each group, or a refusal."
    head, _, _, classes = drawn()
    seen = []

    class Watched(Mean):
        def forward(self, maps):
            seen.append(maps[0][:, 0, 0, 0].tolist())
            return super().forward(maps)

    groups, labels = np.array([0] * 5 + [1] * 3), [0, 1, 2, 0, 1, 2, 0, 1]
    maps = torch.arange(8.0)[:, None, None, None].expand(8, 6, 1, 1)
    train_head(Watched(6, 8), [maps], labels, classes, groups, epochs=2, held=0, sizes=(3, 1), quiet=True)
    assert [[sum(x < 5 for x in step), sum(x >= 5 for x in step)] for step in seen] == [[3, 1], [2, 1]] * 2
    with pytest.raises(VermouthError, match="there are 2 groups"):
        train_head(head, [maps], labels, classes, groups, held=0, sizes=(3,), quiet=True)


def test_the_bottleneck_is_two_linear_layers_and_trains_like_any_head():
    torch.manual_seed(0)
    head, vectors = Bottleneck(20, 8), torch.randn(12, 20)
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 20), (8, 5)]
    want = torch.relu(vectors @ head.down.weight.T) @ head.up.weight.T
    torch.testing.assert_close(head([vectors]), want, rtol=0, atol=1e-6)
    _, _, labels, classes = drawn()
    options = {"epochs": 60, "lr": 0.01, "held": 0, "quiet": True, **LOGITS["paper"]["retrieval"]}
    table = train_head(head, [vectors], labels, classes, np.arange(12) % 2, sizes=(3, 3), **options)
    assert table.train_loss.iloc[-1] < table.train_loss[0] / 4
