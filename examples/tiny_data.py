"""From WordNet documents to tokens and batches, for `train_tiny.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from wordnet import DEFINITION, Document

PAD, EOS, BOS, UNK = range(4)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
IGNORE = -100
MAX_TOKENS = 128


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-casing BPE tokenizer like Gemma's: spaces as "▁", unknown bytes as <0xNN>, BOS.

    Words, single digits and single punctuation marks are never merged with each other, so that
    the marker after a headword is always the same token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\p{L}\p{M}\p{N}▁]|▁"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    # The trainer makes the byte tokens special, and special tokens are left out of decoded text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    return Tokenizer.from_str(json.dumps(state))


@dataclass
class Row:
    """One encoded document, BOS to EOS. All lists have one entry a token."""

    ids: list[int]
    labels: list[int]  # of the token head; IGNORE at BOS, marker and EOS
    is_target: list[bool]  # whether predicting this token counts: everything after the marker
    label: int  # lexicographer class

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Row]:
    """Rows of at most MAX_TOKENS tokens; the end of a longer document is cut off, EOS with it."""
    rows = []
    for document, encoding in zip(
        documents, tokenizer.encode_batch([document.text for document in documents]), strict=True
    ):
        label_at = document.label_at()
        marker = next(at for at, label in enumerate(label_at) if label is None)
        ends = [end for _, end in encoding.offsets[1:]]
        labels = [label_at[end - 1] for end in ends]
        rows.append(
            Row(
                ids=[*encoding.ids, EOS][:MAX_TOKENS],
                labels=[IGNORE if label is None else label for label in (None, *labels, None)][
                    :MAX_TOKENS
                ],
                is_target=[False, *(end > marker + 1 for end in ends), True][:MAX_TOKENS],
                label=document.synset.label,
            )
        )
    return rows


@dataclass
class Batch:
    """Rows padded on the right to the longest. All tensors [B, S] except `classes` [B]."""

    ids: Tensor  # int64
    mask: Tensor  # int64, 1 = token
    next_ids: Tensor  # int64: the token to predict, or IGNORE
    token_labels: Tensor  # int64, or IGNORE
    classes: Tensor  # int64 [B]
    class_weights: (
        Tensor  # float32, sums to 1 a row: half on the definition's last token, half on the others
    )


def collate(rows: Sequence[Row]) -> Batch:
    width = max(len(row) for row in rows)

    def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([items + [fill] * (width - len(items)) for items in lists])

    token_labels = padded((row.labels for row in rows), IGNORE)
    next_ids = padded(
        (
            [
                token if wanted else IGNORE
                for token, wanted in zip(row.ids[1:], row.is_target[1:], strict=True)
            ]
            for row in rows
        ),
        IGNORE,
    )
    definition = (token_labels == DEFINITION).float()
    last = definition * (definition.cumsum(1) == definition.sum(1, keepdim=True))
    return Batch(
        ids=padded((row.ids for row in rows), PAD),
        mask=padded(([1] * len(row) for row in rows), 0),
        next_ids=torch.nn.functional.pad(next_ids, (0, width - next_ids.shape[1]), value=IGNORE),
        token_labels=token_labels,
        classes=torch.tensor([row.label for row in rows]),
        class_weights=0.5 * last + 0.5 * definition / definition.sum(1, keepdim=True).clamp(min=1),
    )


def batches(rows: Sequence[Row], tokens: int, rng: random.Random | None = None) -> list[list[Row]]:
    """Groups of rows of about equal length, at most `tokens` tokens each; `rng` shuffles them."""
    order = sorted(rows, key=(lambda row: (len(row), rng.random())) if rng else len)
    groups: list[list[Row]] = [[]]
    for row in order:
        if groups[-1] and len(row) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(row)
    if rng:
        rng.shuffle(groups)
    return groups
