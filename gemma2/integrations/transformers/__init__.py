"""Our attention and our cache inside transformers' own Gemma 2, versions 4.57 and 5.

    import gemma2.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gemma2")

Importing this package registers the name "gemma2" twice: with transformers' AttentionInterface, and
with its AttentionMaskInterface, without which a model would not hear of padding at all.

transformers numbers columns, padding included; our kernels number a row's real tokens. `attention_mask`
(masks.py) turns one into the other once for all layers of a kind and gives `Rows` (call.py) instead of
a matrix [B, 1, S, S]. Whatever says more than padding, causality, the window and packed documents is
made a matrix after all, with which `attention` (attend.py) goes to `gemma2.reference`.

`HybridCache` (cache.py) is a cache for `model(..)` and `generate(past_key_values=..)`: a ring on sliding
layers, which attention reads where it lies, and which can take tokens back. The three know call.py and
not one another.
"""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface

    from gemma2.integrations.transformers.attend import attention
    from gemma2.integrations.transformers.cache import HybridCache
    from gemma2.integrations.transformers.call import NAME
    from gemma2.integrations.transformers.masks import attention_mask
except ImportError as error:
    raise ImportError(
        "gemma2.integrations.transformers: needs transformers 4.57 or newer "
        f"(pip install 'gemma2[transformers]'): {error}"
    ) from error

__all__ = ["HybridCache", "attention", "attention_mask"]

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
