"""`python -m infera_server PATH...`, the same as `infera serve PATH...`."""

import sys

from infera_gpu.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
