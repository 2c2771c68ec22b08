"""Everything at once: bench.soak, briefly."""

from __future__ import annotations

import pytest

from bench.soak import faults, run


@pytest.mark.large
@pytest.mark.parametrize(("minutes", "window"), [(0.1, 1.0), (2.0, 5.0)], ids=["seconds", "minutes"])
def test_everything_at_once(minutes: float, window: float) -> None:
    rows: list[dict[str, object]] = []
    assert run(minutes, window, rows.append) == []
    total = {name for row in rows for name in dict(row["statuses"])}  # type: ignore[call-overload]
    assert {"binary 200", "json 200", "large 200", "malformed 400", "left 0", "load 200", "unload 200"} <= total


def test_what_is_found_at_the_end() -> None:
    good = {"statuses": {"binary 200": 5, "malformed 400": 1}, "wrong": 0, "rss_mb": 100.0, "files": 30, "threads": 9}
    assert faults([good] * 8) == []
    assert faults([good, good | {"statuses": {"malformed 500": 1, "binary 503": 2}}]) == [
        "malformed: 1 answers of 500", "binary: 2 answers of 503",
    ]  # fmt: skip
    assert faults([good | {"wrong": 1}]) == ["1 wrong answers"]
    assert faults([good] * 4 + [good | {"rss_mb": 150.0, "files": 60}] * 4) == [
        "rss_mb grew from 100 to 150", "files grew from 30 to 60",
    ]  # fmt: skip
