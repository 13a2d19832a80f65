"""The diagonal of the Fisher information: how much each weight matters to what a model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastft.layers.wrappers import is_fsdp2, reshard
from fastft.optim.dtensors import part_beside, placement_of, whole
from fastft.optim.tensors import is_dtensor, local
from fastft.retention.batches import IGNORED, evaluating, labels_of, outputs_of, rows_of
from fastft.retention.processes import (
    check_agreement,
    common_groups,
    is_first_copy,
    refuse_fsdp1,
    same_everywhere,
    sum_over_mesh,
)

Mode = Literal["exact", "sampled", "empirical"]
FORMAT = "fastft.Fisher 1"


@dataclass(frozen=True, eq=False, repr=False)
class Fisher(Mapping[str, Tensor]):
    """The diagonal Fisher information, parameter name → tensor of the parameter's shape, float32 or float64."""

    tensors: Mapping[str, Tensor]
    mode: Mode
    """Which of the Fishers it is; see :func:`estimate_fisher`."""
    examples: int
    """How many examples it is the mean over."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        elements = sum(tensor.numel() for tensor in self.values())
        return f"Fisher({self.mode}, {self.examples:,} examples, {len(self)} parameters, {elements:,} elements)"

    def normalized(self) -> Fisher:
        """The same with a mean of 1 over all elements, so that as a weight it leaves an anchor's strength as it is.

        With DTensors it is a collective: all processes of their meshes call it, and divide by the same mean.

        Raises:
            ValueError: it is 0 everywhere.
        """
        elements = sum(tensor.numel() for tensor in self.values())
        mean = sum_over_processes(self.values()) / max(1, elements)
        if not mean > 0.0:
            raise ValueError("normalized: expected a Fisher information that is not 0 everywhere")
        return Fisher({name: tensor / mean for name, tensor in self.items()}, self.mode, self.examples)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with mode and examples in its header.

        Raises:
            ValueError: of DTensors each process has a part only.
        """
        for name, tensor in self.items():
            if is_dtensor(tensor):
                raise ValueError(
                    f"save: expected whole tensors, got a DTensor for {name}: put them together on all processes, "
                    "Fisher({name: f.full_tensor() for name, f in fisher.items()}, fisher.mode, fisher.examples), and "
                    "save that on one"
                )
        tensors = {name: tensor.contiguous() for name, tensor in self.items()}
        save_file(tensors, path, {"format": FORMAT, "mode": self.mode, "examples": str(self.examples)})

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Read a file of :meth:`save`, onto the CPU.

        Raises:
            ValueError: it is another file.
        """
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path}: expected the format {FORMAT!r}, got {header.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        mode = header["mode"]
        if mode not in get_args(Mode):
            raise ValueError(f"{path}: expected a mode of {get_args(Mode)}, got {mode!r}")
        return cls(tensors, mode, int(header["examples"]))


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: Mode = "exact",
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    next_token: bool | None = None,
    seed: int = 0,
) -> Fisher:
    r"""Estimate the diagonal Fisher information of the model's parameters, as a mean over examples.

    With p(y|x) the model's distribution and g(y) = ∇ log p(y|x), an example contributes

    - ``"exact"``: Σ_y p(y|x)·g(y)², over all classes: what EWC (Kirkpatrick et al. 2017,
      https://arxiv.org/abs/1612.00796) means, without sampling noise; one backward pass per class;
    - ``"sampled"``: g(y)² for one y drawn from p(y|x): the same in expectation; one backward pass;
    - ``"empirical"``: g(y)² for the given label: not the same unless the model fits the data's distribution;
      small where the labels are predicted well. One backward pass, and the only one for any loss.

    Gradients are squared example by example. Squaring the mean gradient of a batch instead, as is often done,
    estimates something else, smaller by up to the batch size (van de Ven 2025, https://arxiv.org/abs/2502.11756).

    An example is one row of a batch; it goes through the model alone (one forward pass for each), which is right for
    any model whose rows do not depend on each other. The model is evaluated in ``eval`` mode (no dropout, fixed
    BatchNorm statistics); mode, ``.grad`` and the random state are afterwards as before.

    With several processes, give each the same batches. Where the parameters are DTensors (``fully_shard``, tensor
    parallelism, or both) or the model is wrapped for DistributedDataParallel, it is a collective, and raises on every
    process if one has another batch. Each process then keeps what belongs to its own parts, as DTensors that lie as
    the parameters do.

    With logits of shape ``[1, ..., C]``, log p of an example is the sum over the positions whose label is not -100.
    So in a causal language model an example is a sequence: its label's log-probability is the sum over its tokens,
    each given the true tokens before it, and what is drawn (or summed over) are the next tokens at each position,
    independently; ``"exact"`` is then one backward pass for each token and word, for tiny vocabularies only.

    Args:
        model: the model; parameters that require grad are estimated.
        batches: mappings of tensors (such as a tokenizer makes, with "labels"), or ``(inputs, labels)``, or only
            inputs; tensors with the rows along their first dimension, on the model's device. Lists with an item for
            each row are cut too, numbers and strings are not. Labels are needed for ``"empirical"``, and for more
            than one position per row, to tell which count.
        mode: see above.
        forward: ``forward(model, batch)`` returns the logits ``[rows, ..., C]``. By default, ``model(**batch)``
            without the labels, or ``model(inputs)``, and of what that returns ``.logits`` if it is no tensor.
        loss: for ``"empirical"``, ``loss(model, batch)`` returns the loss −log p of a batch of one row: a tensor of
            one element, summed over what belongs to the row; used instead of the logits.
        next_token: whether the logits at a position are for the label one further (causal language models). Needed
            for logits of more than two dimensions, where guessing wrong would go unnoticed.
        seed: of the draws of ``"sampled"``.

    Returns:
        The Fisher information in float32 (float64 for float64 parameters), on the parameters' devices.

    Raises:
        ValueError: options do not go together, batches cannot be cut into rows or differ between processes, logits do
            not fit the labels, there is not a single example, gradients are not finite or reach no parameter; or the
            model is wrapped by ``FullyShardedDataParallel``.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {get_args(Mode)}, got {mode!r}")
    if loss is not None and (mode != "empirical" or forward is not None or next_token is not None):
        raise ValueError('loss: expected mode="empirical", and neither forward nor next_token beside it')
    refuse_fsdp1(model, "call estimate_fisher before the model is wrapped, or use torch.distributed.fsdp.fully_shard")
    reshard(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model: expected parameters that require grad, got none")
    groups = common_groups(model)
    generator = torch.Generator().manual_seed(seed)
    examples = 0
    squares = Squares(model, named)
    try:
        with evaluating(model), torch.enable_grad():
            for row in (row for batch in same_everywhere(batches, groups) for row in rows_of(batch)):
                if loss is not None:
                    terms = [(checked_loss(loss(model, row)), 1.0)]
                else:
                    logits = checked_logits(forward(model, row) if forward is not None else outputs_of(model, row))
                    log_p, labels = positions(logits, labels_of(row), mode, next_token)
                    if log_p.shape[0] == 0:
                        continue  # no position of it counts
                    terms = terms_of(log_p, labels, mode, generator)
                for i, (term, weight) in enumerate(terms):
                    squares.add(term, weight, retain_graph=i + 1 < len(terms))
                examples += 1
    finally:
        squares.close()
        reshard(model)  # the root's parameters, if the last pass forward had no backward pass
    if examples == 0:
        raise ValueError("batches: expected at least one example with a label that counts, got none")
    if not squares.reached:
        raise ValueError("model: expected gradients of its parameters, got none: a wrapper may compute with copies")
    failure = None
    for name, total in squares.sums.items():
        total /= examples
        if failure is None and not local(total).isfinite().all():
            failure = ValueError(f"{name}: its gradients, or their squares, are not finite")
    check_agreement("estimate_fisher: expected finite gradients on every process", failure or "finite", groups)
    return Fisher(squares.sums, mode, examples)


class Squares:
    """Sums of squared gradients, of each parameter the part that lies in this process."""

    def __init__(self, model: nn.Module, named: Mapping[str, Tensor]) -> None:
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in named.items()
        }
        self.reached = False
        """Whether there was a gradient at all."""
        copies = gathered_copies(model)
        self._used = {name: p for name, p in named.items() if p not in copies}
        self._copies = [copies[p] for p in named.values() if p in copies]
        # A process has no memory for the gradients of all copies: each is squared, and dropped, as it arrives.
        self._hooks = [
            copies[p].register_hook(partial(self._add_part, local(self.sums[name]), p))
            for name, p in named.items()
            if p in copies
        ]
        self._weight = 1.0

    def add(self, term: Tensor, weight: float, *, retain_graph: bool) -> None:
        """Add ``weight`` times the squares of the gradients of ``term``."""
        self._weight = weight
        inputs = [*self._used.values(), *self._copies]
        gradients = torch.autograd.grad(term, inputs, retain_graph=retain_graph, allow_unused=True)
        self.reached |= any(g is not None for g in gradients)
        for name, g in zip(self._used, gradients, strict=False):  # after these come the copies'
            if g is not None:
                self._add_square(self.sums[name], g)

    def close(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()

    def _add_part(self, total: Tensor, p: Tensor, g: Tensor) -> Tensor | None:
        """Of the gradient of a gathered copy of ``p``; returns what takes its place."""
        self._add_square(total, part_beside(whole(g), p))
        return None if is_dtensor(g) else g.new_zeros(()).expand(g.shape)

    def _add_square(self, total: Tensor, g: Tensor) -> None:
        g = (g if g.layout == torch.strided else g.to_dense()).to(total.device, total.dtype)
        total.addcmul_(g, g, value=self._weight)


def gathered_copies(model: nn.Module) -> dict[Tensor, Tensor]:
    """The leaves of autograd's graph that stand in for parameters of modules that ``fully_shard`` was applied to.

    They are the same ones in each pass, and have memory only while the module has gathered them.
    """
    places = {(owner, name): p for owner in model.modules() for name, p in owner._parameters.items()}
    copies: dict[Tensor, Tensor] = {}
    for module in filter(is_fsdp2, model.modules()):
        module.unshard()  # type: ignore[operator]
        for owner in module.modules():
            for name, copy in owner._parameters.items():
                p = places[owner, name]
                if p is not None and copy is not None and copy is not p:
                    copies[p] = copy
        module.reshard()  # type: ignore[operator]
    return copies


def sum_over_processes(tensors: Iterable[Tensor]) -> float:
    """The sum of all elements in float64; of DTensors over all processes of their meshes, a collective."""
    sums: dict[Any, Tensor] = {}
    for tensor in tensors:
        mesh = placement_of(tensor)[0] if is_dtensor(tensor) else None
        own = sums.setdefault(mesh, torch.zeros((), dtype=torch.float64))
        if is_first_copy(tensor):
            own += local(tensor).detach().double().sum().cpu()
    return sum((own if mesh is None else sum_over_mesh(own, mesh)).item() for mesh, own in sums.items())


def terms_of(
    log_p: Tensor, labels: Tensor | None, mode: Mode, generator: torch.Generator
) -> list[tuple[Tensor, float]]:
    """(what to differentiate, the weight of its squared gradient) for one example; ``log_p`` is [positions, C]."""
    if mode == "exact":
        weights = log_p.detach().exp().tolist()
        return [(log_p[i, c], w) for i, line in enumerate(weights) for c, w in enumerate(line) if w != 0.0]
    if mode == "sampled":
        # Drawn on the CPU, so that a seed means the same on every device.
        labels = torch.multinomial(log_p.detach().cpu().exp(), 1, generator=generator).flatten().to(log_p.device)
    assert labels is not None
    return [(log_p.gather(1, labels.unsqueeze(1)).sum(), 1.0)]


def positions(
    logits: Tensor, labels: Tensor | None, mode: Mode, next_token: bool | None
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities [positions, C], labels [positions]) of the positions that count."""
    if labels is None:
        if mode == "empirical" or logits.dim() > 2:
            why = "empirical" if mode == "empirical" else f"logits of shape {list(logits.shape)}"
            raise ValueError(f'batches: expected labels ("labels", or (inputs, labels)) for {why}, got none')
        return log_softmax(logits), None
    if logits.dim() > 2:
        if next_token is None:
            raise ValueError(
                f"next_token: expected True (causal language models) or False for logits of shape "
                f"{list(logits.shape)}, got None"
            )
        if next_token:
            logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"batches: expected integer labels of shape {list(logits.shape[:-1])} for logits of shape "
            f"{list(logits.shape)}, got {labels.dtype} of shape {list(labels.shape)}"
        )
    counts = labels != IGNORED
    kept = labels[counts]
    classes = logits.shape[-1]
    wrong = kept[(kept < 0) | (kept >= classes)]
    if wrong.numel():
        raise ValueError(f"batches: expected labels from 0 to {classes - 1}, or {IGNORED}, got {int(wrong[0])}")
    return log_softmax(logits[counts]), kept


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def checked_logits(logits: Any) -> Tensor:
    """The logits, if that is what they are."""
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[0] != 1:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"forward: expected logits of shape [1, ..., classes] for one row, got {got}")
    return logits


def checked_loss(value: Any) -> Tensor:
    """The loss, if it is one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a tensor of one element for one row, got {got}")
    return value.sum()
