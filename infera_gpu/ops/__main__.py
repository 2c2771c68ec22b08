"""`python -m infera_gpu.ops`: writes _index.py, which says what every file here declares, and ../_schemas.py."""

from __future__ import annotations

import textwrap
from pathlib import Path

from infera_gpu.ops import declared, modules
from infera_gpu.schemas import table

HEAD = '''"""Which operators each file declares, by `python -m infera_gpu.ops`: a line is a file and names."""

INDEX = """\\
'''


def index() -> str:
    """The text of _index.py."""
    lines: list[str] = []
    for module in sorted(modules()):
        names = sorted({f"{op.domain}.{op.name}" if op.domain else op.name for op in declared(module)})
        lines += [f"{module} {part}\n" for part in textwrap.wrap(" ".join(names), 100)] or [f"{module}\n"]
    return "".join((HEAD, *lines, '"""\n'))


if __name__ == "__main__":
    (Path(__file__).parent / "_index.py").write_text(index())
    (Path(__file__).parent.parent / "_schemas.py").write_text(table())
