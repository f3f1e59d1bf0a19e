"""Inputs that nobody thought of: random ones for the public functions, and files of stores, indexes and saved models with random damage.
Whatever comes, there is a right result or a `VermouthError`; nothing else is raised, and nothing wrong is returned. Every draw is seeded."""
import json
import os
import random
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COUNTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from odd_files import Grey, damaged
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

from vermouth.app.gallery import MANIFEST, Index, used
from vermouth.app.indexing import build_index
from vermouth.app.photos import inside
from vermouth.app.run import parse_value
from vermouth.backbone import FeatureSettings, prompt_list
from vermouth.core import FORMATS, MAX_PIXELS, VermouthError, flatten, image_batch, image_tensor, is_text, read_image, resize
from vermouth.data.masks import read_numbers
from vermouth.data.toybox import Toybox
from vermouth.manifest import FORMAT, content_checksum
from vermouth.metrics import accuracy, confusion, mean_average_precision, mean_iou, precision_at_k, retrieval_metrics
from vermouth.saved import read_card, read_weights, write_model
from vermouth.segment import class_words
from vermouth.shards import FeatureStore, finish, finished, keep, put_shard, shard_name
from vermouth.text import class_prompts, load_clip, text_embeddings
from vermouth.uhead import ARCHS, FUSES, UHead, arch_widths

REFUSED = object()


def often(cases, **draws):
    "Run a test on so many draws, the same ones every time, and count them."
    def wrap(test):
        def counted(**drawn):
            COUNTS["fuzz cases"] += 1
            test(**drawn)
        counted.__name__, counted.__doc__ = test.__name__, test.__doc__
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        return settings(max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=quiet)(given(**draws)(counted))
    return wrap


def attempt(do, *args, **more):
    "The result, or that it was refused in one sentence. Anything else that is raised fails the test."
    try: return do(*args, **more)
    except VermouthError as e:
        assert "\n" not in str(e) and str(e)[-1] in ".!?", e
        return REFUSED


# Images

SIDES = array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
DTYPES = st.sampled_from(["uint8", "uint16", "int32", "float16", "float32", "float64", "bool", "complex64", "<U3", "object"])


@often(150, shape=SIDES | st.tuples(st.integers(0, 4), st.integers(0, 4), st.just(3)), dtype=DTYPES, batch=st.booleans())
def test_arrays(shape, dtype, batch):
    array = np.ones(shape, dtype=dtype)
    found = attempt(image_batch if batch else image_tensor, array)
    good = dtype == "uint8" and array.size and shape[-1:] == (3,) and len(shape) in ((3, 4) if batch else (3,))
    assert (found is not REFUSED) == bool(good)
    if good: assert found.dtype == torch.float32 and found.shape[-3:] == (3, *shape[-3:-1]) and torch.all(found == 1 / 127.5 - 1)


@often(150, shape=SIDES | st.tuples(st.just(3), st.integers(0, 4), st.integers(0, 4)), value=st.floats(-1.5, 1.5) | st.sampled_from([float("nan"), float("inf")]), batch=st.booleans(),
       dtype=st.sampled_from([torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.complex64]))
def test_tensors(shape, value, dtype, batch):
    x = torch.full(shape, value if dtype.is_floating_point else 1, dtype=dtype)
    found = attempt(image_batch if batch else image_tensor, x)
    good = dtype.is_floating_point and x.numel() and len(shape) in ((3, 4) if batch else (3,)) and shape[-3] == 3 and x.isfinite().all() and x.abs().max() <= 1.01
    assert (found is not REFUSED) == bool(good)
    if good: assert torch.equal(found.reshape(-1), x.float().reshape(-1))


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16B"]


@often(100, mode=st.sampled_from(MODES), width=st.integers(0, 5), height=st.integers(0, 5), mark=st.sampled_from([None, 0, b"\0\xff", (1, 2, 3), "x"]))
def test_modes(mode, width, height, mark):
    im = Image.new(mode, (width, height))
    if mark is not None: im.info["transparency"] = mark
    found, x = attempt(flatten, im), attempt(image_tensor, im)
    if found is not REFUSED: assert (found.mode, found.size) == ("RGB", (width, height)) and (x is REFUSED) == (width * height == 0)


@cache
def picture_files():
    "The same photo in every format that is read."
    image, found = Toybox("photo", n=1, seed=4)[0].image.resize((24, 16)), []
    for kind in FORMATS:
        buffer = BytesIO()
        try: image.save(buffer, kind)
        except (KeyError, OSError): continue  # a format that this Pillow was built without
        found.append(buffer.getvalue())
    return found


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_damaged_pictures(tmp_path):
    dice, path, cases = random.Random(0), tmp_path / "photo.png", 250
    assert len(picture_files()) >= 7
    for i in range(cases):
        path.write_bytes(damaged(damaged(picture_files()[i % len(picture_files())], dice), dice) if i % 5 else dice.randbytes(200))
        found = attempt(read_image, path)
        assert found is REFUSED or found.mode == "RGB" and found.width * found.height <= MAX_PIXELS
        numbers = attempt(read_numbers, path)
        assert numbers is REFUSED or numbers.dtype == np.int32 and numbers.ndim == 2
    COUNTS["fuzz cases"] += cases


ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)


@often(100, size=ANYTHING | st.integers(-2, 9) | st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
def test_sizes(size):
    found = attempt(resize, torch.zeros(3, 4, 5), size)
    if found is not REFUSED: assert tuple(found.shape[1:]) == ((4, 5) if size is None else (size, size) if isinstance(size, int) else tuple(size))


@often(60, images=ANYTHING)
def test_what_is_no_image(images): assert attempt(image_batch, images) is REFUSED


# Words

TEXT = st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc", "Zs", "Lo", "So"]), max_size=6) | st.sampled_from(["", " ", "_", "a,b", "{}", "cat", "Cat"])


@often(100, names=st.lists(TEXT, max_size=4), template=TEXT | st.just("a photo of {}"))
def test_class_names(names, template):
    words, prompts = attempt(class_words, names), attempt(class_prompts, names, template)
    if words is not REFUSED: assert len(words) == len(names) == len(set(words)) and all(w and w == " ".join(w.split()) for group in words for w in group)
    if prompts is not REFUSED: assert len(prompts) == len(names) == len(set(prompts)) and template.count("{}") == 1


@cache
def clip(): return load_clip("toybox", "cpu")


@often(60, texts=st.lists(TEXT, max_size=3) | TEXT)
@pytest.mark.filterwarnings("ignore:texts")
def test_texts_are_unit_vectors(texts):
    found = attempt(text_embeddings, texts, clip())
    texts = [texts] if isinstance(texts, str) else texts
    assert (found is REFUSED) == (not texts or not all(map(is_text, texts)))
    if found is not REFUSED: assert torch.allclose(found.norm(dim=1), torch.ones(len(texts)), atol=1e-5)


@often(100, prompts=ANYTHING | st.lists(TEXT | st.none(), max_size=3), count=st.none() | st.integers(1, 3))
def test_prompts(prompts, count):
    found = attempt(prompt_list, prompts, count)
    if found is not REFUSED: assert len(found) == (count or len(found)) and all(map(is_text, found))


@often(200, text=st.text(max_size=20) | st.builds(lambda a, b: a + b, st.sampled_from(["[", "{", "[[", "{a: ", "[!!", "[0x", "[2001-", "- ", "'", "[&a "]), st.text("[]{}:,'\"-_xX01239 \n&*!|>%@`a", max_size=12)))
def test_values_from_a_shell(text): attempt(parse_value, text)


@often(60, value=st.recursive(st.integers(-10**12, 10**12) | st.booleans() | st.none() | st.text("abc xyz", max_size=6), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=2), max_leaves=5).filter(lambda v: not isinstance(v, str)))
def test_json_from_a_shell_is_what_it_says(value): assert parse_value(json.dumps(value)) == value


# Settings and shapes

FIELD = {"timesteps": st.just((200,)) | st.lists(st.integers(0, 999), min_size=1, max_size=3), "stages": st.sampled_from(["mid", ("up",), ("mid", "up"), ("down", "mid", "up")]), "attention": st.sampled_from([None, (), "up_cross"]),
         "noise": st.sampled_from(["ddpm", "none"]), "seed": st.integers(-5, 2**63), "trajectory": st.sampled_from(["sequential", "independent"]), "ddim_steps": st.integers(0, 20)}


@often(150, fields=st.fixed_dictionaries({}, optional={name: good | ANYTHING for name, good in FIELD.items()}))
def test_settings(fields):
    found = attempt(FeatureSettings, **fields)
    if found is not REFUSED: assert FeatureSettings(**found.plain()).plain() == found.plain()


@often(120, arch=st.sampled_from([*ARCHS]), fuse=st.sampled_from(FUSES), dims=st.lists(st.integers(-1, 9), max_size=5), embed=st.integers(0, 6), out_res=st.integers(0, 3),
       shapes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), batch=st.integers(1, 2))
def test_uheads(arch, fuse, dims, embed, out_res, shapes, batch):
    torch.manual_seed(0)
    widths = attempt(arch_widths, arch, len(dims), 1 / 16)
    head = attempt(UHead, dims, embed, arch, fuse, out_res, None if widths is REFUSED else widths)
    if head is REFUSED: return
    maps = [torch.randn(batch + (b == 0), c, h, w) for c, (b, h, w) in zip(dims, sorted(shapes, key=lambda s: s[1]))]
    found = attempt(head, maps)
    if found is not REFUSED: assert found.shape == (batch, embed) or found.shape == (batch + 1, embed)
    if found is not REFUSED: assert found.isfinite().all()


# Metrics


@often(120, data=st.data())
def test_retrieval_agrees_with_scikit_learn(data):
    queries, gallery, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 15))
    scores = np.stack([data.draw(st.permutations(range(gallery))) for _ in range(queries)]) / gallery  # no ties, which scikit-learn breaks otherwise
    ours, theirs = (np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))) for n in (queries, gallery))
    hits = ours[:, None] == theirs
    aps = [average_precision_score(h, s) if h.any() else 0 for h, s in zip(hits, scores)]
    assert abs(mean_average_precision(scores, ours, theirs) - np.mean(aps)) < 1e-6
    first = np.take_along_axis(hits, np.argsort(-scores, axis=1), 1)[:, :k]
    assert abs(precision_at_k(scores, ours, theirs, k) - (first.sum(1) / k).mean()) < 1e-9


@often(100, data=st.data())
def test_accuracy_and_iou_agree_with_scikit_learn(data):
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    pred, target = (np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))) for _ in range(2))
    assert abs(accuracy(np.eye(classes)[pred], target) - accuracy_score(target, pred)) < 1e-9
    there = sorted({*pred, *target})
    assert abs(mean_iou(pred, target, classes) - jaccard_score(target, pred, labels=there, average="macro", zero_division=0)) < 1e-9


@often(120, scores=arrays(st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)) | ANYTHING, queries=ANYTHING | st.lists(st.integers(0, 2), max_size=3),
       gallery=ANYTHING | st.lists(st.integers(0, 2), max_size=3), k=ANYTHING | st.integers(1, 4))
def test_metrics_of_anything(scores, queries, gallery, k):
    for found in (attempt(mean_average_precision, scores, queries, gallery), attempt(precision_at_k, scores, queries, gallery, k), attempt(accuracy, scores, queries), attempt(mean_average_precision, scores, queries, gallery, k)):
        assert found is REFUSED or 0 <= found <= 1
    attempt(retrieval_metrics, scores, scores, queries, queries, (2,))
    if attempt(confusion, queries, gallery, 3) is not REFUSED: assert np.shape(queries) == np.shape(gallery)


def test_large_whole_numbers_are_told_apart():
    "As float32, these scores would be one."
    assert mean_average_precision([[2**24, 2**24 + 1]], [1], [0, 1]) == 1


# Paths

KEPT = tempfile.TemporaryDirectory()  # goes with the process


@often(100, path=st.lists(st.sampled_from(["..", ".", "a", "link", "/", "//", "~", "\0", "a.png"]) | st.text(max_size=4), max_size=5).map("/".join))
def test_no_path_leads_out_of_its_folder(path):
    found = attempt(inside, outer() / "photos", path)
    if found is not REFUSED: assert str(found).startswith(str(outer() / "photos") + os.sep)


@cache
def outer():
    "A folder of photos with a link that leads out of it."
    place = Path(KEPT.name).resolve()
    (place / "photos").mkdir()
    (place / "photos/link").symlink_to(place)
    return place


# Files


def test_every_damage_to_an_index_is_found(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, item in enumerate(Toybox("photo", n=24, seed=3)): item.image.save(tmp_path / f"photos/{i:02}.png")
    index, dice, cases, harmless = build_index(tmp_path / "photos", tmp_path / "idx", Grey(), exact=10, quiet=True), random.Random(2), 1150, 0
    paths = [index.out / name for name in (MANIFEST, *used(index.manifest))]
    good = {path: path.read_bytes() for path in paths}
    assert len(paths) == 3, "manifest, vectors and cells"
    for i in range(cases):
        path = paths[i % 3]
        while (worse := damaged(good[path], dice)) == good[path]: pass
        path.write_bytes(worse)
        try:
            same = Index(index.out).manifest == index.manifest and path.name == MANIFEST
            assert same, f"{path.name} was changed and nobody noticed"
            harmless += 1  # a byte that JSON does not care for
        except VermouthError as e: assert path.name in str(e) and "\n" not in str(e)
        path.write_bytes(good[path])
    assert harmless < 20 and Index(index.out).checksum() == index.checksum()
    COUNTS["fuzz cases"] += cases


@pytest.fixture
def store(tmp_path):
    "Two shards of five items, one more set aside; not yet finished."
    key = {"backbone": "toybox 0123456789abcdef", "captioner": None, "expert": None, "timesteps": [200], "dtype": "float16"}
    manifest = {"format": FORMAT, "key": key, "image": [64, 64], "shapes": [[2, 3, 3], [1, 6, 6]], "ids": list("abcdef"), "stamps": ["7 bytes"] * 6, "shards": [], "checksum": ""}
    maps = [torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).half() for shape in manifest["shapes"]]
    put_shard(tmp_path, 0, [m[:3] for m in maps], ["a fish", "a cat", ""], [], key)
    put_shard(tmp_path, 1, [m[3:] for m in maps], ["a bus", "a tree"], [[4, "not an image"]], key)
    return tmp_path, manifest


def held(out):
    "All that a reader is told, but for the names of weights and the words of a reason, which no digest covers."
    found = FeatureStore(out)
    maps = found.batch(range(len(found)))
    return [m.numpy().tobytes() for m in maps], found.ids, found.prompts, found.kept, found.shapes, found.manifest["stamps"], found.settings["timesteps"], found.settings["dtype"], found.checksum()


def test_every_damage_to_a_store_is_found(store):
    (out, manifest), dice, cases, harmless = store, random.Random(3), 850, 0
    keep(out / "manifest.json", json.dumps(manifest).encode())
    finish(out, manifest, 2)
    whole = held(out)
    for i in range(cases):
        path = out / ("manifest.json", shard_name(0), shard_name(1))[i % 3]
        good = path.read_bytes()
        while (worse := damaged(good, dice)) == good: pass
        path.write_bytes(worse)
        try:
            assert held(out) == whole and path.name == "manifest.json", f"{path.name} was changed and nobody noticed"
            harmless += 1  # white space, a name, a reason
        except VermouthError as e: assert (path.name in str(e) or "format" in str(e)) and "\n" not in str(e)
        path.write_bytes(good)
    assert harmless < 50 and held(out) == whole
    COUNTS["fuzz cases"] += cases


def test_every_damage_to_a_note_of_a_crash_is_found(store):
    "A shard that is done says so in a note until the manifest knows it."
    (out, manifest), dice, cases = store, random.Random(4), 150
    notes = {path: (path.read_bytes(), finished(out, k, manifest)) for k, path in enumerate(sorted(out.glob("shard-*.json")))}
    for i in range(cases):
        k, (path, (good, record)) = i % 2, [*notes.items()][i % 2]
        path.write_bytes(damaged(good, dice))
        assert finished(out, k, manifest) in (None, record)
        path.write_bytes(good)
    (out / "shard-00000.json").write_text("[" * 100_000)
    assert finished(out, 0, manifest) is None
    COUNTS["fuzz cases"] += cases


def test_a_manifest_by_somebody_with_a_plan(store):
    "Its checksum is right; what it says is not."
    out, manifest = store
    finish(out, manifest, 2)
    record = manifest["shards"][0]
    for change in ({"shapes": [[2, 3, -3], [1, 6, 6]]}, {"key": manifest["key"] | {"dtype": "float64"}}, {"key": {}}, {"ids": [1, 2, 3, 4, 5, 6]}, {"shards": [record | {"prompts": [None] * 3}, manifest["shards"][1]]},
                   {"shards": [record | {"items": -3}, manifest["shards"][1]]}, {"shards": [record]}, {"shards": [record, manifest["shards"][1] | {"set_aside": [[99, ""]]}]}):
        false = manifest | change
        keep(out / "manifest.json", json.dumps(false | {"checksum": content_checksum(false)} if false["key"] else false).encode())
        with pytest.raises(VermouthError, match="manifest.json is damaged"): FeatureStore(out)
        COUNTS["fuzz cases"] += 1


def test_damaged_weights_of_a_model_are_found(tmp_path):
    "Its card is read with a schema; what the schema allows is not sealed, so a change to a setting is not found."
    part, dice, cases = {"name": "toybox", "fingerprint": "0" * 16}, random.Random(5), 200
    card = {"backbone": part, "clip": part, "captioner": None, "expert": None, "settings": FeatureSettings().plain(), "prompt": "empty", "size": 64, "uhead": {"arch": "pico", "fuse": "high2low", "out_res": 4, "widths": [32]}, "heads": {}}
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4)}
    write_model(tmp_path, state, card)
    for i in range(cases):
        path = tmp_path / ("vermouth.json", "model.safetensors")[i % 2]
        good = path.read_bytes()
        while (worse := damaged(good, dice)) == good: pass
        path.write_bytes(worse)
        said = attempt(read_card, tmp_path)
        found = attempt(read_weights, tmp_path, state, said["weights"]) if said is not REFUSED else REFUSED
        assert found is REFUSED or i % 2 == 0 and all(torch.equal(found[k], state[k]) for k in state)
        path.write_bytes(good)
    COUNTS["fuzz cases"] += cases
