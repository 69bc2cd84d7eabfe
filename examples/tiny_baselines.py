"""What the embedded model has to beat: a 5-gram model, a bag of words, a token with its neighbours.

`train_tiny.py` fits them on the same training data and scores them on the same held-out documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tiny_data import BOS, IGNORE, Row

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class KneserNey:
    """Interpolated modified Kneser-Ney n-gram model of token rows (Chen and Goodman, 1998).

    An n-gram is an index: of order 1 the token, of order n the rank of (index of its first n - 1
    tokens, last token) among those seen. No n-gram reaches over the start of a row.
    """

    def __init__(self, rows: Sequence[Row], vocab_size: int, order: int = 5) -> None:
        self.vocab_size = vocab_size
        self.order = order
        tokens, position = _flatten(rows)
        self.keys: list[Ints] = [np.arange(vocab_size)]  # of each order, sorted
        raw_counts: list[Ints] = [np.bincount(tokens, minlength=vocab_size)]
        starts_row: list[NDArray[np.bool_]] = [np.arange(vocab_size) == BOS]
        suffixes: list[Ints] = [
            np.zeros(vocab_size, np.int64)
        ]  # of each n-gram, without its first token
        index = tokens
        for n in range(2, order + 1):
            at = np.flatnonzero(position >= n - 1)
            keys, first, inverse, counts = np.unique(
                index[at - 1] * vocab_size + tokens[at],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            self.keys.append(keys)
            raw_counts.append(counts)
            starts_row.append(position[at[first]] == n - 1)
            suffixes.append(index[at[first]])
            index = np.full(len(tokens), -1)
            index[at] = inverse
        self.tables = []
        for n in range(1, order + 1):
            if n == order:
                counts = raw_counts[-1]
            else:
                # Lower orders count the different tokens in front; a start has none in front.
                in_front = np.bincount(suffixes[n], minlength=len(self.keys[n - 1]))
                counts = np.where(starts_row[n - 1], raw_counts[n - 1], in_front)
            if n == 1:
                counts[BOS] = 0  # is never predicted
            contexts = self.keys[n - 1] // vocab_size if n > 1 else np.zeros(vocab_size, np.int64)
            self.tables.append(self._table(counts, contexts, len(self.keys[n - 2]) if n > 1 else 1))

    @staticmethod
    def _table(counts: Ints, contexts: Ints, n_contexts: int) -> tuple[Floats, Floats]:
        """(discounted probability of each n-gram, weight of the lower order by context)."""
        n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discount = np.clip(discounts, 0.0, [0, 1, 2, 3])[np.minimum(counts, 3)]
        total = np.bincount(contexts, counts, n_contexts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts - discount) / total[contexts], np.bincount(
                contexts, discount, n_contexts
            ) / total

    def log_probabilities(self, rows: Sequence[Row]) -> Floats:
        """Natural logarithm of the probability of each token that is a target, in order."""
        tokens, position = _flatten(rows)
        first, backoff = self.tables[0]
        probability = first[tokens] + backoff[0] / self.vocab_size
        index = tokens
        for n in range(2, self.order + 1):
            terms, weights = self.tables[n - 1]
            context = np.full(len(tokens), -1)
            inside = np.flatnonzero(position >= n - 1)
            context[inside] = index[inside - 1]
            known = np.flatnonzero(context >= 0)
            known = known[np.isfinite(weights[context[known]])]
            key = context[known] * self.vocab_size + tokens[known]
            found = np.searchsorted(self.keys[n - 1], key).clip(max=len(self.keys[n - 1]) - 1)
            seen = self.keys[n - 1][found] == key
            probability[known] = (
                np.where(seen, terms[found], 0.0) + weights[context[known]] * probability[known]
            )
            index = np.full(len(tokens), -1)
            index[known[seen]] = found[seen]
        return np.log(probability[np.concatenate([np.array(row.is_target) for row in rows])])

    def perplexity(self, rows: Sequence[Row]) -> float:
        return math.exp(-self.log_probabilities(rows).mean())


def _flatten(rows: Sequence[Row]) -> tuple[Ints, Ints]:
    tokens = np.concatenate([np.array(row.ids, np.int64) for row in rows])
    return tokens, np.concatenate([np.arange(len(row)) for row in rows])


def majority(train_labels: Sequence[int], held_out_labels: Sequence[int]) -> float:
    """Accuracy of always giving the most frequent training label."""
    most = np.bincount(np.asarray(train_labels)).argmax()
    return float((np.asarray(held_out_labels) == most).mean())


def bag_of_words(
    train: tuple[Sequence[str], Sequence[int]], held_out: tuple[Sequence[str], Sequence[int]]
) -> float:
    """Accuracy of a logistic regression over tf-idf weighted words of the whole gloss."""
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10.0, max_iter=200, tol=1e-3)
    model.fit(words.fit_transform(train[0]), train[1])
    return float(model.score(words.transform(held_out[0]), held_out[1]))


def neighbours(train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> tuple[Ints, Ints]:
    """(predicted, true) labels by a logistic regression over a token and its two neighbours."""
    features, labels = _window(train, vocab_size)
    model = LogisticRegression(C=10.0, max_iter=200, tol=1e-3)
    model.fit(features, labels)
    features, labels = _window(held_out, vocab_size)
    return model.predict(features), labels


def _window(rows: Sequence[Row], vocab_size: int) -> tuple[sparse.csr_matrix, Ints]:
    """One-hot features [tokens, 3 vocab_size] and labels [tokens], of tokens with a label."""
    columns, labels = [], []
    for row in rows:
        for at in range(1, len(row) - 1):
            if row.labels[at] != IGNORE:
                columns.append(
                    [row.ids[at - 1], vocab_size + row.ids[at], 2 * vocab_size + row.ids[at + 1]]
                )
                labels.append(row.labels[at])
    flat = np.array(columns, np.int64).reshape(-1)
    pointers = np.arange(0, len(flat) + 1, 3)
    shape = (len(labels), 3 * vocab_size)
    return sparse.csr_matrix((np.ones(len(flat), np.float32), flat, pointers), shape), np.array(
        labels
    )
