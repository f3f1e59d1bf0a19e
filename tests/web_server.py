"`vermouth web` in a process of its own, and requests to it as a browser or an intruder would make them."

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path
from struct import pack
from zlib import compress, crc32

JSON = {"Content-Type": "application/json"}


def png(width, height):
    "The beginning of a PNG file of that size, and nothing of its pixels."

    def chunk(kind, data):
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    header = chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")


def make_index(folder, n):
    "Toybox photos, some of them fish, and their index; a scene."
    from vermouth.app.index import build_index
    from vermouth.data.toybox import Toybox
    from vermouth.model import Vermouth

    (folder / "photos").mkdir()
    for i, item in enumerate(Toybox("photo", n=n, seed=11)):
        item.image.save(folder / f"photos/{item.name} {i:03}.png")
    Toybox("scene", n=1, seed=4)[0].image.resize((256, 256)).save(folder / "scene.png")
    build_index(folder / "photos", folder / "idx", Vermouth.load("toybox", "cpu"), quiet=True)


@contextmanager
def serving(folder, end=signal.SIGTERM, code=143, **options):
    """The address of the page; afterwards the program has ended as it should and has left nothing behind.

    `end` is the signal that ends it, with this exit code; `options` are those of subprocess.Popen.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    program = [Path(sys.executable).with_name("vermouth"), "web", folder / "idx", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, **options)
    address = running.stdout.readline().strip()
    try:
        assert address == f"http://127.0.0.1:{port}", (folder / "log").read_text()
        yield address
        running.send_signal(end)
        assert running.wait(300) == code  # a busy machine
    finally:
        running.kill()
    assert not list((folder / "tmp").glob("vermouth-web-*")), "what was uploaded goes with the program"
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", log := (folder / "log").read_text(), re.M)
    # an intruder was refused, a stream that a browser still held was cut at the end; anything else would be ours
    cut = "asyncio.exceptions.CancelledError"
    refused = ("gradio.exceptions.InvalidPathError", "gradio.exceptions.Error: 'Value ", cut)
    assert all(line.startswith(refused) for line in errors), log


def answer(url, data=None, **headers):
    "Status, body and headers, whatever the status."
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as e:
        return e.code, e.read(), e.headers


def ask(url, data=None, **headers):
    "Status and body."
    return answer(url, data, **headers)[:2]


def form(data, name="x.png"):
    "One file as a browser would send it: the body and its header."
    head = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png'
    body = f"--edge\r\n{head}\r\n\r\n".encode() + data + b"\r\n--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def uploaded(server, data):
    "A file as the page's fields know it."
    body, headers = form(data)
    [path] = json.loads(ask(f"{server}/gradio_api/upload", body, **headers)[1])
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def join(server, name, *data):
    "Put into the queue what a field sends, as a browser would, with no browser to hold anything back."
    page = json.loads(ask(f"{server}/config")[1])
    [field] = [part["id"] for part in page["components"] if part["props"].get("elem_id") == name]
    [job] = [d for d in page["dependencies"] if d["targets"][0][0] == field]
    values = {part["id"]: part["props"].get("value") for part in page["components"]}
    rest = [values[i] for i in job["inputs"][len(data) :]]  # as the page shows them
    session = uuid.uuid4().hex
    body = json.dumps({"data": [*data, *rest], "fn_index": job["id"], "session_hash": session}).encode()
    return session, *ask(f"{server}/gradio_api/queue/join", body, **JSON)


def event(server, name, *data):
    "What the page's server answers when a field sends this."
    session, status, body = join(server, name, *data)
    assert status == 200, body
    with urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return (message["output"].get("data") or [""])[0]


def still_searches(server):
    assert event(server, "words", "a fish", 12).count("<figure") == 12
