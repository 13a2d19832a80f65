from collections.abc import Callable
from typing import Any

import torch

version: str
cuda_archs: str
kernel_devices: tuple[str, ...]

def cuda_unavailable() -> str: ...
def cpu_instruction_set() -> str: ...
def connect_torch(
    tensor_class: type[torch.Tensor],
    allocate_handles: Callable[[list[torch.Tensor]], list[Any]] | None,
    samples: list[torch.Tensor],
) -> None: ...
def overlapping(tensors: list[torch.Tensor]) -> list[int]: ...

class Anchoring:  # csrc/math/adamw.h
    __members__: dict[str, Anchoring]
    none: Anchoring
    selective: Anchoring

class AdamWRecord:
    tensors: tuple[str, ...]  # the names that the constructor, replaced and attributes take
    param: torch.Tensor
    group: int
    dormant: bool
    name: str
    anchoring: Anchoring
    counts_on_device: bool
    rounding_key: int | None  # of stochastic rounding; None: to nearest
    index: tuple[int, int, int] | None  # (row, stride, first) of a shard in the whole tensor; None: it is whole
    steps: bool
    def __init__(
        self,
        param: torch.Tensor,
        group: int,
        *,
        dormant: bool = False,
        name: str = "",
        anchoring: Anchoring = ...,
        counts_on_device: bool = False,
        rounding_key: int | None = None,
        index: tuple[int, int, int] | None = None,
        **tensors: torch.Tensor | None,
    ) -> None: ...
    def replaced(self, **tensors: torch.Tensor | None) -> AdamWRecord: ...
    def unstepped(self) -> AdamWRecord: ...
    def __getattr__(self, name: str) -> Any: ...  # a tensor by its name, or None

class AdamWPlan:
    def __init__(self, records: list[AdamWRecord]) -> None: ...
    def gather(self, parameter_lists: list[list[torch.Tensor]], state: dict[Any, Any]) -> bool: ...
    def unread(self) -> list[int]: ...
    def set_grad(self, position: int, grad: torch.Tensor) -> None: ...
    def stepped(self, position: int) -> torch.Tensor | None: ...
    def written(self) -> list[torch.Tensor]: ...
    def release(self) -> None: ...
    def devices(self) -> list[tuple[int, int]]: ...
    def workspace_bytes(self, device: tuple[int, int]) -> int: ...
    def launches(self, device: tuple[int, int]) -> int: ...
    def sum_of_squares(self, device: tuple[int, int], out: torch.Tensor, workspace: torch.Tensor | None) -> None: ...
    def step(
        self,
        device: tuple[int, int],
        groups: list[dict[str, Any]],
        lrs: list[float | torch.Tensor],
        sum_of_squares: torch.Tensor | None,
        max_grad_norm: float,
        skip_nonfinite: bool,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        skipped_steps: torch.Tensor | None,
        workspace: torch.Tensor | None,
    ) -> None: ...

# Dropout. `random`: (p, seed, offset), or (p, state) with an int64[2] tensor on the device.
def dropout_takes(tensor: object, /) -> bool: ...
def dropout(x: torch.Tensor, random: tuple[Any, ...], /) -> torch.Tensor: ...
def bias_dropout_add(
    x: torch.Tensor,
    y: torch.Tensor,
    random: tuple[Any, ...],
    bias: torch.Tensor | None = None,
    minus: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    /,
) -> None: ...
def bias_dropout_add_backward(
    dy: torch.Tensor,
    dx: torch.Tensor,
    dbias: torch.Tensor,
    random: tuple[Any, ...],
    workspace: torch.Tensor | None,
) -> None: ...
def dropout_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    sum: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    columns: int,
    eps: float,
    random: tuple[Any, ...],
) -> None: ...
def dropout_add_norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    sum: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    dresidual: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    columns: int,
    random: tuple[Any, ...],
    workspace: torch.Tensor | None,
) -> None: ...
def dropout_workspace_bytes(tensor: torch.Tensor, columns: int, sums: int) -> int: ...
