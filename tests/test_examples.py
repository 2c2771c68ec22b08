"""The examples: what stands before and after each model."""

from __future__ import annotations

import json
import struct
import wave
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from examples import demo, faces, filetype, speech
from examples.v2client import Array
from tests.registry import by_onnxruntime, fetched


def never(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    raise AssertionError("the model was asked")


# ---- pictures and faces


def make_png(image: Array, filters: list[int], *, depth: int = 8) -> bytes:
    """`image` as PNG, its rows filtered by `filters` in turn, packed in two chunks."""
    height, width, _ = image.shape
    padded = np.zeros((height + 1, width + 1, 3), np.int32)
    padded[1:, 1:] = image
    lines = b""
    for y in range(1, height + 1):
        kind = filters[(y - 1) % len(filters)]
        a, b, c = padded[y, :-1], padded[y - 1, 1:], padded[y - 1, :-1]
        nearest = np.abs(np.stack((b - c, a - c, a + b - 2 * c)))
        paeth = np.where(nearest.argmin(0) == 0, a, np.where(nearest.argmin(0) == 1, b, c))
        guess = (0 * a, a, b, (a + b) // 2, paeth)[kind]
        lines += bytes([kind]) + (padded[y, 1:] - guess).astype(np.uint8).tobytes()
    packed = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tEXt", b"a\0b"), (b"IDAT", packed[:5]), (b"IDAT", packed[5:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + bytes(4) for k, d in chunks)


@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1, 9)])
def test_a_picture_is_read_whatever_its_filters(tmp_path: Path, filters: list[int], size: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = tmp_path / "p.png"
    path.write_bytes(make_png(image, filters))
    assert np.array_equal(faces.read_png(path), image)


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(make_png(np.zeros((2, 2, 3), np.uint8), [0], depth=16))
    with pytest.raises(ValueError, match="8-bit RGB"):
        faces.read_png(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not a PNG"):
        faces.read_png(path)
    with pytest.raises(ValueError, match="641 x 2"):
        faces.prepare(np.zeros((2, 641, 3), np.uint8))


def test_a_picture_is_padded_and_its_channels_turned() -> None:
    image = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    blob = faces.prepare(image)
    assert blob.shape == (1, 3, 640, 640)
    assert blob[0, :, 0, :2].tolist() == [[3, 6], [2, 5], [1, 4]]
    assert blob.sum() == image.sum()


def grids(**changes: tuple[int, list[float]]) -> dict[str, Array]:
    """Outputs of YuNet for an empty picture, with cells (index, values) changed."""
    outputs = {
        f"{kind}_{stride}": np.zeros((1, (640 // stride) ** 2, width), np.float32)
        for stride in faces.STRIDES
        for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
    }
    for name, (cell, values) in changes.items():
        outputs[name][0, cell] = values
    return outputs


def test_a_cell_is_decoded_to_a_box() -> None:
    cell = 3 * 40 + 5  # row 3, column 5 of the grid of 16 pixels
    outputs = grids(
        cls_16=(cell, [0.5]),
        obj_16=(cell, [2.0]),  # clipped to 1
        bbox_16=(cell, [0.5, -0.25, float(np.log(2)), float(np.log(4))]),
        kps_16=(cell, [0, 0, 1, 0, 0, 1, 0.5, 0.5, -1, -1]),
    )
    (face,) = faces.detect(np.zeros((9, 9, 3), np.uint8), lambda feeds: outputs)
    assert face[:5] == pytest.approx((88 - 16, 44 - 32, 32, 64, np.sqrt(0.5)))
    assert face.landmarks == pytest.approx((80, 48, 96, 48, 80, 64, 88, 56, 64, 32))
    assert faces.detect(np.zeros((9, 9, 3), np.uint8), lambda feeds: outputs, threshold=0.8) == []


def test_overlapping_boxes_leave_the_best() -> None:
    found = np.zeros((4, 15), np.float32)
    found[:, :5] = [[0, 0, 10, 10, 0.7], [1, 0, 10, 10, 0.9], [50, 0, 10, 10, 0.8], [0, 5.5, 10, 10, 0.6]]
    assert faces.suppress(found, 0.3) == [1, 2, 3]  # 0 overlaps 1 by 90/110, 3 overlaps 1 by 40.5/159.5
    assert faces.suppress(found, 0.2) == [1, 2]
    assert faces.suppress(found[:0], 0.3) == []


@pytest.mark.models
def test_yunet_finds_the_astronaut() -> None:
    image = faces.read_png(demo.DATA / "astronaut.png")
    (face,) = faces.detect(image, by_onnxruntime(fetched("yunet")[0]))
    # OpenCV 4.10's FaceDetectorYN on the same picture, padded to 640 x 640
    assert face[:5] == pytest.approx((59.21663, 37.377403, 55.57741, 67.72667, 0.93176836), abs=1e-3)
    assert face.landmarks[:2] == pytest.approx((72.10974, 62.075577), abs=1e-3)
    assert faces.detect(np.full((64, 64, 3), 128, np.uint8), by_onnxruntime(fetched("yunet")[0])) == []


# ---- speech


@pytest.mark.parametrize("width", [1, 2])
def test_sound_is_read(tmp_path: Path, width: int) -> None:
    raw = {1: np.array([0, 128, 192], np.uint8), 2: np.array([-32768, 0, 16384], "<i2")}[width]
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setparams((1, width, speech.RATE, 0, "NONE", ""))
        file.writeframes(raw.tobytes())
    assert speech.read_wav(tmp_path / "s.wav").tolist() == [-1, 0, 0.5]


def test_other_sound_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setparams((2, 2, speech.RATE, 0, "NONE", ""))
    with pytest.raises(ValueError, match="one channel"):
        speech.read_wav(tmp_path / "s.wav")


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1500])
def test_each_window_is_heard_after_the_end_of_the_last(length: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    heard: list[Array] = []

    def infer(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        assert feeds["state"].shape == (2, 1, 128)
        assert (feeds["state"] == len(heard)).all()
        heard.append(feeds["input"])
        return {"output": np.array([[len(heard) / 10]], np.float32), "stateN": feeds["state"] + 1}

    assert speech.probabilities(samples, infer) == pytest.approx([(i + 1) / 10 for i in range(len(heard))])
    assert len(heard) == -(-length // 512)
    for index, window in enumerate(heard):
        assert window.shape == (1, 576)
        whole = np.concatenate((np.zeros(64), samples, np.zeros(512)))
        assert np.array_equal(window[0], whole[index * 512 : index * 512 + 576])


STEP = speech.WINDOW / speech.RATE


@pytest.mark.parametrize(
    ("likely", "expected"),
    [
        ([], []),
        ([0.1] * 50, []),
        ([0.1] * 10 + [0.9] * 5 + [0.1] * 10, []),  # 160 ms: too short
        ([0.9] * 20, [(0, 20 * STEP)]),
        ([0.1] * 10 + [0.9] * 20 + [0.1] * 10, [(10 * STEP - 0.03, 30 * STEP + 0.03)]),
        ([0.9] * 10 + [0.4] * 20 + [0.9] * 10, [(0, 40 * STEP)]),  # between the thresholds goes on
        ([0.9] * 10 + [0.1] * 3 + [0.9] * 10, [(0, 23 * STEP)]),  # a pause of 96 ms does not count
        ([0.9] * 10 + [0.1] * 5 + [0.9] * 10, [(0, 10 * STEP + 0.03), (15 * STEP - 0.03, 25 * STEP)]),
    ],
)
def test_speech_is_cut_at_silences(likely: list[float], expected: list[tuple[float, float]]) -> None:
    found = speech.segments(likely, len(likely) * STEP)
    assert len(found) == len(expected)
    for stretch, wanted in zip(found, expected, strict=True):
        assert stretch == pytest.approx(wanted)


@pytest.mark.models
def test_silero_hears_both_stretches_of_speech() -> None:
    samples = speech.read_wav(demo.DATA / "speech.wav")
    likely = speech.probabilities(samples, by_onnxruntime(fetched("silero-vad")[0]))
    first, second = speech.segments(likely, len(samples) / speech.RATE)
    # As recorded: 0.40 to 1.02 s and 1.62 to 2.45 s.
    assert first == pytest.approx((0.40, 1.02), abs=0.12)
    assert second == pytest.approx((1.62, 2.45), abs=0.12)


# ---- file types


@pytest.fixture
def types(tmp_path: Path) -> filetype.FileTypes:
    config = {
        "beg_size": 6,
        "end_size": 4,
        "block_size": 12,
        "padding_token": 256,
        "min_file_size_for_dl": 3,
        "target_labels_space": ["python", "zip", "randomtxt"],
        "thresholds": {"zip": 0.9},
        "medium_confidence_threshold": 0.5,
        "overwrite_map": {"randomtxt": "txt"},
    }
    words = {"python": "Python source", "zip": "Zip archive", "txt": "Text", "unknown": "Unknown", "empty": None}
    table = {k: {"description": v, "is_text": k in ("python", "txt")} for k, v in words.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "types.json").write_text(json.dumps(table))
    return filetype.FileTypes(tmp_path / "config.json", tmp_path / "types.json")


@pytest.mark.parametrize(
    ("content", "first", "last"),
    [
        (b"abcdefghijklmnop", b"abcdef", b"mnop"),
        (b"  abc\n\n", b"abc\n\n", b" abc"),  # each end loses its own white space only
        (b"ab", b"ab", b"ab"),
        (b" " * 20 + b"x", b"", b"   x"),  # nothing in the first block
        (b" \n", b"", b""),
    ],
)
def test_features_are_the_ends_of_a_file(types: filetype.FileTypes, content: bytes, first: bytes, last: bytes) -> None:
    tokens = types.features(content)
    pad = [256]
    expected = [*first, *pad * (6 - len(first)), *pad * (4 - len(last)), *last]
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [expected]


@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ([0.6, 0.3, 0.1], "python"),
        ([0.4, 0.3, 0.3], "txt"),
        ([0.05, 0.92, 0.03], "zip"),
        ([0.1, 0.8, 0.1], "unknown"),
        ([0.0, 0.0, 1.0], "txt"),
    ],
)
def test_answers_below_their_threshold_are_general(
    types: filetype.FileTypes, probabilities: list[float], label: str
) -> None:
    guess = types.identify(b"content", lambda feeds: {"target_label": np.array([probabilities], np.float32)})
    assert guess.label == label
    assert guess.score == pytest.approx(max(probabilities))


@pytest.mark.parametrize(
    ("content", "label"), [(b"", "empty"), (b"ab", "txt"), (b"\xff\xfe", "unknown"), (b"   a", "txt")]
)
def test_the_model_is_not_asked_about_a_few_bytes(types: filetype.FileTypes, content: bytes, label: str) -> None:
    assert types.identify(content, never)[:1] == (label,)


@pytest.mark.models
@pytest.mark.large
def test_magika_tells_the_files_of_the_demonstration() -> None:
    model, config, content_types = fetched("magika")
    types = filetype.FileTypes(config, content_types)
    infer = by_onnxruntime(model)
    guesses = [types.identify(path.read_bytes(), infer) for path in demo.some_files()]
    assert [guess.label for guess in guesses] == ["python", "png", "wav"]
    assert min(guess.score for guess in guesses) > 0.99
