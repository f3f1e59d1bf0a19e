"""A GPU gives what the CPU gives, in any order and any number of threads.

Where torch sees no CUDA device a pretended one takes its place, which refuses what mixes tensors of both. What only the
hardware can show is skipped there.
"""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from passes import in_threads, same, state
from pretended_gpu import pretended_gpu
from small_tables import few_shot_table, sbir_table
from store_helpers import FEW, ITEMS, content
from torch import nn

from vermouth.backbone import load_backbone, random_backbone
from vermouth.core import in_batches, pick_device, pick_dtype, seed_everything
from vermouth.model import Vermouth
from vermouth.pretrain.common import DeviceStep, Schedule, _replayable
from vermouth.store import FeatureStore, extract
from vermouth.tasks.correspondence import join_levels
from vermouth.train import train_head
from vermouth.uhead import UHead
from vermouth.visualize import feature_colours, grid, highlight, similarity_maps, tint

pytestmark = pytest.mark.slow
REAL = torch.cuda.is_available()
hardware = pytest.mark.skipif(not REAL, reason="torch sees no CUDA device")
PROMPTS = ["a cat", "a photo of a red house and a tree", "", "a duck"]
SETTINGS = {
    "mid and up with maps": {},
    "down": {"stages": "down", "attention": ()},
    "two time steps": {"timesteps": (300, 100), "stages": "mid"},
    "released": {"timesteps": (300, 100), "trajectory": "released"},
    "inverted": {"noise": "ddim", "stages": "mid", "attention": ()},
    "places": {"stages": ["up1.attn0.self.q", "mid.resnet1", "up2.attn0.cross.map"]},
}


@pytest.fixture(scope="module", autouse=True)
def device():
    "A GPU, or what passes for one."
    with nullcontext() if REAL else pretended_gpu():
        yield


@pytest.fixture(scope="module")
def gpu():
    return Vermouth.load("toybox", "cuda")


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run_module(*words):
    "The finished process of a command."
    command, env = [sys.executable, "-m", "vermouth.app.cli", *map(str, words)], os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def error(found, wanted):
    "The largest difference of any map, relative to the map's largest value."
    pairs = [(a.cpu().float(), b.cpu().float()) for a, b in zip(found, wanted, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@hardware
def test_the_best_device_is_the_gpu_and_its_best_type_is_bfloat16():
    assert pick_device().type == "cuda"
    assert pick_dtype("auto", pick_device()) == torch.bfloat16


@pytest.mark.parametrize("name", SETTINGS)
def test_features_are_those_of_the_cpu(toybox, gpu, images, name):
    wanted = toybox.backbone.features(images, PROMPTS, **SETTINGS[name])
    found = gpu.backbone.features(images, PROMPTS, **SETTINGS[name])
    assert {m.device.type for m in found} == {"cuda"}
    assert error(found, wanted) < 2e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(toybox, images, dtype):
    found = load_backbone("toybox", "cuda", dtype).features(images, PROMPTS)
    assert error(found, toybox.backbone.features(images, PROMPTS)) < 5e-2


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=hardware)])
@pytest.mark.parametrize("kind", ["pixart", "sd3", "flux"])
def test_transformers_read_as_on_the_cpu(transformers, transformer_folders, images, kind, offload):
    wanted = transformers[kind].features(images, PROMPTS, size="keep")
    bb = load_backbone(transformer_folders[kind], "cuda", offload=offload)
    assert error(bb.features(images, PROMPTS, size="keep"), wanted) < 1e-3


@hardware
def test_with_weights_in_main_memory_the_features_are_the_same(gpu, images):
    moved = load_backbone("toybox", "cuda", offload=True)
    assert {x.device.type for x in moved.unet.parameters()} == {"meta"}
    assert error(moved.features(images, PROMPTS), gpu.backbone.features(images, PROMPTS)) < 1e-5


@hardware
@pytest.mark.parametrize("size", ["sd1", "sd2.1", "sdxl", "sd3-medium", "flux-dev"])
def test_random_backbones_are_drawn_on_the_gpu(images, size):
    before = torch.cuda.get_rng_state()
    first, second = (random_backbone(size, "cuda", "bfloat16", width=8) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    found = first.features(images, PROMPTS, size="keep")
    assert same(found, second.features(images, PROMPTS, size="keep"))


def test_all_answers_are_those_of_the_cpu(toybox, gpu, photos):
    texts = [f"a photo of a {name}" for name in ("cat", "duck", "house", "tree", "car")]
    assert error([gpu.embed(photos, texts)], [toybox.embed(photos, texts)]) < 1e-3
    assert gpu.prompts(photos) == toybox.prompts(photos)
    names = ["cat", "duck", "fish", "house", "tree"]
    ours, theirs = (model.classify(photos, names, texts) for model in (gpu, toybox))
    assert error([ours], [theirs]) < 1e-2
    assert torch.equal(ours.argmax(-1).cpu(), theirs.argmax(-1).cpu())
    masks = [torch.stack([torch.as_tensor(mask) for mask in model.segment(photos, names)]) for model in (gpu, toybox)]
    assert (masks[0].cpu() == masks[1]).float().mean() > 0.99
    assert gpu.misfit(photos) == toybox.misfit(photos) == ""


def test_pictures_are_drawn_of_what_lies_on_the_gpu(gpu, images):
    fine = gpu.backbone.features(images, PROMPTS)[-1]
    similar = similarity_maps(fine, (0.5, 0.5))
    assert similar.device.type == "cuda"
    image, labels = images[0].to("cuda"), np.zeros((64, 64), int)
    assert highlight(image, similar[0], value_range=(-1, 1)).shape == (64, 64, 3)
    assert tint(image, labels, np.zeros((1, 3)), value_range=(-1, 1)).shape == (64, 64, 3)
    assert len(grid([[similar[0], feature_colours(fine)[0]]]).axes) == 2
    assert join_levels([fine, fine.cpu()]).device.type == "cuda"


def test_the_order_in_a_batch_changes_no_bit(gpu, images):
    order = [2, 0, 3, 1]
    first = gpu.backbone.features(images, PROMPTS)
    other = gpu.backbone.features(images[order], [PROMPTS[i] for i in order])
    assert same([m[order] for m in first], other)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_size_of_a_batch_changes_rounding_at_most(gpu, images, batch_size):
    whole = gpu.backbone.features(images, PROMPTS)
    assert error(gpu.backbone.features(images, PROMPTS, batch_size=batch_size), whole) < 1e-4


@hardware
def test_a_second_pass_gives_the_same_bits_and_leaves_the_random_state_alone(gpu, images):
    before = torch.cuda.get_rng_state()
    first = gpu.backbone.features(images, PROMPTS)
    assert same(first, gpu.backbone.features(images, PROMPTS))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@hardware
def test_eight_threads_give_what_one_gives(gpu, images):
    bb, before = gpu.backbone, state(gpu, gpu.backbone.unet)
    work = {name: partial(bb.features, stages=stages) for name, stages in (("mid", "mid"), ("up", ("mid", "up")))}
    serial = {(name, i): work[name](images[i], PROMPTS[i]) for name in work for i in range(4)}
    calls = list(serial) * 6
    results = in_threads([lambda key=key: work[key[0]](images[key[1]], PROMPTS[key[1]]) for key in calls])
    wrong = [key for key, found in zip(calls, results) if isinstance(found, Exception) or not same(found, serial[key])]
    assert not wrong
    assert state(gpu, bb.unet) == before


@hardware
def test_shorter_products_of_the_caller_do_not_reach_the_features(gpu, images):
    plain = gpu.backbone.features(images, PROMPTS)
    torch.backends.cuda.matmul.fp32_precision, before = "tf32", torch.backends.cuda.matmul.fp32_precision
    try:
        with torch.autocast("cuda", torch.bfloat16):
            assert same(gpu.backbone.features(images, PROMPTS), plain)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@hardware
def test_where_memory_ends_a_batch_is_halved():
    sizes = []

    def run(part):
        sizes.append(part.stop - part.start)
        return [torch.zeros(sizes[-1], 2**30, dtype=torch.uint8, device="cuda")[:, 0].clone()]

    free = torch.cuda.mem_get_info()[0]
    fits = min(7, free // 2**30)
    torch.cuda.set_per_process_memory_fraction((fits + 0.5) * 2**30 / torch.cuda.mem_get_info()[1])
    try:
        assert in_batches(run, 16, 16)[0].shape == (16,)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert sizes[0] == 16 and max(sizes[-3:]) <= fits


@hardware
@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimized_backbone_keeps_its_features(images, compiled):
    plain = random_backbone("sd1", "cuda", width=4)
    wanted = plain.features(images, PROMPTS, size="keep")
    found = plain.optimize(compile=compiled, size=64, seconds=5).features(images, PROMPTS, size="keep")
    assert error(found, wanted) < 1e-3
    assert plain.best_batch >= 1


def test_a_store_is_the_same_twice_and_near_that_of_the_cpu(gpu, whole, tmp_path):
    first, second = (extract(gpu.backbone, ITEMS, tmp_path / name, **FEW) for name in ("a", "b"))
    assert content(first.out).keys() == content(second.out).keys()
    assert all(map(torch.equal, first.batch(range(18)), second.batch(range(18))))
    assert error(first.batch(range(18)), whole.batch(range(18))) < 2e-3  # of numbers in half precision
    assert FeatureStore(first.out).checksum() == second.checksum()


@hardware
def test_a_head_is_trained_on_the_gpu_and_read_on_the_cpu(gpu, tmp_path):
    store = extract(gpu.backbone, ITEMS, tmp_path / "store", **FEW)
    classes = nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=-1).cuda()
    heads = []
    for _ in range(2):
        seed_everything(0)
        heads.append(UHead([shape[0] for shape in store.shapes], 32).cuda())
        options = {"epochs": 20, "lr": 1e-3, "held": 0, "quiet": True}
        history = train_head(heads[-1], store, [i % 3 for i in range(18)], classes, **options)
    assert history.train_loss.iloc[-1] < 0.9 * history.train_loss.iloc[0]
    assert error(*[head.state_dict().values() for head in heads]) == 0  # the same bits
    maps = store.batch([0, 1])
    assert error([copy.deepcopy(heads[0]).cpu()(maps)], [heads[0]([m.cuda() for m in maps])]) < 1e-3


def test_what_is_saved_from_the_gpu_loads_on_the_cpu(gpu, photos, tmp_path):
    gpu.save(tmp_path / "model")
    again, texts = Vermouth.load(tmp_path / "model", "cpu"), ["a cat"] * len(photos)
    assert again.fingerprint == gpu.fingerprint
    assert error([again.embed(photos, texts)], [gpu.embed(photos, texts)]) < 1e-3


@hardware
def test_a_pretraining_step_as_a_cuda_graph_is_the_step():
    def trained(replayed):
        torch.manual_seed(0)
        model, x = nn.Linear(4, 4).cuda(), torch.arange(32.0, device="cuda").view(8, 4) / 32
        schedule = Schedule(steps=20, batch_size=8, lr=1e-2)
        step = DeviceStep(model, lambda m: {"loss": (m(x) - x).square().mean()}, schedule)
        # setting up a graph takes five steps, and recording it none
        run, left = (_replayable(step), 15) if replayed else (step, 20)
        for _ in range(left):
            run()
        torch.cuda.synchronize()
        return [p.detach() for p in (*model.parameters(), *step.average.parameters())]

    assert error(trained(True), trained(False)) < 1e-5


@hardware
def test_the_shell_answers_as_on_the_cpu(photos, tmp_path):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(photos):
        image.save(tmp_path / f"photos/{i}.png")
    words = ["classify", tmp_path / "photos", "--names", "cat,fish,tree", "--model", "toybox", "--json", "--device"]
    gpu, cpu = (run_module(*words, device) for device in ("cuda", "cpu"))
    assert gpu.returncode == cpu.returncode == 0, gpu.stderr
    gpu, cpu = ([image["probabilities"] for image in json.loads(run.stdout)["images"]] for run in (gpu, cpu))
    assert [list(scores) for scores in gpu] == [list(scores) for scores in cpu] and len(gpu) == 5
    for ours, theirs in zip(gpu, cpu):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-2)


def test_studies_come_out_as_on_the_cpu(tmp_path):
    tables = []
    for where in ("cuda", "cpu") if REAL else ("cuda",):
        model = Vermouth.build(uhead="pico", device=where)
        assert {x.device.type for x in model.parameters()} == {where}
        tables.append({})
        for study in (few_shot_table, sbir_table):
            tables[-1] |= study(model, tmp_path / where / study.__name__, 32)
    assert tables[0] == pytest.approx(tables[-1], abs=0.1)
    assert len(tables[0]) >= 5
