"""A small tokenizer built like Gemma's, with the tokens of a conversation."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Library

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
PAD, EOS, BOS, UNK, TURN, END = range(6)


def make_library(template: bool = True) -> Library:
    """A tokenizer built like Gemma's: BPE, "▁" for spaces, bytes for what is unknown."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz\n", "ab", "▁a", "he", "ll", "hell", "hello"]
    merges = [("a", "b"), ("▁", "a"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    library = Library(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if template:
        library.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    library.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return library
