"""Runs before the first request: they make the plans, and the times they take are where the cost model begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import numpy as np

from infera_server.costs import Costs
from infera_server.independence import id_limits
from infera_server.proof import random_array, shape_at
from infera_server.rows import Arrays, Layout
from infera_server.runtime import Session
from infera_server.turns import Share

log = logging.getLogger(__name__)

TIMED = 3
"""Runs timed of each bucket, after one that is not."""


def prime(
    session: Session,
    layout: Layout | None,
    size: int,
    group_of: Callable[[Arrays], Hashable],
    costs: Costs,
    share: Share,
    seconds: float,
) -> None:
    """Run every bucket a few times, open dimensions at `size`, small buckets first, for about so many seconds.

    `group_of(feeds)` names the shapes of a batch as its requests do. What fails or takes too long is left to the first
    requests that need it.
    """
    limits, rng = id_limits(session.graph), np.random.default_rng(0)
    until = time.monotonic() + seconds
    for rows in layout.buckets if layout else (1,):
        feeds = {}
        for name, spec in session.inputs.items():
            fixed = {layout.inputs[name]: rows} if layout and name in layout.inputs else {}
            limit = min(2, limits.get(name, 2))
            feeds[name] = random_array(rng, shape_at(spec, fixed, size), spec.dtype, limit=limit)
        known = costs.of(group_of(feeds), sum(a.size for a in feeds.values()) / rows)
        for i in range(1 + TIMED):
            if time.monotonic() + (known.typical[known.index(rows)] if known.known else 0.0) > until:
                return
            share.enter()
            began = time.monotonic()
            try:
                session.run(feeds)
            except Exception as error:
                log.debug("warming up with %d rows failed: %s", rows, error)
                return
            finally:
                took = time.monotonic() - began
                share.leave()
            if i:
                known.learn(rows, took)
