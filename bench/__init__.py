"""Benchmarks against onnxruntime: `python -m bench`. Results are committed under bench/results."""
