"""A session in a process of its own: what ends that process ends no other, and it is started again.

The run that it was at fails; whatever waits runs afterwards. A process that ends again and again without one run to its
end is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from infera_gpu.errors import DeviceLostError, ModelError
from infera_server.errors import Unavailable
from infera_server.processes.engine_process import Died, EngineProcess
from infera_server.processes.engine_wire import facts_in, specs_in
from infera_server.processes.supervisor import Supervisor
from infera_server.runtime import Shapes, Specs
from infera_server.scheduling.independence import Facts
from infera_server.scheduling.rows import Arrays

Result = TypeVar("Result")


class EngineSupervisor(Supervisor[EngineProcess]):
    """Keeps the engine process of a model running."""

    def __init__(self, name: str, start: Callable[[], EngineProcess]) -> None:
        super().__init__(f"the engine process of model '{name}'", start, "one run to its end")
        self._name = name

    def use(self, work: Callable[[EngineProcess], Result]) -> Result:
        """What `work` makes of the process. Raises Unavailable where it ended meanwhile, or is given up."""
        while True:
            self.wait()
            engine = self._process
            if self.failed or engine is None:
                raise Unavailable(self.failed or f"model '{self._name}' is closed")
            try:
                return work(engine)
            except Died as death:
                if self._closed:
                    raise Unavailable(f"model '{self._name}' is closed") from None
                self._gone(engine)
                if death.began:
                    raise Unavailable(
                        f"the engine process of model '{self._name}' ended during this request and is being started "
                        "again; the request may be sent again"
                    ) from None
            except DeviceLostError as error:
                engine.kill()
                self._gone(engine)
                raise Unavailable(f"model '{self._name}': {error}; its engine process is being started again") from None


@dataclass(frozen=True, slots=True)
class RemotePlan:
    arena_bytes: int


class RemoteDevice:
    """The device that the process runs on; its loss ends the process, and is that of the process."""

    def __init__(self, name: str, supervisor: EngineSupervisor) -> None:
        self.name, self._supervisor = name, supervisor

    @property
    def lost(self) -> str:
        return self._supervisor.failed


class IsolatedSession:
    """A `Session` in an engine process. `target`, "module:function", makes it of `arguments`, which are JSON."""

    def __init__(self, name: str, target: str, arguments: Mapping[str, Any]) -> None:
        """Raises what `target` raises, or ModelError where the process ends meanwhile."""
        self._name, self._opening = name, {"target": target, "arguments": arguments}
        self._reserved: list[Shapes] = []
        self._told: Mapping[str, Any] | None = None
        self.supervision = EngineSupervisor(name, self._start)
        assert self._told is not None
        self.inputs: Specs = specs_in(self._told["inputs"])
        self.outputs: Specs = specs_in(self._told["outputs"])
        self.overridable: Specs = specs_in(self._told["overridable"])
        self.device: RemoteDevice = RemoteDevice(self._told["device"], self.supervision)

    def _start(self) -> EngineProcess:
        engine = EngineProcess(self._name)
        try:
            told = engine.ask("open", self._opening)
            if self._told not in (None, told):
                raise ModelError("its file is that of another model now")
            for shapes in self._reserved:
                engine.ask("reserve", shapes)
        except Died:
            how = engine.wait()
            engine.close()
            raise ModelError(f"the engine process {how} while it loaded the model") from None
        except BaseException:
            engine.close()
            raise
        self._told = told
        return engine

    def facts(self, shared: Collection[str] = ()) -> Facts:
        return facts_in(self.supervision.use(lambda engine: engine.ask("facts", list(shared))))

    def run(self, feeds: Arrays) -> Arrays:
        results = self.supervision.use(lambda engine: engine.run(feeds))
        self.supervision.succeeded()
        return results

    def plan_for(self, shapes: Shapes) -> RemotePlan:
        return RemotePlan(self.supervision.use(lambda engine: engine.ask("plan", shapes)))

    def reserve(self, shapes: Shapes) -> int:
        nbytes: int = self.supervision.use(lambda engine: engine.ask("reserve", shapes))
        self._reserved.append(shapes)
        return nbytes

    def close(self) -> None:
        self.supervision.close()
