"Pipes, devices and files that take long to read, at every door: an answer at once, in one sentence."

import os
import signal
import time

import pytest
from bombs import chunk, many_scans, png_with
from PIL import Image
from program import NAMES

from vermouth import images
from vermouth.app.check import check
from vermouth.app.files import packed_images
from vermouth.app.index import Index
from vermouth.backbone import load_backbone
from vermouth.core import VermouthError
from vermouth.data.extraction import image_digest
from vermouth.expert import load_expert
from vermouth.families.overlays import find_lora
from vermouth.images import jpeg_scans, png_without_texts, read_bytes, read_image
from vermouth.model import Vermouth
from vermouth.pretrain.common import family_folder
from vermouth.text import load_captioner, load_clip

TOYBOX = family_folder()
ENDLESS = {
    "pipe.png": (os.mkfifo, "neither a file nor a folder"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "neither a file nor a folder"),
    "scans.jpg": (lambda path: path.write_bytes(many_scans()), "a JPEG file of 4,010 scans"),
}


@pytest.fixture(autouse=True)
def alarm():
    "Nothing may wait for ever."

    def late(*_):
        raise TimeoutError("still waiting after 60 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ENDLESS)
def test_reading_ends_at_once(tmp_path, name):
    write, says = ENDLESS[name]
    write(path := tmp_path / name)
    started = time.thread_time()
    with pytest.raises(VermouthError, match=says):
        read_image(path)
    if name != "scans.jpg":  # which has bytes
        assert image_digest(path) == "unreadable"
    assert time.thread_time() - started < 1


def test_every_command_ends(program, photos):
    folder = program.folder / "photos"
    folder.mkdir()
    for name, (write, _) in ENDLESS.items():
        write(folder / name)
    photos[0].save(folder / "good.png")
    paths = sorted(str(path) for path in folder.iterdir())
    doors = {
        "index": ["index", "photos", "--out", "idx", "--json"],
        "extract": ["extract", *paths, "--out", "store", "--captioner", "none"],
        "classify": ["classify", *paths, *NAMES],
    }
    for door, words in doors.items():
        as_json = [] if "--json" in words else ["--json"]
        found = program(*words, *as_json, code=1)
        skipped = {os.path.basename(name): reason for name, reason in found["set_aside"]}
        assert set(skipped) == set(ENDLESS), door
        # an index does not follow links that lead out of its folder, so it says that of the device
        expected = {name: says for name, (_, says) in ENDLESS.items()}
        wrong = {name for name, says in expected.items() if says not in skipped[name]}
        assert wrong <= ({"device.png"} if door == "index" else set()), (door, skipped)
    for name, (_, says) in ENDLESS.items():
        program.refuses("segment", f"photos/{name}", *NAMES, "--out", "mask.png", says=says)


def test_a_file_may_be_named_endless(tmp_path):
    "Pipes put in the place of a file after it was looked at are opened without waiting."
    os.mkfifo(tmp_path / "a")
    with pytest.raises(VermouthError, match="neither a file nor a folder"):
        read_bytes(tmp_path / "a")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "sparse.bmp").open("wb") as f:
        f.truncate(2**40)
    with pytest.raises(VermouthError, match="more than 536,870,912 bytes"):
        read_image(tmp_path / "sparse.bmp")


def test_the_processors_time_is_limited(tmp_path, monkeypatch):
    Image.new("RGB", (2000, 2000)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_SECONDS", -1)
    with pytest.raises(VermouthError, match="takes more than -1 s. Save it anew"):
        read_image(tmp_path / "a.png")


def test_ordinary_progressive_files_are_read():
    for side in (8, 200):
        data = many_scans(side, 0)
        assert jpeg_scans(data) == 10 and read_image(data).size == (side, side)


# What image generators write


@pytest.mark.parametrize("size", [2**10, 2**21, 2**25])
def test_metadata_of_any_size_is_left_out(size):
    image = Image.effect_noise((9, 7), 50).convert("RGB")
    texts = chunk(b"tEXt", b"workflow\0" + b"x" * size), chunk(b"iTXt", b"prompt\0\0\0\0\0" + b"y" * size)
    data = png_with(image, *texts, chunk(b"iCCP", b"p\0\0" + b"not a profile"))
    assert png_without_texts(data) == png_with(image)
    assert read_image(data).tobytes() == image.tobytes()


def test_what_turns_a_png_file_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(png_with(Image.new("RGB", (9, 7)), chunk(b"eXIf", exif.tobytes()[6:]))).size == (7, 9)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    kept = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    assert read_image(png_with(Image.new("RGB", (9, 7)), kept)).size == (7, 9)


@pytest.mark.parametrize(
    "door",
    [
        lambda folder: check(folder),
        lambda folder: check(folder / "model.safetensors"),
        lambda folder: check(folder / "shard.tar"),
        lambda folder: check(folder / "other"),
        lambda folder: Index(folder),
        lambda folder: find_lora(folder),
        lambda folder: find_lora(folder / "model.safetensors"),
        lambda folder: packed_images(folder / "shard.tar"),
    ],
)
@pytest.mark.parametrize("device", [True, False])
def test_pipes_and_devices_in_the_place_of_models_and_indexes(tmp_path, door, device):
    for name in ("index.sqlite", "model.safetensors", "pytorch_lora_weights.safetensors", "shard.tar", "other"):
        os.symlink("/dev/zero", tmp_path / name) if device else os.mkfifo(tmp_path / name)
    try:
        assert door(tmp_path).problems
    except VermouthError as error:
        assert "\n" not in str(error)


def linked(source, folder, name, replace):
    "A copy of a model's folder by links, with a pipe or a device in the place of one file."
    for file in source.rglob("*"):
        if file.is_file() and (path := folder / file.relative_to(source)) != folder / name:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(file)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    replace(folder / name)
    return folder


LOADERS = {
    "": lambda folder: load_backbone(folder, "cpu"),
    "clip": lambda folder: load_clip(folder, "cpu"),
    "captioner": lambda folder: load_captioner(folder, "cpu"),
    "expert": lambda folder: load_expert(folder, device="cpu"),
    "vermouth": lambda folder: Vermouth.load(folder, "cpu"),
}
OWN = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")  # of the backbone
FILES = [
    (part, str(file.relative_to(TOYBOX / part)))
    for part in LOADERS
    for file in sorted((TOYBOX / part).rglob("*"))
    if file.is_file() and (part or file.relative_to(TOYBOX).parts[0] in OWN)
]


@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
@pytest.mark.parametrize(("part", "name"), FILES, ids="/".join)
def test_a_model_with_a_pipe_or_a_device_for_a_file_is_refused_at_once(tmp_path, part, name, replace):
    folder = linked(TOYBOX / part, tmp_path / "model", name, replace)
    try:
        LOADERS[part](str(folder))  # a file that nothing needs may be anything
    except VermouthError as error:
        assert "\n" not in str(error)
