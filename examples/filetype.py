"""What kind of file is this? Before and after the magika model, as `magika.Magika.identify_bytes` does it.

The model sees at most 1024 bytes of each end of the file. Its configuration and its table of content types travel in
the same package as the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.v2client import Array, Infer


class Guess(NamedTuple):
    """A content type: magika's label, its description in words, and the model's probability (1.0 if not asked)."""

    label: str
    description: str
    score: float


class FileTypes:
    """magika's configuration: how features are taken, and which answers are trusted."""

    def __init__(self, config: Path, content_types: Path) -> None:
        self._config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        self._types: dict[str, dict[str, Any]] = json.loads(content_types.read_text(encoding="utf-8"))

    def identify(self, content: bytes, infer: Infer) -> Guess:
        """The type of a file's content. The model is not asked about empty and very short files."""
        if not content:
            return self._guess("empty", 1.0)
        features = self.features(content)
        shortest = self._config["min_file_size_for_dl"]
        if len(content) < shortest or features[0, shortest - 1] == self._config["padding_token"]:
            return self._guess(_label_of_few(content[: self._config["block_size"]]), 1.0)
        return self.answer(infer({"bytes": features})["target_label"])

    def features(self, content: bytes) -> Array:
        """int32[1, 2048]: both ends without their outer white space, padded inwards."""
        config = self._config
        first = content[: config["block_size"]].lstrip()[: config["beg_size"]]
        last = content[-config["block_size"] :].rstrip()[-config["end_size"] :]
        tokens = np.full((1, config["beg_size"] + config["end_size"]), config["padding_token"], np.int32)
        tokens[0, : len(first)] = np.frombuffer(first, np.uint8)
        tokens[0, tokens.shape[1] - len(last) :] = np.frombuffer(last, np.uint8)
        return tokens

    def answer(self, probabilities: Array) -> Guess:
        """The best of float32[1, 214], or plain text or unknown where it is below its type's threshold."""
        config = self._config
        best = int(probabilities[0].argmax())
        label, score = config["target_labels_space"][best], float(probabilities[0, best])
        final = config["overwrite_map"].get(label, label)
        if score < config["thresholds"].get(label, config["medium_confidence_threshold"]):
            final = "txt" if self._types[final]["is_text"] else "unknown"
        return self._guess(final, score)

    def _guess(self, label: str, score: float) -> Guess:
        return Guess(label, self._types[label]["description"] or label, score)


def _label_of_few(content: bytes) -> str:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "unknown"
    return "txt"
