"""Training side by side with ``torch.optim.AdamW``: what the contract tests share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft import Anchor
from fastft.optim.checkpoint import PLACE, Has, flags_in

# Both compute in the dtype itself but round in other places (ours fuses multiplications with additions), so a
# difference of some units in the last place per step is right, and anything above it a fault.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.complex128: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 2e-7},
    torch.complex64: {"rtol": 2e-6, "atol": 2e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}


def assert_near(ours: Any, theirs: Any, what: str = "") -> None:
    """Tensors equal within their dtype's tolerance, everything else exactly; same keys, dtypes and devices."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), f"{what}: expected a tensor, got {ours!r}"
        assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} != {theirs.dtype}"
        tolerance = TOLERANCES.get(theirs.dtype, {"rtol": 0.0, "atol": 0.0})
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m: f"{what}: {m}")
    elif isinstance(theirs, Mapping):
        assert list(ours) == list(theirs), f"{what}: {list(ours)} != {list(theirs)}"
        for key in theirs:
            assert_near(ours[key], theirs[key], f"{what}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"{what}: {len(ours)} != {len(theirs)} entries"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(a, b, f"{what}[{i}]")
    else:
        assert ours == theirs, f"{what}: {ours!r} != {theirs!r}"


def assert_same(a: Any, b: Any, what: str = "") -> None:
    """Equal bit for bit, through nested containers; dtypes too."""
    if isinstance(b, Tensor):
        assert isinstance(a, Tensor), f"{what}: expected a tensor, got {a!r}"
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    elif isinstance(b, Mapping):
        assert a.keys() == b.keys(), f"{what}: {list(a)} != {list(b)}"
        for key in b:
            assert_same(a[key], b[key], f"{what}[{key!r}]")
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b), f"{what}: {len(a)} != {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{what}[{i}]")
    else:
        assert a == b, f"{what}: {a!r} != {b!r}"


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six parameters of different shapes; the same ones for the same seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 17), nn.LayerNorm(17), nn.Tanh(), nn.Linear(17, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model.to(dtype)


def give_grads(params: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients that depend on nothing but the step and the parameter's position and shape."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = grad.to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with those gradients; steps are numbered, so that a run can be cut in two."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        give_grads(params, step)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each parameter's state, in order; {} where there is none."""
    return [
        dict(optimizer.state[p]) if p in optimizer.state else {}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


# -- what a state dict has beyond torch's ------------------------------------------------------------------

CARRIED = ("fastft_flags", "anchor", "anchor_importance", "update_mask")


def carried(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each parameter of a state dict, in order, all that it carries beside its moments; {} without any."""
    without = saved.get("fastft", {}).get("without_moments", {})
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    entries = [{**saved["state"].get(i, {}), **without.get(str(i), {})} for i in ids]
    return [{key: entry[key] for key in CARRIED if key in entry} for entry in entries]


def carried_by(saved: Mapping[str, Any], key: str) -> dict[Any, Any]:
    """One key of it, by the parameters' names, or by their positions in a state dict without names."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    names = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
    return {i: entry[key] for i, entry in zip(names or ids, carried(saved), strict=True) if key in entry}


def flags_of(saved: Mapping[str, Any]) -> dict[Any, Has]:
    """Which of it each parameter has, by name or position."""
    return {name: flags_in({"fastft_flags": flags}) for name, flags in carried_by(saved, "fastft_flags").items()}


def names_in_file(saved: Mapping[str, Any]) -> dict[Any, str]:
    """The names of those anchors that lie in a file, there, by the parameters' names or positions here."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    names = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
    groups = [number for number, group in enumerate(saved["param_groups"]) for _ in group["params"]]
    places = carried_by(saved, "fastft_flags")
    found = {}
    for key, number in zip(names or ids, groups, strict=True):
        if key in places and int(places[key]) >> PLACE:
            found[key] = metadata_of(saved, number)["names_in_file"][(int(places[key]) >> PLACE) - 1]
    return found


def metadata_of(saved: Mapping[str, Any], group: int = 0) -> dict[str, Any]:
    """The JSON of a group of a state dict, which is about all of its parameters."""
    found: dict[str, Any] = json.loads(saved["param_groups"][group]["fastft"])
    return found


def change_metadata(saved: dict[str, Any], **changes: Any) -> None:
    """Edit it in all groups."""
    for i, group in enumerate(saved["param_groups"]):
        group["fastft"] = json.dumps({**metadata_of(saved, i), **changes})


class Composed(torch.optim.AdamW):
    """The step of ``fastft.AdamW``, put together from torch's operations.

    Every parameter is anchored where it is now. ``masks`` and ``frozen`` are filled by the tests.
    """

    def __init__(
        self,
        params: Any,
        *,
        anchor_decay: float = 0.0,
        anchor_mode: str = "decoupled",
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, foreach=False, **options)
        for group in self.param_groups:
            group.setdefault("anchor_decay", anchor_decay)
            group.setdefault("anchor_mode", anchor_mode)
        self.max_grad_norm = max_grad_norm
        self.anchors = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.masks: dict[Tensor, Tensor] = {}
        self.frozen: set[Tensor] = set()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        given = {p: p.grad for group in self.param_groups for p in group["params"]}
        for p, grad in given.items():
            p.grad = None if grad is None or p in self.frozen else grad.clone()
        live = [p for p in given if p.grad is not None]
        for p in live:
            if p in self.masks:
                p.grad = torch.where(self.spread_mask(p), p.grad, 0.0)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(live, self.max_grad_norm, foreach=False)
        untouched = {p: copy.deepcopy({"": p.detach(), **self.state[p]}) for p in self.masks}
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.decay(p, group)
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for p, before in untouched.items():
            for key, value in {"": p, **self.state[p]}.items():
                if isinstance(value, Tensor) and key != "step":
                    value.copy_(torch.where(self.spread_mask(p), value, before.get(key, torch.zeros(()))))
        for p, grad in given.items():
            p.grad = grad

    def decay(self, p: Tensor, group: dict[str, Any]) -> None:
        lr, strength = float(group["lr"]), group["anchor_decay"]
        away = p - self.anchors[p]
        change = lr * group["weight_decay"] * p
        if group["anchor_mode"] == "decoupled":
            change += min(1.0, lr * strength) * away
        else:
            p.grad = p.grad + strength * away
        p.sub_(change)

    def spread_mask(self, p: Tensor) -> Tensor:
        mask = self.masks[p]
        return mask.reshape(*mask.shape, *[1] * (p.dim() - mask.dim())).expand(p.shape)


class Twins:
    """Equal models, one under ``fastft.AdamW`` and one under torch's, which is ``Composed`` if ``ours`` is given.

    ``groups`` makes what the optimizers get of a model (its parameters by default); ``options`` go to both,
    ``ours`` are options that torch does not have.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module] = net,
        groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
        *,
        ours: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options = {"lr": 1e-2, "weight_decay": 0.1, **options}
        self.models = (model(), model())
        self.ours = fastft.AdamW(groups(self.models[0]), **options, **(ours or {}))
        if ours is None:
            self.theirs = torch.optim.AdamW(groups(self.models[1]), **{"foreach": False, **options})
        else:
            composed = {key: value for key, value in ours.items() if key != "anchor"}
            self.theirs = Composed(groups(self.models[1]), **options, **composed)
        self.optimizers = (self.ours, self.theirs)
        self.steps = 0

    def params(self, which: int) -> list[Tensor]:
        return list(self.models[which].parameters())

    def give_grads(self, scale: float = 1.0) -> None:
        """Both models the gradients of the next step."""
        for which in (0, 1):
            give_grads(self.params(which), self.steps, scale)
        self.steps += 1

    def step(self, count: int = 1) -> None:
        """Steps with given gradients, checked after each."""
        for _ in range(count):
            self.give_grads()
            for optimizer in self.optimizers:
                optimizer.step()
            self.check()

    @torch.no_grad()
    def equalize(self) -> None:
        """Take away the differences of rounding that there are so far."""
        for p, q in zip(self.params(0), self.params(1), strict=True):
            q.copy_(p)
        for ours, theirs in zip(state_of(self.ours), state_of(self.theirs), strict=True):
            for key, value in ours.items():
                theirs[key].copy_(value)

    def check(self) -> None:
        """Parameters and state agree."""
        assert_near(self.params(0), self.params(1), "parameters")
        assert_near(state_of(self.ours), state_of(self.theirs), "state")


def anchor_in_file(model: nn.Module, folder: Path) -> Anchor:
    """Of the model's first weights when it is called first, in a file under other names; one bias is free."""
    path = folder / "base.safetensors"
    if not path.exists():
        save_file({f"bert.{name}": p.detach() * 0.75 for name, p in model.named_parameters()}, path)
    return Anchor.from_safetensors(path, model, exclude="3.bias")


def weighted_anchor(model: nn.Module, _: Path) -> Anchor:
    """With an importance in bfloat16; one bias is free."""
    importance = {name: p.detach().square() * 100 for name, p in model.named_parameters()}
    return Anchor.snapshot(model, exclude="1.bias").with_importance(importance, dtype=torch.bfloat16)
