"""Gemma 2, top to bottom in the order the data flows: embedding, decoder layers, final norm.

    h = embed(ids)                                       the residual stream [B, S, hidden_size]
    per layer:  a = self_attn(rms(h; input_layernorm))
                h = h + rms(a; post_attention_layernorm)
                m = mlp(rms(h; pre_feedforward_layernorm))
                h = h + rms(m; post_feedforward_layernorm)
    out = rms(h; norm)

A sum and the norm after it are one operator (`add_rms_norm`), also across the border of two layers:
a layer takes the stream h with y, its normed form, and gives both for the next one. The stream is
float32 in float32 and float16 models, bfloat16 in bfloat16 ones; y has the weights' dtype.

Layers may live on different devices: the stream follows, and what a call's layers share is copied to
each of these devices once.

Module and parameter names are those of the hub's checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemma2 import ops, reference
from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.masking import Layout, Masks, prepare
from gemma2.outputs import BaseModelOutputWithPast
from gemma2.ring import LayerCache

__all__ = [
    "Gemma2Attention",
    "Gemma2DecoderLayer",
    "Gemma2MLP",
    "Gemma2Model",
    "Gemma2PreTrainedModel",
    "Gemma2RMSNorm",
    "Linear",
    "ScaledEmbedding",
]

Model = TypeVar("Model", bound="Gemma2PreTrainedModel")


class Linear(nn.Linear):
    """`nn.Linear` on our product; initialised by the model it is part of."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model fills it, once."""

    def forward(self, x: Tensor) -> Tensor:  # x: [.., in_features] -> [.., out_features]
        y = ops.linear(x.to(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias


class ScaledEmbedding(nn.Embedding):
    """Rows of the table times sqrt(hidden_size) rounded to the weight's dtype, as a stream."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model fills it, once."""

    @property
    def embed_scale(self) -> Tensor:
        """What rows are multiplied by, a scalar: adapters scale what they add to a row alike."""
        return torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:  # ids: [B, S] -> [B, S, hidden_size]
        return ops.embed(ids, self.weight, self.embedding_dim**0.5)


class Gemma2RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + weight), computed in float32, in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@dataclass
class Call:
    """What all layers share in one forward call of the model, on the device of its input."""

    layout: Layout
    rope: tuple[Tensor, Tensor]  # cos, sin: float32 [B or 1, S, D / 2]
    cache: HybridCache | None = None
    masks: Masks = field(default_factory=dict)  # what replaces the rule, by kind of layer
    output_attentions: bool = False
    deterministic: bool = False
    # what is written after the last layer, since the layers before would lose it to a failure
    unwritten: list[tuple[LayerCache, Tensor, Tensor]] = field(default_factory=list)
    copies: dict[torch.device, Call] = field(default_factory=dict)  # for layers elsewhere

    def on(self, device: torch.device) -> Call:
        """Give this call as layers on `device` need it; its tensors are copied there once."""
        if device == self.layout.q_start.device:
            return self
        if device not in self.copies:
            cos, sin = self.rope
            masks = {kind: None if m is None else m.to(device) for kind, m in self.masks.items()}
            self.copies[device] = replace(
                self,
                layout=self.layout.on(device),
                rope=(cos.to(device), sin.to(device)),
                masks=masks,
            )
        return self.copies[device]


class Gemma2Attention(nn.Module):
    """Grouped-query attention with capped scores, over a window on sliding layers."""

    def __init__(self, config: Gemma2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.kind = config.layer_types[layer_idx]
        self.head_dim = config.head_dim
        self.options: dict[str, Any] = {
            "scale": config.query_scale,
            "softcap": config.attn_logit_softcapping or 0.0,
            "window": config.layer_window(layer_idx),
        }
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)

    def forward(self, y: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """Give [B, S, hidden_size] and, if asked for, the weights [B, H, S, past + S]."""
        call = call.on(y.device)
        heads = (*y.shape[:2], -1, self.head_dim)
        q = self.q_proj(y).view(heads).transpose(1, 2)  # [B, H, S, D]
        k = self.k_proj(y).view(heads).transpose(1, 2)  # [B, Hkv, S, D]
        v = self.v_proj(y).view(heads).transpose(1, 2)
        if call.output_attentions or call.masks.get(self.kind) is not None:
            out, weights = self._attend_slowly(q, k, v, call)
        else:
            out, weights = self._attend(q, k, v, call), None
        return self.o_proj(out.transpose(1, 2).reshape(*y.shape[:2], -1)), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        at = call.layout
        options = {**self.options, "deterministic": call.deterministic}
        cached = None if call.cache is None else call.cache.layer(self.layer_idx, k)
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if cached is not None and cached.holds(q.shape[2]) and not wants_grad:
            buffers = cached.buffers(q.shape[0])
            q = ops.rope_cache(q, k, v, *call.rope, *buffers, at.q_start, at.kv_len)
            return ops.attention(q, *buffers, at.q_start, at.kv_len, at.kv_start, **options)[0]
        q, k = ops.rope(q, k, *call.rope)
        keys, values, k_base = k, v, at.q_start
        if cached is not None:
            call.unwritten.append((cached, k, v))
            if at.past:
                keys, values, k_base = cached.kept_and_chunk(k, v, at.q_start, at.past)
            else:
                keys, values = cached.as_stored(k), cached.as_stored(v)
        return ops.attention(
            q, keys, values, at.q_start, at.kv_len, at.kv_start, k_base, **options
        )[0]

    def _attend_slowly(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by the reference, whose columns are the cached tokens and then the chunk's."""
        at = call.layout
        q, k = ops.rope(q, k, *call.rope)
        k_base = at.q_start - at.past
        keys, values = k, v
        if call.cache is not None:
            cached = call.cache.layer(self.layer_idx, k)
            call.unwritten.append((cached, k, v))
            width = at.past + q.shape[2]
            keys, values = cached.by_position(k, v, at.q_start, k_base, width)
        where = (at.q_start, at.kv_len, at.kv_start, k_base)
        mask = call.masks.get(self.kind)
        out, _ = reference.attention(q, keys, values, *where, **self.options, mask=mask)
        if not call.output_attentions:
            return out, None
        weights = reference.attention_weights(q, keys, *where, **self.options, mask=mask)
        return out, weights.to(q.dtype)


class Gemma2MLP(nn.Module):
    """down(gelu_tanh(gate(y)) * up(y))."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, y: Tensor) -> Tensor:  # [B, S, hidden_size]
        return self.down_proj(ops.geglu(self.gate_proj(y), self.up_proj(y)))


class Gemma2DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: Gemma2Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.mlp = Gemma2MLP(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Gemma2RMSNorm(size, eps)
        self.post_attention_layernorm = Gemma2RMSNorm(size, eps)
        self.pre_feedforward_layernorm = Gemma2RMSNorm(size, eps)
        self.post_feedforward_layernorm = Gemma2RMSNorm(size, eps)

    def forward(
        self,
        h: Tensor,
        y: Tensor | None,
        next_norm: Gemma2RMSNorm | None,
        call: Call,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Give the stream after this layer, its form normed by `next_norm`, attention weights.

        Args:
            h: the stream, [B, S, hidden_size].
            y: h normed by this layer's input_layernorm; None: it is normed here.
            next_norm: what comes after this layer; None: no normed form is given.
            inplace: h may be overwritten.
        """
        if y is None:
            y = self.input_layernorm(h)
        a, weights = self.self_attn(y, call)
        h, y = add_and_norm(
            h, a, self.post_attention_layernorm, self.pre_feedforward_layernorm, inplace
        )
        m = self.mlp(y)
        h, y = add_and_norm(h, m, self.post_feedforward_layernorm, next_norm, inplace)
        return h, y, weights


def add_and_norm(
    h: Tensor, x: Tensor, post: Gemma2RMSNorm, pre: Gemma2RMSNorm | None, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """Give h + rms(x; post), written over h if `inplace`, and that normed by `pre`."""
    # hooks want to see their modules called, and an adapter in place of a norm has other weights
    if any(n is not None and (is_hooked(n) or type(n) is not Gemma2RMSNorm) for n in (post, pre)):
        h = h + post(x)
        return h, None if pre is None else pre(h)
    weights = post.weight, (post if pre is None else pre).weight
    if inplace:
        y = ops.add_rms_norm_(h, x, *weights, post.eps)
    else:
        h, y = ops.add_rms_norm(h, x, *weights, post.eps)
    return h, None if pre is None else y


def home(module: nn.Module) -> torch.device | None:
    """Give where `module`, a layer or what takes its output, lives; None: a hook sees to that."""
    first = getattr(module, "input_layernorm", module)
    if is_hooked(module) or is_hooked(first):
        return None
    weight = getattr(first, "weight", None)
    return weight.device if isinstance(weight, Tensor) else None


def beside(x: Tensor, module: nn.Module) -> Tensor:
    """Give x on the device of `module`, which takes it."""
    where = home(module)
    return x if where is None or where == x.device else x.to(where)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether somebody watches or changes what goes through `module`."""
    # accelerate puts its hook in the module's dict and replaces `forward`
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module))


class Gemma2PreTrainedModel(nn.Module):
    """What the body and the heads have in common: weights, files, training switches."""

    base_model_prefix = "model"

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        if not isinstance(config, Gemma2Config):
            raise TypeError(
                f"{type(self).__name__}: config is a {type(config).__name__}: it must be a "
                "Gemma2Config"
            )
        self.config = config

    @property
    def base_model(self) -> Gemma2Model:
        """The body without a head."""
        body: Any = getattr(self, self.base_model_prefix, self)
        return body

    # ---- weights ---------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Draw all weights anew: normal(0, initializer_range); norms and biases 0."""
        self.apply(self._init_module)
        self.tie_weights()

    @torch.no_grad()
    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, Gemma2RMSNorm):
            module.weight.zero_()

    def tie_weights(self) -> None:
        """Make tied weights one parameter again; needed after replacing one of them."""

    def get_input_embeddings(self) -> nn.Module:
        """Give the module that maps ids to what `inputs_embeds` takes: scaled embeddings."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding; the new module must scale its rows itself."""
        self.base_model.embed_tokens = value  # type: ignore[assignment]
        self.tie_weights()

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count the parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of everything that the model returns."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str], **options: Any) -> Model:
        """Give the model in `folder`; see `gemma2.checkpoint.from_pretrained` for the options."""
        from gemma2 import checkpoint as files

        return files.from_pretrained(cls, folder, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write config and weights to `folder`; see `gemma2.checkpoint.save_pretrained`."""
        from gemma2 import checkpoint as files

        files.save_pretrained(self, folder, **options)

    # ---- training --------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """In training, keep only the layers' inputs and compute the rest again in the backward.

        `gradient_checkpointing_kwargs` goes to `torch.utils.checkpoint.checkpoint`, whose
        non-reentrant form is used.

        Raises:
            ValueError: use_reentrant=True, which loses the gradients of adapters.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "gradient_checkpointing_enable: use_reentrant is True: only the non-reentrant form "
                "is supported"
            )
        self.base_model.checkpointing = options

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward, the default."""
        self.base_model.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.base_model.checkpointing is not None


class Gemma2Model(Gemma2PreTrainedModel):
    """The body of Gemma 2: token ids to the final hidden states."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            Gemma2DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing: dict[str, Any] | None = None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Give the final hidden states [B, S, hidden_size].

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S] or [B, earlier + S], 1 = token; or 4-D [B or 1, H or 1, S,
                earlier + S], bool or additive; or a dict of 4-D masks by kind of layer.
            position_ids: int64 [B or 1, S], for RoPE; one that does not exceed the one before
                starts a new document. None: a row's real tokens are counted.
            past_key_values: the cache to go on from and to write to.
            inputs_embeds: [B, S, hidden_size], instead of input_ids: as `get_input_embeddings()`
                gives them, scaled.
            use_cache: None: as the config says, while no gradients are recorded and the model is
                not in training (nor being compiled). A cache is made if none is passed.
            output_attentions: runs the slow reference attention and gives [B, H, S, earlier + S].
            cache_position: checked against the cache where that is free; may be left out.
            cu_seqlens: bounds of packed documents over the B * S columns, [documents + 1].

        Raises:
            TypeError, ValueError: the text names the argument; a cache is left as it was.
        """
        x = _checked_input(input_ids, inputs_embeds, self.config)
        batch, columns, device = x.shape[0], x.shape[1], x.device
        output_attentions = self._flag("output_attentions", output_attentions)
        output_hidden_states = self._flag("output_hidden_states", output_hidden_states)
        cache = self._cache_for(past_key_values, use_cache, batch, device)
        at, masks = prepare(
            batch,
            columns,
            device,
            self.config,
            cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            cache_position=cache_position,
        )
        call = Call(
            layout=at,
            rope=ops.rope_table(at.position_ids, self.config.head_dim, self.config.rope_theta),
            cache=cache,
            masks=masks,
            output_attentions=output_attentions,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        x = at.pack(x)
        h = self.embed_tokens(x) if inputs_embeds is None else x.to(self._stream_dtype).contiguous()
        # what a hook was shown may not change under it, nor what the caller passed or gets
        hooked = any(is_hooked(module) for module in (self.embed_tokens, *self.layers))
        inplace = not (torch.is_grad_enabled() or output_hidden_states or hooked)
        if inplace and inputs_embeds is not None:
            h = h.clone()

        if cache is not None:
            cache.begin(at.q_start, at.kv_len, columns, self.norm.weight.dtype)
        y, states, attentions = self._run_layers(h, call, inplace, output_hidden_states)
        if cache is not None:
            try:
                for layer, k, v in call.unwritten:
                    there = call.on(k.device).layout
                    layer.write(k, v, there.q_start, there.kv_len)
            except BaseException:
                cache.forget(batch)  # some rings have lost what others have not
                raise
            if at.keep_history:
                cache.record(at.q_start, at.kv_len, at.position_ids, at.kv_start)
            cache.commit(at.q_start, at.kv_len, columns)

        out = BaseModelOutputWithPast(
            last_hidden_state=at.unpack(y),
            past_key_values=cache,
            hidden_states=tuple(map(at.unpack, states)) if output_hidden_states else None,
            attentions=tuple(map(at.unpack_weights, attentions)) if output_attentions else None,
        )
        return out if return_dict is not False else out.to_tuple()

    def _run_layers(
        self, h: Tensor, call: Call, inplace: bool, collect: bool
    ) -> tuple[Tensor, list[Tensor], list[Any]]:
        """Give the final hidden states, those of all layers if `collect`, attention weights."""
        states: list[Tensor] = []
        attentions: list[Any] = []
        dtype = self.norm.weight.dtype
        saving = self.checkpointing if self.training and torch.is_grad_enabled() else None
        modules = [*self.layers, self.norm]
        homes = [home(module) for module in modules]
        y: Tensor | None = None
        for i, layer in enumerate(self.layers):
            if collect:
                states.append(h.to(dtype))
            here = homes[i]
            if here is not None and here != h.device:
                h = h.to(here)
            # A hook may replace or move the stream: then what follows must norm what the hook made,
            # as a layer on another device does with what it is given.
            follower: Any = modules[i + 1]
            apart = here is None or here != homes[i + 1]
            norm = None if apart else getattr(follower, "input_layernorm", follower)
            if saving is None:
                out = layer(h, y, norm, call, inplace)
            else:
                out = checkpoint(layer, h, y, norm, call, inplace, **saving)
            h, y, weights = (out, None, None) if isinstance(out, Tensor) else out
            if call.output_attentions:
                attentions.append(weights)
        y = self.norm(beside(h, self.norm)) if y is None else y
        if collect:
            states.append(y)
        return y, states, attentions

    def _flag(self, name: str, given: bool | None) -> bool:
        return bool(self.config.extra.get(name, False)) if given is None else given

    @property
    def _stream_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.norm.weight.dtype == torch.bfloat16 else torch.float32

    def _cache_for(
        self, given: HybridCache | None, use_cache: bool | None, batch: int, device: torch.device
    ) -> HybridCache | None:
        """Give the checked cache, a new one that grows on demand, or None."""
        saving = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        if given is not None:
            if not isinstance(given, HybridCache):
                raise TypeError(
                    f"past_key_values: is a {type(given).__name__}: it must be a gemma2.HybridCache"
                )
            if saving:
                raise ValueError(
                    "past_key_values: a cache cannot be written under gradient checkpointing, "
                    "whose backward would write it again: call gradient_checkpointing_disable()"
                )
            given.check_model(self.config, batch, device)
            given.place(device)
            return given
        if use_cache is None:
            quiet = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            use_cache = self.config.use_cache and quiet
        if not use_cache or saving:
            return None
        made = HybridCache(self.config, max(batch, 1))
        made.place(device)
        return made


def _checked_input(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: Gemma2Config
) -> Tensor:
    """Give whichever of the two is not None."""
    if (input_ids is None) == (inputs_embeds is None):
        both = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: {both} given: pass exactly one of them")
    if input_ids is not None:
        name, x, wanted = "input_ids", input_ids, "int64 [B, S]"
        good = isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32) and x.dim() == 2
    else:
        assert inputs_embeds is not None
        name, x, wanted = "inputs_embeds", inputs_embeds, f"floating [B, S, {config.hidden_size}]"
        good = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3
        good = good and x.shape[2] == config.hidden_size
    if not good:
        came = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise (ValueError if isinstance(x, Tensor) else TypeError)(
            f"{name}: is {came}: it must be {wanted}"
        )
    if x.shape[1] == 0:
        raise ValueError(f"{name}: has no tokens: S must be at least 1")
    return x if input_ids is None else x.to(torch.int64)
