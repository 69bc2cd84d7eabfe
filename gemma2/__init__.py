"""Google's Gemma 2 on hand-written kernels.

>>> import gemma2
>>> model = gemma2.Gemma2ForCausalLM.from_pretrained("path/to/gemma-2-2b", dtype="bfloat16")
>>> tokenizer = gemma2.Tokenizer.from_pretrained("path/to/gemma-2-2b")
>>> ids = model.generate(tokenizer(["The sun is"])["input_ids"], max_new_tokens=20)

Threads may share a model in eval mode, each with a cache of its own; while operators run, other threads
do. A forked process goes on with one thread (`torch.set_num_threads(1)` in it, as a DataLoader's workers
have it). With several it hangs if its parent has used several, as torch's own operators do, because
OpenMP's threads are not forked: spawn it then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded at first use, so that `gemma2 --help` need not wait for torch.
_EXPORTS = {
    "Gemma2Config": "gemma2.config",
    "CheckpointError": "gemma2.checkpoint",
    "HybridCache": "gemma2.cache",
    "Gemma2Model": "gemma2.model",
    "Gemma2PreTrainedModel": "gemma2.model",
    "Gemma2ForCausalLM": "gemma2.heads",
    "Gemma2ForSequenceClassification": "gemma2.heads",
    "Gemma2ForTokenClassification": "gemma2.heads",
    "GenerateOutput": "gemma2.outputs",
    "GenerationConfig": "gemma2.generation",
    "TextStreamer": "gemma2.generation",
    "Tokenizer": "gemma2.tokenizer",
}

_MODULES = ("convert", "evaluation", "ops", "reference", "tiny")

__all__ = [*sorted(_EXPORTS), "__version__", *_MODULES]

if TYPE_CHECKING:  # `as`: names that type checkers see as exported
    from gemma2.cache import HybridCache as HybridCache
    from gemma2.checkpoint import CheckpointError as CheckpointError
    from gemma2.config import Gemma2Config as Gemma2Config
    from gemma2.generation import GenerationConfig as GenerationConfig
    from gemma2.generation import TextStreamer as TextStreamer
    from gemma2.heads import Gemma2ForCausalLM as Gemma2ForCausalLM
    from gemma2.heads import Gemma2ForSequenceClassification as Gemma2ForSequenceClassification
    from gemma2.heads import Gemma2ForTokenClassification as Gemma2ForTokenClassification
    from gemma2.model import Gemma2Model as Gemma2Model
    from gemma2.model import Gemma2PreTrainedModel as Gemma2PreTrainedModel
    from gemma2.outputs import GenerateOutput as GenerateOutput
    from gemma2.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gemma2.{name}")
    raise AttributeError(f"module 'gemma2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
