"Random arrays, tensors, image modes, sizes, and image files with random damage."

import random
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import COUNTS
from fuzz import ANYTHING, REFUSED, attempt, often
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from odd_files import damaged
from PIL import Image

from vermouth.data.masks import read_numbers
from vermouth.data.toybox import Toybox
from vermouth.images import FORMATS, MAX_PIXELS, flatten, image_batch, image_tensor, read_image, resize

SIDES = array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
DTYPES = st.sampled_from(
    ["uint8", "uint16", "int32", "float16", "float32", "float64", "bool", "complex64", "<U3", "object"]
)


@often(
    150, shape=SIDES | st.tuples(st.integers(0, 4), st.integers(0, 4), st.just(3)), dtype=DTYPES, batch=st.booleans()
)
def test_arrays(shape, dtype, batch):
    array = np.ones(shape, dtype=dtype)
    found = attempt(image_batch if batch else image_tensor, array)
    good = dtype == "uint8" and array.size and shape[-1:] == (3,) and len(shape) in ((3, 4) if batch else (3,))
    assert (found is not REFUSED) == bool(good)
    if good:
        assert (
            found.dtype == torch.float32
            and found.shape[-3:] == (3, *shape[-3:-1])
            and torch.all(found == 1 / 127.5 - 1)
        )


@often(
    150,
    shape=SIDES | st.tuples(st.just(3), st.integers(0, 4), st.integers(0, 4)),
    value=st.floats(-1.5, 1.5) | st.sampled_from([float("nan"), float("inf")]),
    batch=st.booleans(),
    dtype=st.sampled_from(
        [
            torch.uint8,
            torch.int64,
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.bool,
            torch.complex64,
        ]
    ),
)
def test_tensors(shape, value, dtype, batch):
    x = torch.full(shape, value if dtype.is_floating_point else 1, dtype=dtype)
    found = attempt(image_batch if batch else image_tensor, x)
    good = (
        dtype.is_floating_point
        and x.numel()
        and len(shape) in ((3, 4) if batch else (3,))
        and shape[-3] == 3
        and x.isfinite().all()
        and x.abs().max() <= 1.01
        and not 0.5 < float(x.max()) == float(x.min())  # as one in [0, 1] looks
    )
    assert (found is not REFUSED) == bool(good)
    if good:
        assert torch.equal(found.reshape(-1), x.float().reshape(-1))


MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16B",
]


@often(
    100,
    mode=st.sampled_from(MODES),
    width=st.integers(0, 5),
    height=st.integers(0, 5),
    mark=st.sampled_from([None, 0, b"\0\xff", (1, 2, 3), "x"]),
)
def test_modes(mode, width, height, mark):
    im = Image.new(mode, (width, height))
    if mark is not None:
        im.info["transparency"] = mark
    found, x = attempt(flatten, im), attempt(image_tensor, im)
    if found is not REFUSED:
        assert (found.mode, found.size) == ("RGB", (width, height)) and (x is REFUSED) == (width * height == 0)


@cache
def picture_files():
    "The same photo in every format that is read."
    image, found = Toybox("photo", n=1, seed=4)[0].image.resize((24, 16)), []
    for kind in FORMATS:
        buffer = BytesIO()
        try:
            image.save(buffer, kind)
        except (KeyError, OSError):
            continue  # a format that this Pillow was built without
        found.append(buffer.getvalue())
    return found


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_damaged_pictures(tmp_path):
    dice, path, cases = random.Random(0), tmp_path / "photo.png", 250
    assert len(picture_files()) >= 7
    for i in range(cases):
        path.write_bytes(
            damaged(damaged(picture_files()[i % len(picture_files())], dice), dice) if i % 5 else dice.randbytes(200)
        )
        found = attempt(read_image, path)
        assert found is REFUSED or found.mode == "RGB" and found.width * found.height <= MAX_PIXELS
        numbers = attempt(read_numbers, path)
        assert numbers is REFUSED or numbers.dtype == np.int32 and numbers.ndim == 2
    COUNTS["fuzz cases"] += cases


@often(100, size=ANYTHING | st.integers(-2, 9) | st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
def test_sizes(size):
    found = attempt(resize, torch.zeros(3, 4, 5), size)
    if found is not REFUSED:
        assert tuple(found.shape[1:]) == (
            (4, 5) if size is None else (size, size) if isinstance(size, int) else tuple(size)
        )


@often(60, images=ANYTHING)
def test_what_is_no_image(images):
    assert attempt(image_batch, images) is REFUSED
