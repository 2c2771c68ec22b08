"""`python -m infera_gpu.cli` is `infera`."""

import sys

from infera_gpu.cli import main

sys.exit(main())
