"""A state dict's parameters and groups in the order of the optimizer that loads it, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastft.names import NameIndex, listed

from .replaced import has_names


def by_names(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """The state dict with its parameters and groups in the optimizer's order, where both sides know their names.

    Where no name is known to both, the order counts, as in torch.

    Raises:
        ValueError: other groups, or other parameters.
    """
    saved_groups, own_groups = loaded["param_groups"], optimizer.param_groups
    saved, own = [names_of(group) for group in saved_groups], [names_of(group) for group in own_groups]
    at = {name: (g, k) for g, names in enumerate(saved) for k, name in enumerate(names)}
    if not all(saved) or not all(own) or len(at) < sum(map(len, saved)):
        return loaded
    index = NameIndex(at)
    found = [[index.find(name) for name in names] for names in own]
    matched = {name for names in found for name in names if name is not None}
    if not matched:
        return loaded
    groups = []
    for number, (names, theirs) in enumerate(zip(own, found, strict=True)):
        missing = [name for name, other in zip(names, theirs, strict=True) if other is None]
        homes = sorted({at[name][0] for name in theirs if name is not None})
        if missing:
            unknown = [name for name in at if name not in matched]
            raise ValueError(
                f"state_dict: param_groups[{number}]: expected the state of {listed(missing, quoted=False)}, got "
                f"{'that of ' + listed(unknown, quoted=False) if unknown else 'none'}"
            )
        if len(homes) > 1 or len(saved[homes[0]]) != len(names):
            lists = "; ".join(f"group {g} of {listed(saved[g], quoted=False)}" for g in homes)
            raise ValueError(
                f"state_dict: param_groups[{number}]: expected a group of {listed(names, quoted=False)}, got {lists}"
            )
        group, ids = saved_groups[homes[0]], saved_groups[homes[0]]["params"]
        ordered = {**group, "params": [ids[at[name][1]] for name in theirs if name is not None]}
        if "param_names" in own_groups[number]:
            ordered["param_names"] = own_groups[number]["param_names"]
        groups.append(ordered)
    if len(saved_groups) > len(groups):
        extra = [names for names in saved if not matched.intersection(names)]
        raise ValueError(
            f"state_dict: expected {len(groups)} param_groups, got {len(saved_groups)}, with one of "
            f"{listed(extra[0] if extra else [], quoted=False)}"
        )
    return {**loaded, "param_groups": groups}


def names_of(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters: DCP's, else torch's; [] where not all have one."""
    params = group["params"]
    if params and all(isinstance(i, str) for i in params):
        return list(params)
    return list(group["param_names"]) if has_names(group) else []
