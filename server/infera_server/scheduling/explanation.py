"""Where a request's time went: in the reply to a request that asks for it, by a header or a parameter.

The text is a dictionary of RFC 9651, in one line: `queued=1.204, waited-for="own run", requests=12, rows=17, bucket=32,
most=64, padding=0.469, copied=0.021, ran=3.412, split=0.008`. Times are milliseconds.
"""

from __future__ import annotations

from infera_server.errors import RequestError
from infera_server.scheduling.jobs import Batch, Job

HEADER, PARAMETER = "infera-trace", "infera_trace"
"""What asks for it, and what has it in the reply."""

_YES = frozenset({b"1", b"true"})


def is_asked(value: bytes | None) -> bool:
    """Whether the header's value, None where there is none, asks for it."""
    return value is not None and value.lower() in _YES


def explain(batch: Batch | None, job: Job | None, error: RequestError | None = None) -> str:
    """How a job was run, or why it was not.

    - `queued`: from the job's arrival until its batch was taken; `waited-for`: what kept it
    - `requests`, `rows`: what ran together; `bucket`: rows with padding; `most`: rows that a batch may have
    - `padding`: the share of what was computed that nobody asked for
    - `copied`: into the batch; `ran`; `split`: out of it
    - `cached`: an earlier request's answer was kept
    - `refused`: why there was no run; `retry-after`: seconds
    """
    if batch is None and job is not None and error is None:
        return "cached"
    if batch is None or job is None:
        reason = (error.reason if error else "") or "no run"
        again = f", retry-after={error.retry_after:.3f}" if error and error.retry_after is not None else ""
        return f'refused="{reason}"{again}'
    return (
        f'queued={_ms(batch.taken_at - job.queued_at)}, waited-for="{_waited_for(batch, job)}", '
        f"requests={len(batch.jobs)}, rows={batch.rows}, bucket={batch.padded}, most={batch.most}, "
        f"padding={1 - batch.fill * batch.rows / batch.padded:.3f}, "
        f"copied={_ms(batch.gathered_at - batch.taken_at)}, ran={_ms(batch.ran_at - batch.gathered_at)}, "
        f"split={_ms(batch.split_at - batch.ran_at)}"
    )


def _waited_for(batch: Batch, job: Job) -> str:
    """What took longest of what kept the job from running: the model's run before, or others on the device."""
    own = max(0.0, batch.free_at - job.queued_at)
    other = batch.taken_at - max(batch.asked_at, job.queued_at) if batch.behind else 0.0
    if other > own:
        return f"device, busy with {_quotable(batch.behind)}"
    return "own run" if own else "nothing"


def _quotable(text: str) -> str:
    return "".join(c if " " <= c <= "~" and c not in '"\\' else "?" for c in text)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
