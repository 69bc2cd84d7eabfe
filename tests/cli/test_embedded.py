"""The command with the embedded model: what somebody sees who has just installed the package."""

from __future__ import annotations

import json

import pytest

from gemma2 import cli


@pytest.fixture
def shown(capfd):
    """Runs the command, which must succeed; gives stdout."""

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return run


def test_a_definition_is_written(shown):
    text = shown("generate", "a small bird")
    assert len(text.split()) >= 3
    assert text.endswith("\n")
    assert not text.startswith(" ")


def test_a_definition_ends_of_itself(shown):
    found = json.loads(shown("generate", "--json", "dog"))
    assert found["finish_reason"] == "eos"


def test_a_seed_reproduces_a_definition(shown):
    options = ["generate", "--temperature", "1.2", "--seed"]
    assert shown(*options, "1", "dog") == shown(*options, "1", "dog")
    assert shown(*options, "1", "dog") != shown(*options, "2", "dog")


def test_a_definition_belongs_to_a_class_of_wordnet(shown):
    classes = json.loads(
        shown("classify", "--json", "--top", "45", "a large wild cat with stripes")
    )
    found = classes["classes"]
    assert len(found) == 45
    assert sum(item["probability"] for item in found) == pytest.approx(1, abs=1e-3)
    assert found[0]["label"] == "noun.animal"
    text = shown("classify", "move very fast on foot")
    assert text.split()[1].startswith("verb.")


def test_tokens_are_told_apart(shown):
    found = json.loads(shown("classify", "--tokens", "--json", "dog: a small animal that barks"))
    labels = [item["label"] for item in found["tokens"]]
    assert labels[0] == "headword"
    assert labels[-1] == "definition"


def test_info_describes_the_embedded_model(shown):
    model = json.loads(shown("info", "--json"))["model"]
    assert model["name"] == "the embedded model"
    assert 3e6 <= model["parameters"] <= 6e6
    assert "the embedded model" in shown("info")


def test_bench_measures_the_embedded_model(shown, capfd):
    assert cli.main(["bench", "--runs", "1", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["results"]
    assert row["model"] == "the embedded model"
    assert row["dtype"] == "bfloat16"
