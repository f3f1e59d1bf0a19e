"Orientation as forty odd files say it: the image is turned as viewers turn it, or shown as it lies."

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vermouth.images import flatten, read_image

PICTURE = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
TURNED = {  # orientation → the array as it is to be seen
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}
KINDS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}


def exif_of(kind, values, order="<"):
    "An EXIF block of one entry, the orientation, in any type of the standard."
    size = struct.calcsize(kind)
    code = {"B": 1, "H": 3, "I": 4, "h": 8, "i": 9, "f": 11, "d": 12}[kind]
    data = struct.pack(f"{order}{len(values)}{kind}", *values)
    head = (b"II*\\0" if order == "<" else b"MM\\0*").replace(b"\\0", b"\0") + struct.pack(f"{order}I", 8)
    entry = struct.pack(f"{order}HHI", 0x0112, code, len(values))
    entry += data.ljust(4, b"\0") if size * len(values) <= 4 else struct.pack(f"{order}I", 26)
    more = b"" if size * len(values) <= 4 else data
    return b"Exif\0\0" + head + struct.pack(f"{order}H", 1) + entry + struct.pack(f"{order}I", 0) + more


def saved(kind, exif, **options):
    PICTURE.save(buffer := io.BytesIO(), kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", TURNED)
def test_every_orientation_of_every_kind(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(kind, exif, **KINDS[kind])
    expected = TURNED[orientation](np.asarray(PICTURE))
    np.testing.assert_array_equal(np.asarray(read_image(data)), expected)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(np.asarray(flatten(opened)), expected)
    assert read_image(saved("JPEG", exif)).size == expected.shape[1::-1]


ODD = {
    "as a byte": (exif_of("B", [6]), 1),
    "as a long": (exif_of("I", [6]), 6),
    "as a signed short": (exif_of("h", [6]), 6),
    "as a float": (exif_of("f", [6.0]), 6),
    "as a double": (exif_of("d", [6.0]), 6),
    "big endian": (exif_of("H", [6], ">"), 6),
    "two of them": (exif_of("H", [6, 1]), None),  # no two viewers agree; it must be read
    "0": (exif_of("H", [0]), 1),
    "9": (exif_of("H", [9]), 1),
    "65535": (exif_of("H", [65535]), 1),
    "negative": (exif_of("h", [-6]), 1),
    "half": (exif_of("f", [6.5]), 1),
    "not a number": (exif_of("f", [float("nan")]), 1),
    "empty": (b"Exif\0\0", 1),
    "cut": (exif_of("H", [6])[:20], 1),
    "noise": (b"Exif\0\0" + bytes(range(200)), 1),
    "an entry that points beyond the end": (exif_of("d", [6.0])[:-8], 1),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.filterwarnings("ignore")
def test_odd_tags_are_read_or_left_alone(name, kind):
    exif, orientation = ODD[name]
    found = read_image(saved(kind, exif))
    if orientation is not None:
        assert found.size == ((4, 6) if orientation == 6 else (6, 4))
