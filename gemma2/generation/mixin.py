"""`generate` and `stream`, mixed into the causal model."""

from __future__ import annotations


class GenerationMixin:
    """Gives a causal model `generate` and `stream`."""
