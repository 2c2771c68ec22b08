"""A bare ASGI handler: reads the body, answers as many bytes as a server of the model would."""

import os
from typing import Any

REPLY = bytes(int(os.environ["REPLY_BYTES"]))
HEADERS = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(REPLY))]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": REPLY})
