"""The tokenizer inside GGUF: encodings are SentencePiece's, in both directions, or there is none."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2 import CheckpointError, Tokenizer
from gemma2.convert import gguf as ours
from gemma2.convert import vocabulary
from gemma2.convert.vocabulary import CONTROL, NORMAL, USER_DEFINED, UnfaithfulError, Vocabulary
from tests.convert.sources import MemorySource, config

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
spm = pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")

TEXTS = [
    "Hello, world!",
    " leading, and  two,   three,    four spaces ",
    "",
    " ",
    "      ",
    "line\nline\n\nline\n\n\n\tindented\t\ttwice",
    "aaaa aaaaa aaaaaa aaaaaaa abababab babab",
    "Größe, naïve, 東京タワー, мир, emoji 🙂🙃👩‍👩‍👧, \u0000\x7f",
    "1234567890 3.14159 1e-6",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<bos>twice<bos> <eos><pad>",
    "a▁b ▁ c",
    "<0x0A><0x41> is text, <html> <b>too</b>",
    "tableaux of tables: <table><td>x</td></table>",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts in which many merges compete: few letters, many spaces and newlines."""
    draw = random.Random(seed)
    alphabets = ["ab ", "aab  \n", "the quick brown fox ", "xyz<>/▁ \t", "eé 🙂n"]
    return [
        "".join(draw.choices(draw.choice(alphabets), k=draw.randrange(1, 60))) for _ in range(count)
    ]


def train(
    path: Path, vocab_size: int = 600, normalization_rule_name: str = "identity", **options: Any
) -> Path:
    """A tokenizer.model made as Gemma's: BPE, bytes, digits apart, no spaces added or dropped."""
    own = Path(__file__).read_text("utf-8").split("\n")
    lines = own + random_texts(300, seed=1) + ["aabab" * 5, "the theory of the thesis"] * 20
    out = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": [
            "<start_of_turn>",
            "<end_of_turn>",
            *("\n" * n for n in range(1, 5)),
            *("▁" * n for n in range(2, 6)),
            "\t\t",
            "<table>",
            "</table>",
        ],
        "character_coverage": 0.995,
        "minloglevel": 2,
        "num_threads": 1,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line]),
        model_writer=out,
        vocab_size=vocab_size,
        normalization_rule_name=normalization_rule_name,
        hard_vocab_limit=False,
        **{**settings, **options},
    )
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("spm") / "tokenizer.model")


def pieces_of(path: Path) -> int:
    return int(spm.SentencePieceProcessor(model_file=str(path)).get_piece_size())


def through(path: Path, folder: Path, extra: int = 0, **files: Any) -> ours.GGUFSource:
    """Write a model with the tokenizer at `path` as GGUF and open it."""
    given = [path]
    for name, content in files.items():
        given.append(folder / f"{name}.json")
        given[-1].write_text(json.dumps(content), "utf-8")
    size = (
        pieces_of(path)
        if path.suffix == ".model"
        else len(json.loads(path.read_text())["model"]["vocab"])
    )
    source = MemorySource(config("2b", vocab_size=size + extra), tokenizer=given)
    ours.write(source, folder / "m.gguf")
    return ours.open_source(folder / "m.gguf")


def test_encodings_are_those_of_sentencepiece(model: Path, tmp_path: Path) -> None:
    source = through(model, tmp_path)
    files = source.tokenizer
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    found = Tokenizer.from_pretrained(files[0].parent)
    original = Tokenizer.from_pretrained(model.parent)
    assert (found.bos_id, found.eos_id, found.pad_id) == (2, 1, 0)
    assert found.vocab_size == original.vocab_size
    longest = 0
    for text in TEXTS + random_texts(1500):
        ids = original.encode(text)
        assert found.encode(text) == ids, text
        assert found.decode(ids, False) == original.decode(ids, False)
        longest = max(longest, *(len(original.id_to_token(i) or "") for i in ids))
    assert longest >= 6  # pieces were joined several times over


def test_the_vocabulary_in_the_file_is_that_of_sentencepiece(model: Path, tmp_path: Path) -> None:
    through(model, tmp_path, extra=5, tokenizer_config={"chat_template": "{{ bos_token }}"})
    reader = gguf.GGUFReader(tmp_path / "m.gguf")

    def key(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    library = spm.SentencePieceProcessor(model_file=str(model))
    count = library.get_piece_size()
    tokens, scores, types = key("ggml.tokens"), key("ggml.scores"), key("ggml.token_type")
    assert (key("ggml.model"), key("ggml.pre")) == ("llama", "default")
    assert key("ggml.add_space_prefix") is False
    assert key("ggml.add_bos_token") is True
    assert key("chat_template") == "{{ bos_token }}"
    for i in range(count):
        piece = library.id_to_piece(i)
        user_defined = types[i] == USER_DEFINED
        # llama.cpp looks for these before it rewrites spaces
        assert tokens[i] == (piece.replace("▁", " ") if user_defined else piece)
        assert scores[i] == pytest.approx(library.get_score(i))
        assert (types[i] == 6) == library.is_byte(i)
        assert (types[i] == 2) == library.is_unknown(i)
        turn = piece in ("<start_of_turn>", "<end_of_turn>")
        assert (types[i] == CONTROL) == (library.is_control(i) or turn)
    assert types[tokens.index("  ")] == types[tokens.index("<table>")] == USER_DEFINED
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, count + 5)]
    assert types[count:] == [5] * 5
    assert [key(f"ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")] == [
        2,
        1,
        3,
        0,
    ]


def test_tokenizer_json_goes_there_and_back(model: Path, tmp_path: Path) -> None:
    one = through(model, tmp_path)
    (tmp_path / "again").mkdir()
    two = through(one.tokenizer[0], tmp_path / "again")
    content = json.loads(one.tokenizer[0].read_text("utf-8"))
    assert json.loads(two.tokenizer[0].read_text("utf-8")) == content
    assert len(content["model"]["merges"]) > 300


def test_the_tokenizer_of_transformers_for_gemma_goes_there_and_back(
    model: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GemmaTokenizerFast(vocab_file=str(model), from_slow=True)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = through(tmp_path / "tokenizer.json", tmp_path)
    merges, wanted = (
        [tuple(pair) for pair in json.loads(file.read_text("utf-8"))["model"]["merges"]]
        for file in (source.tokenizer[0], tmp_path / "tokenizer.json")
    )
    # it also joins bytes' names and user-defined pieces, which are never split in the first place
    assert merges == [pair for pair in wanted if pair in set(merges)]
    found = Tokenizer.from_pretrained(source.tokenizer[0].parent)
    original = Tokenizer.from_pretrained(tmp_path)
    # It also differs from SentencePiece where the sign for a space is written in the text itself.
    for text in [text for text in TEXTS + random_texts(500) if "▁" not in text]:
        assert found.encode(text) == original.encode(text), text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "it is no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
        ({"add_dummy_prefix": True}, "adds a space"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_another_sentencepiece_is_left_out_with_a_warning(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    path = train(tmp_path / "tokenizer.model", vocab_size=420, **options)
    with pytest.warns(UserWarning, match=f"gets no tokenizer.*tokenizer.model: .*{said}"):
        source = through(path, tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer is written"):
        assert source.tokenizer == []


def test_the_embedded_tokenizer_is_left_out_since_it_splits_text_otherwise(tmp_path: Path) -> None:
    from gemma2 import tiny

    with pytest.warns(UserWarning, match=r"tokenizer\.json: it rewrites or splits a text"):
        through(tiny.path() / "tokenizer.json", tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"600": {"content": "<tool>"}}}},
        {"added_tokens": {"<tool>": 600}},
    ],
    ids=["settings", "added"],
)
def test_a_token_that_only_the_settings_have_is_not_lost_silently(
    model: Path, tmp_path: Path, files: dict[str, Any]
) -> None:
    with pytest.warns(UserWarning, match="gets no tokenizer.*it lacks '<tool>', which its setti"):
        through(model, tmp_path, extra=1, **files)


def test_a_chat_template_that_is_no_text_is_named(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_bytes(b"\xff")
    source = MemorySource(config("2b"), tokenizer=[model, template])
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: it is not UTF-8"):
        ours.write(source, tmp_path / "m.gguf")


def test_an_unknown_token_of_another_kind_is_no_token(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path, lambda content: content["model"].update(unk_token=[]))
    vocabulary.from_json(path)


def changed(model: Path, folder: Path, change: Any) -> Path:
    source = through(model, folder)
    content = json.loads(source.tokenizer[0].read_text("utf-8"))
    change(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def swap_far_apart(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    several = next(
        i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1])
    )
    merges.append(merges.pop(several))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["model"]["merges"].pop(150), "some of its parts only"),
        (swap_far_apart, "now before, now after"),
        (lambda content: content["model"].update(type="Unigram"), "no BPE model"),
        (lambda content: content["model"].update(byte_fallback=False), "no bytes"),
        (lambda content: content.update(normalizer=None), "rewrites or splits"),
        (lambda content: content["model"]["vocab"].update({"new": 10**9}), "ids are not"),
        (lambda content: content["model"]["vocab"].update({"new": 5}), "ids are not"),
        (lambda content: content["model"].update(merges=[["a"]]), "damaged"),
        (lambda content: content["model"].update(merges=[3]), "damaged"),
        (lambda content: content["model"].update(dropout=0.5), "the option dropout"),
        (lambda content: content["model"].update(ignore_merges=True), "the option ignore_merges"),
        (lambda content: content["added_tokens"][0].update(lstrip=True), "what is around"),
        (lambda content: content.update(added_tokens=[3]), "damaged"),
        (lambda content: content.update(model=[]), "no BPE model"),
    ],
)
def test_a_tokenizer_json_that_scores_cannot_express_is_refused(
    model: Path, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(UnfaithfulError, match=said):
        vocabulary.from_json(changed(model, tmp_path, change))


def test_a_vocabulary_in_a_file_that_does_not_order_its_pieces_is_refused(model: Path) -> None:
    held = vocabulary.from_model(model)
    equal = Vocabulary(held.pieces, np.zeros(len(held.pieces)), held.types)
    with pytest.raises(UnfaithfulError, match="the same score"):
        vocabulary.to_tokenizer(equal, "<bos>")
    nan = Vocabulary(held.pieces, held.scores * np.float32("nan"), held.types)
    with pytest.raises(UnfaithfulError, match="the same score"):
        vocabulary.to_tokenizer(nan, "<bos>")
    bytes_lost = Vocabulary(held.pieces, held.scores, np.where(held.types == 6, NORMAL, held.types))
    with pytest.raises(UnfaithfulError, match="not all 256 bytes"):
        vocabulary.to_tokenizer(bytes_lost, "<bos>")
    with pytest.raises(UnfaithfulError, match="there twice"):
        Vocabulary(["a", "a"], np.zeros(2), np.ones(2))
    with pytest.raises(UnfaithfulError, match="2 pieces, 1 scores"):
        Vocabulary(["a", "b"], np.zeros(1), np.ones(2))


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_tokenizer_model_is_unfaithful_or_read(
    model: Path, tmp_path: Path, seed: int
) -> None:
    data = model.read_bytes()
    draw = random.Random(seed)
    path = tmp_path / "tokenizer.model"
    for _ in range(150):
        mutated = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
        for _ in range(draw.randrange(1, 4)):
            if mutated:
                mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        path.write_bytes(mutated)
        try:
            vocabulary.from_model(path)
        except UnfaithfulError:
            continue


def test_a_file_with_another_vocabulary_gets_none(model: Path, tmp_path: Path) -> None:
    through(model, tmp_path)
    path = tmp_path / "m.gguf"
    data = path.read_bytes()
    for old, new, said in (
        (b"tokenizer.ggml.scores", b"tokenizer.ggml.scoreX", "no scores"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX", "0 tokens for"),
        (b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0berts", "of the kind berts"),
        (b"add_space_prefix", b"add_space_prefiX", "adds a space"),
    ):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        with pytest.warns(UserWarning, match=f"no tokenizer is written.*{said}"):
            assert ours.open_source(path).tokenizer == []
