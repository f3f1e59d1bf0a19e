"Data sets as people have them: masks in other conventions, lists from other editors, litter in folders."

import json
import os
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from vermouth.core import VermouthError
from vermouth.data.fewshot import load_fewshot
from vermouth.data.masks import pair
from vermouth.data.sbir import LAYOUTS, load_sbir
from vermouth.data.segmentation import load_segmentation

NAMES = "background\nbuilding\n"
HALF = np.uint8([[0] * 8] * 4 + [[1] * 8] * 4)


def folder_of(root, mask, names=NAMES, name="{}.png", n=3):
    "A plain folder of n images with a mask each; `mask` is an array, or writes the file."
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"images/{i}.png")
        path = root / "masks" / name.format(i)
        mask(path) if callable(mask) else Image.fromarray(mask).save(path)
    (root / "classnames.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    return root


def labels_in(root):
    split = load_segmentation("folder", root)
    return [pair(item)[1].tolist() for item in split.test], split.names


def palette_mask(path):
    image = Image.fromarray(HALF).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(path)


COLOURS = np.uint8([(0, 0, 0), (128, 0, 0)])[HALF]
READ = {
    "1 bit": (lambda path: Image.fromarray(HALF.astype(bool)).save(path), NAMES),
    "16 bits": (lambda path: Image.fromarray(HALF.astype(np.uint16)).save(path), NAMES),
    "palette": (palette_mask, NAMES),
    "0 and 255, numbered": (HALF * 255, "0: background\n255: building\n"),
    "0 and 255, numbered with tabs": (HALF * 255, "0\tbackground\r\n255\tbuilding\r\n"),
    "100 and 200": (HALF * 100 + 100, "100 = background\n200 = building"),
    "colours": (COLOURS, "0 0 0: background\n128 0 0: building\n"),
    "colours, with a comma": (COLOURS, "0,0,0,background\n128,0,0,building\n"),
    "colours of a palette": (palette_mask, "0 0 0\tbackground\n128 0 0\tbuilding\n"),
    "colours with alpha": (np.dstack([COLOURS, np.full((8, 8), 255, np.uint8)]), "0 0 0 background\n128 0 0 building"),
    "numbered from 0": (HALF, "0 background\n1 building\n"),
}


@pytest.mark.parametrize("case", READ)
def test_conventions_of_masks_that_are_read(case, tmp_path):
    mask, names = READ[case]
    masks, found = labels_in(folder_of(tmp_path, mask, names))
    assert found == ("background", "building") and masks == [HALF.tolist()] * 3


REFUSED = {
    "0 and 255": (HALF * 255, NAMES, ["255", "building", "'0: background', '255: building'"]),
    "1 and 255": (HALF * 254 + 1, NAMES, ["1 ('building')", "255"]),
    "255 only": (np.full((8, 8), 255, np.uint8), NAMES, ["they hold 255 and nothing else"]),
    "0 and 127": (HALF * 127, NAMES, ["number 127 is none of the 2 classes", "'127: name'"]),
    "counted from 1": (HALF + 1, NAMES, ["number 2 is none of the 2 classes"]),
    "colours": (COLOURS, NAMES, ["a picture in RGB", "'0 0 0: name', '128 0 0: name'"]),
    "another colour": (COLOURS, "0 0 0: background\n0 128 0: building\n", ["colour 128 0 0 is none of the 2 classes"]),
    "another size": (HALF[:4], NAMES, ["8×4 pixels (width×height), its image 8×8. Resize the mask"]),
    "jpeg": (lambda p: Image.fromarray(HALF).save(p.with_suffix(".jpg")), NAMES, ["a JPEG file, which changes"]),
    "probabilities": (lambda p: np.save(p.with_suffix(".npy"), HALF / 2), NAMES, ["float64", "not whole numbers"]),
    "one number twice": (HALF, "0: background\n0: building\n", ["two lines begin with 0"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conventions_of_masks_that_are_refused_with_a_remedy(case, tmp_path):
    mask, names, words = REFUSED[case]
    with pytest.raises(VermouthError) as refusal:
        load_segmentation("folder", folder_of(tmp_path, mask, names))
    assert not [word for word in words if word not in str(refusal.value)], refusal.value


def test_a_palette_for_each_mask_is_refused(tmp_path):
    folder_of(tmp_path, HALF)
    for i, colours in enumerate(([0, 0, 0, 9, 9, 9], [9, 9, 9, 0, 0, 0])):
        image = Image.fromarray(HALF).convert("P")
        image.putpalette(colours)
        image.save(tmp_path / f"masks/{i}.png")
    with pytest.raises(VermouthError, match="number 0 is colour"):
        load_segmentation("folder", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["{}_mask.png", "{}-mask.png", "mask_{}.png", "{}_seg.tif", "{}_label.bmp", "seg-{}.png", "{}.png.png"]
    + ["{}_MASK.PNG", "{}_gtFine_labelTrainIds.png", "{}_annotation.gif", "{}.mask.png", "{} mask.webp"]
    + ["mask{}.png", "{}.npy", "{}_L.png"],
)
def test_masks_are_found_by_the_names_that_programs_give_them(name, tmp_path):
    def write(path):
        if path.suffix == ".npy":
            np.save(path, HALF)
        else:
            Image.fromarray(HALF).save(path, **{"lossless": True} if path.suffix == ".webp" else {})

    if name.endswith("webp"):
        with pytest.raises(VermouthError, match="a picture in RGB"):  # WebP holds no grey
            labels_in(folder_of(tmp_path, write, name=name))
    else:
        assert labels_in(folder_of(tmp_path, write, name=name))[0] == [HALF.tolist()] * 3


# Orientations 2 to 4 keep the shape: a mask is taken as upright, since nothing shows that it is not.
TURNED = [(n, drawn) for n in range(1, 9) for drawn in ("stored", "upright", "tagged") if drawn != "stored" or n > 4]


@pytest.mark.parametrize(("orientation", "drawn_on"), TURNED)
def test_masks_of_turned_photos(orientation, drawn_on, tmp_path):
    exif, stored = Image.Exif(), np.uint8([[0, 1, 0], [1, 1, 0]]).repeat(4, 0).repeat(4, 1)
    exif[ExifTags.Base.Orientation] = orientation
    folder_of(tmp_path, HALF, n=0)
    photo = Image.fromarray(np.dstack([stored * 200] * 3))
    photo.save(tmp_path / "images/a.jpg", exif=exif)
    upright = Image.fromarray(stored)
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    upright = ImageOps.exif_transpose(upright)
    masks = {
        "stored": lambda path: Image.fromarray(stored).save(path),
        "upright": lambda path: upright.save(path),
        "tagged": lambda path: Image.fromarray(stored).save(path, exif=exif),
    }
    masks[drawn_on](tmp_path / "masks/a.png")
    image, mask = pair(load_segmentation("folder", tmp_path).test[0])
    assert ((np.asarray(image)[..., 0] > 100) == mask).mean() > 0.97, "mask and image show the same"


def saved(text, encoding):
    if encoding == "bom":
        return text.encode("utf-8-sig")
    return b"\xfe\xff" + text.encode("utf-16-be") if encoding == "be" else text.encode(encoding)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "bom", "utf-16", "utf-16-le", "utf-16-be", "be"])
def test_lists_as_editors_save_them(encoding, end, tmp_path):
    text = f"# classes{end}background {end}\tcaf\u0065\u0301{end}{end}"
    folder_of(tmp_path, HALF, saved(text, encoding))
    assert load_segmentation("folder", tmp_path).names == ("background", "caf\u00e9")


def test_a_list_in_another_encoding_is_named(tmp_path):
    with pytest.raises(VermouthError, match=r"classnames.txt: cannot be read as text .* Save it as UTF-8"):
        load_segmentation("folder", folder_of(tmp_path, HALF, "background\ncaf\u00e9\n".encode("cp1252")))


def official(root, change=lambda text: text, spelled="{}", parts=("train", "zero")):
    "QuickDraw's lists and images."
    lists = root / LAYOUTS["quickdraw"].lists
    lists.mkdir(parents=True)
    for part, names in zip(parts, (("cat", "caf\u00e9"), ("sea lion", "tree")), strict=True):
        suffix = "" if part == "train" else "_zero"
        (lists / f"cname_cid{suffix}.txt").write_bytes(change("".join(f"{n} {i}\n" for i, n in enumerate(names))))
        for kind, listed in (("sketch", f"sketch_{part}.txt"), ("photo", f"all_photo_{part}.txt")):
            lines = []
            for label, name in enumerate(names):
                path = root / kind / unicodedata.normalize("NFD", name) / "1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4)).save(path)
                lines.append(spelled.format(f"{kind}/{name}/1.png", label) + "\n")
            (lists / listed).write_bytes(change("".join(lines)))
    return root


@pytest.mark.parametrize(
    ("spelled", "change"),
    [
        ("{} {}", str.encode),
        ("{}\t{}", str.encode),
        ("{}  {} ", lambda text: text.replace("\n", "\r\n").encode("utf-8-sig")),
        ("{} {}", lambda text: text.replace("/", "\\").encode("utf-16")),
        ("./{} {}", lambda text: f"# made on a Mac\r{text}".replace("\n", "\r").encode()),
        ("{},{}", str.encode),
    ],
)
def test_official_lists_from_other_systems(spelled, change, tmp_path):
    "Composed names in the list, decomposed ones on the disk, in every case."
    split = load_sbir("quickdraw", official(tmp_path / "QuickDraw/QuickDraw", change, spelled).parent)
    assert (split.seen, split.unseen) == (("cat", "caf\u00e9"), ("sea lion", "tree"))
    assert split.train_photos[1].key == "photo/caf\u00e9/1.png" and split.train_photos[1].image.size == (4, 4)


def test_quickdraws_validation_lists_test_if_they_hold_unseen_classes(tmp_path):
    official(tmp_path, str.encode, "{} {}", parts=("train", "val"))
    assert load_sbir("quickdraw", tmp_path).unseen == ("sea lion", "tree")
    for name in ("sketch", "all_photo"):
        lists = tmp_path / LAYOUTS["quickdraw"].lists
        (lists / f"{name}_val.txt").write_bytes((lists / f"{name}_train.txt").read_bytes())
    with pytest.raises(VermouthError, match="it lists images of 'cat', a class to train on"):
        load_sbir("quickdraw", tmp_path)
    other = tmp_path / "tuberlin"
    official(other, str.encode, "{} {}", parts=("train", "val"))
    with pytest.raises(VermouthError, match="is missing"):  # TU-Berlin's validation lists are no tests
        load_sbir("tuberlin", other)


def litter(root):
    "What systems, notebooks and archives leave, in every folder below root."
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (folder / name).mkdir()
            (folder / name / "a-checkpoint.png").write_bytes(b"\0")
        for name in ("._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"):
            (folder / name).write_bytes(b"\0\5\x16\7")


def class_tree(root, kinds=("sketch/", "photo/"), names=("cat", "caf\u00e9", "sea_lion"), suffixes=("png", "JPG")):
    for kind in kinds:
        for name in names:
            (root / kind / name).mkdir(parents=True)
            for i, suffix in enumerate(suffixes):
                image = Image.new("RGB", (4, 4), (i * 80, len(kind), len(name)))
                image.save(root / kind / name / f"{i}.{suffix}", "PNG" if suffix == "png" else "JPEG")
    return root


def test_litter_is_no_data(tmp_path):
    sketches, pets = class_tree(tmp_path / "a"), class_tree(tmp_path / "b", [""])
    houses = folder_of(tmp_path / "c", HALF)
    before = load_sbir("folder", sketches), load_fewshot("folder", pets), load_segmentation("folder", houses)
    for root in (sketches, pets, houses):
        litter(root)
    assert (load_sbir("folder", sketches), load_fewshot("folder", pets), load_segmentation("folder", houses)) == before


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    class_tree(tmp_path)
    (tmp_path / "photo/caf\u00e9").rename(tmp_path / "photo/cafe\u0301")
    assert load_sbir("folder", tmp_path, unseen=["cafe\u0301"]).unseen == ("caf\u00e9",)
    (tmp_path / "sketch/cafe\u0301").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sketch/cafe\u0301/x.jfif", "JPEG")
    assert len(load_sbir("folder", tmp_path, unseen=["caf\u00e9"]).test_sketches) == 3


def test_a_class_whose_name_is_no_text_is_named(tmp_path):
    class_tree(tmp_path, [""])
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(VermouthError, match=r"folder 'caf\\udce9' has no name in UTF-8") as refusal:
        load_fewshot("folder", tmp_path)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("inner", ["data", "other/data"])
def test_an_archives_folder_within_itself(inner, tmp_path):
    class_tree(tmp_path / "data" / inner)
    (tmp_path / "data/data.zip").write_bytes(b"PK")
    assert len(load_sbir("folder", tmp_path / "data").seen) == 2
    class_tree(tmp_path / "pets" / inner, ["cat/", "dog/"], ["cat"])  # cat/cat/0.png
    assert load_fewshot("folder", tmp_path / "pets").names == ("cat", "dog")
    folder_of(tmp_path / "houses" / inner, HALF)
    assert len(load_segmentation("folder", tmp_path / "houses").test) == 3


def test_kinds_that_are_not_read_are_counted(tmp_path):
    class_tree(tmp_path, [""], ["cat", "dog"])
    for name in ("a.NEF", "b.nef", "c.psd"):
        (tmp_path / "cat" / name).touch()
    with pytest.warns(UserWarning, match="cat: 2 .nef files, 1 .psd file not read"):
        assert len(load_fewshot("folder", tmp_path).names) == 2
    for path in (tmp_path / "cat").glob("?.[pjJ]*"):
        path.unlink(missing_ok=path.suffix == ".psd")
    with pytest.raises(VermouthError, match="no images in cat. 2 .nef files"):
        load_fewshot("folder", tmp_path)


def test_split_files_as_editors_save_them(tmp_path):
    class_tree(tmp_path / "dtd/images", [""], ["cat", "dog"], ["png"])
    rows = [[f"{name}\\0.png", i, name] for i, name in enumerate(("cat", "dog"))]
    text = json.dumps({"train": rows, "val": [], "test": rows}, indent=1).replace("\n", "\r\n")
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_bytes(text.encode("utf-8-sig"))
    assert [item.key for item in load_fewshot("dtd", tmp_path).test] == ["dtd/cat/0.png", "dtd/dog/0.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_fewshot("dtd", tmp_path).shots(1)) == 2
