"""From a prompt to tokens: options, sampling, the loop, streaming."""

from __future__ import annotations

from gemma2.generation.config import GenerationConfig
from gemma2.generation.mixin import GenerationMixin
from gemma2.generation.streamers import Streamer, TextStreamer

__all__ = ["GenerationConfig", "GenerationMixin", "Streamer", "TextStreamer"]
