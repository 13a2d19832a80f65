"""``WeightFile``: safetensors on disk, read a tensor at a time, under the names of a module's parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

# The floating-point dtypes that an anchor may have, as a safetensors header spells them.
FILE_DTYPES = ("F32", "BF16", "F16", "F64")


class WeightFile:
    """safetensors on disk, one file or shards with an index: headers and a content hash, tensors on demand."""

    def __init__(self, path: Path, shards: dict[Path, list[str]], *, checksum: bool = True) -> None:
        self.path = path
        self.headers: dict[str, tuple[str, list[int]]] = {}  # name → (dtype, shape)
        self.shard_of: dict[str, Path] = {}
        digest = hashlib.sha256()
        for shard in sorted(shards):
            with safe_open(shard, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    view = opened.get_slice(name)
                    self.headers[name] = (view.get_dtype(), list(view.get_shape()))
                    self.shard_of[name] = shard
            if checksum:
                with open(shard, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        self.sha256 = digest.hexdigest() if checksum else ""

    @classmethod
    def open(cls, path: str | Path, *, checksum: bool = True) -> WeightFile:
        """From a file, an index, or a folder that holds one of them by their usual names.

        Without ``checksum`` only the headers are read, and ``sha256`` is empty.

        Raises:
            ValueError: no such file, or an index that is damaged or lists missing shards.
        """
        path = Path(path)
        if path.is_dir():
            usual = [path / "model.safetensors", path / "model.safetensors.index.json"]
            found = next((p for p in usual if p.exists()), None)
            if found is None:
                raise ValueError(f"{path}: expected {usual[0].name} or {usual[1].name} in this folder, found neither")
            path = found
        if not path.exists():
            raise ValueError(
                f"{path}: the anchor's file does not exist; if it was moved, make the anchor from its new place"
            )
        path = path.absolute()
        if path.suffix != ".json":
            return cls(path, {path: []}, checksum=checksum)
        weight_map = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f'{path}: expected an index with a "weight_map"')
        shards: dict[Path, list[str]] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ValueError(f"{path}: expected shards beside the index, got {shard!r}")
            shards.setdefault(path.parent / shard, []).append(name)
        absent = [str(shard) for shard in shards if not shard.exists()]
        if absent:
            raise ValueError(f"{path}: shards are missing: {', '.join(absent)}")
        return cls(path, shards, checksum=checksum)

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's dtype, on the CPU."""
        with safe_open(self.shard_of[name], framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    def prefix_for(self, names: Iterable[str]) -> PrefixRule:
        """The rule from a module's names to the file's that finds most of them; as they are, where it is a tie."""
        names = set(names)
        rules = {PrefixRule()}
        rules.update(PrefixRule(add=head) for stored in self.headers for head, tail in splits(stored) if tail in names)
        rules.update(PrefixRule(drop=head) for name in names for head, tail in splits(name) if tail in self.headers)
        return max(
            rules, key=lambda r: (sum(r(name) in self.headers for name in names), not r.add + r.drop, r.add, r.drop)
        )


@dataclass(frozen=True)
class PrefixRule:
    """From a parameter's name in the module to its name in the file."""

    add: str = ""
    drop: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.drop)


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name in two: ``("a.", "b.c")``, ``("a.b.", "c")``."""
    for i, letter in enumerate(name):
        if letter == ".":
            yield name[: i + 1], name[i + 1 :]
