"""Configuration of a Gemma 2 model: read, checked and written in the layout of the hub.

The field names are those of the hub's ``config.json``; the defaults are the 2B model. Values come
from the published checkpoints and from Google's ``gemma_pytorch`` (``gemma/config.py``). A file
with a setting that this package cannot honour is refused here, before any weight is read, because a
model that silently ignores a setting gives plausible nonsense.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Gemma2Config"]

SLIDING = "sliding_attention"
FULL = "full_attention"
ACTIVATION = "gelu_pytorch_tanh"
DTYPES = ("float32", "bfloat16", "float16", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Lists, modules and tensors without memory are made of these before any weight is seen: a file that
# claims a billion layers must not take the memory of a billion layers, nor may a product overflow.
_MAX_LAYERS = 1000
_MAX_LABELS = 100_000
_MAX_SIZE = 2**24
_MAX_HEADS = 2**16
_MAX_TOKENS = 2**31 - 1
# Parsed, a small value takes many times its text.
MAX_JSON_BYTES = 2 * 2**20
_MAX_JSON_CONTAINERS = 100_000
_MAX_JSON_DEPTH = 50

_PRESETS: dict[str, dict[str, Any]] = {
    "2b": {},
    "9b": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "27b": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
}

# Settings of other models and other libraries that change the result. Each is fine at the value
# given here (what transformers takes when the key is absent) and refused at any other.
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "projections with a bias are not part of Gemma 2"),
    "use_bidirectional_attention": ((False, None), "attention here is causal"),
    "partial_rotary_factor": ((1, None), "the whole head is rotated"),
    "is_encoder_decoder": ((False, None), "there is no encoder"),
    "add_cross_attention": ((False, None), "there is no cross attention"),
    "pruned_heads": (({}, None), "pruned heads are not supported"),
    "quantization_config": (
        (None,),
        "quantised checkpoints of other libraries cannot be read; load the unquantised weights",
    ),
    "compression_config": (
        (None,),
        "quantised checkpoints of other libraries cannot be read; load the unquantised weights",
    ),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def show(value: object) -> str:
    """Give `value` for an error: one line, never the megabytes of a hostile file."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int with more digits than Python agrees to print
        text = f"a value of type {type(value).__name__} too large to print"
    return text if len(text) <= 120 else text[:100] + f"... ({len(text)} characters)"


def _said(name: str, value: object, wanted: str) -> str:
    return f"config: {name} is {show(value)}: it must be {wanted}"


def default_layer_types(num_hidden_layers: int) -> list[str]:
    """Give the published pattern: layer 0 slides, then full and sliding layers alternate."""
    return [FULL if i % 2 else SLIDING for i in range(num_hidden_layers)]


@dataclass
class Gemma2Config:
    """All settings of a Gemma 2 model and its heads. Defaults: Gemma 2 2B.

    Sizes count elements, `sliding_window` and `max_position_embeddings` count tokens. A soft cap of
    None means no cap. `num_attention_heads * head_dim` need not equal `hidden_size`.

    `num_labels`, `id2label`, `label2id`, `problem_type` and `classifier_dropout` (of the token
    head) serve the classification heads. `dtype` is the name of the checkpoint's dtype
    ("bfloat16"), None if unknown. `extra` holds the keys of the file that this package does not
    know; they are written back unchanged.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that makes no sense or that cannot be honoured.
    """

    model_type: ClassVar[str] = "gemma2"

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = ACTIVATION
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    # None: the published pattern; always a list after construction
    layer_types: list[str] = field(default=None)  # type: ignore[arg-type]
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    num_labels: int = 2
    # None: LABEL_0 ...; always dicts after construction
    id2label: dict[int, str] = field(default=None)  # type: ignore[arg-type]
    label2id: dict[str, int] = field(default=None)  # type: ignore[arg-type]
    problem_type: str | None = None
    classifier_dropout: float = 0.1

    dtype: str | None = None
    architectures: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    # ---- presets -------------------------------------------------------------------------------

    @classmethod
    def gemma2_2b(cls, **overrides: Any) -> Gemma2Config:
        """Give the configuration of Gemma 2 2B; `overrides` replace single fields."""
        return cls(**{**_PRESETS["2b"], **overrides})

    @classmethod
    def gemma2_9b(cls, **overrides: Any) -> Gemma2Config:
        """Give the configuration of Gemma 2 9B; `overrides` replace single fields."""
        return cls(**{**_PRESETS["9b"], **overrides})

    @classmethod
    def gemma2_27b(cls, **overrides: Any) -> Gemma2Config:
        """Give the configuration of Gemma 2 27B; `overrides` replace single fields."""
        return cls(**{**_PRESETS["27b"], **overrides})

    # ---- what the model asks for ----------------------------------------------------------------

    def layer_window(self, layer: int) -> int:
        """Give the window of `layer` in tokens, counting the token itself; 0 on full layers."""
        if self.layer_types[layer] == FULL:
            return 0
        # validate() refuses a sliding layer without a window
        assert self.sliding_window is not None
        return self.sliding_window

    @property
    def query_scale(self) -> float:
        """What q . k is multiplied by: query_pre_attn_scalar ** -0.5 (not head_dim ** -0.5)."""
        return float(self.query_pre_attn_scalar) ** -0.5

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """RoPE as transformers 5 spells it. Set `rope_theta` to change it."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    # ---- validation -----------------------------------------------------------------------------

    def __post_init__(self) -> None:
        if self.hidden_activation is None:
            self.hidden_activation = ACTIVATION
        if self.dtype is not None:
            # a torch.dtype prints as "torch.bfloat16", which is also how some files spell it
            name = str(self.dtype).removeprefix("torch.")
            self.dtype = None if name == "auto" else name
        self._fill_labels()
        counted = _is_int(self.num_hidden_layers) and 0 < self.num_hidden_layers <= _MAX_LAYERS
        if self.layer_types is None and counted:
            self.layer_types = default_layer_types(self.num_hidden_layers)
        if isinstance(self.layer_types, tuple):
            self.layer_types = list(self.layer_types)
        self.validate()
        self.rope_theta = float(self.rope_theta)

    def _fill_labels(self) -> None:
        if self.id2label is not None:
            if not isinstance(self.id2label, Mapping):
                raise TypeError(_said("id2label", self.id2label, "an object of number: name"))
            labels: dict[int, str] = {}
            for key, name in self.id2label.items():
                try:
                    number = int(key)  # JSON has only strings for keys
                except (TypeError, ValueError):
                    number = -1
                if isinstance(key, (bool, float)) or not isinstance(name, str) or number < 0:
                    raise TypeError(
                        f"config: id2label has {show(key)}: {show(name)}: it must map a "
                        "label's number to its name"
                    )
                labels[number] = name
            if self.num_labels == 2:  # the default: the names decide
                self.num_labels = len(labels)
            self.id2label = dict(sorted(labels.items()))
        elif _is_int(self.num_labels) and 0 < self.num_labels <= _MAX_LABELS:
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        else:
            self.id2label = {}
        if self.label2id is None:
            self.label2id = {name: number for number, name in self.id2label.items()}

    def validate(self) -> None:
        """Check every field; called at construction and before writing.

        Raises:
            TypeError, ValueError: the text names the field, its value and what is wanted.
        """
        self._validate_sizes()
        self._validate_numbers()
        self._validate_layers()
        self._validate_tokens()
        self._validate_labels()
        self._validate_flags()
        if not isinstance(self.extra, dict):
            raise TypeError(_said("extra", self.extra, "a dict of unknown keys"))
        known = _FIELDS & set(self.extra)
        if known:
            raise ValueError(
                f"config: extra holds {sorted(known)}: these are fields, pass them as arguments"
            )
        _check_honoured(self.extra)

    def _validate_sizes(self) -> None:
        limits = {
            "num_hidden_layers": _MAX_LAYERS,
            "num_attention_heads": _MAX_HEADS,
            "num_key_value_heads": _MAX_HEADS,
            "head_dim": _MAX_HEADS,
            "max_position_embeddings": _MAX_TOKENS,
        }
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value, top = getattr(self, name), limits.get(name, _MAX_SIZE)
            if not _is_int(value):
                raise TypeError(_said(name, value, "a positive integer"))
            if not 0 < value <= top:
                raise ValueError(_said(name, value, f"between 1 and {top}"))
        if self.head_dim % 2:
            wanted = "even, since RoPE rotates its two halves"
            raise ValueError(_said("head_dim", self.head_dim, wanted))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads is {self.num_attention_heads}, num_key_value_heads "
                f"is {self.num_key_value_heads}: the number of query heads must be a multiple of "
                "the number of key/value heads"
            )

    def _validate_numbers(self) -> None:
        for name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar"):
            value = getattr(self, name)
            self._check_number(name, value, "a positive number", low=0.0, open_low=True)
        self._check_number(
            "initializer_range", self.initializer_range, "a number that is not negative", low=0.0
        )
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            if getattr(self, name) is not None:
                wanted = "a positive number, or null for no cap"
                self._check_number(name, getattr(self, name), wanted, low=0.0, open_low=True)
        wanted = "a probability below 1"
        self._check_number("classifier_dropout", self.classifier_dropout, wanted, low=0.0, high=1.0)
        wanted = "0, since attention weights are never stored; inference does not use it anyway"
        dropout = self.attention_dropout
        self._check_number("attention_dropout", dropout, wanted, low=0.0, high=1e-30)

    @staticmethod
    def _check_number(
        name: str,
        value: object,
        wanted: str,
        *,
        low: float,
        high: float = math.inf,
        open_low: bool = False,
    ) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(_said(name, value, wanted))
        in_range = (value > low if open_low else value >= low) and value < high
        # a Python int may exceed every float; the model computes in floats
        if not in_range or value > 1e30:
            raise ValueError(_said(name, value, wanted))

    def _validate_layers(self) -> None:
        wanted = f'a list of {self.num_hidden_layers} times "{SLIDING}" or "{FULL}"'
        if not isinstance(self.layer_types, list):
            raise TypeError(_said("layer_types", self.layer_types, wanted))
        for i, kind in enumerate(self.layer_types):
            if not isinstance(kind, str) or kind not in (SLIDING, FULL):
                raise ValueError(_said(f"layer_types[{i}]", kind, f'"{SLIDING}" or "{FULL}"'))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"config: layer_types has {len(self.layer_types)} entries and num_hidden_layers is "
                f"{self.num_hidden_layers}: it must be {wanted}, or null for the published pattern"
            )
        if self.sliding_window is None:
            if SLIDING in self.layer_types:
                raise ValueError(
                    "config: sliding_window is None while layer_types has sliding layers: it must "
                    "be a positive integer"
                )
        elif not _is_int(self.sliding_window):
            raise TypeError(_said("sliding_window", self.sliding_window, "a positive integer"))
        elif not 0 < self.sliding_window <= _MAX_TOKENS:
            wanted = f"between 1 and {_MAX_TOKENS}"
            raise ValueError(_said("sliding_window", self.sliding_window, wanted))

    def _validate_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id"
            wanted = "a token id" + (", a list of token ids" if several else "") + " or null"
            ids = value if several and isinstance(value, list) else [value]
            for token in ids:
                if token is None and ids is not value:
                    continue
                if not _is_int(token):
                    raise TypeError(_said(name, value, wanted))
                if token < 0:
                    raise ValueError(_said(name, value, wanted))
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            wanted = f"less than vocab_size, {self.vocab_size}"
            raise ValueError(_said("pad_token_id", self.pad_token_id, wanted))

    def _validate_labels(self) -> None:
        if not _is_int(self.num_labels):
            raise TypeError(_said("num_labels", self.num_labels, "an integer"))
        if not 0 < self.num_labels <= _MAX_LABELS:
            wanted = f"between 1 and {_MAX_LABELS}"
            raise ValueError(_said("num_labels", self.num_labels, wanted))
        if len(self.id2label) != self.num_labels:
            raise ValueError(
                f"config: num_labels is {self.num_labels} and id2label names "
                f"{len(self.id2label)} labels: they must agree"
            )
        if list(self.id2label) != list(range(self.num_labels)):
            raise ValueError(
                f"config: id2label has the numbers {show(list(self.id2label))}: they must be "
                f"0 to {self.num_labels - 1}"
            )
        if not isinstance(self.label2id, Mapping):
            raise TypeError(_said("label2id", self.label2id, "an object of name: number"))
        for label, number in self.label2id.items():
            numbered = _is_int(number) and 0 <= number < self.num_labels
            if not isinstance(label, str) or not numbered:
                raise ValueError(
                    f"config: label2id has {show(label)}: {show(number)}: it must map a label's "
                    f"name to a number from 0 to {self.num_labels - 1}"
                )
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            wanted = f"one of {', '.join(PROBLEM_TYPES)}, or null"
            raise ValueError(_said("problem_type", self.problem_type, wanted))

    def _validate_flags(self) -> None:
        if self.hidden_activation != ACTIVATION:
            raise ValueError(_said("hidden_activation", self.hidden_activation, ACTIVATION))
        for name in ("use_cache", "tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(_said(name, getattr(self, name), "true or false"))
        _check_honoured({"attention_bias": self.attention_bias})
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(_said("dtype", self.dtype, f"one of {', '.join(DTYPES)}, or null"))
        if self.architectures is not None and (
            not isinstance(self.architectures, list)
            or not all(isinstance(name, str) for name in self.architectures)
        ):
            raise TypeError(_said("architectures", self.architectures, "a list of class names"))

    # ---- reading --------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Gemma2Config:
        """Give the configuration in `values`, a parsed ``config.json``; `overrides` replace fields.

        Reads both spellings of RoPE (`rope_theta`, `rope_parameters`) and of the dtype (`dtype`,
        `torch_dtype`). Unknown keys go to `extra`.

        Raises:
            TypeError, ValueError: the text names the field, its value and what is wanted.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: got {show(values)}: it must be a mapping of names to values")
        unknown = set(overrides) - _FIELDS - {"rope_parameters", "rope_scaling", "extra"}
        if unknown:
            raise TypeError(
                f"config: {', '.join(sorted(unknown))}: no such argument, and no setting of Gemma 2"
            )
        fields = _canonical(values)
        changes = _canonical(overrides)
        extra = {**fields.pop("extra"), **changes.pop("extra")}
        if "num_labels" in changes and "id2label" not in changes:
            names = fields.get("id2label")
            if names is not None and len(names) != changes["num_labels"]:
                fields.pop("id2label")
                fields.pop("label2id", None)
        if "id2label" in changes:
            fields.pop("num_labels", None)
            fields.pop("label2id", None)
        if "num_hidden_layers" in changes and "layer_types" not in changes:
            kinds = fields.get("layer_types")
            if isinstance(kinds, list) and kinds == default_layer_types(len(kinds)):
                fields.pop("layer_types")
        merged = {**fields, **changes}
        counted, names = merged.get("num_labels"), merged.get("id2label")
        if counted is not None and isinstance(names, Mapping) and len(names) != counted:
            raise ValueError(
                f"config: num_labels is {show(counted)} and id2label names {len(names)} labels: "
                "they must agree"
            )
        config = cls(**merged, extra=extra)
        shape = _PRESETS["9b"]
        if config.query_pre_attn_scalar == 224 and all(
            getattr(config, name) == value
            for name, value in shape.items()
            if name != "query_pre_attn_scalar"
        ):
            warnings.warn(
                "config: query_pre_attn_scalar is 224 in a Gemma 2 9B: the model was trained with "
                "256, and 224 is a known error of old conversions. Pass query_pre_attn_scalar=256 "
                "to correct it",
                stacklevel=2,
            )
        return config

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> Gemma2Config:
        """Give the configuration in the file `path` (the hub's ``config.json``).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no JSON object, is of another model, or has a field with a value
                that makes no sense or cannot be honoured; the text begins with the path.
        """
        path = Path(path)
        values = read_json(path)
        if "model_type" not in values:
            raise ValueError(f'{path}: model_type is missing: it must be "gemma2"')
        try:
            return cls.from_dict(values, **overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> Gemma2Config:
        """Give the configuration in the folder's ``config.json``; raises as `from_json_file`."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a model's folder holds config.json and model.safetensors"
            )
        return cls.from_json_file(path, **overrides)

    # ---- writing --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Give what is written to ``config.json``: JSON values, both spellings of RoPE and dtype.

        Raises:
            TypeError, ValueError: a field was set to a value that makes no sense.
        """
        self.validate()
        out: dict[str, Any] = copy.deepcopy(self.extra)
        for item in dataclasses.fields(self):
            if item.name != "extra":
                out[item.name] = copy.deepcopy(getattr(self, item.name))
        out["model_type"] = self.model_type
        out["rope_parameters"] = self.rope_parameters
        scalar = float(self.query_pre_attn_scalar)
        if scalar.is_integer():  # transformers 5 declares it int and refuses 256.0
            out["query_pre_attn_scalar"] = int(scalar)
        if self.dtype is None:
            del out["dtype"]
        else:
            out["torch_dtype"] = self.dtype
        if self.classifier_dropout == 0.1 and "hidden_dropout" not in self.extra:
            del out["classifier_dropout"]
        for name in ("architectures", "problem_type"):
            if out[name] is None:
                del out[name]
        # As in transformers, labels are written when they say something; num_labels follows.
        del out["num_labels"]
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del out["id2label"], out["label2id"]
        else:
            out["id2label"] = {str(number): name for number, name in self.id2label.items()}
        return dict(sorted(out.items()))

    def to_json(self) -> str:
        """Give `to_dict` as the text of a ``config.json``.

        Raises:
            TypeError, ValueError: as `to_dict`, or the text would be longer than is read.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        size = len(text.encode("utf-8"))
        if size > MAX_JSON_BYTES:
            raise ValueError(
                f"config: written as JSON it has {size} bytes, but at most {MAX_JSON_BYTES} are "
                "read: give shorter or fewer labels"
            )
        return text


_FIELDS = {item.name for item in dataclasses.fields(Gemma2Config)} - {"extra"}


def read_json(path: Path) -> dict[str, Any]:
    """Give the JSON object in the file `path`, which is not trusted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, is too large, or `parse_json` refuses what is in it; the
            text begins with the path.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading from a pipe may never end
        raise ValueError(f"{path}: it must be a regular file")
    if status.st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: the file has {status.st_size} bytes: at most {MAX_JSON_BYTES} are read"
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(content: bytes) -> dict[str, Any]:
    """Give the JSON object in `content`, which is not trusted.

    Raises:
        ValueError: it is no JSON object, names a key twice, holds a number that is not finite or a
            string that is no text, or is nested deeper than anything that is meant for a model.
    """

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:40]} is no finite number")
        return float(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{show(name)} is given {count} times")
        return values

    try:
        text = content.decode("utf-8")
        values = json.loads(
            text, parse_constant=constant, parse_float=finite, object_pairs_hook=once
        )
        if "\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds {show(values)}: it must hold a JSON object")
    level: list[Any] = [values]
    total = 0
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
        total += len(level)
        if not level:
            return values
        if total > _MAX_JSON_CONTAINERS:
            raise ValueError(f"it holds more than {_MAX_JSON_CONTAINERS} lists and objects")
    raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} deep")


def _check_honoured(values: Mapping[str, Any]) -> None:
    for name, (allowed, why) in _MUST_BE.items():
        if name in values and not any(values[name] == value for value in allowed):
            raise ValueError(f"config: {name} is {show(values[name])}: {why}")


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give `values` as arguments of `Gemma2Config`, with the unknown keys under "extra"."""
    given = copy.deepcopy(dict(values))
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"config: {show(name)} is given as a name: it must be a string")
    extra_given = given.pop("extra", {})
    if not isinstance(extra_given, Mapping):
        raise TypeError(f"config: extra is {show(extra_given)}: it must be a dict of unknown keys")
    model_type = given.pop("model_type", Gemma2Config.model_type)
    if model_type != Gemma2Config.model_type:
        raise ValueError(f'config: model_type is {show(model_type)}: it must be "gemma2"')
    _check_honoured(given)
    theta = _rope_theta(given)
    dtype = given.pop("dtype", None)
    old_dtype = given.pop("torch_dtype", None)
    activation = _activation(given)

    fields = {name: given.pop(name) for name in list(given) if name in _FIELDS}
    # null means "not set" in these, as in transformers; in the others it is a value or an error
    for name in ("layer_types", "id2label", "label2id", "num_labels", "attention_bias"):
        if name in fields and fields[name] is None:
            del fields[name]
    if fields.get("attention_dropout", 0.0) is None:
        fields["attention_dropout"] = 0.0
    if fields.get("classifier_dropout", 0.0) is None:
        del fields["classifier_dropout"]
    if "classifier_dropout" not in fields and given.get("hidden_dropout") is not None:
        fields["classifier_dropout"] = given["hidden_dropout"]  # transformers' second choice
    if "sliding_window" not in fields and "sliding_window_size" in given:
        fields["sliding_window"] = given["sliding_window_size"]  # the spelling of June 2024
    if theta is not None:
        fields["rope_theta"] = theta
    if dtype is not None or old_dtype is not None:
        fields["dtype"] = old_dtype if dtype is None else dtype
    if activation is not None:
        fields["hidden_activation"] = activation
    fields["extra"] = {**given, **copy.deepcopy(dict(extra_given))}
    return fields


def _activation(given: dict[str, Any]) -> Any:
    """Take hidden_activation out of `given`; the older hidden_act counts where it is absent."""
    value = given.pop("hidden_activation", None)
    if value is None and given.get("hidden_act", ACTIVATION) != ACTIVATION:
        raise ValueError(_said("hidden_act", given["hidden_act"], ACTIVATION))
    return value


def _rope_theta(given: dict[str, Any]) -> Any:
    """Take all spellings of RoPE out of `given` and give theta, None where none is given."""
    found: dict[str, Any] = {}
    if given.get("rope_theta") is not None:
        found["rope_theta"] = given["rope_theta"]
    for source in ("rope_parameters", "rope_scaling"):
        value = given.get(source)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"config: {source} is {show(value)}: it must be an object or null")
        # transformers 5 also writes one entry for each kind of layer
        by_kind = {kind: value[kind] for kind in (SLIDING, FULL) if kind in value}
        for kind, entry in (by_kind or {"": value}).items():
            label = f"{source}.{kind}" if kind else source
            if not isinstance(entry, Mapping):
                raise TypeError(f"config: {label} is {show(entry)}: it must be an object")
            rope_type = entry.get("rope_type", entry.get("type", "default"))
            if rope_type != "default":
                raise ValueError(
                    f'config: {label} has rope_type {show(rope_type)}: only "default" is '
                    "supported, as published Gemma 2 models have no RoPE scaling"
                )
            unknown = set(entry) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            if unknown:
                raise ValueError(
                    f"config: {label} has {show(sorted(map(str, unknown)))}: only rope_type and "
                    "rope_theta are supported"
                )
            _check_honoured({"partial_rotary_factor": entry.get("partial_rotary_factor")})
            if entry.get("rope_theta") is not None:
                found[f"{label}.rope_theta"] = entry["rope_theta"]
    for source in ("rope_theta", "rope_parameters", "rope_scaling"):
        given.pop(source, None)
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        said = ", ".join(f"{name} {show(value)}" for name, value in found.items())
        raise ValueError(f"config: RoPE is given as {said}: they must agree")
    return values[0] if values else None
