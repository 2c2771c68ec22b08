"""A session in a process of its own: what ends that process ends no other, and it is started again.

The run that it was at fails; whatever waits runs afterwards. A process that ends again and again without one run to its
end is given up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from infera_gpu.errors import DeviceLostError, ModelError
from infera_server.engine_process import Died, EngineProcess
from infera_server.engine_wire import facts_in, specs_in
from infera_server.errors import Unavailable
from infera_server.independence import Facts
from infera_server.rows import Arrays
from infera_server.runtime import Shapes, Specs

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MOST_CRASHES = 5
"""Processes in a row that end without one run, before the model is given up."""

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
"""Seconds before a process is started again: none after the first crash, then these, doubling."""


class Supervisor:
    """Keeps one process running. `start` returns one that is ready to run, or raises."""

    def __init__(self, name: str, start: Callable[[], EngineProcess]) -> None:
        """Raises what `start` raises."""
        self._name, self._start = name, start
        self._changed = threading.Condition()
        self._engine: EngineProcess | None = start()
        self._crashes = 0
        self._closed = False
        self.failed = ""
        """Why no process is started any more; empty while one is."""

        threading.Thread(target=self._watch, args=(self._engine,), name=f"infera-watch-{name}", daemon=True).start()

    def wait(self) -> None:
        """Return once a process is ready, or none ever will be: at once, except after a crash."""
        with self._changed:
            self._changed.wait_for(self._is_settled)

    def interrupt(self) -> None:
        """End the process, and with it the run in progress; another is started."""
        with self._changed:
            if self._engine is not None:
                self._engine.kill()

    def use(self, work: Callable[[EngineProcess], Result]) -> Result:
        """What `work` makes of the process. Raises Unavailable where it ended meanwhile, or is given up."""
        while True:
            self.wait()
            engine = self._engine
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

    def succeeded(self) -> None:
        """A run came to its end."""
        self._crashes = 0

    def close(self) -> None:
        """End the process and start no other."""
        with self._changed:
            self._closed = True
            engine, self._engine = self._engine, None
            self._changed.notify_all()
        if engine is not None:
            engine.close()

    def _is_settled(self) -> bool:
        return self._engine is not None or bool(self.failed) or self._closed

    def _gone(self, engine: EngineProcess) -> None:
        """Ask this process nothing more: it is ending."""
        with self._changed:
            if self._engine is engine:
                self._engine = None

    def _watch(self, engine: EngineProcess) -> None:
        """The thread that sees a process end and starts the next."""
        following: EngineProcess | None = engine
        while following is not None:
            how = following.wait()
            if self._closed:
                return
            self._gone(following)
            following.close()
            following = self._again(how)

    def _again(self, how: str) -> EngineProcess | None:
        """The next process; None where the session was closed, or is given up."""
        while True:
            self._crashes += 1
            if self._crashes > MOST_CRASHES:
                with self._changed:
                    self.failed = (
                        f"the engine process of model '{self._name}' {how}, and is not started again: "
                        f"{self._crashes} in a row ended without one run to its end"
                    )
                    self._changed.notify_all()
                log.error("%s", self.failed)
                return None
            log.error("the engine process of model '%s' %s; it is started again", self._name, how)
            delay = min(FIRST_DELAY * 2 ** (self._crashes - 2), LONGEST_DELAY) if self._crashes > 1 else 0.0
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, delay):
                    return None
            try:
                engine = self._start()
            except Exception as error:
                how = f"could not be started again: {error}"
                continue
            with self._changed:
                if not self._closed:
                    self._engine = engine
                    self._changed.notify_all()
                    return engine
            engine.close()
            return None


@dataclass(frozen=True, slots=True)
class RemotePlan:
    arena_bytes: int


class RemoteDevice:
    """The device that the process runs on; its loss ends the process, and is that of the process."""

    def __init__(self, name: str, supervisor: Supervisor) -> None:
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
        self.supervision = Supervisor(name, self._start)
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
