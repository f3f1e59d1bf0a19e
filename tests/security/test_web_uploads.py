"What is sent to the page is bounded, and found by its made-up name."

import asyncio
import json
import os

import pytest
from web_gate import MINE, generous, through

from vermouth.app.middleware import SMALL, UPLOAD, UPLOADS, Gate, make_space, own_names


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


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_a_made_up_name_is_found_wherever_a_body_is_cut(tmp_path, chunk):
    "A browser's body comes in pieces."
    seen = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            seen.append(message["body"])
            if not message.get("more_body"):
                break

    gate = Gate(app, tmp_path / 'a "folder" of café', own_names("127.0.0.1"))
    data = json.dumps({"data": [{"path": gate.alias.name + "/a.png"}, "猫"]}).encode()
    parts = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts)} for i, part in enumerate(parts, 1)]

    async def receive():
        return messages.pop(0)

    headers = {b"host": MINE.encode(), b"content-type": b"application/json", b"content-length": b"9"}
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": list(headers.items())}
    asyncio.run(gate(scope, receive, None))
    assert json.loads(b"".join(seen)) == {"data": [{"path": gate.alias.folder + "/a.png"}, "猫"]}


def test_a_flood_of_uploads_is_refused_for_a_minute(tmp_path):
    "30 of 10 MB: 25 fill the folder, and the others wait, so that nobody's photo goes before it was looked at."
    gate = Gate(generous, tmp_path, own_names("127.0.0.1"))
    body = {"content-length": str(UPLOAD)}
    statuses = [through(gate, "POST", "/gradio_api/upload", body)[0]["status"] for _ in range(30)]
    assert statuses == [200] * 25 + [429] * 5
    assert through(gate, "POST", "/gradio_api/queue/join", body)[0]["status"] == 429
    assert through(gate)[0]["status"] == 200, "the page itself is shown"
