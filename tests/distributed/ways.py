"""Ways to spread a model over processes: how each wraps it, steps it, shows it whole, saves it and loads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import deepspeed_distributed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastft
from distributed.given_gradients import ANCHOR_DECAY, LAYERS, OPTIONS, groups
from fastft.integrations.deepspeed import FROZEN, attach
from fastft.names import bare
from fastft.optim import master_weights

SCALER: Mapping[str, Any] = {"init_scale": 8.0, "growth_interval": 2}
"""Powers of two, which round nothing; the scale doubles after two steps, and halves after one that is skipped."""
SAVED_BY = 4
"""As many processes as run the columns, and write the checkpoints for fewer."""
Optimizer = Any
"""``fastft.AdamW``, or what a framework puts around it."""


class Way:
    """A way to run: in one process, without a wrapper, unless a subclass does otherwise.

    ``whole`` tensors are plain and complete in every process; names are those of the model without wrappers.
    """

    name = "one process"
    meaning = ""
    """A sentence for the page, in Markdown."""
    package: str | None = None
    """One that it needs beside torch."""
    dtype = torch.float64
    options: Mapping[str, Any] = MappingProxyType({})
    """Of the optimizer, in every scenario."""
    flat = False
    """Whether the optimizer sees a layer's parameters as one tensor."""
    takes_masks = True
    """Whether update masks can be set; if not, the scenarios of checkpoints go without."""
    masks_before_loading = False
    """Whether a checkpoint with masks is read into masks that are there already."""
    others: tuple[str, ...] = ("anchor made before wrapping",)
    """Names of scenarios beside the columns of the table."""
    unfreezer_mode: Literal["requires_grad", "freeze"] = "freeze"
    weights_only = True
    """Whether the saved file can be read so."""
    names_in_groups = True
    """Whether the optimizer takes them."""
    clips_one_group = False
    """Whether it clips and skips with one group of parameters only, which such scenarios then have."""
    reshards_all = True
    """Whether other numbers of processes load anchor, masks and frozen tensors, too; if not, they are given again."""
    untried: Mapping[str, str] = MappingProxyType({})
    """Columns that make no sense here, and why."""

    def missing(self) -> str | None:
        """Why this way cannot be tried here; None if it can."""
        return None if self.package is None or find_spec(self.package) else f"{self.package} is not installed"

    def in_one_process(self) -> Way:
        """The same without a wrapper: what it has to be equal to."""
        way = Way()
        way.dtype, way.options, way.flat, way.takes_masks = self.dtype, self.options, self.flat, self.takes_masks
        way.clips_one_group = self.clips_one_group
        return way

    def unwrapped(self) -> Way | None:
        """The same, which loads what this way has saved; None if that cannot be done."""
        way = self.in_one_process()
        way.name, way.masks_before_loading = self.name, self.masks_before_loading
        way.load = self.load_unwrapped  # type: ignore[method-assign]
        return way

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def optimizer(self, wrapped: nn.Module, together: bool | None = None, **options: Any) -> Optimizer:
        """The optimizer of two groups, or of one if ``together``; None: as the way clips."""
        if together is None:
            together = self.clips_one_group and not options.keys().isdisjoint({"max_grad_norm", "skip_nonfinite"})
        anchored = options.get("anchor") is not None
        if anchored:
            options.setdefault("anchor_decay", ANCHOR_DECAY)
        parts = groups(
            wrapped.named_parameters(), anchored=anchored, with_names=self.names_in_groups, together=together
        )
        return self.make_optimizer(wrapped, parts, {**OPTIONS, **self.options, **options})

    def make_optimizer(self, wrapped: nn.Module, parts: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
        return fastft.AdamW(parts, **options)

    def core(self, optimizer: Optimizer) -> fastft.AdamW:
        """The ``fastft.AdamW`` that steps in this process."""
        return optimizer

    def scaler(self) -> GradScaler:
        """The loss scaler that goes with it."""
        return GradScaler("cpu", **SCALER)

    def give(self, wrapped: nn.Module, grads: Mapping[str, Tensor], scaler: GradScaler | None = None) -> None:
        """Gradients by hand: whole ones, in the same placement as the parameters; scaled by ``scaler``."""
        factor = torch.ones((), dtype=self.dtype)
        factor = factor if scaler is None else scaler.scale(factor).to(self.dtype)
        for name, p in wrapped.named_parameters():
            p.grad = placed_like(grads[bare(name)] * factor, p)

    def step(self, wrapped: nn.Module, optimizer: Optimizer) -> None:
        optimizer.step()

    def own_parameters(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """{name: parameter} of those that this process steps."""
        known = {p for group in self.core(optimizer).param_groups for p in group["params"]}
        return {bare(name): p for name, p in wrapped.named_parameters() if p in known}

    def freeze(self, wrapped: nn.Module, optimizer: Optimizer, names: tuple[str, ...], frozen: bool) -> None:
        """Freeze, or unfreeze, the parameters whose name, with a dot after it, begins with one of these."""
        own = self.own_parameters(wrapped, optimizer)
        chosen = [p for name, p in own.items() if f"{name}.".startswith(names)]
        core = self.core(optimizer)
        (core.freeze if frozen else core.unfreeze)(chosen)

    def set_masks(self, wrapped: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
        """Set update masks by name, each of its parameter's whole shape or of its rows."""
        own = self.own_parameters(wrapped, optimizer)
        for name, mask in masks.items():
            if name in own:
                self.core(optimizer).set_update_mask(own[name], mask)

    def whole(self, wrapped: nn.Module) -> dict[str, Tensor]:
        return {bare(name): whole(p) for name, p in wrapped.named_parameters()}

    def whole_master_weights(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """The float32 of 16-bit weights with extra bits."""
        return {bare(name): whole(p) for name, p in master_weights(wrapped, optimizer).items()}

    def save(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        """Model and optimizer, in the way that the framework documents."""
        if rank() == 0:
            torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, folder / "saved.pt")

    def load(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        """The inverse of :meth:`save`."""
        saved = self.read(folder)
        wrapped.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def read(self, folder: Path) -> dict[str, Any]:
        """The file of :meth:`save`."""
        return torch.load(folder / "saved.pt", weights_only=self.weights_only)

    def load_unwrapped(self, module: nn.Module, optimizer: fastft.AdamW, folder: Path) -> None:
        """The same, into a model in one process."""
        saved = self.read(folder)
        module.load_state_dict({bare(name): tensor for name, tensor in saved["model"].items()})
        optimizer.load_state_dict(saved["optimizer"])

    def prepare_resharding(self, folder: Path) -> None:
        """Whatever has to be done once to a checkpoint before other numbers of processes can load it."""

    def forget_meshes(self) -> None:
        """Forget what belongs to process groups that are gone."""


class BackwardWay(Way):
    """Gradients of a backward pass, of the same loss in every process: their average is the gradient."""

    def give(self, wrapped: nn.Module, grads: Mapping[str, Tensor], scaler: GradScaler | None = None) -> None:
        give_to_layers(wrapped, grads)
        loss = wrapped(torch.zeros((), dtype=self.dtype))
        (loss if scaler is None else scaler.scale(loss)).backward()


class Ddp(BackwardWay):
    name = "DDP"
    meaning = "`DistributedDataParallel`; checkpoints by `torch.save`."

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module)


class Zero(Ddp):
    """Each process has the state of some whole parameters, and broadcasts them after its step."""

    name = "ZeRO"
    meaning = "`ZeroRedundancyOptimizer` over `DistributedDataParallel`; checkpoints by `consolidate_state_dict`."
    others = (*Way.others, "more processes than tensors")
    weights_only = False  # its groups hold all options, an anchor among them
    names_in_groups = False

    def make_optimizer(self, wrapped: nn.Module, parts: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns a lot

        return ZeroRedundancyOptimizer(parts, optimizer_class=fastft.AdamW, **options)

    def core(self, optimizer: Optimizer) -> fastft.AdamW:
        return optimizer.optim

    def save(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        optimizer.consolidate_state_dict(to=0)
        super().save(wrapped, optimizer, folder)


class Fsdp2(BackwardWay):
    name = "FSDP2"
    meaning = "`fully_shard`; checkpoints by `torch.distributed.checkpoint`, read into masks that were set before."
    others = (*Way.others, "mask that fits a piece", "resume without masks")
    masks_before_loading = True
    unfreezer_mode = "requires_grad"

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", (world(),))

    def forget_meshes(self) -> None:
        self.__dict__.pop("mesh", None)

    def wrap(self, module: nn.Module) -> nn.Module:
        return sharded(module, self.mesh)

    def save(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        state = {
            "model": get_model_state_dict(wrapped),
            "optimizer": get_optimizer_state_dict(wrapped, optimizer),
        }
        dcp.save(state, checkpoint_id=folder / "dcp")

    def load(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        state = {
            "model": get_model_state_dict(wrapped),
            "optimizer": get_optimizer_state_dict(wrapped, optimizer),
        }
        dcp.load(state, checkpoint_id=folder / "dcp")
        set_model_state_dict(wrapped, state["model"])
        set_optimizer_state_dict(wrapped, optimizer, state["optimizer"])

    load_unwrapped = load


class Fsdp2Bfloat16(Fsdp2):
    name = "FSDP2 (bfloat16)"
    meaning = "The same with bfloat16 weights and `extra_bits=16`; the float32 weights are compared, too."
    dtype = torch.bfloat16
    options = MappingProxyType({"extra_bits": 16})


class Hsdp(Fsdp2):
    name = "HSDP"
    meaning = "`fully_shard` on a mesh of 2 × 2 processes: pieces within its rows, copies between them."

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", mesh_shape(), mesh_dim_names=("replicate", "shard"))


class Fsdp2TensorParallel(Fsdp2):
    """The first layer cut in rows by both (``_StridedShard``), the second in columns and rows.

    The norm layer is a copy in each process of the tensor-parallel dimension, and the head is not on its mesh at all.
    """

    name = "FSDP2 × tensor parallelism"
    meaning = (
        "`fully_shard` and `parallelize_module` on a mesh of 2 × 2 processes: `ColwiseParallel` (strided shards), "
        "`RowwiseParallel`, `SequenceParallel`, and a layer that only `fully_shard` cuts."
    )

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", mesh_shape(), mesh_dim_names=("data", "tensor"))

    def wrap(self, module: nn.Module) -> nn.Module:
        plan = {
            "first": ColwiseParallel(),
            "norm": SequenceParallel(),
            "second": RowwiseParallel(),
            "square": ColwiseParallel(),
        }
        return sharded(parallelize_module(module, self.mesh["tensor"], plan), self.mesh["data"])

    # The layers' forward pass is none that tensor parallelism could cut.
    give = Way.give


class Fsdp1(BackwardWay):
    name = "FSDP1"
    meaning = (
        "`FullyShardedDataParallel` with `use_orig_params=True`; checkpoints by its `optim_state_dict`, with "
        "`offload_to_cpu=False`: states that lie on the CPU anyway would be overwritten by torch."
    )
    others = (*Way.others, "mask that fits a piece")
    use_orig_params = True
    strategy = ShardingStrategy.FULL_SHARD
    mesh: DeviceMesh | None = None
    takes_masks = False

    def wrap(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module,
            auto_wrap_policy=ModuleWrapPolicy(set(LAYERS)),
            sharding_strategy=self.strategy,
            device_mesh=self.mesh,
            use_orig_params=self.use_orig_params,
            device_id=torch.device("cpu"),
        )

    def scaler(self) -> GradScaler:
        return ShardedGradScaler("cpu", **SCALER)

    def whole(self, wrapped: nn.Module) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return super().whole(wrapped)

    def own_parameters(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        own = super().own_parameters(wrapped, optimizer)
        return {name.removesuffix("._flat_param"): p for name, p in own.items()}

    def save(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        with whole_state_dicts(wrapped):
            state = {
                "model": wrapped.state_dict(),
                "optimizer": FullyShardedDataParallel.optim_state_dict(wrapped, optimizer),
            }
        if rank() == 0:
            torch.save(state, folder / "saved.pt")

    def load(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        saved = self.read(folder)
        with whole_state_dicts(wrapped):
            wrapped.load_state_dict(saved["model"])
            state = FullyShardedDataParallel.optim_state_dict_to_load(wrapped, optimizer, saved["optimizer"])
        optimizer.load_state_dict(state)

    def load_unwrapped(self, module: nn.Module, optimizer: fastft.AdamW, folder: Path) -> None:
        saved = self.read(folder)
        module.load_state_dict(saved["model"])
        by_position = FullyShardedDataParallel.rekey_optim_state_dict(
            saved["optimizer"], OptimStateKeyType.PARAM_ID, module, optim=optimizer
        )
        optimizer.load_state_dict(by_position)


class Fsdp1Hybrid(Fsdp1):
    name = "FSDP1 (`HYBRID_SHARD`)"
    meaning = "The same on a mesh of 2 × 2 processes: pieces within its rows, copies between them."
    strategy = ShardingStrategy.HYBRID_SHARD

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", mesh_shape(), mesh_dim_names=("replicate", "shard"))

    def forget_meshes(self) -> None:
        self.__dict__.pop("mesh", None)


class Fsdp1Flat(Fsdp1):
    name = "FSDP1 (`use_orig_params=False`)"
    meaning = "The same, with one flat parameter for each layer, which is frozen as a whole."
    use_orig_params = False
    flat = True

    def set_masks(self, wrapped: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
        own = self.own_parameters(wrapped, optimizer)
        super().set_masks(wrapped, optimizer, dict.fromkeys(own, masks["first.weight"]))


class DeepSpeed(Way):
    """Each process steps a flat float32 part of each group; the engine steps, saves and loads."""

    name = "DeepSpeed ZeRO-2"
    meaning = (
        "ZeRO stage 2 with bfloat16 weights, after `fastft.integrations.deepspeed.attach`, held to one process with "
        "`extra_bits=16`; DeepSpeed's float32 weights are compared, too. The optimizer clips and skips itself, with "
        'one group of parameters and `"check_grad_overflow": false`: else it is DeepSpeed that leaves out steps. '
        "Checkpoints by `save_checkpoint`; for other numbers of processes, always with DeepSpeed, by its "
        "`ds_to_universal`, with anchor, masks and frozen tensors given again."
    )
    package = "deepspeed"
    dtype = torch.bfloat16  # in float32 it would be DeepSpeed itself that leaves out a step with an inf
    others = (*Way.others, "clip in two groups", "skip in two groups")
    clips_one_group = True
    reshards_all = False
    untried = MappingProxyType({"GradScaler": 'DeepSpeed scales the loss itself, where its config has "fp16"'})

    def in_one_process(self) -> Way:
        way = super().in_one_process()
        way.options = {"extra_bits": 16}
        return way

    def unwrapped(self) -> None:
        """DeepSpeed's checkpoints are for its engines."""

    def make_optimizer(self, wrapped: nn.Module, parts: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
        optimizer = fastft.AdamW(parts, **options)
        config = {
            **deepspeed_distributed.WAYS["ZeRO-2, bfloat16"].whole_config(),
            "checkpoint": {"load_universal": world() < SAVED_BY},
        }
        deepspeed = deepspeed_distributed.imported()
        engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config)
        attach(engine)
        vars(wrapped)["engine"] = engine  # not as a submodule
        return optimizer

    def give(self, wrapped: nn.Module, grads: Mapping[str, Tensor], scaler: GradScaler | None = None) -> None:
        give_to_layers(wrapped, grads)
        wrapped.engine.backward(wrapped.engine(torch.zeros((), dtype=self.dtype)))

    def step(self, wrapped: nn.Module, optimizer: Optimizer) -> None:
        wrapped.engine.step()

    def freeze(self, wrapped: nn.Module, optimizer: Optimizer, names: tuple[str, ...], frozen: bool) -> None:
        before = {name for group in optimizer.param_groups for name in group[FROZEN]}
        chosen = {name for name, _ in wrapped.named_parameters() if f"{name}.".startswith(names)}
        attach(wrapped.engine, frozen=before | chosen if frozen else before - chosen)

    def set_masks(self, wrapped: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
        attach(wrapped.engine, update_masks=masks)

    def whole_master_weights(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p) for name, p in wrapped.named_parameters()}

    def save(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        wrapped.engine.save_checkpoint(str(folder), tag="saved")

    def load(self, wrapped: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        wrapped.engine.load_checkpoint(str(folder), tag="saved" if world() == SAVED_BY else "universal")

    def prepare_resharding(self, folder: Path) -> None:
        deepspeed_distributed.to_universal(folder / "saved", folder / "universal")


WAYS: list[Way] = [
    Ddp(),
    Fsdp2(),
    Fsdp2Bfloat16(),
    Fsdp2TensorParallel(),
    Hsdp(),
    Fsdp1(),
    Fsdp1Hybrid(),
    Fsdp1Flat(),
    Zero(),
    DeepSpeed(),
]
"""The rows of the table."""


# -- processes and tensors ---------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    """Until all processes are here: what one of them has written can be read then."""
    if dist.is_initialized():
        dist.barrier()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mesh_shape() -> tuple[int, int]:
    """Two dimensions of two processes; with fewer processes, the first one goes."""
    return {4: (2, 2), 2: (1, 2), 1: (1, 1)}[world()]


def sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """``fully_shard``, with two layers by themselves and two in the root."""
    for name in ("first", "second"):
        if name in dict(module.named_children()):
            fully_shard(module.get_submodule(name), mesh=mesh)
    return fully_shard(module, mesh=mesh)


def give_to_layers(wrapped: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Give each layer the gradients that its backward pass is to have."""
    for name, layer in wrapped.named_modules():
        if isinstance(layer, LAYERS):
            prefix = f"{bare(name + '.')}"
            layer.given = {key.removeprefix(prefix): grad for key, grad in grads.items() if key.startswith(prefix)}


def placed_like(grad: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return grad
    return distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


@torch.no_grad()
def whole(p: Tensor) -> Tensor:
    """A copy of a tensor, put together if it is a DTensor."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def pieces(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of what this process holds."""
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def whole_state_dicts(wrapped: nn.Module) -> Any:
    """FSDP1's state dicts put together, in every process."""
    return FullyShardedDataParallel.state_dict_type(
        wrapped,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=False),
        # Offloading does not copy what is on the CPU already, and torch uses the memory again for the next state.
        FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False),
    )
