"The page as a visitor and as an intruder meet it: its functions, its server in a process of its own, and a real browser."
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from vermouth.app import web
from vermouth.app.cli import app
from vermouth.core import VermouthError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("VERMOUTH_SHOTS")  # a folder for the pictures of the docs


# What comes in


def png(width, height):
    "The beginning of a PNG file of that size, and nothing of its pixels."
    from struct import pack
    from zlib import compress, crc32
    def chunk(kind, data): return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = png(60_000, 60_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    started = time.perf_counter()
    for source in (bomb, str(tmp_path / "bomb.png")):
        for read in (web.received, web.drawing):
            with pytest.raises(VermouthError, match="60000×60000 pixels, more than"): read(source)
    assert time.perf_counter() - started < 1


def test_an_error_does_not_tell_where_uploads_lie(tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(VermouthError) as said: web.received(str(tmp_path / "notes.png"))
    assert str(tmp_path) not in str(said.value) and str(said.value).startswith("image: not an image")


def test_sideways_and_transparent_images_come_as_a_person_sees_them():
    exif, data, clear = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(data, "JPEG", exif=exif)
    assert web.received(data.getvalue()).size == (20, 30)
    Image.new("RGBA", (4, 4)).save(clear, "PNG")
    assert web.received(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    big = io.BytesIO()
    Image.new("RGB", (3000, 1500)).save(big, "PNG")
    assert web.received(big.getvalue()).size == (1024, 512)


@pytest.mark.parametrize("path", ["file=/etc/passwd", "file=ROOM/../x", "file=%2e%2e/x", "file%3D/etc/passwd", "file=https://example.org/x", "file=relative.png", "file=", "proxy=https://example.org/", "file/x"])
def test_the_gate_lets_no_other_file_through(tmp_path, path):
    assert web.refusal("/gradio_api/" + path.replace("ROOM", str(tmp_path)), None, False, "localhost", tmp_path, [])[0] == 403


def test_without_gradio_a_sentence(monkeypatch, tmp_path):
    from typer.testing import CliRunner
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["web", str(tmp_path)])
    assert (refused.exit_code, refused.stdout) == (2, "") and refused.stderr == 'web: gradio is not installed. Run pip install "vermouth[web]".\n'


# The server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two hundred Toybox photos, some of them fish, and their index; a scene."
    from vermouth.app.search import build_index
    from vermouth.data.toybox import Toybox
    from vermouth.model import Vermouth
    there = tmp_path_factory.mktemp("web")
    (there / "photos").mkdir()
    for i, item in enumerate(Toybox("photo", n=200, seed=11)): item.image.save(there / f"photos/{item.name} {i:03}.png")
    Toybox("scene", n=1, seed=4)[0].image.resize((256, 256)).save(there / "scene.png")
    build_index(there / "photos", there / "idx", Vermouth.load("toybox", "cpu"), quiet=True)
    return there


@pytest.fixture(scope="module")
def server(folder):
    "`vermouth web` in a process of its own: its address, and at the end it leaves nothing behind."
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "vermouth[web]"')
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    program = [Path(sys.executable).with_name("vermouth"), "web", folder / "idx", "--port", str(port)]
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(program, env=os.environ | {"TMPDIR": str(folder / "tmp")}, stdout=subprocess.PIPE, stderr=log, text=True)
    said = running.stdout.readline().strip()
    try:
        assert said == f"http://127.0.0.1:{port}", (folder / "log").read_text()
        yield said
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 143
    finally: running.kill()
    assert not list((folder / "tmp").glob("vermouth-web-*")), "what was uploaded goes with the program"
    assert "Traceback" not in (log := (folder / "log").read_text()), log


def ask(url, data=None, **headers):
    "Status and body, whatever the status."
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer: return answer.status, answer.read()
    except urllib.error.HTTPError as e: return e.code, e.read()


def form(data, name="x.png"):
    "One file as a browser would send it."
    body = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'.encode() + data + b"\r\n--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def test_it_answers_here_and_only_here(server):
    status, body = ask(server)
    assert status == 200 and b"Vermouth" in body
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(OSError): socket.create_connection(("127.0.0.2", port), timeout=5)
    assert ask(server, Host="evil.example")[0] == 400, "a foreign name that points here"


def test_it_gives_away_no_file(server, folder):
    private = ["/etc/passwd", ROOT / "settings.ini", folder / "idx/index.json", next((folder / "photos").iterdir()), "settings.ini", "..%2f..%2fetc/passwd", "https://example.org/"]
    for path in private:
        for route in ("gradio_api/file=", "file="):
            status, body = ask(f"{server}/{route}{urllib.request.quote(str(path), safe='/:%')}")
            assert status in (403, 404) and b"root:" not in body, (route, path, status)
    for route in ("gradio_api/proxy=https://example.org/", "gradio_api/file/etc/passwd", "static/../../../../../../etc/passwd", "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "monitoring"):
        status, body = ask(f"{server}/{route}")
        assert status in (400, 401, 403, 404) and b"root:" not in body, (route, status)


def test_uploads_are_small_and_come_back_to_be_shown(server):
    data, headers = form(png(8, 8))
    status, body = ask(f"{server}/gradio_api/upload", data, **headers)
    [path] = json.loads(body)
    assert (status, ask(f"{server}/gradio_api/file={urllib.request.quote(path)}")) == (200, (200, png(8, 8)))
    request = urllib.request.Request(f"{server}/gradio_api/upload", b"", headers | {"Content-Length": "10000001"})  # said, not sent: it is refused by its size alone
    with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413


# A real browser


@pytest.fixture(scope="module")
def tab(server):
    "A page in headless Chromium that may ask 127.0.0.1 only, and what it asked."
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright: pip install playwright")
    if CHROMIUM is None: pytest.skip("the browser test needs a chromium that is installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda ws: page.asked.append(ws.url))
        page.goto(server)
        page.wait_for_selector("#draw canvas", timeout=120_000)
        page.wait_for_timeout(1500)  # the pen comes into hand
        yield page
        browser.close()


def shot(page, name):
    "A picture for the docs, when they are asked for."
    if not SHOTS: return
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(Path(SHOTS) / f"web_{name}.png", optimize=True)


def stroke(page, points):
    "One line with the mouse, in shares of the canvas, as large as Toybox draws its sketches; seconds until other photos stand there."
    box, before = page.locator("#draw canvas").first.bounding_box(), page.inner_html("#hits")
    side = 0.66 * min(box["width"], box["height"])
    places = [(box["x"] + box["width"] / 2 + side * x, box["y"] + box["height"] / 2 + side * y) for x, y in points]
    page.mouse.move(*places[0]), page.mouse.down()
    for place in places[1:]: page.mouse.move(*place, steps=2)
    page.mouse.up()
    started = time.perf_counter()
    page.wait_for_function("before => document.querySelector('#hits').innerHTML != before && document.querySelector('#hits figure')", arg=before, timeout=60_000, polling=20)
    seconds = time.perf_counter() - started
    page.wait_for_timeout(1500)  # or a late answer to this line would be taken for one to the next
    return seconds


def test_a_fish_is_drawn_and_photos_appear(tab, capsys):
    body = [(-.08 + .28 * math.cos(a), .16 * math.sin(a)) for a in (i * math.tau / 28 for i in range(29))]
    seconds = [stroke(tab, body), stroke(tab, [(.19, .0), (.4, -.15), (.4, .15), (.19, .0)]), stroke(tab, [(-.25, -.05), (-.23, -.05), (-.24, -.03)])]
    found = tab.locator("#hits figcaption").all_inner_texts()
    with capsys.disabled(): print(f"\nphotos after {', '.join(f'{s:.2f}' for s in seconds)} s; {sum('fish' in name for name in found)} of {len(found)} are fish")
    shot(tab, "search")
    assert len(found) == 12 and any("fish" in name for name in found), found
    assert min(seconds) < 1.5, "the best of three strokes: others may be at work here"


def test_an_emptied_canvas_says_so(tab):
    tab.click("#draw button[aria-label='Clear canvas']")
    tab.wait_for_selector("#hits :text('the canvas is empty')", timeout=60_000)


def test_words_and_a_dropped_photo(tab, folder):
    tab.fill("#words textarea, #words input", "a fish")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#hits figure", timeout=60_000)
    assert any("fish" in name for name in tab.locator("#hits figcaption").all_inner_texts())
    photo = sorted((folder / "photos").iterdir())[0]
    tab.set_input_files("#drop input[type=file]", photo)
    tab.wait_for_function("name => document.querySelector('#hits figcaption')?.innerText.includes(name)", arg=photo.name, timeout=60_000)


def test_classify_and_a_kind_refusal(tab, folder):
    tab.get_by_role("tab", name="Classify").click()
    tab.set_input_files("#classify-image input[type=file]", next((folder / "photos").glob("fish*")))
    tab.wait_for_selector("#classify-image img", timeout=60_000)
    tab.fill("#classify-names textarea", "fish")
    tab.click("#classify-go")
    tab.get_by_text("Type 2 to 200").wait_for(timeout=60_000)
    assert "Traceback" not in tab.content()
    tab.locator(".toast-close").first.click()
    tab.fill("#classify-names textarea", "fish, house\ntree, boat")
    tab.click("#classify-go")
    tab.wait_for_function("['fish', 'house', 'tree', 'boat'].every(n => document.querySelector('#classify-out').innerText.includes(n))", timeout=60_000)
    tab.wait_for_timeout(500), shot(tab, "classify")


@pytest.mark.parametrize("title, word", [("Segment", "segment"), ("Look inside", "look")])
def test_segment_and_look(tab, folder, title, word):
    tab.get_by_role("tab", name=title).click()
    tab.set_input_files(f"#{word}-image input[type=file]", folder / "scene.png")
    tab.wait_for_selector(f"#{word}-image img", timeout=60_000)
    tab.click(f"#{word}-go")
    tab.wait_for_selector(f"#{word}-out img", timeout=60_000)
    tab.wait_for_timeout(500), shot(tab, word)


def test_the_browser_asked_nobody_else(tab):
    hosts = {urllib.request.urlparse(url).hostname for url in tab.asked if not url.startswith(("data:", "blob:"))}
    assert len(tab.asked) > 20 and hosts == {"127.0.0.1"}
