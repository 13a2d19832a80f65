"""ReplayMixer: the ratio in every window, every example once, the same order after a resume, and clear errors."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import replay_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import FIRST_SOURCE, NumberStream, flat, is_source, sources, targets
from started import run_together
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fastft.data import ReplayMixer, replay

RATIOS = st.one_of(
    st.fractions(min_value=Fraction(1, 50), max_value=Fraction(9, 10), max_denominator=60),
    st.floats(min_value=0.01, max_value=0.95),
)


def assert_even(given: Sequence[bool], ratio: float | Fraction) -> None:
    """Every window of ``given``, whether each example is from the source, holds ⌊n·ratio⌋ or ⌈n·ratio⌉ of them."""
    exact = Fraction(ratio).limit_denominator(1_000_000)
    counts = [0]
    for one in given:
        counts.append(counts[-1] + one)
    for n in range(1, len(given) + 1):
        allowed = {math.floor(n * exact), math.ceil(n * exact)}
        found = {counts[start + n] - counts[start] for start in range(len(given) - n + 1)}
        assert found <= allowed, (n, found, allowed)


def batches(mixer: ReplayMixer, batch_size: int = 4, **options: Any) -> list[list[int]]:
    return [batch.tolist() for batch in DataLoader(mixer, batch_size=batch_size, **options)]


def as_workers(monkeypatch: Any, mixer: ReplayMixer, workers: int) -> list[list[int]]:
    """The items of each of several workers, without starting any."""
    streams = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers > 1 else None
        monkeypatch.setattr(replay, "get_worker_info", lambda info=info: info)
        streams.append(list(mixer))
    return streams


# -- map-style -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.integers(1, 120), st.integers(1, 40), RATIOS, st.integers(0, 3), st.integers(0, 2), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_window_of_an_epoch_has_the_ratio(
    n_targets: int, n_sources: int, ratio: float | Fraction, seed: int, epoch: int, fresh: bool
) -> None:
    mixer = ReplayMixer(targets(n_targets), sources(n_sources), ratio, seed, fresh=fresh)
    mixer.set_epoch(epoch)
    given = [mixer[i] for i in range(len(mixer))]
    assert_even([is_source(example) for example in given], ratio)
    assert sorted(example for example in given if not is_source(example)) == list(range(n_targets))
    replayed = Counter(example for example in given if is_source(example))
    if replayed:  # none is repeated before all have had their turn; when fresh, over the epochs together
        assert max(replayed.values()) - min(
            replayed.get(s, 0) for s in range(FIRST_SOURCE, FIRST_SOURCE + n_sources)
        ) <= (2 if fresh else 1)


@pytest.mark.slow
@given(st.integers(1, 80), st.integers(1, 20), RATIOS, st.integers(1, 5), st.booleans(), st.data())
@settings(deadline=None, max_examples=100)
def test_every_window_of_every_rank_has_the_ratio_and_all_ranks_together_have_all(
    n_targets: int, n_sources: int, ratio: float, world_size: int, drop_last: bool, data: st.DataObject
) -> None:
    together: list[int] = []
    lengths = set()
    for rank in range(world_size):
        mixer = ReplayMixer(targets(n_targets), sources(n_sources), ratio, 1, rank=rank, world_size=world_size)
        own = list(mixer.sampler(drop_last=drop_last))
        given = [mixer[i] for i in own]
        assert_even([is_source(example) for example in given], ratio)
        together += given
        lengths.add(len(given))
        start = data.draw(st.integers(0, len(own)), label=f"resume point of rank {rank}")
        resumed = mixer.sampler(start, drop_last=drop_last)
        assert len(resumed) == len(own) - start
        assert list(resumed) == own[start:]
        assert list(resumed) == own and len(resumed) == len(own)  # the next epoch is whole
    whole = [mixer[i] for i in range(len(mixer))]
    if drop_last:
        assert len(lengths) == 1 and len(whole) - len(together) < world_size
        assert not Counter(together) - Counter(whole)
    else:
        assert max(lengths) - min(lengths) <= 1
        assert Counter(together) == Counter(whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_a_loader_gives_the_order_and_follows_set_epoch(options: dict[str, Any]) -> None:
    mixer = ReplayMixer(targets(40), sources(6), 0.25, seed=3)
    loader = DataLoader(mixer, batch_size=4, **options)
    seen = []
    for epoch in (0, 1, 0):
        mixer.set_epoch(epoch)
        given = flat(loader)
        assert given == [mixer[i] for i in range(len(mixer))]
        seen.append(given)
    assert seen[0] == seen[2]
    assert Counter(seen[0]) == Counter(seen[1])
    assert [is_source(example) for example in seen[0]] == [is_source(example) for example in seen[1]]
    for kind in (False, True):  # both are reshuffled
        assert [x for x in seen[0] if is_source(x) == kind] != [x for x in seen[1] if is_source(x) == kind]


def test_the_seed_decides_the_order() -> None:
    orders = [batches(ReplayMixer(targets(40), sources(9), 0.25, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_source_smaller_than_what_is_wanted_is_repeated_evenly() -> None:
    mixer = ReplayMixer(targets(100), sources(3), 0.5)
    counts = Counter(example for example in flat(batches(mixer)) if is_source(example))
    assert sorted(counts.values()) == [33, 33, 34]


def test_fresh_goes_on_through_the_source() -> None:
    mixer = ReplayMixer(targets(10), sources(12), 0.25, fresh=True)
    replayed = []
    for epoch in range(4):
        mixer.set_epoch(epoch)
        replayed += [example for example in flat(batches(mixer)) if is_source(example)]
    assert len(replayed) == 12 and len(set(replayed)) == 12


def test_reordering_is_refused() -> None:
    mixer = ReplayMixer(targets(100), sources(50), 0.5)
    with pytest.raises(ValueError, match=r"shuffled already.*shuffle=True.*mixer\.sampler\(\)"):
        next(iter(DataLoader(mixer, batch_size=8, shuffle=True)))
    # Not only for the order: at this ratio it would give one rank all the old data and the other all the new.
    sampler = DistributedSampler(mixer, num_replicas=2, rank=1, shuffle=False)
    with pytest.raises(ValueError, match="shuffled already"):
        next(iter(DataLoader(mixer, batch_size=8, sampler=sampler)))


def test_indices_work_as_of_a_sequence() -> None:
    mixer = ReplayMixer(targets(9), sources(3), 0.25)
    assert mixer[-1] == mixer[len(mixer) - 1]
    with pytest.raises(IndexError):
        mixer[len(mixer)]
    assert len(batches(mixer, batch_size=1)) == len(mixer)


def test_it_can_be_copied_and_pickled() -> None:
    mixer = ReplayMixer(targets(20), sources(3), 0.25)
    mixer.set_epoch(2)
    expected = batches(mixer)
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert isinstance(other, ReplayMixer) and batches(other) == expected


# -- iterable-style ------------------------------------------------------------------------------------------


STYLES = [(NumberStream, NumberStream), (NumberStream, cases.Numbers), (cases.Numbers, NumberStream)]


@pytest.mark.slow
@pytest.mark.parametrize("styles", STYLES, ids=lambda styles: "+".join(style.__name__ for style in styles))
@given(n_targets=st.integers(1, 90), n_sources=st.integers(16, 40), ratio=RATIOS, data=st.data())
@settings(deadline=None, max_examples=40)
def test_streams_are_even_in_every_worker_and_rank_and_lose_nothing(
    styles: tuple[Any, Any], n_targets: int, n_sources: int, ratio: float, data: st.DataObject
) -> None:
    workers, world_size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    together: list[int] = []
    kinds: list[list[bool]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for rank in range(world_size):
            target, source = styles[0](n_targets), styles[1](n_sources, FIRST_SOURCE)
            mixer = ReplayMixer(target, source, ratio, rank=rank, world_size=world_size)
            for stream in as_workers(monkeypatch, mixer, workers):
                kinds.append([is_source(example) for example in stream])
                assert_even(kinds[-1], ratio)
                together += stream
    assert sorted(example for example in together if not is_source(example)) == list(range(n_targets))
    # The shards' windows at the same place are even together too, as far as all of them reach.
    shards = min(map(len, kinds))
    assert_even_together([stream[:shards] for stream in kinds], ratio)


def assert_even_together(streams: list[list[bool]], ratio: float | Fraction) -> None:
    exact = Fraction(ratio).limit_denominator(1_000_000)
    columns = [sum(column) for column in zip(*streams, strict=True)]
    for n in range(1, len(columns) + 1):
        wanted = n * len(streams) * exact
        for start in range(len(columns) - n + 1):
            assert sum(columns[start : start + n]) in (math.floor(wanted), math.ceil(wanted))


def test_a_short_source_starts_again() -> None:
    mixer = ReplayMixer(NumberStream(20), NumberStream(3, FIRST_SOURCE), 0.5)
    given = [example - FIRST_SOURCE for example in mixer if is_source(example)]
    assert given == [i % 3 for i in range(len(given))] and len(given) > 9


def test_members_that_divide_themselves_are_not_divided_again() -> None:
    mixer = ReplayMixer(NumberStream(20), NumberStream(5, FIRST_SOURCE), 0.5, rank=1, world_size=2, self_sharded=True)
    assert [example for example in mixer if not is_source(example)] == list(range(20))


@pytest.mark.slow
def test_streams_and_workers() -> None:
    mixer = ReplayMixer(NumberStream(41), NumberStream(8, FIRST_SOURCE), 0.25)
    found = batches(mixer, num_workers=2)
    assert sorted(example for example in flat(found) if not is_source(example)) == list(range(41))
    assert all(sum(map(is_source, batch)) == 1 for batch in found if len(batch) == 4)
    assert batches(mixer, num_workers=2) == found


# -- resuming ------------------------------------------------------------------------------------------------


def mixers() -> dict[str, ReplayMixer]:
    return {
        "map": ReplayMixer(targets(60), sources(11), 0.3, seed=2),
        "stream": ReplayMixer(NumberStream(60), NumberStream(11, FIRST_SOURCE), 0.3, seed=2),
        "map+stream": ReplayMixer(targets(60), NumberStream(11, FIRST_SOURCE), 0.3, seed=2),
    }


@pytest.mark.parametrize("kind", mixers())
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_stateful_loader_goes_on_with_the_same_order(kind: str, workers: int, done: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loader(mixer: ReplayMixer) -> Any:
        sampler = mixer.sampler() if kind == "map" and workers else None
        return stateful(mixer, batch_size=4, num_workers=workers, sampler=sampler)

    first = mixers()[kind]
    first.set_epoch(3)
    whole = loader(first)
    iterator = iter(whole)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(whole.state_dict())) if workers == 0 else whole.state_dict()
    expected = [batch.tolist() for batch in iterator]

    second = mixers()[kind]
    resumed = loader(second)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == expected
    first.set_epoch(4)
    second.set_epoch(4)
    assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in whole]  # and the next epoch is whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_is_resumed_by_skipping(workers: int) -> None:
    for kind, first in mixers().items():
        first.set_epoch(3)
        whole = batches(first, num_workers=workers)
        state, second = json.loads(json.dumps(first.state_dict())), mixers()[kind]
        second.load_state_dict(state)
        if kind == "map":
            loader = DataLoader(second, batch_size=4, sampler=second.sampler(start=5 * 4), num_workers=workers)
            assert len(loader) == len(whole) - 5
            resumed = [batch.tolist() for batch in loader]
            assert [batch.tolist() for batch in loader] == whole
        else:
            loader = DataLoader(second, batch_size=4, num_workers=workers)
            resumed = [batch.tolist() for batch in islice(loader, 5, None)]
        assert resumed == whole[5:]


@given(st.integers(0, 80))
@settings(deadline=None, max_examples=30)
def test_a_stream_in_this_process_goes_on_from_any_example(done: int) -> None:
    first, second = mixers()["stream"], mixers()["stream"]
    iterator = iter(first)
    for _ in range(min(done, 70)):
        next(iterator, None)
    second.load_state_dict(first.state_dict())
    resumed = iter(second)
    assert list(islice(resumed, 3)) == list(islice(iterator, 3))
    second, again = mixers()["stream"], second.state_dict()  # resumed, and stopped once more
    second.load_state_dict(again)
    assert list(second) == list(iterator)
    assert list(second) == list(first)


def test_a_state_of_another_mixture_is_refused() -> None:
    state = ReplayMixer(targets(60), sources(11), 0.3).state_dict()
    with pytest.raises(ValueError, match=r"that of another: ratio 3/10 \(here 1/4\), seed 0 \(here 1\)"):
        ReplayMixer(targets(60), sources(11), 0.25, 1).load_state_dict(state)


# -- ranks and workers ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_of_two_workers_have_every_example_once(tmp_path: Path) -> None:
    folders = [str(Path(cases.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, cases.__file__]
    run_together(
        ([*command, str(rank), str(tmp_path)], environment, tmp_path / f"{rank}.log") for rank in range(cases.WORLD)
    )
    ranks = [json.loads((tmp_path / f"given_{rank}.json").read_text()) for rank in range(cases.WORLD)]
    for style in ("map", "stream"):
        for epoch in range(2):
            given = [ranks[rank][style][epoch] for rank in range(cases.WORLD)]
            together = sorted(example for examples in given for example in examples if not is_source(example))
            assert together == list(range(101)), style
            for examples in given:
                assert all(sum(map(is_source, examples[i : i + 4])) in (1, 2) for i in range(0, len(examples) - 3, 4))
    for rank in range(cases.WORLD):
        assert ranks[rank]["map"][0] != ranks[rank]["map"][1]
        assert_even([is_source(example) for example in ranks[rank]["map"][1]], 0.3)


# -- Hugging Face --------------------------------------------------------------------------------------------


def table(rows: int, first: int = 0, **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    ids = list(range(first, first + rows))
    return datasets.Dataset.from_dict({"id": ids, "text": [f"text {i}" for i in ids], **columns})


def ids_of(loader: Iterable[Any]) -> list[int]:
    return [int(i) for batch in loader for i in batch["id"]]


def test_hugging_face_datasets_are_mixed_like_others() -> None:
    plain = ReplayMixer(targets(30), sources(20), 0.25, seed=1)
    mixed = ReplayMixer(table(30), table(20, FIRST_SOURCE), 0.25, seed=1)
    expected = flat(batches(plain))
    assert ids_of(DataLoader(mixed, batch_size=4)) == expected
    assert mixed[3]["text"] == f"text {expected[3]}"
    shuffled = table(40).select(range(29, -1, -1))  # one that is a view of another
    assert sorted(i for i in ids_of(DataLoader(ReplayMixer(shuffled, table(9, FIRST_SOURCE), 0.25))) if i < 99) == list(
        range(30)
    )


def test_each_keeps_its_own_format() -> None:
    new = table(30).with_transform(lambda rows: {"id": [-i for i in rows["id"]], "text": rows["text"]})
    mixed = ReplayMixer(new, table(20, FIRST_SOURCE), 0.25, seed=1)
    assert sorted(i for i in ids_of(DataLoader(mixed, batch_size=4)) if i < 99) == list(range(-29, 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_face_streams_are_mixed(workers: int) -> None:
    new = table(40).to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)
    old = table(40, FIRST_SOURCE).to_iterable_dataset(num_shards=4)
    mixer = ReplayMixer(new, old, 0.25)
    orders = []
    for epoch in range(2):
        mixer.set_epoch(epoch)
        orders.append(ids_of(DataLoader(mixer, batch_size=4, num_workers=workers)))
        assert sorted(i for i in orders[-1] if not is_source(i)) == list(range(40))
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_hugging_face_streams_are_divided_among_ranks() -> None:
    together: list[int] = []
    for rank in range(2):
        new = table(41).to_iterable_dataset(num_shards=3)
        mixer = ReplayMixer(new, table(40, FIRST_SOURCE), 0.25, rank=rank, world_size=2)
        together += ids_of(DataLoader(mixer, batch_size=4, num_workers=2))
    assert sorted(i for i in together if not is_source(i)) == list(range(41))


def test_a_source_with_too_few_shards_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    new = table(40).to_iterable_dataset(num_shards=2)
    old = table(40, FIRST_SOURCE).to_iterable_dataset(num_shards=1)
    # As in the second of two workers; datasets looks there too.
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", SimpleNamespace(id=1, num_workers=2))
    with pytest.raises(RuntimeError, match="worker 1 of 2 of rank 0 of 1, got none; use fewer workers"):
        list(ReplayMixer(new, old, 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["map", "stream"])
def test_trainer(style: str, tmp_path: Path) -> None:
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )

    def rows(size: int, token: int) -> Any:
        return datasets.Dataset.from_dict({"input_ids": [[token, 3, 4]] * size, "labels": [1] * size})

    seen: list[list[int]] = []

    class Recording(transformers.BertForSequenceClassification):  # type: ignore[name-defined, misc]
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            seen.append(input_ids[:, 0].tolist())
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    new, old = rows(24, 5), rows(10, 7)
    if style == "stream":
        new = new.to_iterable_dataset()
    options: dict[str, Any] = {"max_steps": 16} if style == "stream" else {"num_train_epochs": 2}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    mixer = ReplayMixer(new, old, 0.25, world_size=1)
    trainer = transformers.Trainer(Recording(config), arguments, train_dataset=mixer)
    trainer.train()
    assert len(seen) == 16 and all(batch.count(7) == 1 for batch in seen)
    assert mixer.epoch == 1  # Trainer has set it


@pytest.mark.slow
def test_trainer_that_shuffles_is_stopped_before_the_first_step(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    mixer = ReplayMixer([{"x": torch.zeros(2)}] * 40, [{"x": torch.ones(2)}] * 9, 0.25)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    with pytest.raises(ValueError, match="train_sampling_strategy='sequential'"):
        transformers.Trainer(torch.nn.Linear(2, 2), arguments, train_dataset=mixer).train()


# -- wrong input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, 1e-9, float("nan"), float("inf"), "much", None])
def test_a_ratio_that_is_none(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio: expected a number between 0 and 1, both excluded, got"):
        ReplayMixer(targets(3), sources(3), ratio)


@pytest.mark.parametrize("name", ["target", "source"])
def test_an_empty_dataset(name: str) -> None:
    members = {"target": targets(3), "source": sources(3), name: targets(0)}
    with pytest.raises(ValueError, match=f"{name}: expected at least one example, got an empty dataset"):
        ReplayMixer(**members, ratio=0.5)


def test_an_empty_stream() -> None:
    with pytest.raises(RuntimeError, match="source: expected at least one example"):
        list(ReplayMixer(NumberStream(3), NumberStream(0), 0.5))
    assert list(ReplayMixer(NumberStream(0), NumberStream(3), 0.5)) == []


@pytest.mark.parametrize("wrong", [iter([1, 2]), {"a": 1}, "text", 5, None])
def test_what_is_no_dataset(wrong: Any) -> None:
    with pytest.raises(TypeError, match="source: expected a map-style dataset"):
        ReplayMixer(targets(3), wrong, 0.5)


def test_columns_that_differ() -> None:
    with pytest.raises(
        ValueError, match=r"expected the target's columns \['id', 'text'\], got \['id', 'label', 'text'\]"
    ):
        ReplayMixer(table(3), table(3, label=[0, 1, 2]), 0.5)
    with pytest.raises(ValueError, match=r"column types, got label: Value\('string'\) instead of Value\('int64'\)"):
        ReplayMixer(table(3, label=[0, 1, 2]), table(3, label=["a", "b", "c"]), 0.5)
    with pytest.raises(ValueError, match=r"expected the target's columns \['x'\], got \['y'\]"):
        ReplayMixer([{"x": 1}], [{"y": 1}], 0.5)
    with pytest.raises(ValueError, match="expected examples like the target's, a tuple of 2, got a tuple of 3"):
        ReplayMixer([(1, 2)], [(1, 2, 3)], 0.5)
    with pytest.raises(ValueError, match="a int, got a str"):
        ReplayMixer([1], ["a"], 0.5)


def test_columns_of_streams_that_differ_stop_the_first_batch() -> None:
    class Rows(IterableDataset[Any]):
        def __init__(self, name: str) -> None:
            self.name = name

        def __iter__(self) -> Any:
            return iter([{self.name: i} for i in range(9)])

    mixer = ReplayMixer(Rows("x"), Rows("y"), 0.1)  # so rare that the first batch would hold none
    with pytest.raises(ValueError, match=r"columns \['x'\], got \['y'\]"):
        next(iter(DataLoader(mixer, batch_size=2)))
    known = table(9).to_iterable_dataset()
    with pytest.raises(ValueError, match="expected the target's columns"):
        ReplayMixer(known, known.remove_columns("text"), 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed: expected an integer >= 0, got 0.5"),
        ({"rank": 2, "world_size": 2}, r"rank: expected one of 0 \.\.\. 1, got 2"),
        ({"rank": 1}, "rank and world_size: expected both or neither, got 1, None"),
        ({"world_size": 3}, "rank and world_size: expected both or neither, got None, 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReplayMixer(targets(3), sources(3), 0.5, **options)


def test_fresh_streams_and_late_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="fresh: expected False"):
        ReplayMixer(NumberStream(3), sources(3), 0.5, fresh=True)
    mixer = ReplayMixer(targets(3), sources(3), 0.5, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"start: expected 0 \.\.\. 3, the examples of this rank in an epoch, got 4"):
        mixer.sampler(4)


def test_members_learn_the_epoch() -> None:
    class Told(Dataset[int]):
        epoch = -1

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            return index

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    new, old = Told(), Told()
    mixer = ReplayMixer(new, old, 0.5)
    mixer.set_epoch(4)
    assert (new.epoch, old.epoch, mixer.epoch) == (4, 4, 4)
    mixer.sampler().set_epoch(5)
    assert (new.epoch, mixer.epoch) == (5, 5)
