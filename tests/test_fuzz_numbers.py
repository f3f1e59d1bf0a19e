"Random settings, U-heads and scores; the metrics agree with scikit-learn."

import numpy as np
import torch
from fuzz import ANYTHING, REFUSED, attempt, often
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

from vermouth.backbone import FeatureSettings
from vermouth.metrics import accuracy, confusion, mean_average_precision, mean_iou, precision_at_k, retrieval_metrics
from vermouth.uhead import ARCHS, FUSES, UHead, arch_widths

FIELD = {
    "timesteps": st.just((200,)) | st.lists(st.integers(0, 999), min_size=1, max_size=3),
    "stages": st.sampled_from(["mid", ("up",), ("mid", "up"), ("down", "mid", "up")]),
    "attention": st.sampled_from([None, (), "up_cross"]),
    "noise": st.sampled_from(["ddpm", "none"]),
    "seed": st.integers(-5, 2**63),
    "trajectory": st.sampled_from(["sequential", "independent"]),
    "ddim_steps": st.integers(0, 20),
}


@often(150, fields=st.fixed_dictionaries({}, optional={name: good | ANYTHING for name, good in FIELD.items()}))
def test_settings(fields):
    found = attempt(FeatureSettings, **fields)
    if found is not REFUSED:
        assert FeatureSettings(**found.plain()).plain() == found.plain()


@often(
    120,
    arch=st.sampled_from([*ARCHS]),
    fuse=st.sampled_from(FUSES),
    dims=st.lists(st.integers(-1, 9), max_size=5),
    embed=st.integers(0, 6),
    out_res=st.integers(0, 3),
    shapes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5),
    batch=st.integers(1, 2),
)
def test_uheads(arch, fuse, dims, embed, out_res, shapes, batch):
    torch.manual_seed(0)
    widths = attempt(arch_widths, arch, len(dims), 1 / 16)
    head = attempt(UHead, dims, embed, arch, fuse, out_res, None if widths is REFUSED else widths)
    if head is REFUSED:
        return
    maps = [torch.randn(batch + (b == 0), c, h, w) for c, (b, h, w) in zip(dims, sorted(shapes, key=lambda s: s[1]))]
    found = attempt(head, maps)
    if found is not REFUSED:
        assert found.shape == (batch, embed) or found.shape == (batch + 1, embed)
    if found is not REFUSED:
        assert found.isfinite().all()


# Metrics


@often(120, data=st.data())
def test_retrieval_agrees_with_scikit_learn(data):
    queries, gallery, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 15))
    # no ties, which scikit-learn breaks otherwise
    scores = np.stack([data.draw(st.permutations(range(gallery))) for _ in range(queries)]) / gallery
    ours, theirs = (
        np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))) for n in (queries, gallery)
    )
    hits = ours[:, None] == theirs
    aps = [average_precision_score(h, s) if h.any() else 0 for h, s in zip(hits, scores)]
    assert abs(mean_average_precision(scores, ours, theirs) - np.mean(aps)) < 1e-6
    first = np.take_along_axis(hits, np.argsort(-scores, axis=1), 1)[:, :k]
    assert abs(precision_at_k(scores, ours, theirs, k) - (first.sum(1) / k).mean()) < 1e-9


@often(100, data=st.data())
def test_accuracy_and_iou_agree_with_scikit_learn(data):
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    pred, target = (
        np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))) for _ in range(2)
    )
    assert abs(accuracy(np.eye(classes)[pred], target) - accuracy_score(target, pred)) < 1e-9
    there = sorted({*pred, *target})
    assert (
        abs(
            mean_iou(pred, target, classes)
            - jaccard_score(target, pred, labels=there, average="macro", zero_division=0)
        )
        < 1e-9
    )


@often(
    120,
    scores=arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.bool_]),
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    )
    | ANYTHING,
    queries=ANYTHING | st.lists(st.integers(0, 2), max_size=3),
    gallery=ANYTHING | st.lists(st.integers(0, 2), max_size=3),
    k=ANYTHING | st.integers(1, 4),
)
def test_metrics_of_anything(scores, queries, gallery, k):
    for found in (
        attempt(mean_average_precision, scores, queries, gallery),
        attempt(precision_at_k, scores, queries, gallery, k),
        attempt(accuracy, scores, queries),
        attempt(mean_average_precision, scores, queries, gallery, k),
    ):
        assert found is REFUSED or 0 <= found <= 1
    attempt(retrieval_metrics, scores, scores, queries, queries, (2,))
    if attempt(confusion, queries, gallery, 3) is not REFUSED:
        assert np.shape(queries) == np.shape(gallery)


def test_large_whole_numbers_are_told_apart():
    "As float32, these scores would be one."
    assert mean_average_precision([[2**24, 2**24 + 1]], [1], [0, 1]) == 1
