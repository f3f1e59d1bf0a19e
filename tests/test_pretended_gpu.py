"""What stands in for a GPU refuses what a GPU refuses."""

import pytest
import torch
from pretended_gpu import GPU, pretended_gpu

from vermouth.model import Vermouth

MIXED = "on the GPU and the second is not"


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpu():
        yield


def test_a_tensor_on_it_is_told_from_one_in_main_memory():
    here = torch.rand(4, 3)
    there = here.to("cuda")
    assert (there.device, (there * 2).device, torch.zeros(0, device="cuda").device) == (GPU, GPU, GPU)
    assert here.device == there.cpu().device == torch.device("cpu")
    assert torch.equal(there[torch.tensor([1, 0])].cpu(), here[[1, 0]])


def test_what_mixes_both_is_refused():
    here = torch.rand(4, 3)
    there = here.to("cuda")
    for mix in (lambda: torch.cat([there, here]), lambda: there + here, lambda: here[torch.tensor([0], device="cuda")]):
        with pytest.raises(RuntimeError, match=MIXED):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_a_model_with_a_part_left_behind_is_refused(photos):
    model = Vermouth.load("toybox", "cuda")
    assert model.embed(photos[:1], ["a cat"]).device == GPU
    model.adapters.to("cpu")
    with pytest.raises(RuntimeError, match=MIXED):
        model.embed(photos[:1], ["a cat"])
