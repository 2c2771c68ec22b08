"""`python -m bench.import_time`: seconds that `import infera_gpu` takes in a fresh interpreter."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def import_seconds(module: str) -> float:
    """Seconds from a running interpreter to the imported module."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.import_time", description=__doc__)
    parser.add_argument("modules", nargs="*", default=["numpy", "infera_gpu"])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    for module in options.modules:
        import_seconds(module)  # writes the bytecode
    taken: dict[str, list[float]] = {module: [] for module in options.modules}
    for _ in range(options.rounds):
        for module, seconds in taken.items():
            seconds.append(import_seconds(module))
            time.sleep(0.02)
    for module, seconds in taken.items():
        print(f"{module}: {statistics.median(seconds):.3f} s (best {min(seconds):.3f}, worst {max(seconds):.3f})")


if __name__ == "__main__":
    main()
