"The page as a visitor and as an intruder meet it: its functions, and its server in a process of its own."

import base64
import io
import json
import socket
import time
import urllib.request
from importlib.util import find_spec

import pytest
from conftest import ROOT
from PIL import Image
from sd_layout import write_folder
from typer.testing import CliRunner
from web_server import ask, event, form, make_index, png, serving, still_searches, uploaded

from vermouth.app import middleware, web
from vermouth.app.cli import app
from vermouth.app.drawing import PNG
from vermouth.app.index import build_index
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.model import open_model


def canvas(data):
    "Bytes as a canvas sends them."
    return PNG + base64.b64encode(data).decode()


# What comes in


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = png(60_000, 60_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    started = time.perf_counter()
    for read, source in ((web.received, bomb), (web.received, str(tmp_path / "bomb.png")), (web.drawn, canvas(bomb))):
        with pytest.raises(VermouthError, match="60000×60000 pixels, more than"):
            read(source)
    assert time.perf_counter() - started < 1


def test_an_error_does_not_tell_where_uploads_lie(tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(VermouthError) as refused:
        web.received(str(tmp_path / "notes.png"))
    message = str(refused.value)
    assert str(tmp_path) not in message and message.startswith("image: not an image")


def test_sideways_transparent_and_large_images_come_as_a_person_sees_them():
    exif, data, clear, big = Image.Exif(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(data, "JPEG", exif=exif)
    assert web.received(data.getvalue()).size == (20, 30)
    Image.new("RGBA", (4, 4)).save(clear, "PNG")
    assert web.received(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (3000, 1500)).save(big, "PNG")
    assert web.received(big.getvalue()).size == (1024, 512)


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file=FOLDER/../x",
        "file=%2e%2e/x",
        "file%3D/etc/passwd",
        "file=https://example.org/x",
        "file=relative.png",
        "file=",
        "proxy=https://example.org/",
        "file/x",
    ],
)
def test_no_other_file_is_let_through(tmp_path, path):
    address = "/gradio_api/" + path.replace("FOLDER", str(tmp_path))
    assert middleware.refusal(address, None, False, "localhost", tmp_path, [])[0] == 403


def test_without_gradio_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["web", str(tmp_path)])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == f"web: gradio is not installed. {web.INSTALL}\n"


def test_a_stable_diffusion_without_training_is_searched(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, item in enumerate(Toybox("photo", n=3, seed=11)):
        item.image.save(tmp_path / "photos" / f"{i}.png")
    model = open_model(write_folder(tmp_path / "sd"), "cpu")
    index = build_index(tmp_path / "photos", tmp_path / "idx", model, quiet=True)
    photo = (tmp_path / "photos/1.png").read_bytes()
    assert web.by_photo(index, model, photo, 1).count("1.png") == 2
    with pytest.raises(VermouthError, match="it reads images, not words"):
        web.by_words(index, model, "a red car")
    with pytest.raises(VermouthError, match="it knows no class names"):
        web.by_names(model, photo, "cat, dog")
    with pytest.raises(VermouthError, match="has no trained U-head to look inside of"):
        web.maps(model, photo, 200, 2)
    assert web.cut_out(model, photo, "cat, dog").size
    if find_spec("gradio"):  # the program itself, which finds the model by the index
        with serving(tmp_path) as server:
            parts = [part["props"] for part in json.loads(ask(f"{server}/config")[1])["components"]]
            shown = {part.get("elem_id"): part["visible"] for part in parts if "visible" in part}
            assert [shown[name] for name in ("draw", "drop", "words", "more")] == [True, True, False, False]
            assert event(server, "drop", uploaded(server, photo), 1).count("1.png") == 2
            assert "it reads images, not words" in event(server, "words", "a red car", 1)


# The server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Toybox photos and their index."
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[web]'")
    folder = tmp_path_factory.mktemp("web")
    make_index(folder, 60)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    "Its address."
    with serving(folder) as address:
        yield address


def test_it_answers_here_and_only_here(server):
    status, body = ask(server)
    assert status == 200 and b"Vermouth" in body
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert ask(server, Host="evil.example")[0] == 400, "a foreign name that points here"


def test_it_gives_away_no_file(server, folder):
    private = [
        "/etc/passwd",
        ROOT / "settings.ini",
        folder / "idx/index.sqlite",
        next((folder / "photos").iterdir()),
        "settings.ini",
        "..%2f..%2fetc/passwd",
        "https://example.org/",
    ]
    for path in private:
        for route in ("gradio_api/file=", "file="):
            status, body = ask(f"{server}/{route}{urllib.request.quote(str(path), safe='/:%')}")
            assert status in (403, 404) and b"root:" not in body, (route, path, status)
    for route in (
        "gradio_api/proxy=https://example.org/",
        "gradio_api/file/etc/passwd",
        "static/../../../../../../etc/passwd",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "monitoring",
    ):
        status, body = ask(f"{server}/{route}")
        assert status in (400, 401, 403, 404) and b"root:" not in body, (route, status)


def test_uploads_are_small_and_come_back_to_be_shown(server):
    data, headers = form(png(8, 8))
    status, body = ask(f"{server}/gradio_api/upload", data, **headers)
    [path] = json.loads(body)
    assert (status, ask(f"{server}/gradio_api/file={urllib.request.quote(path)}")) == (200, (200, png(8, 8)))
    large = headers | {"Content-Length": "10000001"}  # stated, not sent: refused by its size alone
    for route in ("upload", "queue/join"):
        assert ask(f"{server}/gradio_api/{route}", b"", **large)[0] == 413
    still_searches(server)


def test_bombs_and_rubbish_are_refused_and_it_goes_on(server):
    started = time.perf_counter()
    bomb, text = png(60_000, 60_000), b"a picture of a cat"
    for field, sent in (("drop", uploaded(server, bomb)), ("draw", canvas(bomb))):
        assert "60000×60000 pixels, more than 100,000,000" in event(server, field, sent, 12)
    for field, sent in (("drop", uploaded(server, text)), ("draw", canvas(text))):
        assert "not an image Pillow can read" in event(server, field, sent, 12)
    assert time.perf_counter() - started < 20, "nothing was unpacked"
    for sent in ("/etc/hostname", ["a", "b"], 7, "é", f"{PNG}?"):
        assert "is not what a canvas sends" in event(server, "draw", sent, 12)
    still_searches(server)


def test_a_field_reads_no_file_that_was_not_uploaded(server, folder):
    meta = {"_type": "gradio.FileData"}
    for path in ("/etc/hostname", str(folder / "scene.png"), str(next((folder / "photos").iterdir()))):
        for field in ("drop", "draw", "words"):
            assert event(server, field, {"path": path, "meta": meta}, 12) == "", (field, path)
    address = {"path": None, "url": f"{server}/config", "meta": meta}
    assert "none is there" in event(server, "drop", address, 12), "nor fetches an address"
    still_searches(server)
