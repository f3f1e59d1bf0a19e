"Image files that are small on the disk and large in memory, or take long to read."

import io
import struct
import zlib

import numpy as np
from PIL import Image


def _palette(side):
    image = Image.new("P", (side, side), 3)
    image.putpalette([i % 256 for i in range(768)])
    return image


def _deep(side, dtype, value):
    return Image.fromarray(np.full((side, side), value, dtype))


# file name → function that writes it; a flat image of side × side pixels
LARGE = {
    "bits.png": lambda path, side: Image.new("1", (side, side), 1).save(path),
    "float.tif": lambda path, side: _deep(side, np.float32, 0.5).save(path, compression="tiff_adobe_deflate"),
    "deep.png": lambda path, side: _deep(side, np.uint16, 30_000).save(path),
    "cmyk.jpg": lambda path, side: Image.new("CMYK", (side, side), (1, 2, 3, 4)).save(path, progressive=True),
    "palette.png": lambda path, side: _palette(side).save(path, transparency=3),
    "animated.gif": lambda path, side: _palette(side).save(path, save_all=True, append_images=[_palette(side)]),
    "alpha.webp": lambda path, side: Image.new("RGBA", (side, side), (9, 8, 7, 6)).save(path, method=0),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(image, *chunks):
    "A PNG file with more chunks after its header."
    image.save(buffer := io.BytesIO(), "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


def many_scans(side=2000, scans=4000):
    "A progressive JPEG file of some hundred kilobytes, whose last scan comes again and again."
    Image.new("RGB", (side, side), "teal").save(buffer := io.BytesIO(), "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rindex(b"\xff\xc4") : -2]  # with its table
    return data[:-2] + scan * scans + b"\xff\xd9"
