"The gate of the web page in front of an application that would let everybody in."

import asyncio

MINE = "127.0.0.1:7860"


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
