"""A pytest plugin: the operators' library of `python -m tests.sanitize` in the place of the installed one.

It is loaded with `-p`, before anything imports gemma2. The Python files, and the rest of the package,
are those that are installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "sanitize" / "_ops.so"


def use_sanitized_operators() -> None:
    """`import gemma2` loads LIBRARY from now on."""
    if "gemma2" in sys.modules:
        raise RuntimeError("gemma2 has been imported: its operators are loaded already")
    load = torch.ops.load_library

    def load_sanitized(path: str) -> None:
        load(str(LIBRARY) if Path(path).name == LIBRARY.name else path)

    torch.ops.load_library = load_sanitized


use_sanitized_operators()
