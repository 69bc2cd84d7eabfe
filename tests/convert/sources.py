"""A checkpoint in memory, as a converter sees it, and models that a GGUF file can describe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemma2
from gemma2 import Gemma2Config
from gemma2.weights import TensorInfo
from tests.model import factories

# GGUF knows the 27B model by its 46 layers, whose query scalar is then hidden_size / heads.
OF_27B = {
    "num_hidden_layers": 46,
    "hidden_size": 288,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "query_pre_attn_scalar": 144,
}
OF_SHAPE: dict[str, dict[str, Any]] = {"2b": {}, "9b": {}, "27b": OF_27B}


def config(shape: str, **overrides: Any) -> Gemma2Config:
    fields = {"classifier_dropout": 0.1, **OF_SHAPE.get(shape, {}), **overrides}
    return factories.config(shape, **fields)


class MemorySource:
    """A `Source` whose tensors are in memory."""

    def __init__(
        self,
        config: Gemma2Config,
        state: dict[str, Tensor] | None = None,
        tokenizer: Sequence[Path] = (),
        generation: Any = None,
    ) -> None:
        self.config = config
        self.state = factories.state_dict(config) if state is None else state
        self.tensors = {
            name: TensorInfo(Path("memory"), tuple(tensor.shape), tensor.dtype, str(tensor.dtype))
            for name, tensor in self.state.items()
        }
        self.dtype = next(iter(self.state.values())).dtype
        self.generation = generation
        self.tokenizer = list(tokenizer)

    def read(self, name: str) -> Tensor:
        return self.state[name]


def model_of(source: Any) -> Any:
    """Our float32 model with the weights of a source."""
    model = gemma2.Gemma2ForCausalLM(source.config)
    factories.load(model, {name: source.read(name).float() for name in source.tensors})
    return model.eval()


def logits(model: Any, length: int = 21) -> Tensor:
    with torch.no_grad():
        return model(factories.tokens(2, length)).logits
