"""API keys, their scopes and rates, the protection of management, TLS."""

from __future__ import annotations

import contextlib
import json
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infera_server.access import Access, Key, KeyFileError, is_local, make_key, read_keys
from infera_server.errors import Forbidden, Overloaded, Unauthorized
from infera_server.http import connection
from infera_server.http.gate import Gate
from infera_server.listening import CertificateError, check_certificates
from infera_server.settings import Settings
from tests.commandline import assert_fails, infera
from tests.server.support import Running, doubler, http_request, read_reply, request_of, serving

CERTIFICATES = Path(__file__).with_name("certificates")
X = np.arange(4, dtype=np.float32).reshape(1, 4)
BODY = json.dumps(request_of(X)).encode()
INFER = "/v2/models/double/infer"
LOAD = "/v2/repository/models/double/load"


def keyed(**tables: dict[str, Any]) -> tuple[Access, dict[str, str]]:
    """Access by fresh keys, and the keys."""
    made = {name: make_key(name) for name in tables}
    keys = {}
    for name, (_, table) in made.items():
        digest = table.split('"')[1]
        keys[name] = Key(name, bytes.fromhex(digest), **tables[name])
    return Access(keys), {name: key for name, (key, _) in made.items()}


# --- keys and their file ---------------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_known_by_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    options = ("--model", "res*", "--model", "yunet", "--rate", "2.5", "--management")
    status, output, errors = infera("key", "mobile", "--file", file, *options)
    assert status == 0, errors
    secret = output.strip()
    assert infera("key", "plain", "--file", file)[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret.rpartition("_")[2] not in file.read_text()
    keys = read_keys(file)
    key = Access(keys).identify(f"Bearer {secret}")
    assert key is not None
    assert (key.name, key.models, key.rate, key.management) == ("mobile", ("res*", "yunet"), 2.5, True)
    assert keys["plain"].models == ("*",)
    assert_fails(infera("key", "mobile", "--file", file), "already", status=2)
    assert_fails(infera("key", "A b", "--file", file), "a name is of", status=2)
    assert_fails(infera("key", "c", "--file", file, "--model", ""), "--model", status=2)
    for rate in ("nan", "inf", "-1"):
        assert_fails(infera("key", "c", "--file", file, "--rate", rate), "--rate", status=2)
    assert set(read_keys(file)) == {"mobile", "plain"}


DIGEST = '"' + "0" * 64 + '"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no keys"),
        ("[keys]\n", "holds no keys"),
        ("[other]\n", "holds no keys"),
        ("keys = 3\n", "holds no keys"),
        ("[keys.a\n", "keys.toml is no file of keys"),
        ("# Read me\n\nfirst", "keys.toml is no file of keys as `infera key` makes it"),
        (f"[keys.A]\nsha256 = {DIGEST}\n", "a name is of"),
        ("[keys]\na = 3\n", "is no table"),
        ("[keys.a]\n", "64 hexadecimal digits"),
        ('[keys.a]\nsha256 = "abc"\n', "64 hexadecimal digits"),
        (f"[keys.a]\nsha256 = {DIGEST}\nmodels = []\n", "models must be"),
        (f'[keys.a]\nsha256 = {DIGEST}\nmodels = "x"\n', "models must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = 0\n", "rate must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = true\n", "rate must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = nan\n", "rate must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = inf\n", "rate must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = 1{'0' * 400}\n", "rate must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\nrate = 1{'0' * 5000}\n", "5001 digits"),
        (f"[keys.a]\nsha256 = {DIGEST}\nmanagement = 1\n", "management must be"),
        (f"[keys.a]\nsha256 = {DIGEST}\ncolour = 1\n", "unknown colour"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=says):
        read_keys(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="nothing"):
        read_keys(tmp_path / "nothing.toml")


def test_who_is_known() -> None:
    access, keys = keyed(one={}, two={})
    for name, secret in keys.items():
        for given in (f"Bearer {secret}", f"bearer  {secret} ", secret):
            key = access.identify(given)
            assert key is not None
            assert key.name == name
    swapped = keys["one"].replace("_one_", "_two_")
    wrong = ("", "Bearer", f"Basic {keys['one']}", keys["one"][:-1], keys["one"] + "x", swapped, "infera_none_x", "é")
    for given in wrong:
        with pytest.raises(Unauthorized):
            access.identify(given)
    assert Access().identify("") is None


def test_scopes() -> None:
    access, keys = keyed(some={"models": ("res*", "yunet")})
    for model in ("resnet", "yunet", "res"):
        assert access.admit(keys["some"], model, 0.0) is not None
    for model in ("yunet2", "Resnet", "", "a/yunet"):
        with pytest.raises(Forbidden, match="'some' is not for model"):
            access.admit(keys["some"], model, 0.0)


def test_rates() -> None:
    """Two seconds' worth at once, then one each tenth of a second."""
    access, key = Access(), Key("a", b"", rate=10.0)
    for _ in range(20):
        access.spend(key, 100.0)
    with pytest.raises(Overloaded) as refused:
        access.spend(key, 100.0)
    assert refused.value.retry_after == pytest.approx(0.1)
    with pytest.raises(Overloaded):
        access.spend(key, 100.09)
    access.spend(key, 100.11)
    with pytest.raises(Overloaded):
        access.spend(key, 100.11)
    for _ in range(20):
        access.spend(key, 200.0)
    slow = Key("b", b"", rate=0.01)
    access.spend(slow, 0.0)
    with pytest.raises(Overloaded):
        access.spend(slow, 99.0)
    access.spend(slow, 101.0)
    assert access.refused == {"rate": 4}


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_is_local(host: str, local: bool) -> None:
    assert is_local(host) == local


# --- over sockets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[Running, dict[str, str]]]:
    access, keys = keyed(
        all={}, other={"models": ("other",)}, slow={"rate": 0.001}, admin={"models": (), "management": True}
    )
    with serving({"double": doubler()}, access=access) as running:
        yield running, keys


def header(keys: dict[str, str], name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys[name]}"} if name in keys else {}


@pytest.mark.parametrize(
    ("name", "status"), [("", 401), ("all", 200), ("other", 403), ("admin", 403), ("slow", 200), ("slow", 429)]
)
def test_inference_takes_a_key(guarded: tuple[Running, dict[str, str]], name: str, status: int) -> None:
    running, keys = guarded
    found, headers, _ = running.request("POST", INFER, BODY, header(keys, name))
    assert found == status
    assert (headers["WWW-Authenticate"] == "Bearer") == (status == 401)
    assert ("Retry-After" in headers) == (status == 429)


def test_the_other_header(guarded: tuple[Running, dict[str, str]]) -> None:
    running, keys = guarded
    assert running.request("POST", INFER, BODY, {"X-API-Key": keys["all"]})[0] == 200
    assert running.request("POST", INFER, BODY, {"X-API-Key": "x"})[0] == 401


def test_a_known_head_is_still_within_its_rate() -> None:
    access, keys = keyed(few={"rate": 1.0})
    with (
        serving({"double": doubler()}, access=access) as running,
        contextlib.closing(running.connect()) as sock,
        sock.makefile("rb") as stream,
    ):
        found = []
        for _ in range(4):
            sock.sendall(http_request(BODY, headers=f"Authorization: Bearer {keys['few']}\r\n"))
            found.append(read_reply(stream)[0])
        assert found == [200, 200, 429, 429]
        assert access.refused == {"rate": 2}


@pytest.mark.parametrize(
    ("method", "path", "open_to"),
    [
        ("GET", "/", {"", "all", "admin"}),
        ("GET", "/v2/health/live", {"", "all", "admin"}),
        ("GET", "/v2/health/ready", {"", "all", "admin"}),
        ("GET", "/v2", {"all", "admin"}),
        ("GET", "/metrics", {"all", "admin"}),
        ("GET", "/v2/models/double", {"all", "admin"}),
        ("POST", "/v2/repository/index", {"all", "admin"}),
        ("POST", LOAD, {"admin"}),
        ("POST", "/v2/nowhere", {"admin"}),
        ("PUT", "/v2/nowhere", {"admin"}),
    ],
)
def test_management_takes_a_key_of_its_own(
    guarded: tuple[Running, dict[str, str]], method: str, path: str, open_to: set[str]
) -> None:
    running, keys = guarded
    for name in ("", "all", "admin"):
        status = running.request(method, path, b"" if method != "GET" else None, header(keys, name))[0]
        assert (status in (401, 403)) == (name not in open_to), (name, status)


def test_management_is_closed_to_the_network_without_keys() -> None:
    with serving({"double": doubler()}, access=Access(open_management=False)) as running:
        assert running.request("POST", INFER, BODY)[0] == 200
        assert running.request("GET", "/v2/models/double")[0] == 200
        status, _, body = running.request("POST", LOAD, b"")
        assert status == 403
        assert b"--api-keys" in body


@pytest.mark.anyio
async def test_a_websocket_is_refused() -> None:
    access, _ = keyed(one={})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError

    scope = {"type": "websocket", "path": "/v2/models/double/stream", "headers": []}
    await Gate(never, access)(scope, never, send)
    start, body = sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert body["type"] == "websocket.http.response.body"
    assert b"error" in body["body"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- pages of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1", "Origin": "http://[::1]:1"}, 200),
        ({"Host": "127.0.0.1:1", "Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "127.0.0.1:1", "Origin": "http://127.0.0.1:2", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:1", "Origin": "http://evil.example:1", "Sec-Fetch-Site": "same-origin"}, 403),
    ],
)
def test_pages_of_others_manage_nothing(headers: dict[str, str], status: int) -> None:
    access, keys = keyed(one={"management": True})
    with serving({"double": doubler()}) as running:
        for path in ("/v2/logging", "/v2/systemsharedmemory/unregister"):
            assert running.request("POST", path, b"{}", headers)[0] == status
        assert running.request("GET", "/v2/models/double", None, headers)[0] == 200
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "MDAwMDAwMDAwMDAwMDAwMA=="
        found = running.request("GET", "/v2/models/double/stream", None, headers | upgrade)[0]
        assert found == (101 if status == 200 else 403)
    with serving({"double": doubler()}, access=access) as running:
        bearer = {"Authorization": f"Bearer {keys['one']}"}
        assert running.request("POST", "/v2/logging", b"{}", headers | bearer)[0] == 200


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_tls() -> None:
    """Small, large and pipelined requests; a client without TLS disturbs nobody."""
    certificate = CERTIFICATES / "server.pem"
    context = ssl.create_default_context(cafile=str(certificate))
    large = np.zeros((40_000, 4), np.float32)
    tensor = {"name": "x", "shape": large.shape, "datatype": "FP32", "parameters": {"binary_data_size": large.nbytes}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    sent = http_request(document + large.tobytes(), headers=f"Inference-Header-Content-Length: {len(document)}\r\n")
    with serving(
        {"double": doubler()}, tls_cert=certificate, tls_key=CERTIFICATES / "server.key", max_batch=40_000
    ) as running:
        with contextlib.closing(running.connect()) as plain:
            plain.sendall(http_request(BODY))
            with contextlib.suppress(ConnectionResetError):
                assert plain.recv(100) == b""
        with (
            contextlib.closing(context.wrap_socket(running.connect(), server_hostname="localhost")) as sock,
            sock.makefile("rb") as stream,
        ):
            for message in (http_request(BODY), sent, http_request(BODY) * 2, sent):
                sock.sendall(message)
                for _ in range(message.count(b"POST ")):
                    status, headers, body = read_reply(stream)
                    assert status == 200
                    assert len(body) == int(headers["content-length"])


def test_a_client_that_never_ends_tls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FAREWELL_SECONDS", 0.1)
    context = ssl.create_default_context(cafile=str(CERTIFICATES / "server.pem"))
    patience = 120.0
    files: dict[str, Any] = {"tls_cert": CERTIFICATES / "server.pem", "tls_key": CERTIFICATES / "server.key"}
    with contextlib.ExitStack() as clients:
        with serving({"double": doubler()}, drain_timeout=patience, **files) as running:
            sock = clients.enter_context(context.wrap_socket(running.connect(), server_hostname="localhost"))
            sock.sendall(http_request(BODY))
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
        assert time.monotonic() - began < patience / 2


@pytest.mark.parametrize(
    ("chain", "key", "says"),
    [
        ("none.pem", None, "--tls-cert: .*none.pem cannot be read: No such file"),
        ("server.key", None, "--tls-cert: .*server.key holds no certificate"),
        ("server.pem", None, "--tls-cert: .*server.pem holds no private key; --tls-key"),
        ("server.pem", "server.pem", "--tls-key: .*server.pem holds no private key"),
        ("server.pem", "other.key", "--tls-key: .*other.key is not the key of the certificate"),
        ("damaged.pem", "server.key", "damaged.pem and .*server.key cannot be used"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(tmp_path: Path, chain: str, key: str | None, says: str) -> None:
    for file in CERTIFICATES.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "damaged.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(CertificateError, match=says):
        check_certificates(tmp_path / chain, None if key is None else tmp_path / key, None)


@pytest.mark.parametrize("name", ["tls_key", "tls_client_ca"])
def test_what_only_a_certificate_makes_true_needs_one(name: str) -> None:
    with pytest.raises(ValueError, match="needs --tls-cert"):
        Settings.model_validate({name: CERTIFICATES / "server.pem"})
