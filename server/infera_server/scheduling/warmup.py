"""Runs before the first request: they make the plans, and the times they take are where the cost model begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import numpy as np

from infera_server.runtime import Session
from infera_server.scheduling.proof import random_array, shape_at
from infera_server.scheduling.rows import Arrays, HostArray, Layout
from infera_server.scheduling.schedule import Schedule
from infera_server.scheduling.turns import Share

log = logging.getLogger(__name__)

TIMED = 3
"""Runs timed of each bucket, after one that is not."""


def prime(
    session: Session,
    layout: Layout | None,
    size: int,
    group_of: Callable[[Arrays], Hashable],
    schedule: Schedule,
    share: Share,
    seconds: float,
) -> dict[int, float]:
    """Run every bucket a few times, open dimensions at `size`, small buckets first, for about so many seconds.

    `group_of(feeds)` names the shapes of a batch as its requests do. What fails or takes too long is left to the first
    requests that need it. Returns the typical seconds of the buckets that ran, by rows.
    """
    measured: dict[int, float] = {}
    limits, rng = session.facts().id_limits, np.random.default_rng(0)
    until = time.monotonic() + seconds
    for rows in layout.buckets if layout else (1,):
        feeds: dict[str, HostArray] = {}
        for name, spec in session.inputs.items():
            fixed = {layout.inputs[name]: rows} if layout and name in layout.inputs else {}
            limit = min(2, limits.get(name, 2))
            feeds[name] = random_array(rng, shape_at(spec, fixed, size), spec.dtype, limit=limit)
        costs = schedule.costs.of(group_of(feeds), sum(a.size for a in feeds.values()) / rows)
        for i in range(1 + TIMED):
            if time.monotonic() + costs.typical[costs.index(rows)] > until:
                return measured
            took = _timed(session, feeds, share)
            if took is None:
                return measured
            if i:
                costs.learn(rows, took)
                measured[rows] = costs.typical[costs.index(rows)]
        if schedule.goal is not None:
            schedule.goal.check_reach(costs)
    return measured


def _timed(session: Session, feeds: Arrays, share: Share) -> float | None:
    """Seconds of a run; None where it failed."""
    share.enter()
    began = time.monotonic()
    try:
        session.run(feeds)
    except Exception as error:
        log.debug("model '%s': a run to warm up failed: %s", share.name, error)
        return None
    finally:
        took = time.monotonic() - began
        share.leave()
    return took
