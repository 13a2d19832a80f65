"""``Anchor``: the pre-trained weights that an optimizer pulls back to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastft.layers.wrappers import flattened, reshard
from fastft.names import NameIndex, clean, closest, matching, named_tensors
from fastft.weight_file import FILE_DTYPES, WeightFile

VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Anchor:
    """Weights to stay near to (L2-SP: Li et al. 2018, https://arxiv.org/abs/1802.01483), by parameter name.

    Made by :meth:`snapshot` or :meth:`from_safetensors`, given to :class:`fastft.AdamW`. A parameter is found by
    identity (that of the module it was made from) or by name, see :meth:`find`. ``Anchor()`` is empty.
    :meth:`with_importance` adds a weight for each element, for elastic weight consolidation.
    """

    _index: NameIndex | None = None  # of all names; made when it is first needed

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}  # in memory
        self._file: WeightFile | None = None  # the rest is read from here
        self._in_file: dict[str, str] = {}  # parameter name → name in the file
        self._importance: dict[str, Tensor] = {}
        self._offloaded = False
        self._bound: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by id(parameter)
        # Tensors laid out like a parameter, and its layout; by ("anchor" or "importance", name).
        self._ready: dict[tuple[str, str], tuple[Any, Tensor]] = {}
        self.changes = 0
        """Version counter of updates, bindings and loads; cached lookups are valid while it is unchanged."""

    # -- making one ------------------------------------------------------------------------------------------

    @classmethod
    def snapshot(
        cls,
        module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        exclude: str | Iterable[str] = (),
    ) -> Anchor:
        """The values that parameters have now.

        Args:
            module_or_named_parameters: a module, or ``(name, parameter)`` pairs.
            dtype: float32, bfloat16 or float16 (float64 with float64 parameters); None: each parameter's own.
            device: None: beside each parameter. ``"cpu"`` with parameters on a GPU keeps the anchor in pinned
                host memory, from where the optimizer brings it to the GPU a part ahead of the step.
            exclude: names, glob patterns or module names (``"head"`` means all of ``head.*``) of parameters that are
                not anchored, such as a new head's.

        Raises:
            TypeError: neither a module nor (name, parameter) pairs.
            ValueError: a pattern that matches nothing, a name given twice, or a parameter that is not a dense
                floating-point tensor with values.
        """
        check_dtype(dtype)
        if isinstance(module_or_named_parameters, nn.Module):
            reshard(module_or_named_parameters)
        named = named_tensors(module_or_named_parameters)
        excluded = set(matching(exclude, [name for name, _ in named]))
        kept = [(name, p) for name, p in named if name not in excluded]
        for name, p in kept:
            if p.dtype not in DTYPES or p.layout != torch.strided or p.is_meta:
                if p.is_meta:
                    raise ValueError(
                        f"{name}: expected a parameter with values, got one on meta; load the weights first"
                    )
                raise ValueError(
                    f"{name}: expected a dense float32, bfloat16, float16 or float64 parameter, got {p.dtype}, "
                    f"{p.layout}; leave it out with exclude"
                )
            if dtype == torch.float64 and p.dtype != torch.float64:
                raise ValueError(f"dtype: float64 goes with float64 parameters only, and {name} is {p.dtype}")
        anchor = cls()
        by_id: dict[int, Tensor] = {}
        for name, p in kept:
            if id(p) not in by_id:  # tied parameters share one copy
                target = p.device if device is None else torch.device(device)
                to_host = target.type == "cpu" and p.device.type == "cuda"
                anchor._offloaded |= to_host
                by_id[id(p)] = copied(p, dtype or p.dtype, target, pin=to_host)
            anchor._tensors[name] = by_id[id(p)]
            anchor._bind(name, p)
        return anchor

    @classmethod
    def from_safetensors(cls, path: str | Path, module: nn.Module, *, exclude: str | Iterable[str] = ()) -> Anchor:
        """Weights from a file, mapped to the module's parameters by name.

        Args:
            path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder with ``model.safetensors``
                or its index. Only headers are read now; a tensor is read when the optimizer first needs it.
            module: the module to be tuned. Where its names differ from the file's by a prefix ("bert.") on one
                side, or by what wrappers add, they are matched.
            exclude: as in :meth:`snapshot`.

        Raises:
            ValueError: the file lacks parameters or holds them in another shape, with all of their names; or there is
                no such file; or FullyShardedDataParallel has flattened the module.
        """
        file = WeightFile.open(path)
        reshard(module)
        named = named_tensors(module)
        if any(flattened(p) for _, p in named):
            raise ValueError(
                "module: expected parameters of their own shapes, got some flattened by FullyShardedDataParallel; "
                'load the file into the model before it is wrapped, and use anchor="init" after, or use fully_shard'
            )
        excluded = set(matching(exclude, [name for name, _ in named]))
        # A tied parameter has several names, and the file may know only one of them.
        aliases: dict[int, list[str]] = {}
        for alias, parameter in module.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).extend(dict.fromkeys([alias, clean(alias)]))
        wanted = [(name, p) for name, p in named if name not in excluded]
        prefix = file.prefix_for([alias for _, p in wanted for alias in aliases[id(p)]])

        anchor = cls()
        problems = []
        for name, p in wanted:
            stored = next((prefix(alias) for alias in aliases[id(p)] if prefix(alias) in file.headers), None)
            if stored is None:
                problems.append(f"  {name}: missing")
                continue
            file_dtype, shape = file.headers[stored]
            if shape != list(p.shape):
                problems.append(f"  {name}: expected shape {list(p.shape)}, the file holds {shape}")
            elif file_dtype not in FILE_DTYPES:
                problems.append(f"  {name}: expected one of {', '.join(FILE_DTYPES)}, the file holds {file_dtype}")
            anchor._in_file[name] = stored
            anchor._bind(name, p)
        if problems:
            raise ValueError(
                f"{path}: cannot anchor {len(problems)} of {len(wanted)} parameters:\n"
                + "\n".join(problems)
                + "\nLeave new ones out with exclude."
            )
        anchor._file = file
        return anchor

    def with_importance(self, importance: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Anchor:
        r"""The same anchor, with a weight F ≥ 0 for each element: how strongly this one is pulled.

        With F the diagonal of the old task's Fisher information this is elastic weight consolidation (EWC; Kirkpatrick
        et al. 2017, https://arxiv.org/abs/1612.00796); synaptic intelligence and memory-aware synapses give other F.
        :class:`fastft.AdamW` then pulls by ``lr·λ·F / (1 + lr·λ·F)`` instead of ``lr·λ``: the implicit step on
        ``λ/2·F·(p − anchor)²``, which overshoots for no λ, so that ``lr·λ`` has no upper bound. An element with F = 0
        is free.

        Args:
            importance: parameter name → tensor of the parameter's shape, such as ``fastft.retention.estimate_fisher``
                returns; finite, nowhere negative. Names are matched as in :meth:`find`; of tied parameters one is
                enough, and those that are not anchored are passed over. Copied; kept where the anchor is kept.
            dtype: as in :meth:`snapshot`. Fisher informations reach down to 1e-12 and below, where float16 holds only
                zeros: bfloat16 does not.

        Raises:
            TypeError: ``importance`` is no dict.
            ValueError: anchored names without an importance, or with one that is not of this form, all of them listed.
                Parameters that are not to be anchored at all are left out of the anchor, with ``exclude``.
        """
        check_dtype(dtype)
        if not isinstance(importance, Mapping):
            raise TypeError(f"importance: expected a dict from names to tensors, got {type(importance).__name__}")
        tied: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            tied.setdefault(id(tensor), []).append(name)
        index = NameIndex(importance)
        found: dict[str, Tensor] = {}
        problems = []
        for name in self.names:
            aliases = [name, *(tied[id(self._tensors[name])] if name in self._tensors else [])]
            given = next((importance[key] for key in map(index.find, aliases) if key is not None), None)
            problem = "missing" if given is None else why_no_importance(given, self._shape(name), dtype)
            if problem:
                problems.append(f"  {name}: {problem}")
            elif given is not None:
                found[name] = given
        if problems:
            raise ValueError(
                f"importance: cannot be taken for {len(problems)} of {len(self)} anchored parameters:\n"
                + "\n".join(problems)
            )
        weighted = copy.copy(self)  # of the same tensors, in dicts of its own
        weighted._tensors, weighted._in_file, weighted._importance = dict(self._tensors), dict(self._in_file), {}
        copies: dict[int, Tensor] = {}
        for name, given in found.items():
            if id(given) not in copies:
                copies[id(given)] = copied_beside(given, dtype or given.dtype, self._tensors.get(name))
            weighted._importance[name] = copies[id(given)]
        return weighted

    def update(self, other: Anchor) -> None:
        """Add everything that ``other`` has.

        Raises:
            ValueError: both hold a name, or ``other`` lies in a file.
        """
        both = set(self.names) & set(other.names)
        if both:
            raise ValueError(f"update: both anchors hold {', '.join(sorted(both))}")
        if other._file is not None:
            raise ValueError("update: expected an anchor in memory, got one that lies in a file")
        self._tensors.update(other._tensors)
        self._importance.update(other._importance)
        self._bound.update(other._bound)
        self._offloaded |= other._offloaded
        self._index = None
        self.changes += 1

    # -- lookup --------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the anchored parameters, in order."""
        return (*self._in_file, *(name for name in self._tensors if name not in self._in_file))

    @property
    def offloaded(self) -> bool:
        """Whether the weights wait in host memory for parameters on a GPU."""
        return self._offloaded

    @property
    def weighted(self) -> bool:
        """Whether every anchored parameter has an importance."""
        return bool(self._importance) and len(self._importance) == len(self._in_file) + len(self._tensors)

    @property
    def source(self) -> dict[str, str] | None:
        """``{"path", "sha256"}`` of the file it came from; None for a snapshot."""
        return None if self._file is None else {"path": str(self._file.path), "sha256": self._file.sha256}

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Connect anchored names with parameters; names that are not anchored are passed over.

        Raises:
            ValueError: shapes that do not agree, all of them listed; nothing is bound then.
        """
        known = [(own, p) for name, p in named_parameters if (own := self.find(name)) is not None]
        self.check_shapes(known)
        for own, p in known:
            self._bind(own, p)
        self.changes += 1

    def check_shapes(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Raise unless the parameters under the anchor's own names have its shapes; all that do not are listed."""
        shapes = [(name, list(p.shape), self._shape(name)) for name, p in named_parameters]
        wrong = [f"  {name}: expected shape {own}, the anchor has {got}" for name, own, got in shapes if own != got]
        if wrong:
            raise ValueError("\n".join(["the anchor does not fit the parameters:", *wrong]))

    def find(self, key: str | Tensor, name: str | None = None) -> str | None:
        """The anchor's own name for a parameter; None if it is not anchored.

        A parameter is found by identity; else by its name; else by its name without what wrappers (DDP, FSDP,
        ``torch.compile``, activation checkpointing, PEFT) have added to it or to the anchor's.

        Args:
            key: a parameter, or a name.
            name: the name of a parameter that may be anchored by its name only.

        Raises:
            ValueError: several anchored names are the same as this one without what wrappers add.
        """
        if isinstance(key, Tensor):
            reference, own = self._bound.get(id(key), (None, None))
            if reference is not None and reference() is key:
                return own
            if name is None:
                return None
            key = name
        if key in self._tensors or key in self._in_file:
            return key
        if self._index is None:
            self._index = NameIndex(self.names)
        return self._index.find(key)

    def knew_another(self, param: Tensor) -> bool:
        """Whether a tensor that is gone was bound under the id that ``param`` has now."""
        reference, _ = self._bound.get(id(param), (None, None))
        return reference is not None and reference() is not param

    def get(self, key: str | Tensor, default: Any = None) -> Any:
        """The weights of a name or parameter, as they are kept; ``default`` if there are none."""
        name = self.find(key)
        if name is None:
            return default
        if name not in self._tensors:
            assert self._file is not None
            return self._file.read(self._in_file[name])
        return self._tensors[name]

    def importance_of(self, key: str | Tensor) -> Tensor | None:
        """The importance of a name's or parameter's elements, as it is kept; None if it has none."""
        name = self.find(key)
        return None if name is None else self._importance.get(name)

    def __getitem__(self, key: str | Tensor) -> Tensor:
        found = self.get(key)
        if found is None:
            if isinstance(key, str):
                raise KeyError(f"{key}: not anchored{closest(key, self.names)}")
            raise KeyError(f"a parameter of shape {list(key.shape)}: not anchored")
        return found  # type: ignore[no-any-return]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, Tensor)) and self.find(key) is not None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        weighted = ", weighted" if self._importance else ""
        if self._file is not None:
            return f"Anchor({len(self)} parameters, from {self._file.path}{weighted})"
        tensors = {id(t): t for t in self._tensors.values()}.values()
        kinds = sorted({f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors})
        elements, nbytes = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
        described = f", {elements:,} elements, {nbytes / 1e6:.1f} MB, {', '.join(kinds)}" if kinds else ""
        return f"Anchor({len(self)} parameters{described}{weighted}{', offloaded' if self._offloaded else ''})"

    def tensor_for(
        self, param: Tensor, name: str | None = None, spread: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor | None:
        """The weights as a step needs them: in the parameter's memory order, beside it unless offloaded.

        Found as in :meth:`find`; None if not anchored. The same tensor comes back until the parameter's device or
        memory order changes.

        Args:
            param: the parameter.
            name: its name.
            spread: makes a whole tensor one that is distributed as a DTensor is (the second argument), so that only
                this process's part is brought beside it.

        Raises:
            ValueError: the shapes differ.
        """
        known = self.find(param, name)
        if known is None:
            return None
        if self._shape(known) != list(param.shape):
            late = "; FullyShardedDataParallel has flattened it: take the anchor after wrapping"
            hint = late if flattened(param) else ""
            raise ValueError(
                f"{name or known}: anchor: expected the parameter's shape {list(param.shape)}, got "
                f"{self._shape(known)}{hint}"
            )
        return self._laid_out("anchor", known, self.get, param, spread)

    def importance_for(
        self, param: Tensor, name: str | None = None, spread: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor | None:
        """The importance of its elements, as :meth:`tensor_for` gives the weights; None if it has none."""
        known = self.find(param, name)
        if known is None or known not in self._importance:
            return None
        return self._laid_out("importance", known, self._importance.__getitem__, param, spread)

    def _laid_out(
        self,
        what: str,
        name: str,
        get: Callable[[str], Tensor],
        param: Tensor,
        spread: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor:
        placed = [getattr(param, key, None) for key in ("device_mesh", "placements")]  # a DTensor's
        layout = (param.device, param.stride(), param.dtype == torch.float64, *placed)
        if (what, name) not in self._ready or self._ready[what, name][0] != layout:
            try:
                prepared = self._prepare(get(name), param, spread)
            except ValueError as error:
                raise ValueError(f"{name}: {what}: {error}") from None
            self._ready[what, name] = (layout, prepared)
        return self._ready[what, name][1]

    def _prepare(self, kept: Tensor, param: Tensor, spread: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        dtype = kept.dtype
        if dtype == torch.float64 and param.dtype != torch.float64:
            dtype = torch.float32
        if type(kept) is not Tensor or type(param.detach()) is not Tensor:
            kept = kept.to(dtype) if spread is None else spread(kept.to(dtype), param)
            return kept.to(param.device)  # which the optimizer lays out
        pin = self._offloaded and param.device.type == "cuda"
        device = kept.device if pin else param.device
        if kept.device == device and kept.dtype == dtype and kept.stride() == param.stride():
            return kept
        laid_out = torch.empty_like(param, dtype=dtype, device=device, requires_grad=False)
        return (laid_out.pin_memory() if pin else laid_out).copy_(kept)

    def _shape(self, name: str) -> list[int]:
        if name in self._tensors:
            return list(self._tensors[name].shape)
        assert self._file is not None
        return self._file.headers[self._in_file[name]][1]

    def _bind(self, name: str, param: Tensor) -> None:
        if self.find(param) is None:  # the first name of tied parameters counts
            self._bound[id(param)] = (weakref.ref(param), name)

    # -- checkpoints and copies ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for :meth:`load_state_dict`.

        ``{"version", "source": None | {"path", "sha256", "names": {parameter: name in the file}}, "names",
        "offloaded", "tensors": {name: tensor}, "importance": {name: tensor}}``; ``tensors`` is empty for an anchor that
        lies in a file.
        """
        source: dict[str, Any] | None = self.source
        if source is not None:
            source["names"] = dict(self._in_file)
        return {
            "version": VERSION,
            "source": source,
            "names": list(self.names),
            "offloaded": self._offloaded,
            "tensors": dict(self._tensors),
            "importance": dict(self._importance),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, path: str | Path | None = None) -> None:
        """Replace everything by what was saved. Bindings to parameters are kept where names and shapes still agree.

        Args:
            state_dict: from :meth:`state_dict`.
            path: where the file lies now, if it was moved. A file of the same content that this anchor already reads
                from is found without.

        Raises:
            ValueError: the dict is not one of these, or the file is gone or has other content; the anchor is then as
                before.
        """
        version = state_dict.get("version")
        if version != VERSION:
            raise ValueError(f"anchor state: expected version {VERSION}, got {version!r}")
        loaded = Anchor()
        loaded._offloaded = bool(state_dict["offloaded"])
        for name, tensor in state_dict["tensors"].items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
                raise ValueError(f"anchor state: {name}: expected a floating-point tensor, got {tensor!r:.80}")
            # Back to host memory, if that is where it is kept: loaders like to bring all tensors to the GPU.
            device = torch.device("cpu") if loaded._offloaded else tensor.device
            loaded._tensors[name] = tensor.detach().to(device, copy=True)
        source = state_dict["source"]
        if source is not None:
            loaded._file = self._file_of(source, path)
            loaded._in_file = dict(source["names"])
        for name, importance in state_dict.get("importance", {}).items():
            problem = why_no_importance(importance, loaded._shape(name) if name in loaded else None)
            if problem:
                raise ValueError(f"anchor state: importance: {name}: {problem}")
            loaded._importance[name] = importance.detach().clone()
        bound = [(loaded.find(name), p) for ref, name in self._bound.values() if (p := ref()) is not None]
        loaded.bind((own, p) for own, p in bound if own is not None and loaded._shape(own) == list(p.shape))
        self.__dict__.update(loaded.__dict__, changes=self.changes + 1)

    def _file_of(self, source: Mapping[str, str], path: str | Path | None = None) -> WeightFile:
        """The file that a saved anchor lay in: the one this reads from, if it has that content."""
        if path is None and self._file is not None and self._file.sha256 == source["sha256"]:
            return self._file
        file = WeightFile.open(path or source["path"])
        if file.sha256 != source["sha256"]:
            raise ValueError(
                f"{file.path}: the anchor's file has changed: expected sha256 {source['sha256']}, got {file.sha256}"
            )
        return file

    # Parts of it, which an optimizer saves with each parameter's state and restores.

    def kept(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """(weights, importance) under one of the anchor's own names, as they lie in memory; None where not there."""
        return self._tensors.get(name), self._importance.get(name)

    def name_in_file(self, name: str) -> str | None:
        """The name in the file of one of the anchor's own names; None if it lies in memory."""
        return None if name in self._tensors else self._in_file.get(name)

    def restore(
        self,
        saved: Iterable[tuple[str, Tensor, Tensor | None, Tensor | None, str | None]],
        source: Mapping[str, str] | None,
        *,
        offloaded: bool | None = None,
    ) -> None:
        """Replace what is known of parameters by what was saved with them.

        Args:
            saved: (name, parameter, weights, importance, name in the file) of each; with neither weights nor a name in
                the file it is not anchored any more.
            source: of the file, as :attr:`source` gives it.
            offloaded: whether weights wait in host memory; None: as it is now.

        Raises:
            ValueError: the file is gone or has other content, or a tensor does not fit; the anchor is then as before.
        """
        offloaded = self._offloaded if offloaded is None else offloaded
        tensors, in_file, importances = dict(self._tensors), dict(self._in_file), dict(self._importance)
        entries = list(saved)
        lies_in_file = source is not None and any(stored is not None for *_, stored in entries)
        file = self._file_of(source) if source is not None and lies_in_file else self._file
        bound: dict[str, Tensor] = {}
        for name, p, tensor, importance, stored in entries:
            own = self.find(p, name) or name
            while own in bound and bound[own] is not p:  # two modules may use one name
                own += "'"
            for known in (tensors, in_file, importances):
                known.pop(own, None)
            if stored is not None:
                shape = None if file is None else file.headers.get(stored, (None, None))[1]
                if shape != list(p.shape):
                    raise ValueError(
                        f"{name}: anchor: expected a file that holds {stored} of shape {list(p.shape)}, got "
                        f"{'none' if file is None else f'shape {shape} in {file.path}'}"
                    )
                in_file[own] = stored
            elif tensor is None:
                continue
            for key, found, into in (("anchor", tensor, tensors), ("anchor_importance", importance, importances)):
                if found is None:
                    continue
                if found.dtype not in DTYPES or list(found.shape) != list(p.shape):
                    raise ValueError(
                        f"{name}: {key}: expected a floating-point tensor of shape {list(p.shape)}, got {found.dtype} "
                        f"of shape {list(found.shape)}"
                    )
                # Back to host memory, if that is where it is kept: loaders like to bring all tensors to the GPU.
                ours = found is self._tensors.get(own) or found is self._importance.get(own)
                device = torch.device("cpu") if offloaded else p.device
                into[own] = found if ours else found.detach().to(device, copy=True)
            bound[own] = p
        self._tensors, self._in_file, self._importance = tensors, in_file, importances
        self._file, self._offloaded = file if in_file else None, offloaded
        self._bound = {i: (ref, own) for i, (ref, own) in self._bound.items() if own in tensors or own in in_file}
        self._ready, self._index = {}, None
        for own, p in bound.items():
            self._bound[id(p)] = (weakref.ref(p), own)
        self.changes += 1

    def __getstate__(self) -> dict[str, Any]:
        # Parameters themselves, so that a deep copy or a pickle together with the model follows its copies.
        bound = [(p, name) for ref, name in self._bound.values() if (p := ref()) is not None]
        return {**self.__dict__, "_bound": bound, "_ready": {}, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bound = {id(p): (weakref.ref(p), name) for p, name in state["_bound"]}


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless anchors can be kept in it; None: in the parameters' own."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")


def copied(p: Tensor, dtype: torch.dtype, device: torch.device, pin: bool) -> Tensor:
    """A copy that shares nothing with ``p``, in its memory order."""
    source = p.detach()
    if not pin:
        return source.to(device, dtype, copy=True)
    return torch.empty_like(source, dtype=dtype, device=device).pin_memory().copy_(source)


def copied_beside(tensor: Tensor, dtype: torch.dtype, kept: Tensor | None) -> Tensor:
    """A copy that shares nothing with ``tensor``: where ``kept`` is, if that is in memory, and in its order."""
    if kept is None or type(kept) is not Tensor or type(tensor.detach()) is not Tensor:
        return copied(tensor, dtype, tensor.device, pin=False)
    beside = torch.empty_like(kept, dtype=dtype)
    return (beside.pin_memory() if kept.is_pinned() else beside).copy_(tensor.detach())


def why_no_importance(given: Any, shape: list[int] | None, dtype: torch.dtype | None = None) -> str | None:
    """Why this cannot be the importance of a parameter of that shape, stored in ``dtype``; None if it can."""
    if shape is None:
        return "not anchored"
    if not isinstance(given, Tensor) or given.dtype not in DTYPES or given.layout != torch.strided or given.is_meta:
        return f"expected a dense float32, bfloat16, float16 or float64 tensor, got {given!r:.80}"
    if list(given.shape) != shape:
        return f"expected shape {shape}, got {list(given.shape)}"
    stored = given.detach().to(dtype or given.dtype)
    if not bool(((stored >= 0) & (stored < float("inf"))).all()):
        return f"expected finite numbers >= 0, got {stored.min().item():g} to {stored.max().item():g}"
    return None
