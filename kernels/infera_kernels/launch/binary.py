"""What a compiled kernel is like inside, by the disassemblers that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infera_kernels.launch.compile import Binary
from infera_kernels.launch.types import LaunchError

_MEMORY = re.compile(r"\b(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UBLK\w+|UTMA\w+)\b")
"""Instructions that read or write what is in the GPU's memory. What L2 fetches ahead is no concern of theirs."""


def _tool(name: str, *args: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(next(iter(nvidia.__path__))) / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Inspection:
    """A binary, its resources and its machine code (SASS)."""

    binary: Binary

    @cached_property
    def sass(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(self.binary.cubin)
            f.flush()
            return _tool("nvdisasm", "-c", f.name)

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(self.binary.cubin)
            f.flush()
            text = _tool("cuobjdump", "-res-usage", f.name)
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        if "REG" not in found:
            raise LaunchError(f"cuobjdump reported no register count: {text.strip()[:200]}")
        return found

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._usage["REG"]

    @property
    def spilled_bytes(self) -> int:
        """Bytes of stack and local memory a thread: 0 where every value stays in registers."""
        return self._usage.get("STACK", 0) + self._usage.get("LOCAL", 0)

    @property
    def waits_first(self) -> bool:
        """Whether a kernel touches the GPU's memory only after it has waited for the one in front of it."""
        found = re.search(r"\bACQBULK\b", self.sass)
        return found is not None and _MEMORY.search(self.sass, endpos=found.start()) is None

    def count(self, instruction: str) -> int:
        """How often an instruction, with any suffix, stands in the machine code: `LDGSTS`, `HMMA`, `LDG.E.128`."""
        return len(re.findall(rf"\b{re.escape(instruction)}(?=[.\s])", self.sass))
