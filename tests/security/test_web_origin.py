"No other web page uses this one: foreign origins, frames, uploads without end, words without end, a full queue."

import asyncio
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from web_server import JSON, answer, ask, event, form, join, make_index, png, serving, still_searches, uploaded

from vermouth.app import middleware, web
from vermouth.app.middleware import SMALL, UPLOAD, UPLOADS, Gate, make_space, own_names
from vermouth.core import VermouthError

MINE = "127.0.0.1:7860"
OTHERS = (
    "http://127.0.0.1:8888",
    "http://127.0.0.1",
    "http://localhost:7860",
    "https://evil.example",
    "http://127.0.0.1:7860.evil.example",
    "http://evil.example/127.0.0.1:7860",
    "null",
    "",
)
NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def through(gate, method="GET", path="/", headers=None, kind="http"):
    "What a gate answers: its messages."
    messages = []
    listed = [(k.encode(), v.encode()) for k, v in ({"host": MINE} | (headers or {})).items()]

    async def send(message):
        messages.append(message)

    asyncio.run(gate({"type": kind, "method": method, "path": path, "headers": listed}, None, send))
    return messages


async def generous(scope, receive, send):
    "An application that lets every page read its answers."
    headers = [(b"Access-Control-Allow-Origin", b"*"), (b"access-control-allow-credentials", b"true")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"photos"})


@pytest.fixture
def gate(tmp_path):
    return Gate(generous, tmp_path, own_names("127.0.0.1"))


@pytest.mark.parametrize("origin", OTHERS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_another_origin_is_refused(gate, method, origin):
    assert through(gate, method, headers={"origin": origin, "content-length": "9"})[0]["status"] == 403


@pytest.mark.parametrize("site", ["same-site", "cross-site", "a new word"])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/upload"])
def test_another_site_is_refused_without_an_origin(gate, site, path):
    for method in ("GET", "POST"):
        assert through(gate, method, path, {"sec-fetch-site": site, "content-length": "9"})[0]["status"] == 403


def test_the_page_itself_and_programs_are_answered(gate):
    body = {"content-length": "9"}
    for headers in ({}, {"origin": f"http://{MINE}"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert through(gate, "POST", "/gradio_api/upload", body | headers)[0]["status"] == 200
    lan = Gate(generous, gate.folder, own_names("0.0.0.0"))
    address = {"host": "192.168.1.5:7860", "origin": "http://192.168.1.5:7860"}
    assert through(lan, "POST", headers=body | address)[0]["status"] == 200
    assert through(lan, "POST", headers=body | address | {"origin": "http://192.168.1.6:7860"})[0]["status"] == 403


def test_a_link_may_be_followed_and_nothing_else(gate):
    link = {"sec-fetch-site": "cross-site", **NAVIGATION}
    assert through(gate, headers=link)[0]["status"] == 200
    for method, path, headers in (
        ("POST", "/", link | {"content-length": "9"}),
        ("GET", "/config", link),
        ("GET", "/gradio_api/queue/data", link),
        ("GET", "/", link | {"sec-fetch-dest": "iframe"}),
        ("GET", "/", link | {"sec-fetch-mode": "no-cors"}),
    ):
        assert through(gate, method, path, headers)[0]["status"] == 403, (method, path)


@pytest.mark.parametrize("headers", [{}, {"origin": "http://127.0.0.1:8888"}, {"host": "evil.example"}])
def test_no_answer_may_be_framed_or_read_by_others(gate, headers):
    names = [(k.decode().lower(), v.decode()) for k, v in through(gate, headers=headers)[0]["headers"]]
    assert "frame-ancestors 'none'" in dict(names)["content-security-policy"]
    assert dict(names)["x-frame-options"] == "DENY"
    assert not [name for name, _ in names if name.startswith("access-control-")]


def test_a_websocket_is_closed(gate):
    assert through(gate, kind="websocket") == [{"type": "websocket.close"}]


@pytest.mark.parametrize("length", ["", "-9", "1e3", "9" * 5000, "0" * 25 + "9", " 9"])
def test_a_length_that_is_no_number_is_not_stated(gate, length):
    assert through(gate, "POST", headers={"content-length": length})[0]["status"] == 411


def test_bodies_that_arrive_together_are_bounded(tmp_path):
    "Each waits to be read; what is more than the folder holds is turned away, and afterwards all is as before."
    most, answered = UPLOADS // UPLOAD, []

    async def flood():
        read = asyncio.Event()

        async def slow(scope, receive, send):
            await read.wait()
            await generous(scope, receive, send)

        async def send(message):
            if message["type"] == "http.response.start":
                answered.append(message["status"])
                if len(answered) == 5:
                    read.set()

        headers = [(b"host", MINE.encode()), (b"content-length", str(UPLOAD).encode())]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
        gate = Gate(slow, tmp_path, own_names("127.0.0.1"))
        await asyncio.gather(*(gate(scope, None, send) for _ in range(most + 5)))
        return gate.arriving

    assert asyncio.run(flood()) == 0
    assert answered == [503] * 5 + [200] * most


def test_the_oldest_uploads_go_first(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}").mkdir()
        file = tmp_path / f"{i:02}/photo.png"
        file.touch()
        os.truncate(file, UPLOAD)  # a hole: no space on disk
        os.utime(file, (i, i))
    make_space(tmp_path, UPLOAD)
    left = sorted(int(file.parent.name) for file in tmp_path.rglob("*.png"))
    assert left == list(range(6, 30)) and (len(left) + 1) * UPLOAD <= UPLOADS
    assert UPLOADS // SMALL <= 1024, "nor are there too many small ones"


def test_words_and_names_without_end_are_refused_at_once(toybox):
    started = time.perf_counter()
    long = "cat " * 2_250_000  # 9 MB
    with pytest.raises(VermouthError, match="characters, more than 300"):
        web.by_words(None, toybox, long)
    for text in (long, "a," * 5_001):
        with pytest.raises(VermouthError, match="characters, more than 10,000"):
            web.typed_names(text)
    assert time.perf_counter() - started < 1


# The server itself


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Its address."
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[web]'")
    folder = tmp_path_factory.mktemp("web")
    make_index(folder, 20)
    with serving(folder) as address:
        yield address


def test_a_foreign_form_uploads_nothing(server):
    body, headers = form(png(8, 8))
    for foreign in ({"Origin": "http://127.0.0.1:9999"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        for route in ("upload", "queue/join"):
            assert ask(f"{server}/gradio_api/{route}", body, **headers, **foreign)[0] == 403
    assert ask(f"{server}/gradio_api/upload", body, Origin=server, **headers)[0] == 200
    still_searches(server)


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/gradio_api/info", "/no/such/page"])
def test_no_page_of_the_server_may_be_framed_or_read_by_others(server, path):
    for origin in ({}, {"Origin": server}, {"Origin": "http://localhost:9999"}):
        status, _, headers = answer(server + path, **origin)
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert not [name for name in headers if name.lower().startswith("access-control-")], path
        assert (status == 403) == (origin == {"Origin": "http://localhost:9999"})


def test_a_preflight_of_another_port_gets_no_leave(server):
    import http.client

    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=60)
    headers = {"Origin": "http://localhost:9999", "Access-Control-Request-Method": "POST"}
    connection.request("OPTIONS", "/gradio_api/upload", headers=headers)
    response = connection.getresponse()
    assert response.status == 403 and response.getheader("Access-Control-Allow-Origin") is None


def test_words_without_end_do_not_hold_the_server(server):
    started = time.perf_counter()
    assert "characters, more than 300" in event(server, "words", "cat " * 2_250_000, 12)
    assert time.perf_counter() - started < 20
    still_searches(server)


def test_more_photos_than_the_page_offers_are_not_shown(server):
    for k in (0, -1, 61, 10**9):
        assert "<figure" not in (event(server, "words", "a fish", k) or "")
    still_searches(server)


def test_the_queue_is_bounded(server):
    with ThreadPoolExecutor(32) as pool:
        statuses = [job[1] for job in pool.map(lambda i: join(server, "words", f"a fish {i}", 12), range(160))]
    assert statuses.count(200) < 160 and set(statuses) <= {200, 503}, statuses
    assert statuses.count(200) >= web.QUEUE
    deadline = time.monotonic() + 120
    while True:
        try:
            return still_searches(server)
        except AssertionError:  # still full
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_rubbish_in_the_queue_ends_nothing(server):
    for body in (b"", b"{}", b"[1", b'{"data": 7, "fn_index": "x"}', json.dumps({"fn_index": -1}).encode()):
        assert ask(f"{server}/gradio_api/queue/join", body, **JSON)[0] in (400, 404, 411, 422, 500), body
    still_searches(server)


def test_no_answer_tells_where_files_lie(server):
    "But that to an upload, whose path the page sends back."
    photo = uploaded(server, png(8, 8))
    sent = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    addresses = ("", "config", "theme.css", "no/such/page", *(f"gradio_api/{p}" for p in ("info", "file=", "app_id")))
    answers = [ask(f"{server}/{address}")[1] for address in addresses]
    for body in (b"{}", b"[1"):
        answers += [ask(f"{server}/gradio_api/{route}", body, **JSON)[1] for route in ("queue/join", "run/x", "upload")]
    messages = [event(server, "drop", photo, 3), event(server, "drop", sent, 3), event(server, "words", "猫", 3)]
    text = b"\n".join(answers).decode(errors="replace") + json.dumps(messages)
    places = (photo["path"], tempfile.gettempdir() + "/", sys.prefix, str(ROOT), str(Path.home()) + "/")
    assert not [place for place in places if place in text]


def test_a_flood_of_uploads_is_refused_for_a_minute(tmp_path):
    "30 of 10 MB: 25 fill the folder, and the others wait, so that nobody's photo goes before it was looked at."
    gate = Gate(generous, tmp_path, own_names("127.0.0.1"))
    body = {"content-length": str(UPLOAD)}
    statuses = [through(gate, "POST", "/gradio_api/upload", body)[0]["status"] for _ in range(30)]
    assert statuses == [200] * 25 + [429] * 5
    assert through(gate, "POST", "/gradio_api/queue/join", body)[0]["status"] == 429
    assert through(gate)[0]["status"] == 200, "the page itself is shown"


def test_own_names_are_those_of_the_loopback():
    assert [own_names(host) for host in ("0.0.0.0", "192.168.1.5", "example.org", "::")] == [[]] * 4
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        assert host in own_names(host)
    assert middleware.refusal("/", None, False, "evil.example", ".", own_names("127.0.0.1"))[0] == 400
