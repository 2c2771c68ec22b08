"""Settings of Triton's model configuration that go beyond the server's own, which hold then."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from infera_server.models.definition import threads_asked
from infera_server.models.ignored import THREADS
from infera_server.models.modelconfig import ModelConfig
from infera_server.settings import Settings


def limited(config: ModelConfig | None, settings: Settings, name: str, devices: Collection[str]) -> list[str]:
    """`setting: why` of everything that is not as the configuration of the model says, which runs on these devices."""
    if config is None:
        return []
    found = list(_limited(config, settings))
    if (option := _device_option(settings, name)) and not _as_asked(config, frozenset(devices)):
        found.append(f"instance_group: {option} goes before it")
    return found


def _device_option(settings: Settings, name: str) -> str:
    """What says the device in place of the configuration; empty where nothing does."""
    if name in settings.pins:
        return f"--pin {name}={settings.pins[name]}"
    return f"--device {settings.device}" if "device" in settings.model_fields_set else ""


def _as_asked(config: ModelConfig, devices: frozenset[str]) -> bool:
    """Whether the devices are those that the instance groups ask for, if they do."""
    groups = config.instance_group
    if not groups:
        return True
    if groups[0].kind == groups[0].KIND_CPU:
        return devices == {"cpu"}
    if gpus := {f"cuda:{gpu}" for group in groups for gpu in group.gpus}:
        return devices == gpus
    return groups[0].kind != groups[0].KIND_GPU or "cpu" not in devices


def _limited(config: ModelConfig, settings: Settings) -> Iterator[str]:
    given = settings.model_fields_set
    if "max_batch" in given and config.max_batch_size > settings.max_batch:
        yield f"max_batch_size: {config.max_batch_size} is over --max-batch {settings.max_batch}"
    batching = config.dynamic_batching
    levels = batching.priority_levels or settings.priority_levels
    policies = {"default_queue_policy": batching.default_queue_policy}
    for level, policy in sorted(batching.priority_queue_policy.items()):
        if 1 <= level <= levels:
            policies[f"priority_queue_policy[{level}]"] = policy
        else:
            yield f"dynamic_batching.priority_queue_policy[{level}]: levels are 1 to {levels}"
    for name, policy in policies.items():
        if policy.max_queue_size > settings.max_queue:
            yield (
                f"dynamic_batching.{name}.max_queue_size: {policy.max_queue_size} is over "
                f"--max-queue {settings.max_queue}"
            )
        if (seconds := policy.default_timeout_microseconds / 1e6) > settings.request_timeout:
            yield (
                f"dynamic_batching.{name}.default_timeout_microseconds: {seconds:g} s is over "
                f"--request-timeout {settings.request_timeout:g}"
            )
    if "threads" in given and threads_asked(config) not in (0, settings.threads):
        yield f"parameters.{THREADS}: --threads {settings.threads} goes before it"
