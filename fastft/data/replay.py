"""Mix old data into new: every training example of the target, and between them examples of the source."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count, islice, pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from fastft.checks import check_count

TARGET, SOURCE, ORDER = range(3)
"""The uses of a permutation: a part of its seed."""


@dataclass(frozen=True)
class Pattern:
    """The positions of a sequence that belong to the source, spread as evenly as whole numbers allow.

    Position i does iff ⌊(i + 1)·ratio + φ⌋ > ⌊i·ratio + φ⌋, so any n positions in a row hold ⌊n·ratio⌋ or ⌈n·ratio⌉
    of them. The phases φ = (shard + ½)/shards of the shards of one stream are such that the same holds for the
    shards together: Σₖ ⌊x + k/K⌋ = ⌊K·x⌋ (Hermite).
    """

    ratio: Fraction
    shard: int = 0
    shards: int = 1

    def sources_before(self, position: Any) -> Any:
        """How many of the positions 0 ... position − 1 belong to the source; of an int, or of an int64 array."""
        p, q, shards = self.ratio.numerator, self.ratio.denominator, self.shards
        return (2 * shards * position * p + (2 * self.shard + 1) * q) // (2 * shards * q)

    def length_with(self, targets: int) -> int:
        """How long the sequence is up to and with its last target, if there are ``targets`` of them."""
        length = int(targets / (1 - self.ratio))
        while length - self.sources_before(length) < targets:
            length += 1
        while length - 1 - self.sources_before(length - 1) >= targets:
            length -= 1
        return length


class ReplayMixer(Dataset[Any]):
    """The examples of ``target``, each once an epoch, and between them examples of ``source``, evenly.

    Of any n examples in a row, ⌊n·ratio⌋ or ⌈n·ratio⌉ are from the source: in every batch, for every rank, with any
    number of workers. About 5 % of old data do where the new data are close to it, 25 % where they are far (Ibrahim et
    al. 2024, https://arxiv.org/abs/2403.08763).

    **Two map-style datasets** (``len`` and ``[i]``; HF ``Dataset``) give a map-style one that is *already shuffled*:
    item i is the i-th example of the epoch. Give it to a ``DataLoader`` without ``shuffle``; what would reorder it
    (``shuffle=True``, a ``DistributedSampler``) is refused when the first batch is fetched. :meth:`sampler` divides it
    among ranks, and starts in the middle. ``set_epoch`` reshuffles; workers follow it, persistent ones too.

    **Where one is iterable-style** (``IterableDataset``; HF streaming), so is the mixture. A map-style partner is
    shuffled, an iterable one is read in its own order, from its beginning each epoch; both are divided among ranks and
    workers. A source that ends before the target starts again. Each (rank, worker) stream is exact by itself.

    In either case an epoch ends with its last target example, so under DDP ranks may differ by one example (map-style)
    or by what their shares differ (iterable-style): use ``join``, or ``sampler(drop_last=True)``.

    With transformers' ``Trainer``: ``train_sampling_strategy="sequential"`` for map-style, ``world_size=1`` here for
    iterable-style, since accelerate then does the dividing.

    Args:
        target: the fine-tuning data.
        source: the data whose knowledge is to be kept, with the same columns.
        ratio: the share of the source in the mixture, between 0 and 1; rounded to a fraction with a denominator of at
            most a million.
        seed: of all shuffling.
        fresh: map-style only. False: every epoch holds the same source examples. True: each epoch goes on through the
            source where the last one stopped, so that in time every example has its turn.
        rank, world_size: whose share to give; by default torch.distributed's, 0 of 1 if it is not initialised.
        self_sharded: the iterable members already give each rank (as after ``split_dataset_by_node``) and worker its
            own share. By default they are taken to give the same everywhere, and each rank and worker picks its part;
            HF streams are known to divide themselves among workers.

    Raises:
        ValueError: a bad ratio, an empty dataset, or columns that differ.
        TypeError: what is neither map- nor iterable-style.
    """

    def __new__(cls, target: Any = None, source: Any = None, *args: Any, **kwargs: Any) -> ReplayMixer:
        if cls is ReplayMixer:
            cls = StreamReplayMixer if is_stream(target, "target") | is_stream(source, "source") else MapReplayMixer
        return object.__new__(cls)

    def __init__(
        self,
        target: Any,
        source: Any,
        ratio: float | Fraction,
        seed: int = 0,
        *,
        fresh: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        self_sharded: bool = False,
    ) -> None:
        self.target, self.source = target, source
        self.ratio = checked_ratio(ratio)
        check_count("seed", seed, 0)
        self.seed = seed
        self.fresh, self.self_sharded = fresh, self_sharded
        if (rank is None) != (world_size is None) and world_size != 1:
            raise ValueError(f"rank and world_size: expected both or neither, got {rank}, {world_size}")
        if world_size is not None and not 0 <= (rank or 0) < world_size:
            raise ValueError(f"rank: expected one of 0 ... {world_size - 1}, got {rank}")
        self._rank, self._world_size = rank, world_size
        for name, dataset in (("target", target), ("source", source)):
            if not is_stream(dataset, name) and len(dataset) == 0:
                raise ValueError(f"{name}: expected at least one example, got an empty dataset")
        check_columns(target, source)
        # Shared memory: workers that outlive an epoch see the next one set.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose order is given; 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as for this epoch, from the next iteration on; calls the ``set_epoch`` of members that have one."""
        self._epoch.fill_(epoch)
        for dataset in (self.target, self.source):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def share(self) -> tuple[int, int]:
        """(rank, world_size) whose share is given."""
        if self._world_size is not None:
            return self._rank or 0, self._world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def sampler(self, start: int = 0, *, drop_last: bool = False) -> ReplaySampler:
        """Of a map-style mixture: the positions of one rank's share of an epoch, for ``DataLoader(sampler=...)``.

        A rank's share is one stretch of the epoch, so the ratio holds in it too.

        Args:
            start: how many examples this rank has had of the current epoch; the first iteration starts behind them,
                later ones at the beginning.
            drop_last: give every rank equally many, by leaving out up to ``world_size − 1`` examples of an epoch.

        Raises:
            TypeError: the mixture is iterable-style.
            ValueError: ``start`` is more than the rank's share.
        """
        raise TypeError("sampler: expected a mixture of two map-style datasets, got an iterable-style one")

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and what the mixture was made of.

        Of an iterable-style mixture also how many examples of the epoch this process has given, and loading it skips
        as many: with ``StatefulDataLoader`` every worker does so; with a plain ``DataLoader`` with workers skip batches
        instead, ``itertools.islice(loader, batches_done, None)``. A ``DataLoader`` reads ahead, so of a map-style
        mixture only the training loop knows how far it is: resume with ``sampler(start=batches_done * batch_size)``
        after :meth:`load_state_dict`; ``StatefulDataLoader`` does both by itself.
        """
        return {"epoch": self.epoch, "mixture": self._mixture()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another mixture, whose order would be another.
        """
        mine, theirs = self._mixture(), dict(state["mixture"])
        if mine != theirs:
            different = [f"{key} {theirs.get(key)} (here {mine[key]})" for key in mine if mine[key] != theirs.get(key)]
            raise ValueError(f"state: expected that of this mixture, got that of another: {', '.join(different)}")
        self.set_epoch(int(state["epoch"]))

    def _mixture(self) -> dict[str, Any]:
        """All that the order depends on, besides the epoch."""
        sizes = {
            f"{name}_examples": None if is_stream(dataset, name) else len(dataset)
            for name, dataset in (("target", self.target), ("source", self.source))
        }
        return {**sizes, "ratio": str(self.ratio), "seed": self.seed, "fresh": self.fresh}

    def _permutation(self, size: int, *key: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, *key)).permutation(size)


class MapReplayMixer(ReplayMixer):
    """Two map-style datasets, as one; see :class:`ReplayMixer`, which makes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Pattern(self.ratio)
        self.length = self.pattern.length_with(len(self.target))
        self._joined = joined(self.target, self.source)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """The examples of an epoch, all ranks together."""
        return self.length

    def __getitem__(self, index: int) -> Any:
        """The example at a position of the epoch; negative ones count from its end."""
        place, targets = int(self.order()[index]), len(self.target)
        return self.target[place] if place < targets else self.source[place - targets]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several examples, by one access to each dataset where it can."""
        refuse_reordered(indices)
        places, targets = self.order()[indices], len(self.target)
        if self._joined is not None:
            return fetch(self._joined, places.tolist())
        examples: list[Any] = [None] * len(places)
        for dataset, mine, first in ((self.target, places < targets, 0), (self.source, places >= targets, targets)):
            fetched = fetch(dataset, (places[mine] - first).tolist())
            for i, example in zip(np.flatnonzero(mine).tolist(), fetched, strict=True):
                examples[i] = example
        return examples

    def order(self) -> NDArray[np.int64]:
        """Which example is at each position of the current epoch, int64 [len(self)]: i is the target's i-th,
        ``len(target) + j`` the source's j-th. Which positions are the source's is the same in every epoch."""
        epoch = self.epoch
        if self._order is None or self._order[0] != epoch:
            from_source = np.diff(self.pattern.sources_before(np.arange(self.length + 1))).astype(bool)
            order = np.empty(self.length, np.int64)
            order[~from_source] = self._permutation(len(self.target), TARGET, 0, epoch)
            order[from_source] = len(self.target) + self._source_order(epoch)
            self._order = (epoch, order)
        return self._order[1]

    def sampler(self, start: int = 0, *, drop_last: bool = False) -> ReplaySampler:
        return ReplaySampler(self, start, drop_last)

    def _source_order(self, epoch: int) -> NDArray[np.int64]:
        """Which source examples, in which order: a stretch of an endless series of passes through all of them."""
        size, draws = len(self.source), self.length - len(self.target)
        begin = epoch * draws if self.fresh else 0
        parts = [np.empty(0, np.int64)]
        for number in range(begin // size, -(-(begin + draws) // size)):
            first, last = max(begin - number * size, 0), min(begin + draws - number * size, size)
            part = self._permutation(size, SOURCE, number)[first:last]
            parts.append(part[self._permutation(len(part), ORDER, number, epoch)])
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}  # quicker made anew than sent to a worker


class ReplaySampler(Sampler[int]):
    """The positions of one rank's share of a mixture; see :meth:`ReplayMixer.sampler`."""

    def __init__(self, mixer: MapReplayMixer, start: int, drop_last: bool) -> None:
        self.mixer, self.drop_last = mixer, drop_last
        rank, world_size = mixer.share()
        each, rest = divmod(len(mixer), world_size)
        begin = rank * each + (0 if drop_last else min(rank, rest))
        self.positions = range(begin, begin + each + (not drop_last and rank < rest))
        if not 0 <= start <= len(self.positions):
            raise ValueError(
                f"start: expected 0 ... {len(self.positions)}, the examples of this rank in an epoch, got {start}"
            )
        self.start = start

    def __iter__(self) -> Iterator[int]:
        begin, self.start = self.start, 0
        return iter(self.positions[begin:])

    def __len__(self) -> int:
        return len(self.positions) - self.start

    def set_epoch(self, epoch: int) -> None:
        """Set the mixer's epoch; frameworks call this on samplers."""
        self.mixer.set_epoch(epoch)


class StreamReplayMixer(ReplayMixer, IterableDataset[Any]):
    """A mixture of which at least one part is iterable-style; see :class:`ReplayMixer`, which makes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fresh:
            raise ValueError("fresh: expected False, since an iterable-style dataset is read from its start")
        self._given = self._skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        self._given = skip
        for example in islice(self._examples(), skip, None):
            self._given += 1
            yield example
        self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, what the mixture was made of, and how many examples of the epoch this process has had."""
        return {**super().state_dict(), "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._given = self._skip = int(state["given"])

    def _examples(self) -> Iterator[Any]:
        """This (rank, worker)'s stream of the epoch."""
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        rank, world_size = self.share()
        shard = Shard(rank, world_size, worker_id, workers)
        pattern = Pattern(self.ratio, shard.index, shard.count)
        sources = self._sources(shard)
        sources_given = 0
        for targets, target in enumerate(self._pass(self.target, shard, TARGET, 0)):
            if not targets:
                first = next(sources)
                check_examples_alike(target, first)
                sources = chain([first], sources)
            while pattern.sources_before(targets + sources_given + 1) > sources_given:
                sources_given += 1
                yield next(sources)
            yield target

    def _sources(self, shard: Shard) -> Iterator[Any]:
        """Source examples without end: pass after pass."""
        for number in count():
            empty = True
            for example in self._pass(self.source, shard, SOURCE, number):
                empty = False
                yield example
            if empty:
                raise RuntimeError(f"source: expected at least one example for {shard}, got none; {FEW}")

    def _pass(self, dataset: Any, shard: Shard, *key: int) -> Iterator[Any]:
        """This shard's part of a dataset, once through."""
        if not is_stream(dataset, "dataset"):
            mine = self._permutation(len(dataset), *key, self.epoch)[shard.index :: shard.count].tolist()
            return (example for i in range(0, len(mine), AT_ONCE) for example in fetch(dataset, mine[i : i + AT_ONCE]))
        if self.self_sharded:
            return iter(dataset)
        if is_hugging_face_stream(dataset):  # inside a worker it gives that worker's shards only
            return islice(iter(dataset), shard.rank, None, shard.world_size)
        return islice(iter(dataset), shard.index, None, shard.count)


FEW = "use fewer workers, or split the source into more shards"
AT_ONCE = 64
"""How many examples of a map-style partner of a stream are read together."""


@dataclass(frozen=True)
class Shard:
    """One worker of one rank."""

    rank: int
    world_size: int
    worker: int
    workers: int

    @property
    def index(self) -> int:
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        return self.world_size * self.workers

    def __str__(self) -> str:
        return f"worker {self.worker} of {self.workers} of rank {self.rank} of {self.world_size}"


def fetch(dataset: Any, indices: list[int]) -> list[Any]:
    """The examples at ``indices``, in one access where the dataset offers it, as DataLoader does."""
    if indices and hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


def joined(target: Any, source: Any) -> Any:
    """The source's rows below the target's, if both are of Hugging Face and formatted alike; one access is quicker."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not all(isinstance(dataset, datasets.Dataset) for dataset in (target, source)):
        return None
    return datasets.concatenate_datasets([target, source]) if target.format == source.format else None


# -- checks --------------------------------------------------------------------------------------------------


def checked_ratio(ratio: float | Fraction) -> Fraction:
    """``ratio`` as a fraction of whole numbers that stay small enough to compute with quickly."""
    wanted = "ratio: expected a number between 0 and 1, both excluded"
    try:
        exact = Fraction(ratio).limit_denominator(1_000_000)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{wanted}, got {ratio!r}") from error
    if not 0 < exact < 1:
        raise ValueError(f"{wanted}, got {ratio!r}")
    return exact


def is_stream(dataset: Any, name: str) -> bool:
    """Whether a dataset is iterable-style; an error if it is neither that nor map-style."""
    if isinstance(dataset, IterableDataset) or is_hugging_face_stream(dataset):
        return True
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, (str, Mapping)):
        return False
    raise TypeError(
        f"{name}: expected a map-style dataset (with len() and []) or an IterableDataset, got {type(dataset).__name__}"
    )


def is_hugging_face_stream(dataset: Any) -> bool:
    datasets = sys.modules.get("datasets")  # where it is not imported, nothing can be one of its objects
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def refuse_reordered(indices: Sequence[int]) -> None:
    """Raise if positions do not follow one another; a last batch may be filled up from the beginning."""
    if any(b not in (a + 1, 0) for a, b in pairwise(indices)):
        raise ValueError(
            "the mixture is shuffled already, and reordering it would break the ratio: leave out shuffle=True and "
            "other samplers, or use mixer.sampler(), which also divides it among ranks (transformers' Trainer: "
            "train_sampling_strategy='sequential'; Lightning: use_distributed_sampler=False)"
        )


def check_columns(target: Any, source: Any) -> None:
    """Raise if the two give different kinds of examples, as far as is known without reading from a stream."""
    names = [getattr(dataset, "column_names", None) for dataset in (target, source)]
    if all(isinstance(columns, list) for columns in names):
        refuse_different_columns(*cast(list[list[str]], names))
        refuse_different_features(target.features, source.features)
    elif not any(is_stream(dataset, "dataset") for dataset in (target, source)):
        check_examples_alike(target[0], source[0])


def refuse_different_columns(target: Iterable[Any], source: Iterable[Any]) -> None:
    mine, theirs = set(target), set(source)
    if mine != theirs:
        raise ValueError(
            f"source: expected the target's columns {sorted(mine, key=str)}, "
            f"got {sorted(theirs, key=str)}: rename or remove columns of one of them"
        )


def refuse_different_features(target: Any, source: Any) -> None:
    different = [f"{name}: {source[name]} instead of {target[name]}" for name in target if target[name] != source[name]]
    if different:
        raise ValueError(
            f"source: expected the target's column types, got {'; '.join(different)}: "
            "use source.cast(target.features), or make the target's like the source's"
        )


def check_examples_alike(target: Any, source: Any) -> None:
    """Raise if an example of the source could not be collated with one of the target."""
    if isinstance(target, Mapping) and isinstance(source, Mapping):
        refuse_different_columns(target, source)
    elif type(target) is not type(source) or (isinstance(target, (tuple, list)) and len(target) != len(source)):
        raise ValueError(f"source: expected examples like the target's, {describe(target)}, got {describe(source)}")


def describe(example: Any) -> str:
    name = type(example).__name__
    return f"a {name} of {len(example)}" if isinstance(example, (tuple, list)) else f"a {name}"
