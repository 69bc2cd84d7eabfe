from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def make(rows, vocab, dtype=torch.float32, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)


def step(n):
    return torch.tensor(n, dtype=torch.int64)


def check(logits, history=None, seed=0, n=0, **options):
    """The token is the reference's, or as good as it to within what float32 can tell apart."""
    tokens = ops.sample(logits, history, seed, step(n), **options)
    assert tokens.dtype == torch.int64
    assert tokens.shape == logits.shape[:1]
    scores = reference.kept_scores(logits, history, **options).double()
    if options.get("temperature", 1.0) > 0:
        scores = scores + reference.gumbel(*scores.shape, seed, n)
    if len(tokens) == 0:
        return
    best = scores.amax(-1)
    chosen = scores.gather(-1, tokens[:, None])[:, 0]
    close = 4e-6 * best.abs().clamp(min=1.0)
    if options.get("temperature", 1.0) > 0:
        close = close + 1e-6 * logits.float().abs().amax() / options.get("temperature", 1.0)
    assert (best - chosen <= close).all(), f"{tokens} instead of {scores.argmax(-1)}, {options}"


def test_philox_gives_the_published_numbers():
    """Random123's known answers."""
    low = 0xFFFFFFFF
    known = [
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([low] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in known:
        out = reference.philox(torch.tensor(counter), key)
        assert " ".join(f"{int(w):08x}" for w in out) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012])
@pytest.mark.parametrize("n", [0, 7, 2**32 - 1, 2**40 + 3, -1])
def test_the_random_integers_are_the_references(seed, n):
    """With equal logits the token is where the largest of the row's integers is."""
    for vocab in (1, 5, 64, 1000):
        logits = torch.zeros(6, vocab)
        words = reference.gumbel(6, vocab, seed, n)
        assert torch.equal(ops.sample(logits, None, seed, step(n)), words.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}],
    ids=str,
)
def test_each_row_may_have_a_step_of_its_own(options):
    logits = make(4, 50001)
    steps = [3, 0, 2**40 + 5, 3]
    tokens = ops.sample(logits, None, 9, torch.tensor(steps), **options)
    strided = torch.tensor([steps, [7] * 4]).T.contiguous()[:, 0]
    assert strided.stride() == (2,)
    assert torch.equal(ops.sample(logits, None, 9, strided, **options), tokens)
    for row, n in enumerate(steps):
        assert tokens[row] == ops.sample(logits, None, 9, step(n), **options)[row], row


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_matches_the_reference_for_any_shape_dtype_and_option(data):
    draw = data.draw
    vocab = draw(st.sampled_from([1, 2, 7, 16, 33, 64, 100, 515, 2000]))
    rows = draw(st.integers(0, 4))
    logits = make(rows, vocab, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    if draw(st.booleans()) and vocab > 1:
        logits[:, :: draw(st.integers(2, 5))] = -torch.inf
        logits[:, -1] = 1.0
    history = None
    if draw(st.booleans()):
        history = torch.randint(-1, vocab, (rows, draw(st.integers(0, 5))))
    check(
        logits,
        history,
        draw(st.integers(-(2**63), 2**63 - 1)),
        draw(st.integers(0, 2**40)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, 1, 3, 50, 300, 5000])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 50},
        {"top_k": 256, "top_p": 0.9},
        {"top_p": 0.95, "temperature": 0.8},
        {"min_p": 0.02, "temperature": 3.0},
        {"top_p": 0.99, "temperature": 50.0},  # nearly flat: almost all are candidates
    ],
    ids=str,
)
def test_matches_the_reference_on_a_whole_vocabulary(dtype, options):
    logits = ops.softcap(make(1, 256000, dtype), 30.0)
    history = torch.randint(0, 256000, (1, 40))
    check(logits, history, seed=5, n=3, repetition_penalty=1.2, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_neither_threads_nor_other_rows_show(options):
    logits = make(3, 50001)
    alone = ops.sample(logits[:1], None, 9, step(2), **options)
    tokens = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tokens.append(ops.sample(logits, None, 9, step(2), **options))
    assert torch.equal(*tokens)
    assert torch.equal(tokens[0][:1], alone)


def quantile_of_chi_square(freedom, z=4.75):
    """What one run in a million exceeds (Wilson and Hilferty's approximation)."""
    a = 2 / (9 * freedom)
    return freedom * (1 - a + z * a**0.5) ** 3


def chi_square(logits, probabilities, rows=1000, steps=40, **options):
    counts = torch.zeros(logits.shape[0], dtype=torch.float64)
    batch = logits.expand(rows, -1).contiguous()
    for n in range(steps):
        tokens = ops.sample(batch, None, 42, step(n), **options)
        counts += torch.bincount(tokens, minlength=len(counts))
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities > 0
    expected = probabilities[likely] * rows * steps
    statistic = ((counts[likely] - expected) ** 2 / expected).sum()
    return statistic, quantile_of_chi_square(int(likely.sum()) - 1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature):
    logits = make(1, 23, spread=1.5)[0]
    probabilities = (logits.double() / temperature).softmax(-1)
    statistic, limit = chi_square(logits, probabilities, temperature=temperature)
    assert statistic < limit


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_tokens_follow_the_softmax_of_what_is_kept(options):
    logits = make(1, 23, spread=1.5)[0]
    kept = reference.kept_scores(logits[None], **options)[0]
    assert 1 < kept.isfinite().sum() < 20
    statistic, limit = chi_square(logits, kept.softmax(-1), **options)
    assert statistic < limit


def test_successive_steps_and_neighbouring_rows_are_independent():
    logits = torch.zeros(4000, 4)
    first, second = (ops.sample(logits, None, 3, step(n)) for n in (0, 1))
    for a, b in ((first, second), (first[:-1], first[1:])):
        counts = torch.bincount(4 * a + b, minlength=16).double()
        expected = len(a) / 16
        assert ((counts - expected) ** 2 / expected).sum() < quantile_of_chi_square(15)


def test_the_same_arguments_give_the_same_tokens_and_another_seed_or_step_others():
    logits = make(200, 50)
    tokens = ops.sample(logits, None, 1, step(1))
    assert torch.equal(tokens, ops.sample(logits, None, 1, step(1)))
    assert not torch.equal(tokens, ops.sample(logits, None, 2, step(1)))
    assert not torch.equal(tokens, ops.sample(logits, None, 1, step(2)))


def test_greedy_takes_the_first_of_the_largest():
    for vocab in (3, 100, 40000):
        logits = torch.zeros(2, vocab)
        assert ops.sample(logits, None, 0, step(0), 0.0).tolist() == [0, 0]
        logits[0, vocab // 2 :] = 5.0
        logits[1, -1] = 5.0
        assert ops.sample(logits, None, 0, step(0), 0.0).tolist() == [vocab // 2, vocab - 1]


def drawn(logits, **options):
    """Every token that comes in many draws."""
    batch = logits.expand(2000, -1).contiguous()
    return set(ops.sample(batch, None, 17, step(0), **options).tolist())


def test_top_k_keeps_all_that_equal_the_kth():
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    assert drawn(logits, top_k=2) == {0, 2, 3, 4}
    assert drawn(logits, top_k=1) == {0}
    assert drawn(logits, top_k=6) == set(range(6))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert drawn(logits, top_p=0.5) == {0}
    assert drawn(logits, top_p=0.51) == {0, 1}
    assert drawn(logits, top_p=0.75) == {0, 1}
    assert drawn(logits, top_p=0.76) == {0, 1, 3}  # of equal ones the last first, as transformers
    assert drawn(logits, top_p=0.9) == {0, 1, 2, 3}
    assert drawn(logits, top_p=1e-9) == {0}
    assert drawn(torch.zeros(10), top_p=0.6) == {4, 5, 6, 7, 8, 9}


def test_min_p_is_relative_to_the_largest_probability():
    logits = torch.tensor([0.6, 0.31, 0.06, 0.03]).log()
    assert drawn(logits, min_p=0.5) == {0, 1}
    assert drawn(logits, min_p=0.09) == {0, 1, 2}
    assert drawn(logits, min_p=1.0) == {0}


def test_the_penalty_counts_a_token_once_and_knows_the_sign():
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.0]])
    history = torch.tensor([[0, 0, 1, -1]])
    kept = reference.kept_scores(logits, history, repetition_penalty=2.0)
    assert kept.tolist() == [[1.0, -2.0, 1.5, 0.0]]
    assert ops.sample(logits, history, 0, step(0), 0.0, repetition_penalty=2.0).item() == 2
    assert ops.sample(logits, history, 0, step(0), 0.0, repetition_penalty=1.3).item() == 0
    check(make(4, 300), torch.randint(-1, 300, (4, 100)), repetition_penalty=1.7)


def test_minus_infinity_is_never_drawn():
    logits = torch.full((1000, 40), -torch.inf)
    logits[:, 13] = -1e30
    logits[:, 29] = -1e30
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}):
        tokens = ops.sample(logits, None, 1, step(0), **options)
        assert set(tokens.tolist()) <= {13, 29}


def test_processors_run_in_the_order_of_transformers():
    """Repetition penalty, temperature, top-k, top-p, min-p, each as transformers means it."""
    generation = pytest.importorskip("transformers.generation.logits_process")
    for seed, temperature, top_k, top_p, min_p, penalty in itertools.product(
        range(3), (0.5, 1.7), (4, 30), (0.6, 0.95), (0.02, 0.2), (1.5,)
    ):
        logits = make(3, 200, seed=seed, spread=2.0)
        history = torch.randint(0, 200, (3, 60), generator=torch.Generator().manual_seed(seed))
        expected = logits.clone()
        for processor in (
            generation.RepetitionPenaltyLogitsProcessor(penalty),
            generation.TemperatureLogitsWarper(temperature),
            generation.TopKLogitsWarper(top_k),
            generation.TopPLogitsWarper(top_p),
            generation.MinPLogitsWarper(min_p),
        ):
            expected = processor(history, expected)
        options = dict(zip(OPTIONS, (temperature, top_k, top_p, min_p, penalty), strict=True))
        kept = reference.kept_scores(logits, history, **options)
        assert torch.equal(kept.isfinite(), expected.isfinite())
        torch.testing.assert_close(kept[kept.isfinite()].float(), expected[expected.isfinite()])
        for row in range(3):
            many = logits[row].expand(300, -1).contiguous()
            seen = history[row].expand(300, -1).contiguous()
            tokens = ops.sample(many, seen, seed, step(0), **options)
            assert expected[row, tokens].isfinite().all()


def test_order_matters_where_it_is_tested():
    """Temperature before top-p: heat keeps more; top-k before top-p: shares of the k."""
    logits = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert drawn(logits, top_p=0.8) == {0}
    assert len(drawn(logits, top_p=0.8, temperature=5.0)) > 3
    flat = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert drawn(flat, top_k=2, top_p=0.5) == {0}


def test_strided_logits_equal_contiguous_ones():
    logits = make(6, 90)
    expected = ops.sample(logits[::2, :70].contiguous(), None, 0, step(0))
    assert torch.equal(ops.sample(logits[::2, :70], None, 0, step(0)), expected)
    assert torch.equal(
        ops.sample(logits.T.contiguous().T, None, 0, step(0)), ops.sample(logits, None, 0, step(0))
    )


def test_opcheck():
    logits = make(3, 40)
    history = torch.randint(-1, 40, (3, 4))
    for args in (
        (logits, None, 1, step(0)),
        (logits, history, 1, step(0), 0.7, 5, 0.9, 0.01, 1.2),
        (logits, None, 1, torch.tensor([0, 2, 1])),
    ):
        torch.library.opcheck(torch.ops.gemma2.sample.default, args)


def poisoned(value, at=3):
    logits = make(2, 40)
    logits[1, at] = value
    return logits


S = step(0)
BAD = [
    (lambda x: ops.sample(x[0], None, 0, S), "logits has shape [40]: [B, V] is wanted"),
    (lambda x: ops.sample(x[:, :0], None, 0, S), "logits has shape [2, 0]: [B, V] with 1 <= V"),
    (lambda x: ops.sample(x.double(), None, 0, S), "logits is float64"),
    (lambda x: ops.sample(x.long(), None, 0, S), "logits is int64"),
    (lambda x: ops.sample(x, None, 0, S.int()), "step is int32: int64 is wanted"),
    (
        lambda x: ops.sample(x, None, 0, torch.zeros(3).long()),
        "step has shape [3]: a scalar is wanted, or [B] = [2]",
    ),
    (
        lambda x: ops.sample(x, None, 0, torch.zeros(2, 1).long()),
        "step has shape [2, 1]: a scalar is wanted",
    ),
    (lambda x: ops.sample(x, None, 0, S, -1.0), "temperature is -1: a number >= 0 is wanted"),
    (lambda x: ops.sample(x, None, 0, S, float("nan")), "temperature is nan"),
    (lambda x: ops.sample(x, None, 0, S, float("inf")), "temperature is inf"),
    (lambda x: ops.sample(x, None, 0, S, 1e-40), "temperature is 1e-40: too small"),
    (lambda x: ops.sample(x, None, 0, S, top_k=-1), "top_k is -1: a number >= 0 is wanted"),
    (lambda x: ops.sample(x, None, 0, S, top_p=0.0), "top_p is 0: 0 < top_p <= 1 is wanted"),
    (lambda x: ops.sample(x, None, 0, S, top_p=1.1), "top_p is 1.1"),
    (lambda x: ops.sample(x, None, 0, S, top_p=float("nan")), "top_p is nan"),
    (lambda x: ops.sample(x, None, 0, S, min_p=-0.1), "min_p is -0.1: 0 <= min_p <= 1 is wanted"),
    (lambda x: ops.sample(x, None, 0, S, min_p=1.5), "min_p is 1.5"),
    (lambda x: ops.sample(x, None, 0, S, repetition_penalty=0.0), "repetition_penalty is 0"),
    (lambda x: ops.sample(x, None, 0, S, repetition_penalty=-2.0), "repetition_penalty is -2"),
    (lambda x: ops.sample(x, torch.zeros(1, 3).long(), 0, S), "history has shape [1, 3]"),
    (lambda x: ops.sample(x, torch.zeros(2).long(), 0, S), "history has shape [2]"),
    (lambda x: ops.sample(x, torch.zeros(2, 3), 0, S), "history is float32: int64 is wanted"),
    (lambda x: ops.sample(x, torch.full((2, 3), 40), 0, S), "history holds 40"),
    (
        lambda x: ops.sample(poisoned(float("nan")), None, 0, S),
        "row 1 of logits has NaN or +infinity",
    ),
    (lambda x: ops.sample(poisoned(float("inf"), 39), None, 0, S), "row 1 of logits has NaN"),
    (
        lambda x: ops.sample(x * 0 - torch.inf, None, 0, S),
        "row 0 of logits is -infinity everywhere",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match="sample") as error:
        call(make(2, 40))
    assert text in str(error.value)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str
)
def test_every_path_finds_nan_and_emptiness(options):
    with pytest.raises(ValueError, match="row 1 of logits has NaN"):
        ops.sample(poisoned(float("nan")), None, 0, S, **options)
    with pytest.raises(ValueError, match="-infinity everywhere"):
        ops.sample(torch.full((1, 40), -torch.inf), None, 0, S, **options)
