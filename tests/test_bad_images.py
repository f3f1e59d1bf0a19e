"Unusual images are read as their plain twins, and damaged ones are refused, or skipped among others."

import os
from pathlib import Path

import numpy as np
import pytest
from disks import run_child
from odd_files import BAD, GOOD, bomb
from PIL import Image
from program import CLASSES, CLASSIFY, EXTRACT, INDEX, NAMES

# Unusual images


def rotated_exif(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to view
    image.rotate(90).save(path, exif=exif)


def sixteen_colours(image):
    "A palette image one of whose colours is transparent."
    palette = image.quantize(16)
    palette.info["transparency"] = 0
    return palette


def on_white(image):
    clear = sixteen_colours(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")


def grey(image, dtype, scale=1):
    return Image.fromarray(np.asarray(image.convert("L"), dtype=dtype) * np.asarray(scale, dtype))


def animated(image, path):
    image.quantize(16).save(path, save_all=True, append_images=[image.rotate(90).quantize(16)])


# file name, how it is written, the plain image that it must look like
TWINS = {
    "CMYK": ("odd.tif", lambda im, p: im.convert("CMYK").save(p), lambda im: im),
    "16 bits": ("odd.png", lambda im, p: grey(im, np.uint16, 257).save(p), lambda im: im.convert("L")),
    "floats in [0,1]": ("odd.tif", lambda im, p: grey(im, np.float32, 1 / 255).save(p), lambda im: im.convert("L")),
    "palette with alpha": ("odd.png", lambda im, p: sixteen_colours(im).save(p, transparency=0), on_white),
    "animated": ("odd.gif", animated, lambda im: im.quantize(16).convert("RGB")),
    "rotated by EXIF": ("odd.png", rotated_exif, lambda im: im),
    "wrong extension": ("odd.jpg", lambda im, p: im.save(p, "BMP"), lambda im: im),
    "1×1": (
        "odd.png",
        lambda im, p: Image.new("RGB", (1, 1), "teal").save(p),
        lambda im: Image.new("RGB", (64, 64), "teal"),
    ),
    "name in Unicode": ("ünï ćødé 画像 🐟.png", lambda im, p: im.save(p), lambda im: im),
    "name with spaces": ("  my photo .png", lambda im, p: im.save(p), lambda im: im),
    "name with a new line": ("new\nline.png", lambda im, p: im.save(p), lambda im: im),
    "name in another encoding": (os.fsdecode(b"caf\xe9.png"), lambda im, p: im.save(p, "PNG"), lambda im: im),
}


def probabilities(document):
    return [[image["probabilities"][name] for name in CLASSES] for image in document["images"]]


@pytest.mark.parametrize("kind", TWINS)
def test_an_unusual_image_is_classified_as_its_plain_twin(program, photos, kind):
    name, write, plain = TWINS[kind]
    write(photos[0], program.folder / name)
    plain(photos[0]).save(program.folder / "twin.bmp")
    document = program(*CLASSIFY)
    odd, twin = probabilities(document)
    assert not document["set_aside"]
    np.testing.assert_allclose(odd, twin, atol=1e-4)
    np.testing.assert_allclose([sum(odd), sum(twin)], 1, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_line_of_pixels_is_an_image(program, photos, size):
    photos[0].resize(size).save(program.folder / "line.png")
    [row] = probabilities(program(*CLASSIFY))
    assert abs(sum(row) - 1) < 1e-4


# Damaged images


def floats(values):
    return lambda path, image: Image.fromarray(np.asarray(values, np.float32).reshape(8, 8)).save(path)


REFUSED = {
    "truncated PNG": ("cut.png", BAD["truncated.png"][0], "image='cut.png': it cannot be read (image file is trunc"),
    "truncated JPEG": ("cut.jpg", BAD["truncated.jpg"][0], "image='cut.jpg': it cannot be read (image file is trunc"),
    "zero bytes": ("empty.png", BAD["empty.png"][0], "not an image"),
    "not an image": ("text.jpg", BAD["text.jpg"][0], "not an image"),
    "EPS, which is a program": ("page.png", lambda p, im: im.save(p, "EPS"), "not an image"),
    "ICO, which holds other formats": ("icon.png", lambda p, im: im.save(p, "ICO"), "not an image"),
    "NaN pixels": ("deep.tif", floats(np.full(64, np.nan)), "NaN"),
    # the file ends after a row, so that decoding it would say something else
    "floats in no usual range": (
        "deep.tif",
        floats(np.linspace(-1, 1, 64)),
        "pixels go from -1 to 1. Scale them to 0…1",
    ),
    "decompression bomb": ("bomb.png", lambda p, im: bomb(p), "20000×20000 pixels, more than 100,000,000"),
    "dangling link": ("dangling.png", BAD["dangling.png"][0], "no such file"),
    "link to itself": ("circle.png", BAD["circle.png"][0], "levels of symbolic links"),
    "missing file": ("none.png", lambda p, im: None, "no such file"),
    "folder": ("photo.png", lambda p, im: p.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_image_is_refused_in_one_sentence(program, photos, kind):
    name, write, sentence = REFUSED[kind]
    write(program.folder / name, photos[0])
    program.refuses("segment", name, *NAMES, "--out", "mask.png", says=sentence)


@pytest.mark.parametrize("words", [CLASSIFY, [*EXTRACT, "--json"], INDEX], ids=["classify", "extract", "index"])
def test_damaged_images_are_skipped_among_others(program, photos, words):
    folder = program.folder / words[1]
    folder.mkdir(exist_ok=True)
    for name, (write, _) in BAD.items():
        write(folder / name, photos[0])
    for name, write in GOOD.items():
        write(folder / name, photos[0])
    (folder / "below").mkdir()
    (folder / "below/up").symlink_to("..")  # a cycle of folders
    document = program(*words, code=1)
    skipped = {Path(name).name for name, _ in document["set_aside"]}
    not_files = {"outside", "pipe.png"}  # a folder and a pipe, which only an index reports
    assert {*BAD} - not_files - {"out.png"} <= skipped <= {*BAD}
    done = document.get("items", document.get("photos", len(document.get("images", []))))
    assert done in (len(GOOD), len(GOOD) + 1)


def test_a_thousand_copies_of_a_photo_are_embedded_once(program, photos):
    folder = program.folder / "photos"
    folder.mkdir()
    photos[0].save(folder / "0.png")
    for i in range(1, 999):
        os.link(folder / "0.png", folder / f"{i}.png")
    (folder / "999.png").write_text("a picture of a cat")
    found = program(*INDEX, code=1)
    assert [found["photos"], found["looked_at"], len(found["set_aside"])] == [999, 1, 1]


@pytest.mark.parametrize(
    "words, sentence",
    [(CLASSIFY, "no images there"), (EXTRACT, "no images there"), (INDEX, "no photos in it")],
    ids=["classify", "extract", "index"],
)
def test_an_empty_folder_is_refused(program, words, sentence):
    (program.folder / words[1]).mkdir(exist_ok=True)
    program.refuses(*words, says=sentence)


def test_an_opened_file_that_cannot_be_decoded_is_refused(toybox, photos, tmp_path):
    from vermouth.core import VermouthError

    BAD["truncated.png"][0](tmp_path / "cut.png", photos[0])
    with pytest.raises(VermouthError, match="it cannot be read"):
        toybox.embed(Image.open(tmp_path / "cut.png"))


def test_a_shell_sees_one_sentence_for_a_bomb(tmp_path):
    bomb(tmp_path / "bomb.png")
    result = run_child(["segment", "bomb.png", *NAMES, "--out", "mask.png"], lambda: os.chdir(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "image='bomb.png': 20000×20000 pixels, more than 100,000,000. Shrink it first.\n"


def test_json_is_one_document(program, photos):
    photos[0].save(program.folder / "0.png")
    assert set(program(*CLASSIFY)) >= {"images", "set_aside"}
