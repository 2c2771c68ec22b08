"""The next token of a text, from a model's logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from infera_server.errors import BadRequest
from infera_server.requests import Parameter
from infera_server.scheduling.rows import HostArray

MAX_SEED = 2**63


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the likeliest where `temperature` is 0, else at random, of the `top_k` likeliest (0: all).

    At most `most` are made. Equal seeds choose alike.
    """

    most: int
    temperature: float = 0.0
    top_k: int = 0
    seed: int | None = None


def sampling(parameters: Mapping[str, Parameter], most: int) -> Sampling:
    """What a request asks for, where no request gets more than `most` tokens. Raises BadRequest."""
    wanted = _number(parameters, "max_tokens", most, 1, MAX_SEED)
    seed = _number(parameters, "seed", -1, 0, MAX_SEED)
    return Sampling(
        min(int(wanted), most),
        _number(parameters, "temperature", 0.0, 0.0, 1e6),
        int(_number(parameters, "top_k", 0, 0, MAX_SEED)),
        None if seed < 0 else int(seed),
    )


def _number(parameters: Mapping[str, Parameter], name: str, default: float, least: float, most: float) -> float:
    """A number, or a text that is one: parameters of JSON requests have no fractions."""
    value = parameters.get(name)
    if value is None:
        return default
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except ValueError:
        found = float("nan")
    if not least <= found <= most or (name != "temperature" and found != int(found)):
        kind = "a number" if name == "temperature" else "an integer"
        raise BadRequest(f"parameter '{name}' must be {kind} from {least:g}")
    return found


class Sampler:
    """Chooses one text's tokens."""

    def __init__(self, asked: Sampling) -> None:
        self._asked = asked
        self._rng = np.random.default_rng(asked.seed) if asked.temperature else None

    def choose(self, logits: HostArray) -> int:
        """A token by its logits [V]: softmax(logits / temperature) is sampled as the largest of them plus Gumbel noise,
        which needs neither a sum nor an order (Gumbel-max, Maddison et al. 2014)."""
        if self._rng is None:
            return int(logits.argmax())
        scores = logits.astype(np.float32) / np.float32(self._asked.temperature)
        if 0 < self._asked.top_k < scores.size:
            least = np.partition(scores, -self._asked.top_k)[-self._asked.top_k]
            scores[scores < least] = -np.inf
        return int((scores + self._rng.gumbel(size=scores.size)).argmax())
