"""Who may do what: API keys, the models and rates of each, and the protection of management.

A key is `infera_<name>_<secret>`, its secret 256 random bits. The file of keys holds the SHA-256 of each secret, which
for so many random bits is as good as a slow hash:

    [keys.mobile]
    sha256 = "9f86d0..."
    models = ["resnet*", "yunet"]   # all where left out
    rate = 50.0                     # requests a second, with a burst of twice that; no limit where left out
    management = false
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from infera_server.codec import short
from infera_server.errors import Forbidden, Overloaded, Unauthorized

PREFIX = "infera"
NAME = re.compile(r"[a-z0-9-]{1,64}")
SECRET_BYTES = 32
BUCKET_BYTES = 16
"""Of a shared bucket: two floats."""

MAX_RATE = 1e9
"""Requests a second; no server takes more."""

BURST_SECONDS = 2.0
"""A key that was not used for so long may send what it might have sent meanwhile, at once."""


class KeyFileError(ValueError):
    """A file of keys that cannot be used."""


class Bucket:
    """A token bucket: what may be sent within a rate, with a burst of `BURST_SECONDS`' worth."""

    tokens, filled_at = 0.0, -1e9

    def take(self, rate: float, now: float) -> float:
        """Take a token at a time of `time.monotonic`. Returns the seconds until there is one; 0 where there was."""
        tokens = min(max(1.0, rate * BURST_SECONDS), self.tokens + (now - self.filled_at) * rate)
        self.filled_at = now
        self.tokens = tokens - 1 if tokens >= 1 else tokens
        return 0.0 if tokens >= 1 else (1 - tokens) / rate


class SharedBucket(Bucket):
    """One that several processes take from: the `index`th in a file in memory."""

    def __init__(self, file: int, index: int) -> None:
        self._file, self._start = file, index * BUCKET_BYTES
        whole = memoryview(mmap.mmap(file, 0))
        self._kept = whole[self._start : self._start + BUCKET_BYTES].cast("d")

    def take(self, rate: float, now: float) -> float:
        fcntl.lockf(self._file, fcntl.LOCK_EX, BUCKET_BYTES, self._start)  # given up when its holder is killed
        try:
            self.tokens, self.filled_at = self._kept
            wait = super().take(rate, max(now, self.filled_at))
            self._kept[0], self._kept[1] = self.tokens, self.filled_at
            return wait
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, BUCKET_BYTES, self._start)


@dataclass(slots=True, eq=False)
class Key:
    """What the holder of a key may do. Used from the event loop's thread only."""

    name: str
    digest: bytes
    models: tuple[str, ...] = ("*",)
    rate: float | None = None
    management: bool = False
    bucket: Bucket = field(default_factory=Bucket)

    def allows(self, model: str) -> bool:
        """Whether requests to this model are in its scope."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def reads(self, model: str) -> bool:
        """Whether this model is told of: one in its scope, and to who manages models any."""
        return self.management or self.allows(model)


@dataclass(frozen=True, slots=True)
class Access:
    """Decides by the credentials that a request brings. Without keys everybody may infer.

    `open_management` says whether without a key with that right models may be loaded and settings changed.
    """

    keys: Mapping[str, Key] = field(default_factory=dict)
    open_management: bool = True
    refused: Counter[str] = field(default_factory=Counter)
    """Requests that were not let in, by why: "no_key", "unknown_key", "scope", "rate" or "management"."""

    @property
    def is_open(self) -> bool:
        """Whether inference needs no key."""
        return not self.keys

    def identify(self, credentials: str) -> Key | None:
        """The key in `Authorization: Bearer KEY` or a bare one; None where no keys are asked for.

        Raises Unauthorized. Takes the same time for a wrong secret, whatever is wrong with it.
        """
        if not self.keys:
            return None
        scheme, _, token = credentials.strip().partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else credentials.strip()
        prefix, _, rest = token.partition("_")
        name, _, secret = rest.partition("_")
        key = self.keys.get(name) if prefix == PREFIX else None
        digest = sha256(secret.encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, key.digest if key else bytes(len(digest))) or key is None:
            self.refused["unknown_key" if token else "no_key"] += 1
            if not token:
                raise Unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
            raise Unauthorized("the API key is not known here")
        return key

    def admit(self, credentials: str, model: str, now: float) -> Key | None:
        """The key of a request to a model at a time of `time.monotonic`; None where no keys are asked for.

        Raises Unauthorized, Forbidden where the key's scope leaves the model out, or Overloaded over its rate.
        """
        key = self.identify(credentials)
        if key is not None:
            if not key.allows(model):
                raise self._out_of_scope(key, model)
            self.spend(key, now)
        return key

    def spend(self, key: Key, now: float) -> None:
        """Account for a request with this key at a time of `time.monotonic`. Raises Overloaded over its rate."""
        if key.rate is not None and (wait := key.bucket.take(key.rate, now)):
            self.refused["rate"] += 1
            raise Overloaded(
                f"key '{key.name}' may send {key.rate:g} requests a second; send the request again later", wait
            )

    def admit_reader(self, credentials: str, model: str | None) -> Key | None:
        """The key of who asks about a model, or about none by its name; None where no keys are asked for.

        What lists models leaves out those that `readable` says no to. Raises Unauthorized, or Forbidden where the key
        does not read this model, whether there is one of the name or not.
        """
        key = self.identify(credentials)
        if key is not None and model is not None and not key.reads(model):
            raise self._out_of_scope(key, model)
        return key

    def check_management(self, credentials: str) -> Key | None:
        """The key of who may load models and change settings; None where no keys are asked for.

        Raises Unauthorized or Forbidden.
        """
        if self.keys:
            key = self.identify(credentials)
            if key is None or not key.management:
                self.refused["management"] += 1
                raise Forbidden("the API key is not for management")
            return key
        if not self.open_management:
            self.refused["management"] += 1
            raise Forbidden(
                "management is closed, since the server listens on more than this machine without API keys; "
                "start it with --api-keys, or with --open-management"
            )
        return None

    def _out_of_scope(self, key: Key, model: str) -> Forbidden:
        self.refused["scope"] += 1
        return Forbidden(f"key '{key.name}' is not for model '{short(model)}'")


def readable(key: Key | None, model: str) -> bool:
    """Whether who came with this key, or with None where none are asked for, is told of a model."""
    return key is None or key.reads(model)


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address that is listened on."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> dict[str, Key]:
    """The keys in a file. Raises KeyFileError, which names what is wrong."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise KeyFileError(f"{path} is no file of keys as `infera key` makes it: {error}") from None
    if set(document) != {"keys"} or not isinstance(document["keys"], dict) or not document["keys"]:
        raise KeyFileError(f"{path} holds no keys: expected tables [keys.NAME]")
    return {name: _key(path, name, table) for name, table in document["keys"].items()}


def _key(path: Path, name: str, table: object) -> Key:
    where = f"{path}: key '{name}'"
    if not NAME.fullmatch(name):
        raise KeyFileError(f"{where}: a name is of a-z, 0-9 and -, at most 64 of them")
    if not isinstance(table, dict):
        raise KeyFileError(f"{where} is no table")
    if unknown := set(table) - {"sha256", "models", "rate", "management"}:
        raise KeyFileError(f"{where}: unknown {', '.join(sorted(unknown))}")
    digest, models, rate = table.get("sha256"), table.get("models", ["*"]), table.get("rate")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise KeyFileError(f"{where}: sha256 must be 64 hexadecimal digits; make a key with: infera key {name}")
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        raise KeyFileError(f"{where}: models must be a list of names or patterns")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_RATE):
        raise KeyFileError(f"{where}: rate must be a number of requests a second above 0, up to {MAX_RATE:g}")
    management = table.get("management", False)
    if not isinstance(management, bool):
        raise KeyFileError(f"{where}: management must be true or false")
    return Key(name, bytes.fromhex(digest), tuple(models), None if rate is None else float(rate), management)


def make_key(name: str) -> tuple[str, str]:
    """A new key, and the table for the file of keys. Raises KeyFileError for a name that cannot be one."""
    if not NAME.fullmatch(name):
        raise KeyFileError(f"'{name}': a name is of a-z, 0-9 and -, at most 64 of them")
    secret = secrets.token_urlsafe(SECRET_BYTES)
    digest = sha256(secret.encode()).hexdigest()
    return f"{PREFIX}_{name}_{secret}", f'[keys.{name}]\nsha256 = "{digest}"\n'
