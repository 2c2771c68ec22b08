"""Which version answers: labels, a split by weight, a shadow that gets copies of requests, and what a new one must
answer as before.

Read from `infera.toml` in the model's folder, or set while the server runs:

    pinned = true                    # never evicted

    [labels]
    stable = 1
    canary = 2

    [split]                          # of the requests that name no version
    stable = 90
    canary = 10

    [shadow]                         # gets copies; its replies are compared and thrown away
    version = "canary"
    share = 0.1
    tolerance = 0.001

    [golden]                         # requests that a new version is held against; else as the server says
    requests = 32
    tolerance = 0.01
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infera_server.models.discovery import leads_outside
from infera_server.models.modelconfig import ConfigError

FILE = "infera.toml"
MAX_BYTES = 1 << 16

MAX_GOLDEN = 1024
"""Requests that can be kept of one model."""

MAX_VERSION = (1 << 63) - 1
"""What the protocol has room for."""

MAX_NUMBER = 1e300
"""Of a weight or tolerance: sums of them are still finite."""

LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""What a label may be: no number, which would be a version."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version or label, the share of requests copied to it, and by how much its outputs may differ."""

    version: str
    share: float = 1.0
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class GoldenRule:
    """How many of the latest requests are kept, and by how much of an output's largest value a reply may differ.

    None: as the server says.
    """

    requests: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests for a model find a version. `split` is weights by version or label; empty: the newest version."""

    labels: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, float] = field(default_factory=dict)
    shadow: Shadow | None = None
    pinned: bool = False
    golden: GoldenRule = GoldenRule()

    def version(self, name: str) -> str:
        """The version that a version or label means."""
        return self.labels.get(name, name)

    def missing(self, served: Collection[str]) -> list[str]:
        """What is named here and not served."""
        shadowed = (self.shadow.version,) if self.shadow else ()
        named = dict.fromkeys(map(self.version, (*self.labels.values(), *self.split, *shadowed)))
        return [version for version in named if version not in served]

    def as_dict(self) -> dict[str, Any]:
        """The document that `parse` takes."""
        shadow = self.shadow
        found: dict[str, Any] = {"labels": dict(self.labels), "split": dict(self.split), "pinned": self.pinned}
        if shadow:
            found["shadow"] = {"version": shadow.version, "share": shadow.share, "tolerance": shadow.tolerance}
        golden = {"requests": self.golden.requests, "tolerance": self.golden.tolerance}
        if given := {name: value for name, value in golden.items() if value is not None}:
            found["golden"] = given
        return found


def read(folder: Path | None) -> Traffic:
    """What the model's folder says; nothing where it has no such file. Raises ConfigError."""
    path = folder / FILE if folder else None
    if folder is None or path is None or not path.is_file():
        return Traffic()
    if leads_outside(path, folder):
        raise ConfigError(f"{path} leads outside the model's folder")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        document = tomllib.loads(text.decode()) if len(text) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also for an integer of over 4,300 digits
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if document is None:
        raise ConfigError(f"{path} has over {MAX_BYTES:,} bytes")
    try:
        return parse(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(document: object) -> Traffic:
    """Raises ConfigError for what is not understood."""
    if not isinstance(document, dict):
        raise ConfigError("expected an object with labels, split, shadow, golden, pinned")
    if unknown := document.keys() - {"labels", "split", "shadow", "golden", "pinned"}:
        raise ConfigError(f"'{min(map(str, unknown))}' is unknown; there are labels, split, shadow, golden and pinned")
    labels = {_label(k): _version(v) for k, v in _table(document, "labels").items()}
    pinned = document.get("pinned", False)
    if not isinstance(pinned, bool):
        raise ConfigError("pinned must be true or false")
    return Traffic(labels, _split(document, labels), _shadow(document, labels), pinned, _golden(document))


def _split(document: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, float]:
    """Weights by version or label, each version named once."""
    split: dict[str, float] = {}
    named: dict[str, str] = {}
    for name, weight in _table(document, "split").items():
        target = _target(name, labels)
        version = labels.get(target, target)
        if (other := named.setdefault(version, name)) != name:
            raise ConfigError(f"split names version {version} twice, as '{other}' and '{name}': give it one weight")
        split[target] = _number(weight, f"split.{name}")
    if split and not sum(split.values()) > 0:
        raise ConfigError("split needs a weight above 0")
    return split


def _golden(document: Mapping[str, Any]) -> GoldenRule:
    table = _table(document, "golden")
    if unknown := table.keys() - {"requests", "tolerance"}:
        raise ConfigError(f"'golden.{min(map(str, unknown))}' is unknown; there are requests and tolerance")
    requests, tolerance = table.get("requests"), table.get("tolerance")
    if requests is not None and (type(requests) is not int or not 0 <= requests <= MAX_GOLDEN):
        raise ConfigError(f"golden.requests must be an integer from 0 to {MAX_GOLDEN}")
    return GoldenRule(requests, None if tolerance is None else _number(tolerance, "golden.tolerance"))


def _shadow(document: Mapping[str, Any], labels: Mapping[str, str]) -> Shadow | None:
    table = _table(document, "shadow")
    if not table:
        return None
    if unknown := table.keys() - {"version", "share", "tolerance"}:
        raise ConfigError(f"'shadow.{min(map(str, unknown))}' is unknown; there are version, share and tolerance")
    return Shadow(
        _target(table.get("version", ""), labels),
        _number(table.get("share", 1.0), "shadow.share", 1.0),
        _number(table.get("tolerance", 1e-3), "shadow.tolerance"),
    )


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} must be a table")
    return table


def _label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise ConfigError(f"'{text[:64]}' is no label: letters, digits, '_', '-' and '.', not first a digit")
    return text


def _version(value: object) -> str:
    """A number, or one in a text, as a version's folder is named."""
    if type(value) is int and 0 <= value <= MAX_VERSION:
        return str(value)
    if isinstance(value, str) and re.fullmatch(r"0*[0-9]{1,19}", value) and int(value[-19:]) <= MAX_VERSION:
        return str(int(value[-19:]))
    told = f"'{value[:64]}'" if isinstance(value, str) else "a number" if type(value) is int else type(value).__name__
    raise ConfigError(f"{told} is no version: an integer from 0 to {MAX_VERSION}")


def _target(name: object, labels: Mapping[str, str]) -> str:
    """A label as it is, or a version's number."""
    if not isinstance(name, str) or name.isdecimal():
        return _version(name)
    if name not in labels:
        known = f"which have {', '.join(labels)}" if labels else "which have none: they replace all earlier ones"
        raise ConfigError(f"'{name[:64]}' is no version, and no label in these settings, {known}")
    return name


def _number(value: object, what: str, most: float = MAX_NUMBER) -> float:
    """A number that is said to be `what`; neither NaN nor infinite, nor an integer that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ConfigError(f"{what} must be a number from 0 to {most:g}")
    return float(value)
