"""What is logged, and how, while the server runs: Triton's logging extension.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_logging.md
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from infera_server.errors import BadRequest, Unsupported
from infera_server.log_lines import LineFormatter
from infera_server.protocols import members

KINDS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
FORMATS = ("default", "ISO8601")
ISO = LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")


class LogSettings:
    """Over a logger and its handlers; at first as they are. What was asked for holds for all that is logged there."""

    def __init__(self, logger: logging.Logger = logging.root) -> None:
        self._logger = logger
        self._level = logger.level
        level = logger.getEffectiveLevel()
        self._kinds = {name: level <= kind for name, kind in KINDS.items()}
        self._verbose = int(level <= logging.DEBUG)
        self._format = "default"
        self._formatters: dict[logging.Handler, logging.Formatter | None] = {}

    def settings(self) -> dict[str, Any]:
        """As the protocol has them."""
        return {"log_file": "", **self._kinds, "log_verbose_level": self._verbose, "log_format": self._format}

    def update(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is named and not null; returns all.

        Raises BadRequest or Unsupported, and changes nothing then.
        """
        if document.get("log_file") is not None:
            raise Unsupported("log file location can not be updated through network protocol")
        given = {name: value for name, value in document.items() if value is not None}
        kinds = self._kinds | {name: members.flag(given[name], name) for name in KINDS if name in given}
        verbose = members.natural(given.get("log_verbose_level", self._verbose), "log_verbose_level")
        form = given.get("log_format", self._format)
        if form not in FORMATS:
            raise BadRequest(f"invalid argument for --log_format, got: {str(form)[:100]}")
        if (kinds, verbose, form) != (self._kinds, self._verbose, self._format):
            self._kinds, self._verbose, self._format = kinds, verbose, form
            self._apply()
        return self.settings()

    def restore(self) -> None:
        """Log again as at first."""
        if self._formatters:
            self._logger.setLevel(self._level)
        for handler, formatter in self._formatters.items():
            handler.removeFilter(self._passes)
            handler.setFormatter(formatter)

    def _apply(self) -> None:
        levels = [kind for name, kind in KINDS.items() if self._kinds[name]]
        self._logger.setLevel(logging.DEBUG if self._verbose else min(levels, default=logging.CRITICAL))
        for handler in self._logger.handlers:
            handler.removeFilter(self._passes)
            handler.addFilter(self._passes)
            before = self._formatters.setdefault(handler, handler.formatter)
            handler.setFormatter(ISO if self._format == "ISO8601" else before)

    def _passes(self, record: logging.LogRecord) -> bool:
        """Whether a record is of a kind that is logged; a critical one always is."""
        if record.levelno < logging.INFO:
            return self._verbose > 0
        if record.levelno >= logging.CRITICAL:
            return True
        return self._kinds[max((level, name) for name, level in KINDS.items() if level <= record.levelno)[1]]
