"""A conversation's tokens: nothing is read twice, nothing is tokenised twice, turns are closed once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.cli.conversation import Conversation, Definitions
from gemma2.cli.shared import CommandError
from gemma2.tokenizer import Tokenizer
from tests.cli.chat_model import chat_model
from tests.model.libraries import BOS, END, PAD, TURN, make_library

WILD = {"do_sample": True, "temperature": 50.0, "top_k": 0}  # all tokens are about as probable


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_library().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return chat_model()


@pytest.fixture
def talk(model, tokenizer):
    """Makes a conversation."""

    def make(context: int = 4096, seed: int | None = None, **options) -> Conversation:
        return Conversation(model, tokenizer, {"max_new_tokens": 20, **options}, context, seed)

    return make


@pytest.fixture
def columns(model):
    """The columns of every forward call, as a hook sees them."""
    seen: list[int] = []
    hook = model.model.register_forward_hook(
        lambda module, args, options, out: seen.append(out.last_hidden_state.shape[1]),
        with_kwargs=True,
    )
    yield seen
    hook.remove()


def answer(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def uncached(conversation: Conversation, ids: list[int], count: int) -> list[int]:
    """What the model writes after `ids` without a cache from before."""
    prompt = torch.tensor([ids])
    options = {k: v for k, v in conversation.options.items() if k != "max_new_tokens"}
    out = conversation.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        eos_token_id=conversation._ends,
        seed=conversation.last["seed"],
        **options,
    )
    return out[0, len(ids) :].tolist()


# ---- nothing twice ------------------------------------------------------------------------------


def test_in_a_straight_conversation_every_token_is_read_once(talk, columns):
    conversation = talk(max_new_tokens=60)
    for number in range(6):  # to 500 tokens, past the window of 8 and the ring of 128
        answer(conversation, f"hello {'ab ' * number} there")
        stats = conversation.stats()
        assert sum(columns) == stats["read_tokens"] == stats["cached_tokens"]
        assert stats["read_again_tokens"] == 0
    assert stats["cached_tokens"] > 400
    # all but the answer's last token and its end, which the next prompt begins with
    assert stats["conversation_tokens"] - stats["cached_tokens"] == 2


@pytest.mark.parametrize("options", [{}, WILD], ids=["greedy", "sampled"])
def test_every_answer_is_the_one_that_is_written_without_a_cache(talk, options):
    conversation = talk(max_new_tokens=40, seed=5 if options else None, **options)
    for text in ("hello", "a b", "ab " * 50, "hell"):
        answer(conversation, text)
        begin = conversation._answers[-1]
        tokens = conversation.last["tokens"]
        assert uncached(conversation, conversation.ids[:begin], len(tokens)) == tokens
        assert conversation.ids[begin : begin + len(tokens) - 1] == tokens[:-1]


def test_what_the_model_writes_is_never_tokenised_again(talk, tokenizer):
    """Random tokens: their text has another tokenisation, and some of them are padding."""
    conversation = talk(max_new_tokens=300, seed=1, **WILD)
    written = []
    for _ in range(4):
        answer(conversation, "hello")
        written += [token for token in conversation.last["tokens"] if token not in (END, 1)]
    assert PAD in conversation.ids
    text = [{**m, "content": m["content"]} for m in conversation.messages]
    assert tokenizer.encode_chat(text, add_generation_prompt=False) != conversation.ids
    position = 0
    for token in written:  # in the same order
        position = conversation.ids.index(token, position) + 1
    stats = conversation.stats()
    assert stats["read_tokens"] == stats["cached_tokens"]
    assert stats["read_again_tokens"] == 0


# ---- turns --------------------------------------------------------------------------------------


def turns(conversation: Conversation) -> tuple[int, int, int]:
    """How often a text, a turn and the end of one begin."""
    return tuple(conversation.ids.count(token) for token in (BOS, TURN, END))


def test_an_answer_that_is_cut_gets_its_end_and_the_text_begins_once(talk):
    conversation = talk(max_new_tokens=7)
    for number in (1, 2, 3):
        answer(conversation, "hello")
        assert conversation.last["finish_reason"] == "length"
        assert conversation.ids[-1] == END
        assert turns(conversation) == (1, 2 * number, 2 * number)


def test_the_end_that_the_model_writes_is_not_doubled(talk):
    for end in (END, 1):  # <end_of_turn> and <eos>: the template has the first one
        for seed in range(20):
            conversation = talk(max_new_tokens=2000, seed=seed, **WILD)
            answer(conversation, "hello")
            tokens = conversation.last["tokens"]
            if tokens[-1] != end:
                continue
            assert conversation.last["finish_reason"] == "end"
            begin = conversation._answers[0]
            assert conversation.ids[begin:] == [*tokens[:-1], END]
            answer(conversation, "hello")
            stats = conversation.stats()
            assert stats["read_tokens"] == stats["cached_tokens"]
            break
        else:
            pytest.fail(f"no seed ended with {end}")


PIECES = ["a", "b", " ", "hello", "\n", "字", "<end_of_turn>", "<bos>", "\t"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6))
def test_turns_tokenised_alone_are_the_template_tokenised_whole(tokenizer, model, texts):
    texts = texts[: len(texts) // 2 * 2]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    conversation = Conversation(model, tokenizer, {"max_new_tokens": 1}, 4096)
    conversation.replay(messages)
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    newline = tokenizer.encode("\n", add_bos=False)
    assert [*conversation.ids, *newline] == whole
    question = {"role": "user", "content": "hello"}
    assert conversation._prompt("hello") == tokenizer.encode_chat([*messages, question])


def test_a_vocabulary_without_turns_is_an_error(model, tmp_path):
    content = make_library().to_str().replace("<end_of_turn>", "<unused>")
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the vocabulary has no <end_of_turn>"):
        Conversation(model, tokenizer, {"max_new_tokens": 1}, 100)


# ---- stopping -----------------------------------------------------------------------------------


def test_a_stopped_answer_is_in_the_history_as_far_as_it_came(talk, columns):
    conversation = talk(max_new_tokens=500)
    answer(conversation, "hello")
    pieces = conversation.ask("a b")
    shown = [next(pieces) for _ in range(5)]
    conversation.stop()
    shown += pieces
    assert conversation.last["finish_reason"] == "stopped"
    assert 5 <= len(conversation.last["tokens"]) <= 6
    assert conversation.messages[-1]["content"] == "".join(shown).strip()
    assert conversation.ids[-1] == END
    stats = conversation.stats()
    assert sum(columns) == stats["read_tokens"] == stats["cached_tokens"]
    answer(conversation, "hell")
    stats = conversation.stats()
    assert sum(columns) == stats["read_tokens"] == stats["cached_tokens"]
    begin = conversation._answers[-1]
    tokens = conversation.last["tokens"]
    assert uncached(conversation, conversation.ids[:begin], len(tokens)) == tokens


@pytest.mark.parametrize("call", [1, 3, 9])
@pytest.mark.parametrize("length", [2, 300])
def test_an_interrupt_in_the_midst_of_a_layer_keeps_the_conversation(
    talk, model, monkeypatch, call, length
):
    conversation = talk()
    answer(conversation, "hello")
    ids, messages = conversation.ids, conversation.messages
    layer = type(model.model.layers[0])
    forward = layer.forward
    calls = []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 2 * call:  # in the second layer
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(layer, "forward", interrupted)
    if call == 1:  # while the message is read
        with pytest.raises(KeyboardInterrupt):
            answer(conversation, "ab " * length)
        assert (conversation.ids, conversation.messages) == (ids, messages)
    else:
        answer(conversation, "ab " * length)
        assert len(conversation.last["tokens"]) == call - 1
        assert conversation.last["finish_reason"] == "stopped"
    monkeypatch.undo()
    answer(conversation, "hell")
    begin = conversation._answers[-1]
    tokens = conversation.last["tokens"]
    assert uncached(conversation, conversation.ids[:begin], len(tokens)) == tokens


def test_an_answer_whose_reader_goes_is_kept_as_far_as_it_came(talk):
    conversation = talk()
    pieces = conversation.ask("hello")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1]["content"] == shown.strip()
    assert conversation.ids[-1] == END
    answer(conversation, "a b")
    stats = conversation.stats()
    assert stats["read_tokens"] == stats["cached_tokens"]


def test_a_stop_before_the_first_token_and_a_second_one_interrupt_at_once(talk):
    conversation = talk()
    pieces = conversation.ask("hello")
    with pytest.raises(KeyboardInterrupt):
        conversation.stop()
    next(pieces)
    conversation.stop()
    with pytest.raises(KeyboardInterrupt):
        conversation.stop()


# ---- again --------------------------------------------------------------------------------------


def test_an_answer_again_takes_the_place_of_the_last_one(talk):
    conversation = talk()
    with pytest.raises(CommandError, match="there is no answer yet"):
        conversation.ask_again()
    answer(conversation, "hello")
    first = answer(conversation, "a b")
    ids, read = conversation.ids, conversation.stats()["read_tokens"]
    assert "".join(conversation.ask_again()) == first
    assert conversation.ids == ids
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    # the prompt's last token, and the answer's without its last
    assert conversation.stats()["read_tokens"] - read == 1 + 19


def test_an_answer_again_needs_nothing_from_before_even_where_the_rings_have_forgotten_it(talk):
    conversation = talk(max_new_tokens=400)
    answer(conversation, "hello")
    first = answer(conversation, "a b")  # three times the ring of 128
    read = conversation.stats()["read_tokens"]
    assert "".join(conversation.ask_again()) == first
    stats = conversation.stats()
    assert stats["read_tokens"] - read == 1 + 399
    assert stats["read_again_tokens"] == 0


def test_an_answer_again_is_another_one_when_sampling(talk):
    conversation = talk(seed=3, **WILD)
    first = answer(conversation, "hello")
    second = "".join(conversation.ask_again())
    assert second != first
    assert conversation.messages[-1]["content"] == second.strip()
    same = talk(seed=3, **WILD)
    assert answer(same, "hello") == first, "the seed makes it repeatable"


# ---- room ---------------------------------------------------------------------------------------


def test_a_full_context_cuts_the_answer_and_then_refuses_the_message(talk):
    conversation = talk(context=60, max_new_tokens=500)
    answer(conversation, "hello")
    assert conversation.last["finish_reason"] == "context"
    assert conversation.last["prompt_tokens"] + conversation.last["new_tokens"] == 60
    before = conversation.ids
    with pytest.raises(CommandError, match=r"the context is full: .* room for 60: /reset"):
        conversation.ask("a b")
    assert conversation.ids == before
    conversation.reset()
    answer(conversation, "a b")
    stats = conversation.stats()
    assert stats["read_tokens"] == stats["cached_tokens"] <= 60


def test_an_empty_message_is_an_error(talk):
    with pytest.raises(CommandError, match="the message is empty"):
        talk().ask(" \n")


# ---- files --------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_its_messages(talk):
    conversation = talk(seed=9, **WILD)
    answer(conversation, "hello")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "a b"},
    ]
    other = talk()
    other.replay(messages, conversation.settings())
    assert (other.options, other.seed) == (conversation.options, 10)
    assert other.messages == messages
    text = answer(other, "hell")
    assert other.stats()["read_tokens"] == other.stats()["cached_tokens"]
    assert "".join(other.ask_again()) != text


def test_a_setting_that_is_null_is_none(talk):
    conversation = talk()
    conversation.replay([], {"max_new_tokens": None, "temperature": None})
    assert conversation.options == {"max_new_tokens": 20}
    answer(conversation, "hello")


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([{"role": "assistant", "content": "a"}], {}, "must be 'user'"),
        ([{"role": "user", "content": "a"}], {}, "the last message has no answer"),
        ([{"role": "system", "content": "a"}], {}, "no system role"),
        ([], {"temprature": 1}, "there is no setting 'temprature'"),
        ([], {"temperature": -1}, "temperature is -1"),
        ([], {"seed": 1.5}, "the seed is 1.5"),
        ([{"role": "user", "content": "\ud800"}], {}, "half of a pair of surrogates"),
    ],
)
def test_what_is_no_conversation_is_refused_and_changes_nothing(talk, messages, options, text):
    conversation = talk()
    answer(conversation, "hello")
    before = (conversation.ids, conversation.messages, conversation.options)
    with pytest.raises(ValueError, match=text):
        conversation.replay(messages, options)
    assert (conversation.ids, conversation.messages, conversation.options) == before


# ---- the embedded model -------------------------------------------------------------------------


def test_the_embedded_model_defines_and_remembers_nothing():
    from gemma2 import tiny

    model, tokenizer = tiny.load_causal_lm(), tiny.load_tokenizer()
    conversation = Definitions(model, tokenizer, {"max_new_tokens": 30}, 1024)
    first = answer(conversation, "a small bird")
    answer(conversation, "a tree")
    assert answer(conversation, "a small bird") == first
    assert tokenizer.decode(conversation.ids).startswith("a small bird:")
    with pytest.raises(ValueError, match="remembers no conversation"):
        conversation.replay([])
