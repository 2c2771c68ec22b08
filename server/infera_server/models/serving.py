"""What requests find under a model's name, its versions and its labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from infera_server.models.golden import Golden, Recorder
from infera_server.models.servable import Servable
from infera_server.models.traffic import Shadow, Traffic
from infera_server.models.versions import Route, Shadowed
from infera_server.pipelines.generator import Generator
from infera_server.settings import Settings

log = logging.getLogger(__name__)


class Serving:
    """The table that requests are looked up in. Changed in the event loop's thread once the server takes requests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.find: dict[tuple[str, str | None], Servable] = {}
        """By name and version or label; None is the version of requests that name none."""

        self.golden: dict[str, Golden] = {}
        """What was kept of the live traffic of each model."""

    def publish(self, name: str, models: Mapping[str, Servable], traffic: Traffic) -> None:
        """Serve these versions of a model, the newest last, and no others."""
        found: dict[tuple[str, str | None], Servable] = {(name, version): model for version, model in models.items()}
        found |= {(name, label): models[v] for label, v in traffic.labels.items() if v in models}
        if models:
            found[name, None] = self._default(name, models, traffic)
        self.find.update(found)  # first: a request must not find nothing in between
        for key in list(self.find):
            if key[0] == name and key not in found:
                del self.find[key]

    def forget_golden(self, name: str) -> None:
        """What was kept of an ensemble was answered by models that answer otherwise now."""
        if (golden := self.golden.get(name)) is not None:
            golden.forget()

    def shadows(self, name: str) -> list[Shadowed]:
        """Who copies requests of a model."""
        default = self.find.get((name, None))
        targets = default.models if isinstance(default, Route) else [default]
        return [target for target in targets if isinstance(target, Shadowed)]

    def _default(self, name: str, models: Mapping[str, Servable], traffic: Traffic) -> Servable:
        """What takes the requests that name no version."""
        newest = list(models.values())[-1]
        weights = {models[v]: w for t, w in traffic.split.items() if (v := traffic.version(t)) in models and w}
        split = [model for model in weights if _alike(model, next(iter(weights)))]
        if len(split) < len(weights):
            log.warning("model '%s': only versions with equal tensors share the requests", name)
        targets: list[Servable] = [*split] or [newest]
        size = self._settings.golden_requests if traffic.golden.requests is None else traffic.golden.requests
        if not size or isinstance(newest, Generator):  # whose requests are no runs
            self.golden.pop(name, None)
        else:
            golden = self.golden.setdefault(name, Golden(size))
            golden.resize(size)
            targets = [Recorder(model, golden) if model is newest else model for model in targets]
        if traffic.shadow and (copied := models.get(traffic.version(traffic.shadow.version))):
            targets = [_shadowed(model, copied, traffic.shadow) for model in targets]
        return targets[0] if len(targets) == 1 else Route(targets, [weights[model] for model in split])


def _shadowed(model: Servable, copied: Servable, shadow: Shadow) -> Servable:
    """The model, with copies of its requests going to another that can take them."""
    if model.signature is copied.signature or not _alike(model, copied):
        return model
    return Shadowed(model, copied, shadow.share, shadow.tolerance)


def _alike(one: Servable, other: Servable) -> bool:
    return one.signature.same_tensors(other.signature)
