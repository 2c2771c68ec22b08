"""Settings of Triton's model configuration that go beyond the server's own, which hold then."""

from __future__ import annotations

from collections.abc import Iterator

from infera_server.models.definition import threads_asked
from infera_server.models.ignored import THREADS
from infera_server.models.modelconfig import ModelConfig
from infera_server.settings import Settings


def limited(config: ModelConfig | None, settings: Settings) -> list[str]:
    """`setting: why` of everything that is not as the configuration says."""
    return list(_limited(config, settings)) if config is not None else []


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
