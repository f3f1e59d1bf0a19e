"Image files that are damaged, unsafe or unusual, and a model fast enough to embed many of them."

import os
import struct
import zlib

import numpy as np
import torch
from PIL import Image


class Grey:
    "Embed an image as 8×8 grey pixels. It starts no threads, so a forked process can use it."

    name, fingerprint = "grey", "0123456789abcdef"

    def __init__(self):
        self.seen = 0

    def embed(self, images):
        images = images if isinstance(images, list) else [images]
        self.seen += len(images)
        x = np.stack([np.asarray(im.convert("L").resize((8, 8)), dtype=np.float32).ravel() for im in images])
        x = x - x.mean(1, keepdims=True) + 0.1
        return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def bomb(path):
    "Write a PNG of 400 million pixels in about a hundred bytes."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 60_001))
        + chunk(b"IEND", b"")
    )


def truncate(path, image, size):
    "Save an image and keep the first `size` bytes of the file."
    image.save(path)
    path.write_bytes(path.read_bytes()[:size])


# file name → (function that creates it from a path and an image, part of the reason for which it is skipped)
BAD = {
    "truncated.png": (lambda p, im: truncate(p, im, 2000), "truncated"),
    "truncated.jpg": (lambda p, im: truncate(p, im, 700), "truncated"),
    "empty.png": (lambda p, im: p.touch(), "not an image"),
    "text.jpg": (lambda p, im: p.write_text("a picture of a cat"), "not an image"),
    "bomb.png": (lambda p, im: bomb(p), "20000×20000 pixels, more than 100,000,000"),
    "pipe.png": (lambda p, im: os.mkfifo(p), "neither a file nor a folder"),
    "dangling.png": (lambda p, im: p.symlink_to("nothing"), "leads nowhere"),
    "circle.png": (lambda p, im: p.symlink_to("circle.png"), "leads nowhere"),
    "out.png": (lambda p, im: p.symlink_to("/etc/hostname"), "leads out of the folder"),
    "outside": (lambda p, im: p.symlink_to("/etc"), "leads out of the folder"),
}

# file name → function that creates it from a path and an image
GOOD = {
    "cmyk.jpg": lambda p, im: im.convert("CMYK").save(p),
    "grey.png": lambda p, im: im.convert("L").save(p),
    "deep.png": lambda p, im: Image.fromarray(np.asarray(im.convert("L"), dtype=np.uint16) * 257).save(p),
    "palette.png": lambda p, im: im.convert("RGBA").quantize(16).save(p, transparency=0),
    "alpha.webp": lambda p, im: im.convert("RGBA").save(p),
    "animated.gif": lambda p, im: im.save(p, save_all=True, append_images=[im.rotate(90)]),
    "really a jpeg.png": lambda p, im: im.save(p, "JPEG"),
    "LOUD.JPG": lambda p, im: im.save(p, "JPEG"),
    "one.png": lambda p, im: im.resize((1, 1)).save(p),
    "thin.png": lambda p, im: im.resize((1, 5000)).save(p),
    "ünï ćødé 画像.png": lambda p, im: im.save(p),
    "new\nline.png": lambda p, im: im.save(p),
    "<b>'\"&.png": lambda p, im: im.save(p),
    os.fsdecode(b"caf\xe9.png"): lambda p, im: im.save(p, "PNG"),
}


def damaged(data, dice):
    "Return the bytes with one bit flipped, a part cut off, some inserted, or some set to zero."
    at = dice.randrange(len(data))
    return dice.choice(
        [
            data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :],
            data[:at],
            data[:at] + dice.randbytes(3) + data[at:],
            data[:at] + bytes(len(data[at : at + 9])) + data[at + 9 :],
        ]
    )
