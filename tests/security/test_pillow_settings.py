"Pillow belongs to the host process: importing and reading leave its settings as they are. Threads may read at once."

import ast
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFile, PngImagePlugin

from vermouth import images
from vermouth.core import VermouthError
from vermouth.images import Budget, image_tensor, read_image

SETTINGS = {
    (Image, "MAX_IMAGE_PIXELS"): 1024**3 // 4 // 3,
    (ImageFile, "LOAD_TRUNCATED_IMAGES"): False,
    (PngImagePlugin, "MAX_TEXT_CHUNK"): 2**20,
    (PngImagePlugin, "MAX_TEXT_MEMORY"): 2**26,
}


def settings():
    return {(module.__name__, name): getattr(module, name) for module, name in SETTINGS}


def test_no_module_sets_anything_of_pillow():
    found = []
    for path in sorted((ROOT / "vermouth").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else ():
                owner = target.value if isinstance(target, ast.Attribute) else None
                if isinstance(owner, ast.Name) and (owner.id.startswith("Image") or owner.id.endswith("Plugin")):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found, found


def test_importing_leaves_the_settings():
    "Other tests of this process have imported most modules by now; this one the reading ones."
    assert settings() == {(module.__name__, name): value for (module, name), value in SETTINGS.items()}


def test_reading_in_threads_leaves_the_settings_and_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # a host that is stricter; Pillow would refuse or warn
    dice = np.random.default_rng(0)
    for i in range(24):
        picture = dice.integers(0, 256, (40 + i, 90 - i, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i:02}.{('png', 'jpg', 'bmp')[i % 3]}")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    Image.new("1", (10_001, 10_000)).save(tmp_path / "large.png")
    monkeypatch.setitem(images._budgets, "pixels", Budget(images.MAX_PIXELS))
    before, paths = settings(), sorted(tmp_path.iterdir())

    def read(path):
        try:
            return image_tensor(path, 32)
        except VermouthError as error:
            return str(error)

    one_by_one = [read(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for found in zip(*[pool.map(read, paths) for _ in range(4)], strict=True):
            for other in found[1:]:
                assert other == found[0] if isinstance(found[0], str) else bool((other == found[0]).all())
        together = list(pool.map(read, paths))
    for a, b in zip(one_by_one, together, strict=True):
        assert a == b if isinstance(a, str) else bool((a == b).all())
    assert sum(isinstance(found, str) for found in one_by_one) == 2
    assert settings() == before and images._budgets["pixels"].free == images.MAX_PIXELS


@pytest.mark.parametrize("fails", [False, True])
def test_threads_wait_for_room_and_give_it_back(fails):
    budget, most, lock = Budget(10), [], threading.Lock()
    running = 0

    def work(pixels):
        nonlocal running
        with budget.take(pixels):
            with lock:
                running += pixels
                most.append(running)
            if fails and pixels == 7:
                running -= pixels
                raise VermouthError("damaged")
            with lock:
                running -= pixels

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, pixels) for pixels in (3, 7, 10, 1, 5, 7, 2) * 20]
    assert budget.free == 10 and max(most) <= 10
    assert sum(future.exception() is not None for future in futures) == 40 * fails


def test_a_damaged_image_gives_its_room_back(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for _ in range(3):
        with pytest.raises(VermouthError):
            read_image(tmp_path / "a.png")
    assert images._budgets["pixels"].free == images.MAX_PIXELS and images._budgets["files"].free == 1
