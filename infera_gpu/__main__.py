"""`python -m infera_gpu` is `infera`."""

import sys

from infera_gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
