"""WordNet 3.0 as training data: synsets, documents with a label per character, the held-out split.

Reads the files `data.{noun,verb,adj,adv}`, `index.*` and `*.exc` of the Debian package
`wordnet-base` (`apt-get install wordnet-base` puts them in /usr/share/wordnet). The formats are
described in wndb(5WN). Nothing here knows about tokens or models.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The 45 lexicographer files, by number: lexnames(5WN).
# fmt: off
CLASSES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather",
    "adj.ppl",
)
# fmt: on

# Labels of the token head; the marker between headword and definition belongs to none of them.
TOKEN_LABELS = ("definition", "example", "headword")
DEFINITION, EXAMPLE, HEADWORD = range(3)

MARKER = ":"
MAX_EXAMPLES = 2
FILES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@dataclass
class Synset:
    """One meaning: its words, definition and example sentences."""

    key: str  # part of speech and offset, such as "n00001740"
    label: int  # index into CLASSES
    lemmas: list[str]
    ranks: list[
        int
    ]  # of each lemma: 1 if this is the lemma's most frequent sense in its part of speech
    definition: str
    examples: list[str]
    hypernyms: list[str] = field(default_factory=list)  # keys
    instance: bool = False  # a named individual (a person, a town), not a kind of thing

    @property
    def pos(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Document:
    """Pieces of text in order with the token head's label; None is not trained or scored."""

    synset: Synset
    pieces: tuple[tuple[str, int | None], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    def label_at(self) -> list[int | None]:
        """The label of each character."""
        return [label for text, label in self.pieces for _ in text]


def read_synsets(folder: Path | str) -> list[Synset]:
    """All synsets of WordNet in file order; ValueError if `folder` has no WordNet."""
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / f"data.{name}").is_file()]
    if missing:
        raise ValueError(
            f"wordnet: {folder} has no data.{missing[0]}: want the folder of the Debian package "
            "wordnet-base, after `apt-get install wordnet-base` it is /usr/share/wordnet"
        )
    synsets = []
    for name, pos in FILES.items():
        ranks = _sense_ranks(folder / f"index.{name}")
        with (folder / f"data.{name}").open(encoding="utf-8") as lines:
            synsets += [_parse(line, pos, ranks) for line in lines if not line.startswith("  ")]
    return synsets


def _sense_ranks(path: Path) -> dict[tuple[str, str], int]:
    """(lemma, offset) -> 1, 2, ...: the order of an index line, most frequent sense first."""
    ranks = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):
                continue
            fields = line.split()
            count = int(fields[2])
            for rank, offset in enumerate(fields[-count:], start=1):
                ranks[fields[0], offset] = rank
    return ranks


def _parse(line: str, pos: str, ranks: dict[tuple[str, str], int]) -> Synset:
    record, _, gloss = line.partition(" | ")
    fields = record.split()
    count = int(fields[3], 16)
    # An adjective may carry its syntactic place: "galore(ip)".
    words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
    pointers = 4 + 2 * count
    links = fields[pointers + 1 : pointers + 1 + 4 * int(fields[pointers])]
    definition, examples = split_gloss(gloss)
    return Synset(
        key=pos + fields[0],
        label=int(fields[1]),
        lemmas=[word.replace("_", " ") for word in words],
        ranks=[ranks.get((word.lower(), fields[0]), 9) for word in words],
        definition=definition,
        examples=examples,
        hypernyms=[
            target_pos + offset
            for symbol, offset, target_pos in zip(links[::4], links[1::4], links[2::4], strict=True)
            if symbol in ("@", "@i")
        ],
        instance="@i" in links[::4],
    )


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """A gloss's definition and its example sentences: `a sound; "he heard a bang"`."""
    gloss = re.sub(r"\s+", " ", gloss).strip().replace("`", "'")
    start = re.search(r'(^|[;:,.]\s*|\s)"', gloss)
    definition, rest = (gloss[: start.start()], gloss[start.start() :]) if start else (gloss, "")
    examples = [example.strip() for example in re.findall(r'"([^"]+)"', rest)]
    return definition.strip(" ;:,"), [example for example in examples if example]


def is_held_out(synset: Synset, percent: int = 5, seed: int = 0) -> bool:
    """Whether a synset is held out: by hash of its definition, so equal ones stay together."""
    words = re.sub(r"[^a-z0-9]+", " ", synset.definition.lower()).strip()
    digest = hashlib.sha256(f"{seed} {words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def split(synsets: list[Synset]) -> tuple[list[Synset], list[Synset]]:
    """(train, held out), without named individuals and without synsets that have no definition."""
    usable = [synset for synset in synsets if synset.definition and not synset.instance]
    train = [synset for synset in usable if not is_held_out(synset)]
    return train, [synset for synset in usable if is_held_out(synset)]


# ---------------------------------------------------------------- documents


def read_exceptions(folder: Path | str) -> dict[str, list[str]]:
    """Irregular forms of a word: {"run": ["ran", "running"]}, of all parts of speech."""
    forms: dict[str, list[str]] = {}
    for name in FILES:
        path = Path(folder) / f"{name}.exc"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                form, *bases = line.split()
                for base in bases:
                    forms.setdefault(base.replace("_", " "), []).append(form.replace("_", " "))
    return forms


class Documents:
    """Writes documents `headword: definition; "example"` for synsets.

    Examples of a synset illustrate one of its words each; a document keeps those with its own
    headword.
    """

    def __init__(self, synsets: list[Synset], exceptions: dict[str, list[str]]) -> None:
        self.by_key = {synset.key: synset for synset in synsets}
        self.exceptions = exceptions

    @functools.lru_cache(maxsize=400_000)  # noqa: B019  one instance, lives as long as the program
    def pattern(self, lemma: str) -> re.Pattern[str]:
        """Finds a lemma in running text, inflected: "run up" also as "ran up" and "running up"."""
        first, *rest = lemma.lower().split(" ")
        forms = [re.escape(form) for form in [first, *self.exceptions.get(first, [])]]
        stem = re.escape(first)
        forms += [
            stem + "(?:s|es|d|ed|ing|er|r|est|st|'s)",
            stem + re.escape(first[-1:]) + "(?:ed|ing|er|est)",
        ]
        if first.endswith("e"):
            forms.append(re.escape(first[:-1]) + "ing")
        if first.endswith("y"):
            forms.append(re.escape(first[:-1]) + "(?:ies|ied|ier|iest)")
        tail = "".join(" " + re.escape(word) for word in rest) + ("(?:s|es)?" if rest else "")
        return re.compile(r"\b(?:" + "|".join(forms) + ")" + tail + r"(?!\w)", re.IGNORECASE)

    def examples_for(self, synset: Synset, lemma: str | None) -> list[str]:
        """At most MAX_EXAMPLES sentences that use `lemma`; without a lemma the first ones."""
        if lemma is None:
            return synset.examples[:MAX_EXAMPLES]
        pattern = self.pattern(lemma)
        return [example for example in synset.examples if pattern.search(example)][:MAX_EXAMPLES]

    def document(self, synset: Synset, head: str = "", lemma: str | None = None) -> Document:
        """The document of `synset` with `head` before the marker (default: lemma, else nothing).

        The headword inside examples is labelled by `lemma`; without one, any lemma of the synset
        counts.
        """
        head = head or lemma or ""
        pieces: list[tuple[str, int | None]] = [(head, HEADWORD)] if head else []
        pieces += [(MARKER, None), (" " + synset.definition, DEFINITION)]
        for example in self.examples_for(synset, lemma):
            pieces.append(('; "', EXAMPLE))
            end = 0
            for start, stop in self._occurrences(example, [lemma] if lemma else synset.lemmas):
                pieces.append((example[end:start], EXAMPLE))
                pieces.append((example[start:stop], HEADWORD))
                end = stop
            pieces.append((example[end:] + '"', EXAMPLE))
        return Document(synset, tuple(pieces))

    def _occurrences(self, text: str, lemmas: list[str]) -> Iterator[tuple[int, int]]:
        spans = sorted(
            match.span() for lemma in lemmas for match in self.pattern(lemma).finditer(text)
        )
        end = 0
        for start, stop in spans:
            if start >= end:
                yield start, stop
                end = stop

    def evaluation_document(self, synset: Synset) -> Document:
        """The one document by which a held-out synset is scored: its first word."""
        return self.document(synset, lemma=synset.lemmas[0])

    def training_document(self, synset: Synset, rng: random.Random) -> Document:
        """A document drawn for one epoch: 55 % a word, 30 % no headword, 15 % (nouns) a phrase.

        Words for which the meaning is the usual one are drawn more often. Documents without a
        headword teach the classifier, which sees none; phrases ("a small bird") teach to define
        what has no entry.
        """
        draw = rng.random()
        if draw < 0.30:
            return self.document(synset)
        if draw < 0.45 and (phrase := self.phrase(synset, rng)):
            return self.document(synset, head=phrase)
        lemma = rng.choices(synset.lemmas, [1.0 / rank for rank in synset.ranks])[0]
        head = lemma
        if synset.pos == "n" and lemma.islower() and rng.random() < 0.15:
            head = with_article(lemma)
        elif synset.pos == "v" and rng.random() < 0.10:
            head = "to " + lemma
        return self.document(synset, head=head, lemma=lemma)

    def phrase(self, synset: Synset, rng: random.Random) -> str | None:
        """A definition's first words, or its adjectives and a more general noun: "a small bird"."""
        if synset.pos != "n":
            return None
        words = genus_phrase(synset.definition)
        if not words:
            return None
        if len(words) > 1 and synset.hypernyms and rng.random() < 0.5:
            general = self.by_key[rng.choice(synset.hypernyms)].lemmas[0]
            words = [*words[: min(2, len(words) - 1)], general]
        if len(words) < 2:
            return None
        phrase = " ".join(words)
        return with_article(phrase) if rng.random() < 0.7 else phrase


# fmt: off
_STOP = frozenset((
    "of", "that", "which", "who", "whose", "with", "used", "for", "in", "having", "by", "to",
    "or", "and", "from", "as", "on", "at", "into", "containing", "made", "where", "when",
    "between", "among", "resulting", "consisting", "usually", "especially", "worn", "found",
    "formed", "not",
))
# fmt: on


def genus_phrase(definition: str) -> list[str]:
    """The first words of a noun's definition, at most five: ["large", "wild", "cat"]."""
    text = re.sub(r"^\([^)]*\)\s*", "", definition)
    text = re.sub(r"^(an?|the|any|one|some)\s+", "", text)
    words: list[str] = []
    for word in text.split(" "):
        bare = word.rstrip(",;:")
        if bare in _STOP or not re.fullmatch(r"[A-Za-z][A-Za-z'-]*", bare):
            break
        words.append(bare)
        if bare != word:
            break
    return words if 1 <= len(words) <= 5 else []


def with_article(phrase: str) -> str:
    return ("an " if phrase[:1].lower() in "aeiou" else "a ") + phrase
