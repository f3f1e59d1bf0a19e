"The page as a visitor and as an intruder meet it: its functions, its server in a process of its own, and a real browser."
import base64
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from itertools import groupby
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from vermouth.app import web
from vermouth.app.cli import app
from vermouth.app.drawing import PNG
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
    for read, source in ((web.received, bomb), (web.received, str(tmp_path / "bomb.png")), (web.drawn, PNG + base64.b64encode(bomb).decode())):
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
    ends = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", log := (folder / "log").read_text(), re.M)
    assert all(line.startswith("gradio.exceptions.InvalidPathError") for line in ends), log  # an intruder was refused, see below; anything else would be ours


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
    for door in ("upload", "queue/join"): assert ask(f"{server}/gradio_api/{door}", b"", **headers | {"Content-Length": "10000001"})[0] == 413, "said, not sent: refused by its size alone"
    still_searches(server)


def event(server, name, *data):
    "What the page's server answers when a field sends this, as a browser would ask, with no browser to hold anything back."
    page = json.loads(ask(f"{server}/config")[1])
    [field] = [part["id"] for part in page["components"] if part["props"].get("elem_id") == name]
    [number] = [d["id"] for d in page["dependencies"] if d["targets"][0][0] == field]
    session = uuid.uuid4().hex
    status, body = ask(f"{server}/gradio_api/queue/join", json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode(), **{"Content-Type": "application/json"})
    assert status == 200, body
    with urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash={session}", timeout=60) as told:
        for line in told:
            if line.startswith(b"data:") and (message := json.loads(line[5:]))["msg"] == "process_completed": return (message["output"].get("data") or [""])[0]


def uploaded(server, data):
    "A file as the page's fields know it."
    body, headers = form(data)
    [path] = json.loads(ask(f"{server}/gradio_api/upload", body, **headers)[1])
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def still_searches(server): assert event(server, "words", "a fish", 12).count("<figure") == 12


def test_bombs_and_rubbish_are_refused_and_it_goes_on(server):
    started = time.perf_counter()
    bomb, text = png(60_000, 60_000), b"a picture of a cat"
    def drawn(data): return PNG + base64.b64encode(data).decode()
    for field, sent in (("drop", uploaded(server, bomb)), ("draw", drawn(bomb))): assert "60000×60000 pixels, more than 100,000,000" in event(server, field, sent, 12)
    for field, sent in (("drop", uploaded(server, text)), ("draw", drawn(text))): assert "not an image Pillow can read" in event(server, field, sent, 12)
    assert time.perf_counter() - started < 20, "nothing was unpacked"
    for sent in ("/etc/hostname", ["a", "b"], 7, "é", f"{PNG}?"): assert "is not what a canvas sends" in event(server, "draw", sent, 12)
    still_searches(server)


def test_a_field_reads_no_file_that_was_not_uploaded(server, folder):
    for path in ("/etc/hostname", str(folder / "scene.png"), str(next((folder / "photos").iterdir()))):
        assert event(server, "drop", {"path": path, "meta": {"_type": "gradio.FileData"}}, 12) == "", path
    assert "none is there" in event(server, "drop", {"path": None, "url": f"{server}/config", "meta": {"_type": "gradio.FileData"}}, 12), "nor fetches an address"
    still_searches(server)


# A real browser


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium."
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright: pip install playwright")
    if CHROMIUM is None: pytest.skip("the browser test needs a chromium that is installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(page, server):
    page.goto(server)
    page.wait_for_selector("#draw canvas", timeout=120_000)
    return page


@pytest.fixture(scope="module")
def tab(browser, server):
    "The page, and what it asked for."
    page = browser.new_page(viewport={"width": 1100, "height": 760})
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("websocket", lambda ws: page.asked.append(ws.url))
    return opened(page, server)


def shot(page, name):
    "A picture for the docs, when they are asked for."
    if not SHOTS: return
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(Path(SHOTS) / f"web_{name}.png", optimize=True)


class Mouse:
    def __init__(self, page): self.page = page
    def down(self, x, y): self.page.mouse.move(x, y), self.page.mouse.down()
    def move(self, x, y): self.page.mouse.move(x, y)
    def up(self): self.page.mouse.up()


class Finger:
    def __init__(self, page): self.cdp = page.context.new_cdp_session(page)
    def send(self, kind, *points): self.cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})
    def down(self, x, y): self.send("touchStart", (x, y))
    def move(self, x, y): self.send("touchMove", (x, y))
    def up(self): self.send("touchEnd")


def stroke(page, hand, points):
    "One line, in shares of the canvas; seconds from the touch of the pen, which is not lifted, until other photos stand there."
    box, before = page.locator("#draw canvas").bounding_box(), page.inner_html("#hits")
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    hand.down(*places[0])
    started = time.perf_counter()
    for place in places[1:]: hand.move(*place)
    page.wait_for_function("before => document.querySelector('#hits').innerHTML != before && document.querySelector('#hits figure')", arg=before, timeout=60_000, polling=20)
    seconds = time.perf_counter() - started
    hand.up()
    page.wait_for_timeout(1500)  # or a late answer to this line would be taken for one to the next
    return seconds


def fish(x, y, side):
    "Three lines of a fish: where its middle is, and how long it is, in shares of the canvas."
    body = [(-.12 + .34 * math.cos(a), .2 * math.sin(a)) for a in (i * math.tau / 28 for i in range(29))]
    return [[(x + side * u, y + side * v) for u, v in line] for line in (body, [(.22, .0), (.5, -.19), (.5, .19), (.22, .0)], [(-.33, -.06), (-.31, -.06), (-.32, -.03)])]


def found(page): return page.locator("#hits figcaption").all_inner_texts()


def test_photos_come_while_a_fish_is_drawn(tab, capsys):
    seconds = [stroke(tab, Mouse(tab), line) for line in fish(.5, .5, .7)]
    names = found(tab)
    with capsys.disabled(): print(f"\nphotos {', '.join(f'{s:.2f}' for s in seconds)} s after the pen touched; {sum('fish' in name for name in names)} of {len(names)} are fish")
    shot(tab, "search")
    assert len(names) == 12 and any("fish" in name for name in names), names
    assert min(seconds) < 1.5, "the best of three lines: others may be at work here"


def test_a_small_fish_in_a_corner_is_a_fish(tab):
    tab.click("#draw button >> text=Clear")
    tab.wait_for_selector("#hits :text('the canvas is empty')", timeout=60_000)
    for line in fish(.2, .8, .25): stroke(tab, Mouse(tab), line)
    assert any("fish" in name for name in found(tab)), found(tab)


def test_never_two_questions_at_a_time(tab):
    "However fast the pen is: each question waits for the answer to the one before."
    tab.evaluate("""() => { window.log = []; const real = window.fetch
        new MutationObserver(() => log.push("answered")).observe(document.querySelector("#hits"), {childList: true, subtree: true, characterData: true, attributes: true})
        window.fetch = (url, ...rest) => { if (String(url.url ?? url).includes("queue/join")) log.push("asked"); return real(url, ...rest) } }""")
    box = tab.locator("#draw canvas").bounding_box()
    tab.mouse.move(box["x"] + 9, box["y"] + 9), tab.mouse.down()
    for i in range(100): tab.mouse.move(box["x"] + 9 + 3 * i, box["y"] + 9 + 2 * (i % 40)), tab.wait_for_timeout(20)
    tab.mouse.up(), tab.wait_for_timeout(2000)
    log = [name for name, _ in groupby(tab.evaluate("log"))]
    assert log.count("asked") >= 4 and tab.evaluate("log").count("asked") == log.count("asked"), log


def test_a_finger_draws_on_a_phone(browser, server, capsys):
    phone = opened(browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page(), server)
    finger = Finger(phone)
    seconds = [stroke(phone, finger, line) for line in fish(.5, .5, .7)]
    with capsys.disabled(): print(f"\nphotos {', '.join(f'{s:.2f}' for s in seconds)} s after a finger touched")
    shot(phone, "phone")
    assert any("fish" in name for name in found(phone)), found(phone)
    stroke(phone, finger, [(.5, .95 - i * .03) for i in range(31)])  # upwards, as one scrolls
    assert phone.evaluate("[scrollX, scrollY, document.documentElement.scrollWidth]") == [0, 0, 390], "the page stays where it is"
    boxes = [photo.bounding_box() for photo in phone.locator("#hits figure").all()]
    assert all(box["y"] + box["height"] <= 844 for box in boxes[:4]) and all(box["x"] + box["width"] <= 390 for box in boxes), "photos stand on the screen that is drawn on"
    assert phone.locator("#words").bounding_box()["y"] > phone.locator("#hits figure").last.bounding_box()["y"]
    phone.context.close()


def test_a_line_is_taken_back(tab):
    tab.click("#draw button >> text=Clear")
    pixels = "document.querySelector('#draw canvas').toDataURL()"
    blank = tab.evaluate(pixels)
    box = tab.locator("#draw canvas").bounding_box()
    tab.mouse.click(box["x"] + 50, box["y"] + 50)
    assert (dot := tab.evaluate(pixels)) != blank, "a dot is a line"
    tab.mouse.move(box["x"] + 50, box["y"] + 90), tab.mouse.down(), tab.mouse.move(box["x"] + 90, box["y"] + 90), tab.mouse.up()
    assert tab.evaluate(pixels) not in (blank, dot)
    tab.click("#draw button >> text=Undo")
    assert tab.evaluate(pixels) == dot
    tab.click("#draw button >> text=Undo")
    assert tab.evaluate(pixels) == blank
    tab.wait_for_selector("#hits :text('the canvas is empty')", timeout=60_000)


def test_words_and_a_dropped_photo(tab, folder):
    tab.fill("#words textarea, #words input", "a fish")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('#hits figcaption')?.innerText.includes('fish')", timeout=60_000)
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
    tab.fill("#classify-names textarea", "fish, house\ntree, sailboat")
    tab.click("#classify-go")
    tab.wait_for_function("['fish', 'house', 'tree', 'sailboat'].every(n => document.querySelector('#classify-out').innerText.includes(n))", timeout=60_000)
    tab.wait_for_timeout(500), shot(tab, "classify")
    tab.fill("#classify-names textarea", "猫, house")
    tab.click("#classify-go")
    tab.get_by_text("CLIP does not know '猫'").wait_for(timeout=60_000)
    tab.wait_for_function("document.querySelector('#classify-out').innerText.includes('猫')", timeout=60_000)
    tab.locator(".toast-close").first.click()


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
