"""`python -m bench.quantized`: how far models that quantise on the way are from their exact results, here and there.

For each example and seed: the largest difference between infera_gpu, onnxruntime without optimisations and the same
model in float64, relative to the peak. One rounding that falls the other way shows as a large difference; what counts
is how often that happens to each. Writes
bench/results/<host class>-quantized-<date>.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

import infera_gpu
from bench.environment import environment, write_results
from bench.inputs import EXAMPLES, Feeds
from bench.models import path_of
from infera_gpu.verify import OnnxRuntime, compare, run_in_float64

MODELS = ("minilm-l6-int8", "bert-tiny-ner", "quire-tagger", "traceforge-encoder", "traceforge-decoder")
SAME = 1e-4
"""Of the peak: below it no rounding fell another way."""
PAIRS = ("infera_gpu to float64", "onnxruntime to float64", "infera_gpu to onnxruntime")


def differences(path: Path, session: infera_gpu.Session, reference: OnnxRuntime, feeds: Feeds) -> list[float]:
    """One for each of PAIRS."""
    ours, theirs = session.run(feeds), reference.run(feeds)
    exact = {k: v.astype(ours[k].dtype) for k, v in run_in_float64(path, feeds).items()}
    return [max(d.error for d in compare(a, b)) for a, b in ((ours, exact), (theirs, exact), (ours, theirs))]


def rows(name: str, seeds: int) -> list[dict[str, Any]]:
    path = path_of(name)
    reference = OnnxRuntime(path, threads=1)
    with infera_gpu.load(path, device="cpu") as session:
        found = np.array(
            [
                differences(path, session, reference, example.feeds(seed))
                for example in EXAMPLES[name]
                for seed in track(range(seeds), f"{name} {example.label}", transient=True)
            ]
        )
    return [
        {
            "model": name,
            "pair": pair,
            "runs": len(found),
            "same": int((column < SAME).sum()),
            "median": float(np.median(column)),
            "largest": float(column.max()),
        }
        for pair, column in zip(PAIRS, found.T, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.quantized", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    options = parser.parse_args()
    measured = environment()
    found = [row for name in options.models for row in rows(name, options.seeds)]
    for row in found:
        print(
            f"{row['model']:20} {row['pair']:26} same in {row['same']:3} of {row['runs']}, "
            f"median {row['median']:.1e}, largest {row['largest']:.1e}"
        )
    chosen = {"seeds": options.seeds, "models": list(options.models)}
    print(write_results(measured, chosen, found, topic="quantized"))


if __name__ == "__main__":
    main()
