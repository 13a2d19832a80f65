"""Text augmentation: how often, what is never touched, and that a change depends on (seed, epoch, example) alone."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastft.data import (
    Augmented,
    AugmentingCollator,
    ReplayMixer,
    SpanMasking,
    SynonymReplacement,
    TextAugment,
    TokenDropout,
)
from fastft.data.text import Tokens, read_synonyms

pytest.importorskip("transformers")

from augment_cases import Padded, byte_pairs, texts, word_pieces

TABLE = {"good": ["great", "fine"], "film": ["movie"], "slow": ["unhurried"], "feel": ["was"]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_pieces()


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(texts(200))]


STEPS: dict[str, Callable[[Any], Any]] = {
    "token dropout": lambda tokenizer: TokenDropout(0.3),
    "span masking": lambda tokenizer: SpanMasking(0.3, 2.5),
    "synonyms": lambda tokenizer: SynonymReplacement(0.6, TABLE, tokenizer),
}


def augment(tokenizer: Any, *names: str) -> TextAugment:
    return TextAugment(tokenizer, *(STEPS[name](tokenizer) for name in names or STEPS))


def collator(tokenizer: Any, *names: str, seed: int = 0) -> AugmentingCollator:
    return AugmentingCollator(Padded(tokenizer), augment(tokenizer, *names), seed)


def unpadded(batch: Any) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# -- what is changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_only_words_change_and_only_input_ids(name: str, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    plain = Padded(tokenizer)(rows)
    changed = collator(tokenizer, name)(rows)
    assert changed.keys() == plain.keys()
    for key in plain:
        assert changed[key].dtype == plain[key].dtype and changed[key].shape == plain[key].shape
        if key != "input_ids":
            assert torch.equal(changed[key], plain[key])
    different = changed["input_ids"] != plain["input_ids"]
    special = torch.isin(plain["input_ids"], torch.tensor(tokenizer.all_special_ids))
    assert different.any() and not (different & special).any()
    if name != "synonyms":
        assert (changed["input_ids"][different] == tokenizer.mask_token_id).all()


@pytest.mark.parametrize("p", [0.05, 0.3])
@pytest.mark.parametrize("name", ["token dropout", "span masking"])
def test_tokens_are_masked_with_probability_p_wherever_they_are(name: str, p: float, tokenizer: Any) -> None:
    step = {"token dropout": TokenDropout(p), "span masking": SpanMasking(p, 3.0)}[name]
    length, count = 12, 4000
    ids = [[5 + i % 20 for i in range(length)] for _ in range(count)]
    dataset = Augmented([{"input_ids": row} for row in ids], TextAugment(tokenizer, step), seed=1)
    masked = np.array([row["input_ids"] for row in dataset.__getitems__(range(count))]) == tokenizer.mask_token_id
    error = (p * (1 - p) / count) ** 0.5
    assert np.abs(masked.mean(0) - p).max() < 4.5 * error  # at each place, the first and the last too
    runs = np.diff(np.flatnonzero(np.diff(np.pad(masked[:, 2:-2], ((0, 0), (1, 1))).ravel())))[::2]
    together = (masked[:, :-1] & masked[:, 1:]).mean()  # P(two in a row) = p·(1 − 1/mean length)
    wanted = p * p if name == "token dropout" else p * (1 - 1 / 3)
    assert abs(together - wanted) < 6 * (wanted / count / length) ** 0.5 * 2
    assert runs.max() >= (2 if name == "token dropout" else 5)


def test_one_token_rows_are_masked_as_often(tokenizer: Any) -> None:
    dataset = Augmented([{"input_ids": [6]}] * 4000, TextAugment(tokenizer, SpanMasking(0.2, 3.0)))
    masked = [row["input_ids"] == [tokenizer.mask_token_id] for row in dataset.__getitems__(range(4000))]
    assert abs(np.mean(masked) - 0.2) < 4.5 * (0.2 * 0.8 / 4000) ** 0.5


def test_steps_draw_different_random_numbers(tokenizer: Any) -> None:
    ids = [{"input_ids": list(range(5, 25))}] * 500
    twice = Augmented(ids, TextAugment(tokenizer, TokenDropout(0.3), TokenDropout(0.3)))
    masked = np.array([row["input_ids"] for row in twice.__getitems__(range(500))]) == tokenizer.mask_token_id
    assert abs(masked.mean() - (1 - 0.7**2)) < 0.02
    # Neighbours in place, and rows in a row, are independent as well.
    flat = masked[:, :].astype(float) - masked.mean()
    for shifted in (flat[:, 1:] * flat[:, :-1], flat[1:] * flat[:-1]):
        assert abs(shifted.mean()) < 4.5 * 0.25 / shifted.size**0.5


def test_synonyms_replace_whole_words_of_the_table(tokenizer: Any) -> None:
    step = SynonymReplacement(0.999999, TABLE, tokenizer)
    assert step.words == 3  # "unhurried" is no token, so "slow" cannot be replaced
    dataset = Augmented(
        [dict(tokenizer(text)) for text in ["good film, goods feels feel slow"] * 50], TextAugment(tokenizer, step)
    )
    found = Counter(tokenizer.decode(dataset[i]["input_ids"], skip_special_tokens=True) for i in range(50))
    assert set(found) == {"great movie, goods feels was slow", "fine movie, goods feels was slow"}
    assert min(found.values()) > 10


def test_synonyms_know_where_byte_pair_words_begin() -> None:
    tokenizer = byte_pairs()
    step = SynonymReplacement(0.999999, {"good": ["great"]}, tokenizer)
    dataset = Augmented(
        [dict(tokenizer(text)) for text in ("good good", "Good feel feeling", "feelgood good.", "<|end|>good")],
        TextAugment(tokenizer, step),
    )
    found = [tokenizer.decode(row["input_ids"]) for row in dataset.__getitems__(range(4))]
    assert found == ["great great", "Great feel feeling", "feelgood great.", "<|end|>great"]


def test_what_a_special_tokens_mask_marks_stays(tokenizer: Any) -> None:
    row = tokenizer("good good good good", return_special_tokens_mask=True)
    row["special_tokens_mask"][2:4] = [1, 1]
    protected = AugmentingCollator(Padded(tokenizer), TextAugment(tokenizer, TokenDropout(0.999999)))
    mask, good = tokenizer.mask_token_id, row["input_ids"][2]
    expected = [row["input_ids"][0], mask, good, good, mask, row["input_ids"][-1]]
    assert protected([row])["input_ids"].tolist() == [expected]
    assert Augmented([row], protected.augment)[0]["input_ids"] == expected


def test_labels_that_a_collator_makes_are_of_the_text_as_it_was(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    import transformers

    inner = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ids = [{"input_ids": row["input_ids"]} for row in rows]
    batch = AugmentingCollator(inner, augment(tokenizer, "token dropout"))(ids)
    plain = inner(ids)
    assert torch.equal(batch["labels"], plain["labels"]) and not torch.equal(batch["input_ids"], plain["input_ids"])


def test_a_tokenizer_without_a_mask_token_uses_its_unknown_one() -> None:
    tokenizer = byte_pairs()
    assert tokenizer.mask_token_id is None
    dataset = Augmented([{"input_ids": [5, 6]}], TextAugment(tokenizer, TokenDropout(0.999999)))
    assert dataset[0]["input_ids"] == [tokenizer.unk_token_id] * 2
    dataset = Augmented([{"input_ids": [5, 6]}], TextAugment(tokenizer, TokenDropout(0.999999), mask_id=9))
    assert dataset[0]["input_ids"] == [9, 9]


# -- empty and short -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
@given(lengths=st.lists(st.integers(0, 3), max_size=6), probability=st.sampled_from([0.0, 0.2]))
@settings(deadline=None, max_examples=25)
def test_any_rows_keep_their_lengths(name: str, tokenizer: Any, lengths: list[int], probability: float) -> None:
    step = {
        "token dropout": TokenDropout(probability),
        "span masking": SpanMasking(probability),
        "synonyms": SynonymReplacement(probability, TABLE, tokenizer),
    }[name]
    rows = [{"input_ids": list(range(5, 5 + length))} for length in lengths]
    found = Augmented(rows, TextAugment(tokenizer, step)).__getitems__(range(len(rows)))
    assert [len(row["input_ids"]) for row in found] == lengths
    if probability == 0:
        assert found == rows


def test_batches_of_nothing(tokenizer: Any) -> None:
    chain = augment(tokenizer)
    for shape in ((0, 5), (2, 0), (1, 1)):
        ids = torch.full(shape, tokenizer.pad_token_id)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
        chain.batch(batch, lambda keys: keys)
        assert torch.equal(batch["input_ids"], ids)


# -- what a change depends on --------------------------------------------------------------------------------


def test_it_is_off_at_eval(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    collate = collator(tokenizer)
    dataset = Augmented(rows, collate.augment)
    plain = Padded(tokenizer)(rows)
    for switch in (collate, dataset):
        switch.eval()
        assert not switch.training
    assert torch.equal(collate(rows)["input_ids"], plain["input_ids"])
    assert [dataset[i] for i in range(len(rows))] == rows
    for switch in (collate, dataset):
        switch.train()
    assert not torch.equal(collate(rows)["input_ids"], plain["input_ids"])
    assert dataset[5]["input_ids"] != rows[5]["input_ids"] or dataset[6]["input_ids"] != rows[6]["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 3}, {"num_workers": 2, "persistent_workers": True}]
)
def test_changes_are_the_same_with_any_number_of_workers(
    options: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    alone = collator(tokenizer, seed=7)
    collate = collator(tokenizer, seed=7)
    loader: Any = DataLoader(rows, batch_size=16, collate_fn=collate, **options)  # type: ignore[arg-type]
    for epoch in (0, 1):
        collate.set_epoch(epoch)
        alone.set_epoch(epoch)
        found = [row for batch in loader for row in unpadded(batch)]
        torch.manual_seed(epoch)  # who else draws random numbers does not matter
        assert found == unpadded(alone(rows))
    collate.eval()  # workers see this too
    assert [row for batch in loader for row in unpadded(batch)] == [row["input_ids"] for row in rows]


def test_changes_do_not_depend_on_the_batch_or_its_padding(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    collate = collator(tokenizer)
    together = unpadded(collate(rows))
    assert [unpadded(collate([row]))[0] for row in rows] == together
    tokenizer.padding_side = "left"
    try:
        assert unpadded(collate(rows)) == together
    finally:
        tokenizer.padding_side = "right"
    plain = Padded(tokenizer)(rows)
    plain.pop("attention_mask")  # padding is then known by its token
    collate.augment.batch(plain, collate.keys)
    kept = [ids[ids != tokenizer.pad_token_id].tolist() for ids in plain["input_ids"]]
    assert kept == together


def test_seed_and_epoch_and_place_matter(tokenizer: Any) -> None:
    row = {"input_ids": [5 + i % 20 for i in range(64)]}

    def changed(seed: int, epoch: int, index: int) -> tuple[int, ...]:
        dataset = Augmented([row] * 3, augment(tokenizer, "token dropout"), seed)
        dataset.set_epoch(epoch)
        return tuple(dataset[index]["input_ids"])

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 - 1, 5, 2)]
    assert len({changed(*key) for key in keys}) == len(keys)
    assert changed(0, 1, 0) == changed(0, 1, 0)


def test_a_dataset_changes_an_example_by_its_index_alone(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    dataset = Augmented(rows, augment(tokenizer), seed=3)
    dataset.set_epoch(2)
    one_by_one = [dataset[i]["input_ids"] for i in range(len(rows))]
    assert [row["input_ids"] for row in dataset.__getitems__(range(len(rows)))] == one_by_one
    assert dataset[-1] == dataset[len(rows) - 1]
    assert rows[5]["input_ids"] == Augmented(rows, augment(tokenizer)).dataset[5]["input_ids"]  # the original stays
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[i]["input_ids"] for i in range(len(rows))] == one_by_one


def test_arrays_and_tensors_stay_what_they_are(tokenizer: Any) -> None:
    ids = [5 + i % 20 for i in range(40)]
    forms = [ids, np.array(ids, np.int32), torch.tensor(ids)]
    found = [Augmented([{"input_ids": form}], augment(tokenizer, "token dropout"))[0]["input_ids"] for form in forms]
    assert isinstance(found[0], list) and found[1].dtype == np.int32 and found[2].dtype == torch.int64
    assert found[0] == found[1].tolist() == found[2].tolist() != ids


def test_it_works_under_a_mixer_for_the_target_alone(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    target = Augmented(rows[:60], augment(tokenizer, "token dropout"))
    mixer = ReplayMixer(target, rows[60:80], 0.25)
    mixer.set_epoch(3)
    assert target.epoch == 3
    found = [mixer[i]["input_ids"] for i in range(len(mixer))]
    assert found == [row["input_ids"] for row in mixer.__getitems__(list(range(len(mixer))))]
    old = [row["input_ids"] for row in rows[60:80]]
    assert sum(tokenizer.mask_token_id in row for row in found) > 30
    assert all(row in old for row, place in zip(found, mixer.order(), strict=True) if place >= 60)


def test_any_function_of_tokens_is_a_step(tokenizer: Any) -> None:
    def upside_down(tokens: Tokens) -> Any:
        return np.where(tokens.free, 30 - tokens.ids, tokens.ids)

    dataset = Augmented([{"input_ids": [2, 6, 7, 3]}], TextAugment(tokenizer, upside_down))
    assert dataset[0]["input_ids"] == [2, 24, 23, 3]


# -- from the command line -----------------------------------------------------------------------------------


def test_a_spec_names_the_steps(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("good\tgreat\tfine\n\nfilm\tmovie\ngood\tnot bad\n", encoding="utf-8")
    assert read_synonyms(path) == {"good": ["great", "fine", "not bad"], "film": ["movie"]}
    spec = f"token_dropout=0.1, span_masking=0.2,span_masking=0.3:2,synonyms=0.4:{path}"
    assert TextAugment.split_spec(spec)[2:] == [["span_masking", "0.3", "2"], ["synonyms", "0.4", str(path)]]
    made = TextAugment.from_spec(spec, tokenizer)
    assert made.steps[:3] == (TokenDropout(0.1), SpanMasking(0.2), SpanMasking(0.3, 2.0))
    synonyms = made.steps[3]
    assert isinstance(synonyms, SynonymReplacement) and synonyms.p == 0.4 and synonyms.words == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "augment: expected one of token_dropout, span_masking, synonyms, got ''"),
        ("token_dropuot=0.1", "got 'token_dropuot'; closest: token_dropout"),
        ("token_dropout", "augment: token_dropout=: could not convert string to float"),
        (
            "token_dropout=2",
            r"augment: token_dropout=2: p: expected a number from 0 to below 1, got 2\.0",
        ),
        ("token_dropout=0.1:3", "augment: token_dropout=0.1:3: "),
        ("span_masking=0.9:3", r"mean_length: expected at least 1/\(1 - p\) = 10, got 3\.0"),
        ("synonyms=0.1:nowhere.tsv", "augment: synonyms=0.1:nowhere.tsv: .*No such file"),
    ],
)
def test_a_wrong_spec(spec: str, said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=said):
        TextAugment.from_spec(spec, tokenizer)


def test_wrong_input(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: expected at least one"):
        TextAugment(tokenizer)
    with pytest.raises(
        ValueError, match="expected a word and a synonym that are one token each, got none among 1 words"
    ):
        SynonymReplacement(0.1, {"good": ["unheard"]}, tokenizer)
    with pytest.raises(ValueError, match="seed: expected a whole number from 0"):
        AugmentingCollator(Padded(tokenizer), augment(tokenizer), seed=-1)
    (tmp_path / "words.tsv").write_text("good\tgreat\nfilm\n")
    with pytest.raises(ValueError, match=r"words\.tsv, line 2: expected a word, a tab and a synonym, got 'film'"):
        read_synonyms(tmp_path / "words.tsv")
    bare = byte_pairs()
    bare.unk_token = None
    with pytest.raises(ValueError, match="mask_id: expected a token id, since the tokenizer has no mask token"):
        TextAugment(bare, TokenDropout(0.1))
