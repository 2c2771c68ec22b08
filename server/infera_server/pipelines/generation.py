"""What turns an ONNX decoder into a model that generates: `generate_*` parameters of Triton's model configuration.

The decoder takes tokens and its state, and gives logits and the next state: of fixed size, as a recurrent one has, or
growing with the text, as keys and values of an attention do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from infera_gpu.spec import TensorSpec
from infera_server.models.modelconfig import ConfigError, ModelConfig
from infera_server.pipelines.recurrence import State, pairs
from infera_server.runtime import Session
from infera_server.scheduling.proof import SMALL_IDS, random_array, shape_at
from infera_server.scheduling.rows import Arrays, HostArray, Layout, padded_length

INPUT, LOGITS, STATES = "generate_input", "generate_logits", "generate_states"
STOP, MOST = "generate_stop", "generate_max_tokens"
PARAMETERS = frozenset({INPUT, LOGITS, STATES, STOP, MOST})

DEFAULT_MOST = 256

MASK, POSITIONS, CACHED = "attention_mask", "position_ids", "use_cache_branch"
"""Inputs that follow from how many tokens there are: all of them attended to, the places of the new ones, and whether
there were some before."""

LEAST_LENGTH = 32
"""What states that grow are made as long as at least, where they are padded."""

TOLERANCE = 1e-2
"""By how much logits may differ, of their largest, between a prompt in one run and in two."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a decoder is run. With `wide` it takes any number of tokens at once, else one.

    `shared` are inputs that clients feed and every run of a text gets. `rank` is that of the tokens. Nobody gets more
    than `most` tokens, and none after one of `stop`.

    With `padded`, states that grow do so in steps, with zeros in front that the mask hides: texts of about equal length
    have runs of equal shapes, which share batches and plans.
    """

    tokens: str
    logits: str
    states: Sequence[State]
    derived: Mapping[str, TensorSpec]
    shared: Sequence[str]
    dtype: np.dtype[np.generic]
    rank: int
    wide: bool
    stop: frozenset[int]
    most: int
    padded: bool = False

    @property
    def growing(self) -> Mapping[str, int]:
        """States that grow, each with the axis along which it does."""
        return {s.input: s.initial.shape.index(0) for s in self.states if not s.initial.size}

    @property
    def beginnings(self) -> Sequence[str]:
        """States that a client may begin with: those that do not grow."""
        return [state.input for state in self.states if state.initial.size]

    @property
    def rereads(self) -> bool:
        """Whether every run is fed all of the text, since nothing else tells what came before."""
        return self.wide and not self.states

    @property
    def described(self) -> str:
        """For a human."""
        states = (
            ", ".join(f"'{s.output}' becomes '{s.input}'" for s in self.states)
            or "no state: a run reads all of the text"
        )
        width = "a prompt in one run" if self.wide else "a token a run"
        steps = "; what grows is padded, so that texts of unequal length share batches" if self.padded else ""
        return f"'{self.tokens}' from '{self.logits}', {width}, at most {self.most}; {states}{steps}"

    def feeds(
        self, tokens: Sequence[int], past: int, state: Arrays | None, shared: Arrays, padding: int = 0
    ) -> dict[str, HostArray]:
        """Of a run of one text, `past` tokens of which came before; its state begins with so much padding."""
        count = len(tokens)
        found: dict[str, HostArray] = {
            self.tokens: np.array(tokens, self.dtype).reshape((1,) if self.rank == 1 else (1, count))
        }
        for name, spec in self.derived.items():
            if name == MASK:
                found[name] = np.ones((1, padding + past + count), spec.dtype)
                found[name][:, :padding] = 0
            elif name == POSITIONS:
                found[name] = np.arange(past, past + count, dtype=spec.dtype)[None]
            else:
                found[name] = np.full((1,), past > 0, spec.dtype)
        states = {s.input: s.initial for s in self.states} if state is None else state
        return {**found, **shared, **states}

    def next_logits(self, outputs: Arrays) -> HostArray:
        """[V], after the last token of a run."""
        logits = outputs[self.logits]
        last: HostArray = logits.reshape(-1, logits.shape[-1])[-1]
        return last

    def next_state(self, outputs: Arrays, past: int) -> tuple[dict[str, HostArray], int]:
        """What the next run is fed, before which there are `past` tokens, and how much of it is padding.

        It has memory of its own: a view would keep its whole batch.
        """
        made = {state.input: outputs[state.output] for state in self.states}
        padding = 0
        if self.padded:
            length = padded_length(max(past, LEAST_LENGTH))
            padding = length - past
            made |= {name: _ending(made[name], axis, length) for name, axis in self.growing.items()}
        return {name: array if array.base is None else array.copy() for name, array in made.items()}, padding


def _ending(array: HostArray, axis: int, length: int) -> HostArray:
    """The array with this length along an axis: without what is too much at its beginning, or with zeros there."""
    missing = length - array.shape[axis]
    if missing > 0:
        return np.pad(array, [(missing if at == axis else 0, 0) for at in range(array.ndim)])
    cut: HostArray = array[(slice(None),) * axis + (slice(-missing, None),)]
    return cut


def generates(config: ModelConfig | None) -> bool:
    """Whether a configuration asks for it."""
    return config is not None and INPUT in config.parameters


def check(config: ModelConfig) -> None:
    """Raises ConfigError for what cannot be asked for together."""
    if not generates(config):
        return
    if config.input or config.output:
        raise ConfigError(f"{INPUT}: the tensors of {config.name} follow from it, and cannot be listed")
    if config.HasField("sequence_batching") or config.response_cache.enable:
        raise ConfigError(f"{INPUT}: {config.name} can have neither sequence_batching nor a response cache as well")


def decoding(session: Session, layout: Layout | None, config: ModelConfig) -> Decoding:
    """What a configuration says, and what is found of the rest. Raises ConfigError."""
    given = {name: config.parameters[name].string_value for name in PARAMETERS if name in config.parameters}
    name, tokens = config.name, given[INPUT]
    spec = session.inputs.get(tokens)
    if spec is None or spec.dtype.kind not in "iu" or len(spec.shape) not in (1, 2):
        raise ConfigError(f"{INPUT}: '{tokens}' is no input [batch] or [batch, tokens] of integers of {name}")
    states = list(_states(session, layout, given.get(STATES, ""), spec))
    known = {tokens, *(state.input for state in states)}
    derived = {n: s for n, s in session.inputs.items() if n in (MASK, POSITIONS, CACHED) and n not in known}
    made = {state.output for state in states}
    scores = [n for n, s in session.outputs.items() if n not in made and s.dtype.kind in "fV" and s.shape]
    logits = given.get(LOGITS) or ("logits" if "logits" in scores else scores[0] if len(scores) == 1 else "")
    if logits not in scores:
        raise ConfigError(f"{LOGITS}: which of {', '.join(sorted(session.outputs))} has the logits of {name}?")
    return Decoding(
        tokens,
        logits,
        states,
        derived,
        [n for n in session.inputs if n not in known and n not in derived],
        spec.dtype,
        len(spec.shape),
        len(spec.shape) == 2 and not isinstance(spec.shape[1], int),
        frozenset(_numbers(given.get(STOP, ""), STOP)),
        next(iter(_numbers(given.get(MOST, ""), MOST)), DEFAULT_MOST),
    )


def _numbers(text: str, what: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"{what}: '{text[:64]}' is no list of numbers")
    return [int(part) for part in parts]


def _states(session: Session, layout: Layout | None, given: str, tokens: TensorSpec) -> Iterator[State]:
    """As given, `input:output` and commas between them, else by their names. The first run is fed zeros."""
    if given:
        named = [(fed.strip(), made.strip()) for pair in given.split(",") for fed, _, made in [pair.partition(":")]]
    else:
        named = list(pairs(session, layout, growing=True))
        for side in (0, 1):
            names = [pair[side] for pair in named]
            if doubtful := sorted({name for name in names if names.count(name) > 1}):
                raise ConfigError(f"{STATES}: '{doubtful[0]}' may belong to several states")
    for fed, made in named:
        if fed not in session.inputs or made not in session.outputs:
            raise ConfigError(f"{STATES}: '{fed}:{made}' is no input and output of the model")
        spec = session.inputs[fed]
        axis = layout.inputs.get(fed) if layout is not None else None
        yield State(fed, made, np.zeros(_first_shape(spec, tokens, axis), spec.dtype))


def _first_shape(spec: TensorSpec, tokens: TensorSpec, axis: int | None) -> tuple[int, ...]:
    """One row, and nothing of what grows."""
    batch = axis
    if batch is None and tokens.shape[0] in spec.shape:
        batch = spec.shape.index(tokens.shape[0])
    return tuple(d if isinstance(d, int) else int(at == (batch or 0)) for at, d in enumerate(spec.shape))


def proven(session: Session, found: Decoding) -> Decoding:
    """The same, `padded` where that changes nothing. A prompt that can be run at once must give what it gives in two.

    Raises ConfigError where it does not.
    """
    prompt, shared = sample(session, found, np.random.default_rng(0))
    ahead = prompt[:2] if found.wide else prompt[:1]
    try:
        if found.rereads:
            session.run(found.feeds(prompt, 0, None, shared))
            return found
        first = session.run(found.feeds(ahead, 0, None, shared))
        second = session.run(_after(found, first, prompt[-1:], len(ahead), shared))
        whole = session.run(found.feeds(prompt, 0, None, shared)) if found.wide else second
    except Exception as error:
        raise ConfigError(f"{INPUT}: a run failed: {type(error).__name__}: {error}") from None
    want = found.next_logits(whole)
    if not _alike(found.next_logits(second), want):
        raise ConfigError(f"{INPUT}: 3 tokens in one run give other logits than 2 and then the third: states are amiss")
    padded = replace(found, padded=True)
    if MASK in found.derived and found.growing:
        with suppress(Exception):  # it cannot be padded
            third = session.run(_after(padded, first, prompt[-1:], len(ahead), shared))
            return padded if _alike(found.next_logits(third), want) else found
    return found


def sample(session: Session, found: Decoding, rng: np.random.Generator) -> tuple[list[int], dict[str, HostArray]]:
    """Three tokens, and what else a text has."""
    specs = {name: session.inputs[name] for name in found.shared}
    shared = {name: random_array(rng, shape_at(spec, {}, 1), spec.dtype) for name, spec in specs.items()}
    most = min(session.facts().id_limits.get(found.tokens, SMALL_IDS), SMALL_IDS)
    return [int(token) for token in rng.integers(0, most, 3)], shared


def _after(found: Decoding, outputs: Arrays, tokens: Sequence[int], past: int, shared: Arrays) -> Arrays:
    """The feeds of the run after one with these outputs."""
    state, padding = found.next_state(outputs, past)
    return found.feeds(tokens, past, state, shared, padding)


def _alike(have: HostArray, want: HostArray) -> bool:
    a, b = have.astype(np.float64), want.astype(np.float64)
    return bool(np.abs(a - b).max() <= TOLERANCE * np.abs(b).max())
