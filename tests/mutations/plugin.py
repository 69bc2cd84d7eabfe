"""A pytest plugin that breaks the package on purpose: `-p tests.mutations.plugin`.

`GEMMA2_MUTATE` names the fault. Faults of C++ are compiled into a test build and read the variable
themselves (csrc/common/mutate.h); those of Python are patched in here, before any test is imported.
`GEMMA2_MUTATION_PACKAGE` is the folder that holds the test build's copy of the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PYTHON: dict[str, Callable[[], None]] = {}


def fault(patch: Callable[[], None]) -> Callable[[], None]:
    """Registers a fault under the function's name; the docstring says what is broken."""
    PYTHON[patch.__name__] = patch
    return patch


def use_package(folder: str) -> None:
    """Makes `import gemma2` find the one in `folder`, whatever is installed."""
    # an editable install answers before sys.path is asked
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    sys.path.insert(0, folder)
    import gemma2

    found = Path(gemma2.__file__).parent
    if found != Path(folder) / "gemma2":
        raise RuntimeError(f"GEMMA2_MUTATION_PACKAGE is {folder}, but gemma2 came from {found}")


# ---- configuration ------------------------------------------------------------------------------


@fault
def query_scale_of_head_dim() -> None:
    """Scores are multiplied by head_dim ** -0.5 instead of query_pre_attn_scalar ** -0.5."""
    from gemma2 import Gemma2Config

    Gemma2Config.query_scale = property(lambda self: self.head_dim**-0.5)  # type: ignore[method-assign]


@fault
def layer_parity_inverted() -> None:
    """Odd layers slide and even ones see everything."""
    from gemma2 import Gemma2Config

    def layer_window(self: Any, layer: int) -> int:
        return 0 if self.layer_types[layer] == "sliding_attention" else self.sliding_window

    Gemma2Config.layer_window = layer_window  # type: ignore[method-assign]


# ---- where tokens stand -------------------------------------------------------------------------


def patch_layout(change: Callable[[Any], None]) -> None:
    from gemma2 import masking

    original = masking.lay_out

    def lay_out(*args: Any, **kwargs: Any) -> Any:
        layout = original(*args, **kwargs)
        change(layout)
        return layout

    masking.lay_out = lay_out


@fault
def left_padding_takes_positions() -> None:
    """Position 0 is the first column, not the first token: left pads are not negative."""
    patch_layout(lambda at: at.q_start.clamp_(min=0))


@fault
def right_padding_is_visible() -> None:
    """Padded columns count as tokens."""

    def change(at: Any) -> None:
        at.kv_len = at.kv_len.max().expand_as(at.kv_len).contiguous()

    patch_layout(change)


@fault
def documents_leak() -> None:
    """Packed documents see each other."""

    def change(at: Any) -> None:
        at.kv_start = None

    patch_layout(change)


@fault
def documents_forgotten_by_the_cache() -> None:
    """The next call does not know where the last document began."""
    from gemma2 import HybridCache

    HybridCache.last_token = lambda self, batch: None  # type: ignore[method-assign]


@fault
def rope_by_column() -> None:
    """RoPE starts again at 0 in every call."""
    import torch

    def change(at: Any) -> None:
        columns = at.position_ids.shape[1]
        at.position_ids = torch.arange(columns).expand_as(at.position_ids)

    patch_layout(change)


# ---- cache --------------------------------------------------------------------------------------


@fault
def crop_does_not_roll_back() -> None:
    """crop() leaves the lengths as they are."""
    from gemma2 import HybridCache

    HybridCache.crop = lambda self, n: None  # type: ignore[method-assign]


@fault
def crop_ignores_the_margin() -> None:
    """crop() goes back to positions that the ring has lost."""
    from gemma2 import HybridCache

    original = HybridCache.crop

    def crop(self: Any, n: Any) -> None:
        written = self._written.clone()
        self._written.zero_()
        original(self, n)
        self._written.copy_(written)

    HybridCache.crop = crop  # type: ignore[method-assign]


@fault
def crop_counts_from_the_length() -> None:
    """The margin is counted from the present length, not from the highest position written."""
    from gemma2 import HybridCache

    original = HybridCache.crop

    def crop(self: Any, n: Any) -> None:
        self._written.copy_(self.lengths)
        original(self, n)

    HybridCache.crop = crop  # type: ignore[method-assign]


@fault
def long_chunks_overwrite_the_ring() -> None:
    """A chunk longer than the margin is written before it is attended to."""
    from gemma2.ring import LayerCache

    LayerCache.holds = lambda self, columns: True  # type: ignore[method-assign]


@fault
def reorder_leaves_lengths() -> None:
    """reorder() moves keys and values, but not the rows' lengths."""
    from gemma2 import HybridCache

    original = HybridCache.reorder

    def reorder(self: Any, beam_idx: Any) -> None:
        lengths = self.lengths.clone()
        original(self, beam_idx)
        self.lengths.copy_(lengths)

    HybridCache.reorder = HybridCache.reorder_cache = reorder  # type: ignore[method-assign]


@fault
def reset_keeps_lengths() -> None:
    """reset() does not go back to position 0."""
    from gemma2 import HybridCache

    HybridCache.reset = lambda self: None  # type: ignore[method-assign]


# ---- layers, heads, gradients -------------------------------------------------------------------


@fault
def norms_swapped() -> None:
    """post_attention_layernorm and pre_feedforward_layernorm change places."""
    from gemma2 import model

    original = model.add_and_norm
    model.add_and_norm = lambda h, x, post, pre, *rest: original(h, x, pre, post, *rest)


@fault
def cap_missing_in_backward() -> None:
    """The backward of attention does not know the cap."""
    import gemma2.ops

    module = sys.modules["gemma2.ops.attention"]
    real = module.library  # type: ignore[attr-defined]

    def attention_backward(*args: Any, **options: Any) -> Any:
        return real.attention_backward(*args, **{**options, "softcap": 0.0})

    module.library = SimpleNamespace(  # type: ignore[attr-defined]
        attention=real.attention, attention_backward=attention_backward
    )
    assert gemma2.ops.attention.__module__ == module.__name__


@fault
def loss_not_shifted() -> None:
    """A column is taken to predict its own token."""
    from gemma2 import heads

    heads.F = SimpleNamespace(  # type: ignore[assignment]
        **{**vars(heads.F), "pad": lambda labels, *_, **__: _same_labels(labels)}
    )


def _same_labels(labels: Any) -> Any:
    import torch

    return torch.cat([labels[:, :1], labels], dim=1)


@fault
def num_items_ignored() -> None:
    """The loss is a mean, whatever num_items_in_batch says."""
    from gemma2 import heads

    original = heads._cross_entropy
    heads._cross_entropy = lambda logits, labels, num_items=None: original(logits, labels)


@fault
def last_column_pooled() -> None:
    """The sequence head reads the last column, padding or not."""
    import torch

    from gemma2 import Gemma2ForSequenceClassification as Head

    Head._last_token = lambda self, ids, mask, columns, states: torch.full(  # type: ignore[method-assign]
        (states.shape[0],), columns - 1
    )


@fault
def greedy_takes_the_second_best() -> None:
    """generate() chooses the wrong token."""
    from gemma2.generation import sampling

    sampling.Sampler.draw = (  # type: ignore[method-assign]
        lambda self, logits, step: logits.topk(2, dim=-1).indices[:, 1]
    )


@fault
def drafts_unchecked() -> None:
    """Drafted tokens are taken for right, whatever the model draws."""
    import torch

    from gemma2.generation.assisted import AssistedStep

    original = AssistedStep._check
    AssistedStep._check = (
        lambda self, drafts: (  # type: ignore[method-assign]
            torch.cat([drafts, original(self, drafts)[0][:, -1:]], dim=1),
            torch.ones(
                drafts.shape[0], drafts.shape[1] + 1, dtype=torch.bool, device=drafts.device
            ),
        )
    )


@fault
def prefixes_not_compared() -> None:
    """A cache is gone on from, whatever the prompt begins with."""
    from gemma2.generation import prefix

    prefix.common_prefix = lambda text, prompt: min(len(text), len(prompt))


@fault
def replays_uncounted() -> None:
    """The host does not count the tokens of replayed steps."""
    from gemma2.generation.step import Step

    Step.replayed = lambda self: None  # type: ignore[method-assign]


def _activate() -> None:
    # the shared library must not meet a name that it does not know
    name = os.environ.get("GEMMA2_MUTATE", "")
    patch = PYTHON.get(name)
    if patch is not None:
        del os.environ["GEMMA2_MUTATE"]
    if folder := os.environ.get("GEMMA2_MUTATION_PACKAGE"):
        use_package(folder)
    if patch is not None:
        patch()


_activate()
