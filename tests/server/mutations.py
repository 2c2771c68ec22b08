"""Requests that are nearly right."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence

import numpy as np

from tests.server.malformed import BODY, CHUNKED, CHUNKS, HOST, LENGTH, LINE, post
from tests.server.support import http_request

X = np.arange(4, dtype=np.float32)
_TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
_DOCUMENT = json.dumps({"inputs": [_TENSOR], "parameters": {"binary_data_output": True}, "id": "a"}).encode()
BINARY = http_request(
    _DOCUMENT + X.tobytes(), headers=f"Inference-Header-Content-Length: {len(_DOCUMENT)}\r\n"
)  # fmt: skip
FLAT = b'{"x": [0, 1, 2, 3]}'
_ASKED = b'"outputs": [{"name": "y", "parameters": {"classification": 2}}], "id": "b"}'

INFERENCE: list[bytes] = [
    post(),
    BINARY,
    http_request(BODY[:-1] + b", " + _ASKED),
    post(CHUNKED, CHUNKS),
    http_request(gzip.compress(BODY, mtime=0), headers="Content-Encoding: gzip\r\nAccept-Encoding: deflate\r\n"),
    post(b"Connection: keep-alive\r\nExpect: 100-continue\r\n" + LENGTH),
    post(b"x-api-key: k\r\nUser-Agent: a\r\ninfera-trace: 1\r\n" + LENGTH),
]  # fmt: skip
"""Good requests for inference, in all their forms."""

SEEDS: list[bytes] = [
    *INFERENCE,
    http_request(FLAT, path="/v2/models/double/generate"),
    http_request(FLAT, path="/v2/models/double/versions/1/generate_stream"),
    http_request(b'{"ready": true}', path="/v2/repository/index"),
    http_request(b'{"key": "/k", "offset": 0, "byte_size": 64}', path="/v2/systemsharedmemory/region/r/register"),
    http_request(b'{"trace_level": ["OFF"]}', path="/v2/trace/setting"),
    b"GET /v2/models/double/config?a=b HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /metrics HTTP/1.1\r\n" + HOST + b"Accept-Encoding: gzip\r\n\r\n",
    b"GET /v2/models/double/stream HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
]  # fmt: skip
"""Those, and good ones for all else."""

WORDS: Sequence[bytes] = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"00", b"1e999", b"NaN",
    b"99999999999999999999", b"\xff", b"%00", b"%2f", b"../", b"null", b"true", b"[]", b"{}", b"[", b"}", b'"', b"\\",
    b"\\ud800", LENGTH, CHUNKED, HOST, LINE, b"Content-Length: 1\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n",
    b"Content-Encoding: gzip\r\n", b"Inference-Header-Content-Length: 7\r\n", b"HTTP/1.0", b"HTTP/1.1", b"0\r\n\r\n",
    b'"binary_data_size"', b'"data"', b'"shape"', b'"parameters": {"timeout": 1}', b"[" * 2000, b"a" * 5000,
]  # fmt: skip


def flipped(rng: random.Random, sent: bytes) -> bytes:
    at = rng.randrange(len(sent))
    return sent[:at] + bytes([sent[at] ^ 1 << rng.randrange(8)]) + sent[at + 1 :]


def cut_out(rng: random.Random, sent: bytes) -> bytes:
    at = rng.randrange(len(sent))
    return sent[:at] + sent[at + rng.randint(1, 20) :]


def doubled(rng: random.Random, sent: bytes) -> bytes:
    at, size = rng.randrange(len(sent)), rng.randint(1, 60)
    return sent[: at + size] + sent[at:]


def interspersed(rng: random.Random, sent: bytes) -> bytes:
    at = rng.randrange(len(sent) + 1)
    return sent[:at] + rng.choice(WORDS) + sent[at + rng.choice((0, 0, 1, 4)) :]


def counted_otherwise(rng: random.Random, sent: bytes) -> bytes:
    """Another digit, or one more."""
    places = [at for at, byte in enumerate(sent) if 48 <= byte < 58] or [0]
    at = rng.choice(places)
    return sent[:at] + b"%d" % rng.randrange(10) + sent[at + rng.randrange(2) :]


def spliced(rng: random.Random, sent: bytes) -> bytes:
    other = rng.choice(SEEDS)
    return sent[: rng.randrange(len(sent))] + other[rng.randrange(len(other)) :]


def cut_short(rng: random.Random, sent: bytes) -> bytes:
    return sent[: rng.randint(1, len(sent))]


def in_other_letters(rng: random.Random, sent: bytes) -> bytes:
    at, size = rng.randrange(len(sent)), rng.randint(1, 20)
    return sent[:at] + sent[at : at + size].swapcase() + sent[at + size :]


def followed(rng: random.Random, sent: bytes) -> bytes:
    return sent + rng.choice(SEEDS)


MUTATIONS: Sequence[Callable[[random.Random, bytes], bytes]] = [
    flipped, cut_out, doubled, interspersed, interspersed, counted_otherwise, spliced, cut_short, in_other_letters,
    followed,
]  # fmt: skip


def mutated(rng: random.Random, most: int = 4, seeds: Sequence[bytes] = SEEDS) -> bytes:
    """A seed after some mutations, few more often than many."""
    sent = rng.choice(seeds)
    for _ in range(min(rng.randint(1, most), rng.randint(1, most))):
        sent = rng.choice(MUTATIONS)(rng, sent) or b"\r\n"
    return sent
