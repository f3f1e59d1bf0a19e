"""What people and machines hand to Vermouth by mistake or on purpose, in one table: each row is tried, and each either works,
or ends in one sentence and exit code 2 with nothing lost."""
import contextlib
import importlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COUNTS
from odd_files import BAD, GOOD, Grey, bomb
from PIL import Image
from typer.testing import CliRunner

from vermouth import backbone, text
from vermouth.app.cli import app
from vermouth.app.search import build_index
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import Vermouth
from vermouth.shards import shard_name, sole_writer
from vermouth.store import extract

LOAD, LOAD_BACKBONE, LOAD_CAPTIONER = Vermouth.load, backbone.load_backbone, text.load_captioner


@cache
def toybox(): return LOAD("toybox", "cpu")


@cache
def photos(): return [item.image for item in Toybox("photo", n=5, seed=3)]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    "The program as it is, but that it loads the Toybox once for all rows."
    def unless_toybox(ready, load): return lambda name="toybox", *rest, **more: ready() if str(name) == "toybox" and not more else load(name, *rest, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vermouth, "load", unless_toybox(toybox, LOAD))
        patch.setattr(backbone, "load_backbone", unless_toybox(lambda: toybox().backbone, LOAD_BACKBONE))
        patch.setattr(text, "load_captioner", unless_toybox(lambda: toybox().captioner, LOAD_CAPTIONER))
        yield


@dataclass
class Place:
    "An empty folder, the current one, and what is put right again afterwards."
    here: Path
    patch: pytest.MonkeyPatch
    after: contextlib.ExitStack
    image: Image.Image = field(default_factory=lambda: photos()[0])
    kept: dict[str, Any] = field(default_factory=dict)  # what `check` wants to compare with

    def __truediv__(self, name): return self.here / name


@dataclass
class Row:
    "One input."
    make: Callable[[Place], Any]         # puts it there
    words: list[str] | Callable[[], Any] # for the program; or, for what a shell cannot hand over, a call
    says: str = ""                       # part of the sentence that refuses it; empty: it works
    check: Callable[[Place, Any], Any] = lambda place, found: None # looks at what the program printed; raises what pytest shows
    code: int = 0                        # 1 where something was set aside


CLASSES = ["cat", "fish", "tree"]
NAMES = ["--names", ",".join(CLASSES)]
CLASSIFY = ["classify", ".", *NAMES, "--json"]
EXTRACT = ["extract", ".", "--out", "store", "--captioner", "none", "-p", "stages", "mid", "-p", "attention", "[]", "--json"]
INDEX = ["index", "photos", "--out", "idx", "--json"]


def some(place, folder="photos", n=3):
    "A few good photos."
    (place / folder).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(photos()[:n]): image.save(place / folder / f"{i}.png")


def folder(*words, **places):
    "The words with another folder to read and another to write."
    said = [*words]
    if "read" in places: said[1] = places["read"]
    if "out" in places: said[said.index("--out") + 1] = places["out"]
    return said


# Images: what works looks like its twin


def twins(write, twin=lambda im: im, name="odd.png"):
    "A photo in an odd form, and a plain one that looks the same."
    def make(place):
        write(place.image, place / name)
        twin(place.image).save(place / "twin.bmp")
    return make


def rows_of(found): return [[image["probabilities"][name] for name in CLASSES] for image in found["images"]]  # in one order: the program sorts by what it saw


def alike(place, found):
    rows = rows_of(found)
    assert len(rows) == 2 and not found["set_aside"]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)
    np.testing.assert_allclose(np.sum(rows, 1), 1, atol=1e-4)


def sane(place, found):
    assert not found["set_aside"] and found["images"]
    for image in found["images"]: assert abs(sum(image["probabilities"].values()) - 1) < 1e-4


def turned(im, path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    im.rotate(90).save(path, exif=exif)


def see_through(im):
    "Sixteen colours, of which one is not there."
    clear = im.quantize(16)
    clear.info["transparency"] = 0
    return clear


def on_white(im):
    clear = see_through(im).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", im.size, "white"), clear).convert("RGB")


IMAGES = {
    "CMYK": Row(twins(lambda im, p: im.convert("CMYK").save(p), name="odd.tif"), CLASSIFY, check=alike),
    "16 bits": Row(twins(lambda im, p: Image.fromarray(np.asarray(im.convert("L"), dtype=np.uint16) * 257).save(p), lambda im: im.convert("L")), CLASSIFY, check=alike),
    "real numbers from 0 to 1": Row(twins(lambda im, p: Image.fromarray(np.asarray(im.convert("L"), dtype=np.float32) / 255).save(p), lambda im: im.convert("L"), "odd.tif"), CLASSIFY, check=alike),
    "palette with alpha": Row(twins(lambda im, p: see_through(im).save(p, transparency=0), on_white), CLASSIFY, check=alike),
    "animated": Row(twins(lambda im, p: im.quantize(16).save(p, save_all=True, append_images=[im.rotate(90).quantize(16)]), lambda im: im.quantize(16).convert("RGB"), "odd.gif"), CLASSIFY, check=alike),
    "taken sideways": Row(twins(turned), CLASSIFY, check=alike),
    "wrong extension": Row(twins(lambda im, p: im.save(p, "BMP"), name="odd.jpg"), CLASSIFY, check=alike),
    "1×1": Row(twins(lambda im, p: Image.new("RGB", (1, 1), "teal").save(p), lambda im: Image.new("RGB", (64, 64), "teal")), CLASSIFY, check=alike),
    "1×5000": Row(lambda place: place.image.resize((1, 5000)).save(place / "thin.png"), CLASSIFY, check=sane),
    "5000×1": Row(lambda place: place.image.resize((5000, 1)).save(place / "flat.png"), CLASSIFY, check=sane),
    "a name in Unicode": Row(twins(lambda im, p: im.save(p), name="ünï ćødé 画像 🐟.png"), CLASSIFY, check=alike),
    "a name with spaces": Row(twins(lambda im, p: im.save(p), name="  my photo .png"), CLASSIFY, check=alike),
    "a name with a new line": Row(twins(lambda im, p: im.save(p), name="new\nline.png"), CLASSIFY, check=alike),
    "a name in another encoding": Row(twins(lambda im, p: im.save(p, "PNG"), name=os.fsdecode(b"caf\xe9.png")), CLASSIFY, check=alike),
}


# Images that are refused when they are asked for, and set aside when they are among others


def alone(name, write):
    return dict(make=lambda place: write(place / name, place.image), words=["segment", name, *NAMES, "--out", "mask.png"])


def many(name):
    "All bad files and all odd ones in one folder."
    def make(place):
        (place / name).mkdir(exist_ok=True)
        for file, (write, _) in BAD.items(): write(place / name / file, place.image)
        for file, write in GOOD.items(): write(place / name / file, place.image)
        (place / name / "below").mkdir()
        (place / name / "below/up").symlink_to("..")  # a circle of folders
    return make


def crowd(place):
    "The same photo under 9,999 names, and a text."
    some(place, n=1)
    for i in range(1, 9_999): os.link(place / "photos/0.png", place / f"photos/{i}.png")
    (place / "photos/9999.png").write_text("a picture of a cat")


def the_rest(place, found):
    "What the long jobs list at their end."
    aside = {Path(name).name for name, _ in found["set_aside"]}
    unseen = {"outside", "pipe.png"}  # a folder and a pipe, which only an index speaks of: they are no files
    assert {*BAD} - unseen - {"out.png"} <= aside <= {*BAD}, aside
    assert found.get("items", found.get("photos", len(found.get("images", [])))) in (len(GOOD), len(GOOD) + 1)


REFUSED = {
    "truncated PNG": Row(**alone("cut.png", BAD["truncated.png"][0]), says="image='cut.png': it cannot be read (image file is truncated"),
    "truncated JPEG": Row(**alone("cut.jpg", BAD["truncated.jpg"][0]), says="image='cut.jpg': it cannot be read (image file is truncated"),
    "zero bytes": Row(**alone("empty.png", BAD["empty.png"][0]), says="not an image"),
    "not an image": Row(**alone("text.jpg", BAD["text.jpg"][0]), says="not an image"),
    "a program that draws": Row(**alone("page.png", lambda p, im: im.save(p, "EPS")), says="not an image"),
    "an icon around another image": Row(**alone("icon.png", lambda p, im: im.save(p, "ICO")), says="not an image"),
    "NaN among the pixels": Row(**alone("deep.tif", lambda p, im: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(p)), says="NaN"),
    # its bytes end after a row, so that decoding it would say something else
    "real numbers in no usual range": Row(**alone("deep.tif", lambda p, im: Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(p)), says="pixels go from -1 to 1. Scale them to 0…1"),
    "decompression bomb": Row(**alone("bomb.png", lambda p, im: bomb(p)), says="20000×20000 pixels, more than 100,000,000"),
    "dangling link": Row(**alone("dangling.png", BAD["dangling.png"][0]), says="no such file"),
    "a link to itself": Row(**alone("circle.png", BAD["circle.png"][0]), says="levels of symbolic links"),
    "no such file": Row(**alone("none.png", lambda p, im: None), says="no such file"),
    "a folder for an image": Row(**alone("photo.png", lambda p, im: p.mkdir()), says="Is a directory"),
    "bad files among odd ones, classified": Row(many("."), CLASSIFY, code=1, check=the_rest),
    "bad files among odd ones, extracted": Row(many("in"), folder(*EXTRACT, read="in"), code=1, check=the_rest),
    "bad files among odd ones, indexed": Row(many("photos"), INDEX, code=1, check=the_rest),
    "ten thousand files in one folder": Row(crowd, INDEX, code=1, check=lambda place, found: [found["photos"], found["looked_at"], len(found["set_aside"])] == [9_999, 1, 1] or pytest.fail(str(found))),
    "an empty folder, classified": Row(lambda place: None, CLASSIFY, "no images there"),
    "an empty folder, extracted": Row(lambda place: (place / "in").mkdir(), folder(*EXTRACT, read="in"), "no images there"),
    "an empty folder, indexed": Row(lambda place: (place / "photos").mkdir(), INDEX, "no photos in it"),
}


# Words


def said_once(sentence):
    def check(place, found):
        sane(place, found)
        said = [str(w.message) for w in place.kept["warnings"] if str(w.message).startswith("texts:")]
        assert len(said) == 1 and sentence in said[0], said
    return check


def named(names): return ["classify", ".", "--names", names, "--json", "--batch-size", "1"]


WORDS = {
    "a class nobody knows": Row(lambda place: some(place, "."), named("zyzzyva,cat"), check=said_once("CLIP does not know 'zyzzyva', and reads")),
    "a repeated class": Row(lambda place: some(place, "."), named("cat, dog ,cat"), "names: 'cat' occurs 2 times"),
    "the same class twice to the eye": Row(lambda place: some(place, "."), named("tall_tree,tall  tree"), "names: 'tall tree' occurs 2 times"),
    "one class": Row(lambda place: some(place, "."), named("cat"), "names='cat': one name, which everything would get"),
    "one class, segmented": Row(lambda place: some(place, "."), ["segment", "0.png", "--names", "cat", "--out", "mask.png"], "names='cat': one name"),
    "a nameless class": Row(lambda place: some(place, "."), named("cat,,dog"), "names: number 1 is empty"),
    "a class name of 500 words": Row(lambda place: some(place, "."), named("cat," + "fish " * 500), check=said_once("1 longer than CLIP's")),
    "other alphabets": Row(lambda place: some(place, "."), named("猫,кошка,قطة,γάτα,חתול,🐈"), check=said_once("CLIP does not know '猫', 'кошка', 'قطة', 'γάτα', 'חתול' and others")),
    "a class name in another encoding": Row(lambda place: some(place, "."), named("cat," + os.fsdecode(b"caf\xe9")), "is not text in UTF-8"),
    "braces in a name": Row(lambda place: some(place, "."), named("{},{0},{cat},%s"), check=sane),
}


# Settings and tensors


def settings(*words): return dict(make=lambda place: some(place, "in"), words=[*folder(*EXTRACT, read="in"), *words])
def call(do): return dict(make=lambda place: None, words=do)


def image(value=0.0, **how): return torch.full((3, 64, 64), value, **how)


SETTINGS = {
    "a time step too late": Row(**settings("-p", "timesteps", "1000"), says="timesteps=1000: give one or more whole numbers from 0 to 999"),
    "a time step too early": Row(**settings("-p", "timesteps", "[200, -1]"), says="timesteps=[200, -1]"),
    "half a time step": Row(**settings("-p", "timesteps", "200.5"), says="timesteps=200.5"),
    "a seed that is a word": Row(**settings("-p", "seed", "lucky"), says="seed='lucky': pass a whole number"),
    "a seed too large": Row(**settings("-p", "seed", str(2**70)), says="pass a whole number"),
    "no size": Row(**settings("--size", "0"), says="size=0: pass a side in pixels from 1"),
    "less than no size": Row(**settings("--size", "-8"), says="size=-8: pass a side"),
    "a size beyond memory": Row(**settings("--size", "1000000"), says="size=1000000: pass a side"),
    "a floating-point type nobody has": Row(**settings("--dtype", "float17", "--model", "./toybox"), says="dtype='float17': unknown"),
    "a device that is not here": Row(**settings("--device", "cuda:99", "--model", "./toybox"), says="device='cuda:99': not usable here"),
    "empty batches": Row(lambda place: some(place, "."), [*CLASSIFY, "--batch-size", "0"], "batch_size=0"),
    "NaN tensor": Row(**call(lambda: toybox().embed(image(float("nan")))), says="images: a tensor with NaN"),
    "infinite tensor": Row(**call(lambda: toybox().classify(image(float("inf")), ["cat", "dog"])), says="images: a tensor with NaN or infinite"),
    "a tensor of bytes": Row(**call(lambda: toybox().embed(image(0, dtype=torch.uint8))), says="images: a tensor of torch.uint8"),
    "an array of floats": Row(**call(lambda: toybox().embed(np.zeros((64, 64, 3)))), says="images: an array of float64"),
    "an array of floats from 0 to 1": Row(**call(lambda: toybox().embed([np.ones((64, 64, 3), np.float32)])), says="images: an array of float32"),
    "a tensor of 0…255": Row(**call(lambda: toybox().embed(image(255.0))), says="images: a tensor with values up to 255. Scale it to [-1, 1]"),
    "channels last": Row(**call(lambda: toybox().embed(torch.zeros(64, 64, 3))), says="images: a tensor of shape (64, 64, 3)"),
    "one number": Row(**call(lambda: toybox().embed(torch.tensor(0.5))), says="images: a tensor of shape ()"),
    "a file that Pillow has opened and cannot decode": Row(lambda place: BAD["truncated.png"][0](place / "cut.png", place.image), lambda: toybox().embed(Image.open("cut.png")), "it cannot be read"),
    "labels that are no classes": Row(**call(lambda: text.make_prompts("oracle", photos(), names=["cat"], labels=[0, 1, 0, 0, 0])), says="labels: 1 is not an index of 1 names"),
}


# Weights


def wrong_pipeline(place):
    some(place, "in")
    (place / "xl").mkdir()
    (place / "xl/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
                                                           "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}))


def pickled(name, **files):
    "A folder of a model with pickled weights, which would say so if they were ever opened."
    class Trap:
        def __reduce__(self): return (os.mkdir, ("sprung",))
    def make(place):
        some(place, "in")
        for file, content in files.items() if files else ():
            (place / name / file).parent.mkdir(parents=True, exist_ok=True)
            (place / name / file).write_text(content)
        (place / name / "vae").mkdir(parents=True, exist_ok=True)
        for file in ("model.safetensors", "pytorch_model.bin", "vae/diffusion_pytorch_model.bin"): torch.save(Trap(), place / name / file)
    return make


def card(place):
    "A saved model whose weights are a pickle under the right name."
    toybox().save(place / "model")
    pickled("model")(place)


SD = json.dumps({"_class_name": "StableDiffusionPipeline", **{part: ["diffusers", cls] for part, (cls, _) in backbone.WEIGHTS.items()}})
WEIGHTS = {
    "a checkpoint of another kind": Row(wrong_pipeline, [*folder(*EXTRACT, read="in"), "--model", "xl"], "holds a StableDiffusionXLPipeline whose text_encoder_2"),
    "a checkpoint in one file": Row(lambda place: (some(place, "in"), (place / "sd.safetensors").touch()), [*folder(*EXTRACT, read="in"), "--model", "sd.safetensors"], "no model_index.json in it"),
    "a backbone for a trained model": Row(lambda place: (some(place, "."), wrong_pipeline(place)), ["classify", "0.png", *NAMES, "--model", "xl"], "vermouth.json is missing"),
    "pickles for a backbone": Row(pickled("sd", **{"model_index.json": SD}), [*folder(*EXTRACT, read="in"), "--model", "sd"], "pickled .bin files are not read"),
    "pickles for a trained model": Row(lambda place: (pickled("model")(place), (place / "model/model.safetensors").unlink()), ["classify", "in", *NAMES, "--model", "model"], "vermouth.json is missing (pytorch_model.bin is there, but pickled weights are not read)"),
    "a pickle that is called safetensors": Row(card, ["classify", "in", *NAMES, "--model", "model"], "is not a whole file in safetensors format"),
    "pickles for a captioner": Row(lambda place: (pickled("blip")(place), (place / "blip/model.safetensors").unlink()), [*folder(*EXTRACT, read="in"), "--captioner", "blip"], "pickled ones are not read"),
}


# Stores, indexes, disks, clocks


def stored(place, out="store"):
    some(place, "in")
    return extract(toybox().backbone, sorted((place / "in").iterdir()), place / out, size=64, stages="mid", attention=(), shard_size=2, quiet=True)


def tampered(place):
    stored(place)
    path = place / "store" / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def unfinished(place):
    "As a crash leaves it, but that somebody has changed the size of the images."
    store = stored(place)
    manifest = store.manifest | {"shards": [], "checksum": "", "image": [64, 65]}
    (place / "store/manifest.json").write_text(json.dumps(manifest))
    for k in range(2): (place / "store" / shard_name(k)).unlink()


def again(): extract(toybox().backbone, sorted(Path("in").iterdir()), "store", size=64, stages="mid", attention=(), shard_size=2, quiet=True)


def other_model(place):
    some(place)
    build_index(place / "photos", place / "idx", Grey(), quiet=True)


def climbing(place):
    "An index whose manifest was written by somebody with a plan: every digest is right, and a path leads out."
    from vermouth.app.gallery import write_manifest
    other_model(place)
    manifest = json.loads((place / "idx/index.json").read_text())
    Image.new("RGB", (9, 9)).save(place / "secret.png")
    manifest["photos"][0][0] = "../secret.png"
    write_manifest(place / "idx", {k: v for k, v in manifest.items() if k not in ("format", "checksum", "seal")})


def climb():
    from vermouth.app.gallery import Index
    index = Index("idx")
    [index.nearest(Grey().embed([Image.new("RGB", (9, 9))]).numpy(), 9)[i].look() for i in range(len(index))]


def busy(folder, what):
    def make(place):
        some(place, "in"), some(place)
        place.after.enter_context(sole_writer(place / folder, what))
    return make


def small_disk(place, size):
    "A tmpfs of so many bytes on `disk`."
    (place / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "disk"], cwd=place.here, capture_output=True, text=True) if os.getuid() == 0 else None
    if mounted is None or mounted.returncode: pytest.skip("a small disk to fill can be mounted by root only, and not in every container")
    place.after.callback(subprocess.run, ["umount", "disk"], cwd=place.here, check=True)


def filling(place):
    some(place, "photos", 5), small_disk(place, "20k")


def goes_on(place, found):
    "More room, and what was finished is not done again."
    kept = len(list((place / "disk/idx").glob("part-*")))
    assert kept >= 1
    subprocess.run(["mount", "-o", "remount,size=1m", "disk"], cwd=place.here, check=True)
    again = shell([*folder(*INDEX, out="disk/idx"), "--batch-size", "1"])
    assert again.exit_code == 0 and json.loads(again.stdout)["looked_at"] == 5 - kept, again.stderr


def as_nobody(place):
    "Root may do everything: be somebody else for a while."
    toybox(), photos()
    for module in ("vermouth.app.run", "vermouth.app.files", "vermouth.app.search"): importlib.import_module(module)  # Python itself may lie in root's home
    if os.getuid(): return
    for path in (place.here, *place.here.rglob("*")): os.chown(path, 65534, 65534)
    for above in place.here.parents: # a temporary folder may be root's alone
        mode = stat.S_IMODE(above.stat().st_mode)
        if mode & 0o011 != 0o011: place.after.callback(above.chmod, mode); above.chmod(mode | 0o011)
    os.seteuid(65534)
    place.after.callback(os.seteuid, 0)


def locked(what):
    def make(place):
        some(place, "in"), some(place)
        (place / "in/below").mkdir(), (place / "photos/below").mkdir(), (place / "shut").mkdir()
        (place / what).chmod(0o555 if what == "shut" else 0)
        as_nobody(place)
        place.after.callback((place / what).chmod, 0o755)  # before root is back, and before the folder is removed
    return make


def one_aside(place, found):
    [(name, why)] = found["set_aside"]
    assert "ermission denied" in why and found.get("items", found.get("photos")) in (2, 3)


def clock(place):
    "Files from the future and from before 1970, and a clock that runs backwards all the while."
    some(place, "in"), some(place)
    for i in range(3):
        for name in ("in", "photos"): os.utime(place / name / f"{i}.png", ns=((i - 1) * 2**61, (i - 1) * 2**61))
    now = iter(range(2**31, 0, -100))
    place.patch.setattr(time, "time", lambda: float(next(now)))
    place.kept["before"] = [json.loads(shell(words).stdout) for words in (folder(*EXTRACT, read="in"), INDEX)]


def as_before(place, found):
    for name in ("in", "photos"): os.utime(place / name / "1.png", (0, 0))
    store, index = place.kept["before"]
    if "store" in found: assert (found["checksum"], found["items"]) == (store["checksum"], 3)
    else: assert (found["checksum"], found["looked_at"]) == (index["checksum"], 0)


DISKS = {
    "a tampered shard": Row(tampered, ["verify", "store"], "shard-00001.safetensors is not what was written"),
    "a store begun and then changed": Row(unfinished, again, "its manifest.json is damaged"),
    "a store that is none": Row(lambda place: (place / "store").mkdir(), ["verify", "store"], "no manifest.json in it"),
    "an index of another model": Row(other_model, ["search", "idx", "a cat"], "are not those that made the index 'idx', 'grey' (0123456789abcdef)"),
    "an index that leads elsewhere": Row(climbing, climb, "path='../secret.png': leads out of the folder of photos"),
    "two writers of a store": Row(busy("store", "store"), folder(*EXTRACT, read="in"), "another process is writing this store"),
    "two writers of an index": Row(busy("idx", "index"), INDEX, "another process is writing this index"),
    "a disk too small for a store": Row(lambda place: (some(place, "in"), small_disk(place, "4k")), folder(*EXTRACT, read="in", out="disk/store"), "are free. Free some space"),
    "a disk that is full in the middle": Row(filling, [*folder(*INDEX, out="disk/idx"), "--batch-size", "1"], "No space left on device", check=goes_on),
    "no permission to read a photo, extracted": Row(locked("in/1.png"), folder(*EXTRACT, read="in"), code=1, check=one_aside),
    "no permission to read a photo, indexed": Row(locked("photos/1.png"), INDEX, code=1, check=one_aside),
    "no permission to open a folder": Row(locked("photos/below"), INDEX, code=1, check=one_aside),
    "read-only output of a store": Row(locked("shut"), folder(*EXTRACT, read="in", out="shut/store"), "out='shut/store': cannot be written (Permission denied)"),
    "read-only output of an index": Row(locked("shut"), folder(*INDEX, out="shut/idx"), "out='shut/idx': cannot be written (Permission denied)"),
    "read-only output of a mask": Row(locked("shut"), ["segment", "in/0.png", *NAMES, "--out", "shut/mask.png"], "out='shut/mask.png': cannot be written (Permission denied)"),
    "a clock moved back, extracted": Row(clock, folder(*EXTRACT, read="in"), check=as_before),
    "a clock moved back, indexed": Row(clock, INDEX, check=as_before),
}


# Memory


def short(part, most):
    "Memory for so many images or texts at once, in one part of the model."
    def make(place):
        some(place, ".", 5)
        place.kept["plain"] = toybox().classify(photos(), CLASSES).tolist()
        owner, name = {"VAE": (toybox().backbone.vae, "encode"), "captioner": (toybox().captioner.model, "generate"), "expert": (toybox().expert.net, "forward"), "CLIP": (toybox().clip.model, "encode_text")}[part]
        def greedy(x, *rest, real=getattr(owner, name), **more):
            if len(x) > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return real(x, *rest, **more)
        place.patch.setattr(owner, name, greedy)
    return make


def as_with_room(place, found):
    np.testing.assert_allclose(rows_of(found), place.kept["plain"], atol=1e-4)


MEMORY = {f"memory for {most} in the {part}": Row(short(part, most), CLASSIFY, check=as_with_room) for part, most in (("VAE", 2), ("captioner", 1), ("expert", 2), ("CLIP", 1))}
MEMORY |= {f"memory for none in the {part}": Row(short(part, 0), CLASSIFY, "not enough memory for a single one") for part in ("VAE", "captioner", "expert", "CLIP")}


def short_of_pixels(place):
    from vermouth.segment import dense_head
    some(place, ".", 1)
    head = dense_head(toybox())
    place.kept["plain"] = toybox().segment(photos()[0], CLASSES, short=96)
    def greedy(maps, real=head.forward):
        if len(maps[0]) > 2: raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")
        return real(maps)
    place.patch.setattr(head, "forward", greedy)


def same_mask(place, found):
    with Image.open("mask.png") as mask: assert (np.asarray(mask) == place.kept["plain"]).mean() > 0.999


MEMORY["memory for 2 windows in the segmentation head"] = Row(short_of_pixels, ["segment", "0.png", *NAMES, "--out", "mask.png", "--short", "96", "--json"], check=same_mask)


# The table


ROWS = IMAGES | REFUSED | WORDS | SETTINGS | WEIGHTS | DISKS | MEMORY


def shell(words): return CliRunner().invoke(app, words)


def run(words):
    "Exit code, what was printed, what was said beside it."
    if isinstance(words, list):
        ran = shell(words)
        if ran.exception and not isinstance(ran.exception, SystemExit): raise ran.exception
        return ran.exit_code, ran.stdout, ran.stderr
    try: words()
    except VermouthError as e: return 2, "", f"{e}\n"
    return 0, "null", ""


def files(here): return {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and not p.is_symlink() and p.name != ".lock" and os.access(p, os.R_OK, effective_ids=True)}


@pytest.fixture
def place():
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        Path(here).chmod(0o777)  # for somebody who is not root
        yield Place(Path(here), patch, after)


@pytest.mark.parametrize("name", ROWS)
def test_one_sentence_or_it_works_and_nothing_is_lost(place, name):
    row = ROWS[name]
    row.make(place)
    before = files(place.here)
    with warnings.catch_warnings(record=True) as place.kept["warnings"]:
        warnings.simplefilter("default")
        code, printed, said = run(row.words)
    assert code == (2 if row.says else row.code), said
    if row.says: assert row.says in said and said.count("\n") == 1 and said[-2] in ".!?" and printed == "", said
    after = files(place.here)
    assert not [path for path, data in before.items() if after.get(path) != data], "an input was changed"
    assert not (place / "sprung").exists(), "a pickle was opened"
    row.check(place, json.loads(printed or "null"))
    COUNTS["inputs tried"] += 1


def test_the_table_is_long_enough(): assert len(ROWS) >= 40


@pytest.mark.parametrize("words, code, lines, says", [
    (["segment", "bomb.png", *NAMES, "--out", "mask.png"], 2, 0, "image='bomb.png': 20000×20000 pixels, more than 100,000,000. Shrink it first.\n"),
    (["classify", "photo.png", "--names", "cat," + "fish " * 500], 0, 1, "texts: 1 longer than CLIP's 32 tokens, the end is cut."),
])
def test_a_real_shell_sees_one_sentence(tmp_path, words, code, lines, says):
    bomb(tmp_path / "bomb.png"), photos()[0].save(tmp_path / "photo.png")
    ran = subprocess.run([Path(sys.executable).with_name("vermouth"), *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (ran.returncode, ran.stdout.count("\n"), ran.stderr.count("\n")) == (code, lines, 1) and ran.stderr.startswith(says), ran.stderr


KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a forked process has no others
from vermouth.backbone import load_backbone
from vermouth.data.toybox import Toybox
from vermouth.shards import MANIFEST, FeatureStore
from vermouth.store import extract

backbone, toys, dice, out = load_backbone("toybox", "cpu"), [item.image for item in Toybox("photo", n=16)], random.Random(0), Path("store")
def make(where): return extract(backbone, toys, where, stages="mid", attention=(), shard_size=2, batch_size=1, quiet=True)
make("warm")
began = time.perf_counter()
whole = make("whole").checksum()
took, kills, early, ended = time.perf_counter() - began, 0, 0, 0
def finished(): return (out / MANIFEST).exists() and json.loads((out / MANIFEST).read_bytes())["checksum"]
while kills < 20:
    pid = os.fork()
    if not pid: make(out), os._exit(0)
    time.sleep(dice.uniform(0, 0.5) * took)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    kills += os.WIFSIGNALED(status)
    early += os.WIFSIGNALED(status) and not finished()
    if finished():
        assert FeatureStore(out).checksum() == whole
        shutil.rmtree(out)
        ended += 1
assert make(out).checksum() == whole and (out / MANIFEST).read_bytes() == Path("whole", MANIFEST).read_bytes()
print(json.dumps([kills, early, ended + 1]))
"""


def test_kill_9_twenty_times_and_the_store_is_the_same(tmp_path):
    ran = subprocess.run([sys.executable, "-c", KILLS], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    kills, early, _ = json.loads(ran.stdout)
    assert kills == 20 and early >= 10, f"{early} of {kills} kills came before the store was whole"
    COUNTS["kills survived"] += kills
