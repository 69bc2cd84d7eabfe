"""`python -m gemma2` is the command `gemma2`."""

from __future__ import annotations

import sys

from gemma2.cli import main

if __name__ == "__main__":
    sys.exit(main())
