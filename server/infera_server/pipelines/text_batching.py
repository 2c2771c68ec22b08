"""Whether texts of a decoder may share batches, and the proof: its inputs hang together, random ones show nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_server.models.modelconfig import ConfigError, ModelConfig
from infera_server.pipelines.generation import CACHED, Decoding, decoding, proven, sample
from infera_server.runtime import Session
from infera_server.scheduling.batching import Batching, Candidate, arena_of, buckets_to, candidates, derive
from infera_server.scheduling.proof import difference
from infera_server.scheduling.rows import Arrays, HostArray, Layout

TEXTS = 3
"""Run together and one by one."""


def derive_for_texts(session: Session, config: ModelConfig, max_batch: int) -> Batching:
    """The batch axis of a decoder: rows are texts. Raises ConfigError where it does not generate."""
    how = proven(session, decoding(session, None, config))
    alone = derive(session, 1)
    if max_batch <= 1:
        return alone
    refusals = []
    for candidate in candidates(session.inputs, session.outputs):
        if candidate.outputs is None or set(candidate.shared) - {CACHED}:
            continue
        refusal = session.facts(candidate.shared).mixes_rows or _disproof(session, how, candidate)
        if refusal is None:
            return _sized(session, how, candidate, max_batch)
        refusals.append(f"{candidate.origin}, but {refusal}")
    return replace(alone, reason=f"off: {'; '.join(refusals) or 'not all tensors have one axis for it'}")


def _disproof(session: Session, how: Decoding, candidate: Candidate) -> str | None:
    """Why texts are not independent, if so: a prompt each, and then a token each."""
    assert candidate.outputs is not None
    rng = np.random.default_rng(0)
    texts = [sample(session, how, rng) for _ in range(TEXTS)]
    feeds: list[dict[str, HostArray]] = []
    for prompt, shared in texts:
        feeds.append(how.feeds(prompt[:2] if how.wide else prompt[:1], 0, None, shared))
    try:
        for step in (0, 1):
            singles = [session.run(row) for row in feeds]
            whole = session.run(_together(feeds, candidate))
            if refusal := difference(whole, singles, candidate.outputs):
                return refusal
            past = 2 if how.wide else 1
            if step or how.rereads:
                return None
            after = [how.next_state(outputs, past) for outputs in singles]
            feeds = [
                how.feeds(prompt[-1:], past, state, shared, padding)
                for (prompt, shared), (state, padding) in zip(texts, after, strict=True)
            ]
    except Exception as error:
        return f"a run of {TEXTS} texts failed: {type(error).__name__}: {error}"
    return None


def _together(feeds: list[dict[str, HostArray]], candidate: Candidate) -> Arrays:
    rows = {name: np.concatenate([row[name] for row in feeds], axis) for name, axis in candidate.inputs.items()}
    return rows | {name: feeds[0][name] for name in candidate.shared}


def _sized(session: Session, how: Decoding, candidate: Candidate, max_batch: int) -> Batching:
    """The buckets whose plans fit in memory, for the token after a prompt."""
    assert candidate.outputs is not None
    prompt, shared = sample(session, how, np.random.default_rng(0))
    count = 2 if how.wide else 1
    row = how.feeds(prompt[:count], 0, None, shared)
    if not how.rereads:
        state, padding = how.next_state(session.run(row), count)
        row = how.feeds(prompt[-1:], count, state, shared, padding)
    arena: dict[int, int] = {}
    reason = f"on: {candidate.origin}, and {TEXTS} texts together equal the texts one by one"
    for bucket in buckets_to(max_batch):
        shapes = {
            name: tuple(bucket if at == candidate.inputs.get(name) else size for at, size in enumerate(array.shape))
            for name, array in row.items()
        }
        try:
            arena[bucket] = arena_of(session, shapes)
        except Exception as error:
            if not arena:
                raise ConfigError(f"no plan for one text: {error}") from None
            reason += f"; no more than {max(arena)} rows, because {error}"
            break
    return Batching(Layout(candidate.inputs, candidate.outputs, tuple(arena), candidate.shared), reason, arena, {})
