"""What a model's folder, or a load request, says of the model: which versions, from which files, served how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from infera_gpu.cpus import MAX_THREADS
from infera_gpu.devices.cuda import gpu_count
from infera_server.codec import short
from infera_server.models import modelconfig
from infera_server.models.discovery import Source, Stamp, leads_outside, stamp
from infera_server.models.ignored import THREADS, ignored
from infera_server.models.modelconfig import ConfigError, ModelConfig
from infera_server.models.queue_policy import policies
from infera_server.models.traffic import FILE, Traffic
from infera_server.models.traffic import read as read_traffic
from infera_server.pipelines.generation import check
from infera_server.settings import Settings

MAX_LABEL_BYTES = 1 << 22


class NoVersionError(ConfigError):
    """The version policy chooses none of the versions that there are."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A model to be loaded: the versions that its policy chooses, oldest first, each with its file.

    `notes` says what of the configuration has no effect.
    """

    name: str
    sources: Sequence[Source]
    config: ModelConfig | None = None
    notes: Sequence[str] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """The files of each version as they were when this was read; reading them again may find others."""

    traffic: Traffic = field(default_factory=Traffic)
    held: object = None
    """What keeps the files there, if anything must."""

    def is_unchanged(self, version: str, before: Definition) -> bool:
        """Whether loading this version again would give what `before` gave."""
        return self.config == before.config and self.stamps.get(version) == before.stamps.get(version, None)

    @property
    def is_ensemble(self) -> bool:
        """Whether it has no file of its own, and passes requests on to other models."""
        return self.config is not None and self.config.HasField("ensemble_scheduling")

    @property
    def members(self) -> frozenset[str]:
        """The models of an ensemble's steps; empty where it is none."""
        steps = self.config.ensemble_scheduling.step if self.config is not None else ()
        return frozenset(step.model_name for step in steps)

    @property
    def folder(self) -> Path | None:
        """The model's own."""
        return self.sources[0].folder

    def tuned(self, settings: Settings) -> Settings:
        """The settings for this model: the configuration's, but never above a limit that the operator set."""
        config, given = self.config, settings.model_fields_set
        if config is None:
            return settings
        changes: dict[str, int] = {}
        if config.max_batch_size or config.input or config.output:
            most = config.max_batch_size or 1
            changes["max_batch"] = min(most, settings.max_batch) if "max_batch" in given else most
        policy, by_level = config.dynamic_batching.default_queue_policy, config.dynamic_batching.priority_queue_policy
        if policy.max_queue_size and not by_level:
            changes["max_queue"] = min(policy.max_queue_size, settings.max_queue)
        levels = config.dynamic_batching.priority_levels
        if levels:
            changes |= {
                "priority_levels": levels,
                "default_priority": config.dynamic_batching.default_priority_level,
            }
        if (threads := threads_asked(config)) and "threads" not in given:
            changes["threads"] = threads
        return settings.model_copy(update=changes)

    def devices(self, settings: Settings) -> Sequence[str]:
        """The devices that the configuration asks for; none: any one. The operator's word goes before it.

        Raises ConfigError for a GPU where there is none.
        """
        groups = self.config.instance_group if self.config is not None else ()
        if not groups or "device" in settings.model_fields_set:
            return ()
        first = groups[0]
        if first.kind == first.KIND_CPU:
            return ("cpu",)
        gpus = list(dict.fromkeys(gpu for group in groups for gpu in group.gpus))
        most = max(gpus, default=0)
        if (gpus or first.kind == first.KIND_GPU) and gpu_count() <= most:
            raise ConfigError(
                f"instance group {self.name}_0 of model {self.name} has kind KIND_GPU but there is no GPU {most}; "
                "--device says where models run otherwise"
            )
        return [f"cuda:{gpu}" for gpu in gpus][: 1 if self.name in settings.pins else None]

    @property
    def queue_timeout(self) -> float | None:
        """Seconds that a request waits where it does not say otherwise; None: not given, or not for all alike."""
        if self.config is None or policies(self.config) is not None:
            return None
        return self.config.dynamic_batching.default_queue_policy.default_timeout_microseconds / 1e6 or None

    def labels(self, output: str) -> tuple[str, ...]:
        """The names of an output's classes. Raises ConfigError where their file cannot be read."""
        for tensor in self.config.output if self.config is not None else ():
            if tensor.name == output and tensor.label_filename:
                if self.folder is None:
                    raise ConfigError(f"label_filename '{tensor.label_filename}' needs a model's folder")
                path = modelconfig.inside(self.folder, tensor.label_filename, "label_filename")
                if path.stat().st_size > MAX_LABEL_BYTES:
                    raise ConfigError(f"{path} has over {MAX_LABEL_BYTES:,} bytes")
                try:
                    return tuple(path.read_text(encoding="utf-8").splitlines())
                except UnicodeDecodeError:
                    raise ConfigError(f"{path} is not UTF-8") from None
        return ()


def threads_asked(config: ModelConfig) -> int:
    """Threads of a run on the CPU; 0: as many as the server has. Raises ConfigError."""
    text = next((p.string_value for name, p in config.parameters.items() if name.lower() == THREADS), "0")
    if re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()) is None or int(text) > MAX_THREADS:
        raise ConfigError(f"parameters.{THREADS} must be an integer up to {MAX_THREADS}, is '{short(text)}'")
    return max(0, int(text))


def define(name: str, sources: Sequence[Source], override: ModelConfig | None = None) -> Definition:
    """What the folder of these versions says, or `override` in place of its `config.pbtxt`. Raises ConfigError."""
    folder = sources[0].folder if sources else None
    config = override if override is not None or folder is None else modelconfig.read(folder, name)
    if config is not None:
        check(config)
        threads_asked(config)
    piped = config is not None and config.HasField("ensemble_scheduling")
    wanted = modelconfig.chosen(config, [source.version for source in sources])
    found = [
        s if piped else replace(s, path=modelconfig.model_file(config, s.path)) for s in sources if s.version in wanted
    ]
    if not found:
        raise NoVersionError(f"at least one version must be available under the version policy of model '{name}'")
    for source in found:
        if source.root is not None and leads_outside(source.path, source.root):
            raise ConfigError(f"{source.path} leads outside {source.root}")
    notes = ignored(config) if config is not None else []
    for version in modelconfig.absent(config, [source.version for source in sources]):
        notes.append(f"version_policy.specific: version {version} is not there")
    traffic = read_traffic(folder)
    for version in traffic.missing([source.version for source in found]):
        notes.append(f"{FILE}: it names version {version}, which is not served")
    stamps = {source.version: stamp(_files(source)) for source in found}
    return Definition(name, found, config, notes, stamps, traffic)


def _files(source: Source) -> Path:
    """The version's folder, where it has one; else its file."""
    return source.path if source.folder is None else source.path.parent
