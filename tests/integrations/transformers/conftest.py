"""What the tests inside transformers watch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from gemma2 import reference


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that went to the reference; a test asserts that there were none, or some."""
    seen: list[Tensor] = []
    usual = reference.attention

    def watched(*args: Any, mask: Tensor | None = None, **options: Any) -> Any:
        if mask is not None:
            seen.append(mask)
        return usual(*args, mask=mask, **options)

    monkeypatch.setattr(reference, "attention", watched)
    return seen
