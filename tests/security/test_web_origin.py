"No other web page uses this one: foreign origins, frames, words without end, a full queue."

import json
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from conftest import COUNTS, ROOT
from disks import short_files
from web_gate import MINE, generous, through
from web_server import JSON, answer, ask, event, form, join, make_index, png, serving, still_searches, uploaded

from vermouth.app import middleware, web
from vermouth.app.middleware import Gate, own_names
from vermouth.core import VermouthError

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


class Server(str):
    "Its address, with the folder that has its index."

    def __new__(cls, address, folder):
        made = super().__new__(cls, address)
        made.folder = folder
        return made


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Its address."
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[web]'")
    folder = tmp_path_factory.mktemp("web")
    make_index(folder, 20)
    with serving(folder) as address:
        yield Server(address, folder)


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
    photo = uploaded(server, png(8, 8))
    sent = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    addresses = ("", "config", "theme.css", "no/such/page", *(f"gradio_api/{p}" for p in ("info", "file=", "app_id")))
    answers = [ask(f"{server}/{address}")[1] for address in addresses]
    for body in (b"{}", b"[1"):
        answers += [ask(f"{server}/gradio_api/{route}", body, **JSON)[1] for route in ("queue/join", "run/x", "upload")]
    messages = [event(server, "drop", photo, 3), event(server, "drop", sent, 3), event(server, "words", "猫", 3)]
    text = b"\n".join(answers).decode(errors="replace") + json.dumps([photo, *messages])
    places = (tempfile.gettempdir() + "/", "vermouth-web-", sys.prefix, str(ROOT), str(Path.home()) + "/")
    assert not [place for place in places if place in text]


def test_an_upload_is_found_by_its_made_up_name(server, photos):
    "Its preview, and what is asked about it; a name of another run is no file."
    image = BytesIO()
    photos[0].save(image, "PNG")
    photo = uploaded(server, image.getvalue())
    assert not Path(photo["path"]).exists()
    assert ask(f"{server}/gradio_api/file={photo['path']}") == (200, image.getvalue())
    assert event(server, "drop", photo, 3).count("<figure") == 3
    name = photo["path"].split("/")[1]
    for other in ("0" * len(name), name[:-1], "etc"):
        path = photo["path"].replace(name, other)
        assert ask(f"{server}/gradio_api/file={path}")[0] == 403
        assert "<figure" not in (event(server, "drop", photo | {"path": path}, 3) or "")


def test_an_upload_to_a_full_disk_is_one_sentence(server, tmp_path):
    "Nothing of it stays, and smaller ones go on."
    (tmp_path / "idx").symlink_to(server.folder / "idx")
    with serving(tmp_path, preexec_fn=lambda: short_files(50_000)) as address:
        for _ in range(3):
            body, headers = form(png(8, 8) + bytes(100_000))
            status, said = ask(f"{address}/gradio_api/upload", body, **headers)
            assert (status, said.count(b".")) == (507, 2) and b"cannot be kept (File too large)" in said
        assert not [path for path in tmp_path.glob("tmp/*/*") if path.is_file()], "half an upload"
        assert Path(uploaded(address, png(8, 8))["path"]).name == "x.png"
    assert "Traceback" not in (tmp_path / "log").read_text()
    COUNTS["full disks"] += 4


def test_ctrl_c_ends_the_server(server, tmp_path):
    (tmp_path / "idx").symlink_to(server.folder / "idx")
    with serving(tmp_path, signal.SIGINT, 0) as address:
        assert ask(address)[0] == 200
    assert (tmp_path / "log").read_text() == ""
    COUNTS["interrupts"] += 1


def test_own_names_are_those_of_the_loopback():
    assert [own_names(host) for host in ("0.0.0.0", "192.168.1.5", "example.org", "::")] == [[]] * 4
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        assert host in own_names(host)
    assert middleware.refusal("/", None, False, "evil.example", ".", own_names("127.0.0.1"))[0] == 400
