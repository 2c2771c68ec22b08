"""Runs every `pip install` line of Dockerfile.cuda with --dry-run: what an image build would install, resolved."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    text = (ROOT / "Dockerfile.cuda").read_text()
    lines = re.findall(r"pip install (.+)$", text, re.MULTILINE)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "--wheel-dir", wheels, str(ROOT)], check=True)
        for line in lines:
            wheel = str(next(Path(wheels).glob("*.whl")))
            args = [a for a in shlex.split(line.replace("$(ls /wheels/*.whl)", wheel)) if a != "--no-cache-dir"]
            done = subprocess.run(
                [*pip, "install", "--dry-run", "--ignore-installed", *args], capture_output=True, text=True
            )
            print(f"pip install {line}\n  {(done.stdout or done.stderr).strip().splitlines()[-1]}", flush=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
