"""The unfreezer as a Lightning callback."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from unfreeze_cases import CLASSES, ConvNet, Stack, assert_equal, bits, params, state_tensors

import fastft
from fastft.integrations.lightning import UnfreezeCallback
from fastft.optim import layerwise_lr
from fastft.unfreeze import LISA, GradualUnfreeze, OnPlateau, layer_groups

lightning = pytest.importorskip("lightning.pytorch")

BATCHES = 6


class Module(lightning.LightningModule):
    """A model with everything at work that could move a parameter: decay, anchor, momentum."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = {"weight_decay": 0.1, "anchor": "init", "anchor_decay": 3.0, "max_grad_norm": 0.5, **options}

    def training_step(self, batch: Any, index: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        groups = layerwise_lr(layer_groups(self), 1e-2, decay=1 / 1.2)
        optimizer = fastft.AdamW(groups, **self.options)
        schedule = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recorder(lightning.Callback):
    def __init__(self, unfreeze: UnfreezeCallback) -> None:
        self.unfreeze = unfreeze
        self.opened: dict[int, tuple[str, ...]] = {}
        self.lr: dict[int, list[float]] = {}
        self.moments: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.note(trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.note(trainer)

    def note(self, trainer: Any) -> None:
        assert self.unfreeze.unfreezer is not None
        assert self.unfreeze.unfreezer.progress.step == trainer.global_step
        self.opened[trainer.global_step] = self.unfreeze.unfreezer.open_groups
        self.lr[trainer.global_step] = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        self.moments = bits(state_tensors(trainer.optimizers[0]))


def data(shape: tuple[int, ...] = (5,), batches: int = BATCHES, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * 4, *shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (batches * 4,), generator=generator)), batch_size=4)


def fit(
    folder: Path, module: Any, unfreeze: Any, resume: Path | None = None, package: Any = lightning, **options: Any
) -> Any:
    loaders = options.pop("loaders", (data(), data(batches=2, seed=1)))
    recorder = options.pop("recorder", None) or Recorder(unfreeze)
    checkpoints = package.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, save_last=False)
    defaults = {"max_epochs": 4, "accumulate_grad_batches": 2}
    trainer = package.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[unfreeze, recorder, checkpoints],
        **{**defaults, **options},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps|sync_dist|GPU).*")
        trainer.fit(module, *loaders, ckpt_path=None if resume is None else str(resume))
    return recorder


POLICIES = {
    "gradual": (GradualUnfreeze(every=3), {"rewarm_steps": 2}),
    "epochs": (GradualUnfreeze(every=1, unit="epoch"), {"state_policy": "offload"}),
    "lisa": (LISA(1, every=2, seed=5), {"mode": "freeze", "state_policy": "reset"}),
    "plateau": (OnPlateau("val_loss", patience=1, threshold=0.5, restore_best=True), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_fit_that_is_resumed_matches_one_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    policy, options = POLICIES[name]
    whole = fit(tmp_path, module := Module(Stack()), UnfreezeCallback(policy, **options))
    (checkpoint,) = tmp_path.glob("epoch=1-*")
    again = Module(Stack(seed=9))
    resumed = fit(tmp_path / "again", again, UnfreezeCallback(policy, **options), checkpoint)
    assert_equal(params(again), params(module))
    assert_equal(resumed.moments, whole.moments)
    assert {step: whole.lr[step] for step in resumed.lr if step > 6} == {s: v for s, v in resumed.lr.items() if s > 6}
    later = {step: opened for step, opened in resumed.opened.items() if step > 6}
    assert list(later) == [7, 8, 9, 10, 11, 12]
    assert later == {step: whole.opened[step] for step in later}
    assert len(set(later.values())) > 1
    assert len({opened for step, opened in whole.opened.items() if step <= 6}) > 1


def test_optimizer_steps_are_counted_not_batches(tmp_path: Path) -> None:
    # 6 batches, 4 at a time: 2 steps an epoch.
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=3))
    recorder = fit(tmp_path, Module(Stack()), unfreeze, accumulate_grad_batches=4)
    assert {step: len(opened) for step, opened in recorder.opened.items()} == {
        0: 1,
        1: 1,
        2: 1,
        3: 2,
        4: 2,
        5: 2,
        6: 3,
        7: 3,
        8: 3,
    }


@pytest.mark.parametrize("length", [True, False])
def test_epochs_are_counted(length: bool, tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        """Nobody knows how long it is."""

        def __iter__(self) -> Any:
            return iter(data().dataset)

    loader = data() if length else DataLoader(Endless(), batch_size=4)
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=1.5, unit="epoch"))
    recorder = fit(tmp_path, Module(Stack()), unfreeze, loaders=(loader,), accumulate_grad_batches=1)
    opened = {step: len(names) for step, names in recorder.opened.items()}
    assert [step for step in opened if step > 1 and opened[step] > opened[step - 1]] == (
        [9, 18] if length else [12, 18]
    )


@pytest.mark.parametrize("mode", ["requires_grad", "freeze"])
def test_what_is_closed_does_not_move_nor_do_its_statistics(mode: Any, tmp_path: Path) -> None:
    module = Module(ConvNet())
    before = bits(dict(module.named_parameters()) | dict(module.named_buffers()))
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=100, start=2), mode=mode)
    fit(tmp_path, module, unfreeze, loaders=(data(),), max_epochs=1)
    assert unfreeze.unfreezer is not None
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    expected = {n for g in unfreeze.unfreezer.groups if g.name in unfreeze.unfreezer.open_groups for n in g.param_names}
    assert expected <= moved
    # Statistics of what is open went on, and of nothing else.
    statistics = moved - expected
    assert {name.rsplit(".", 1)[1] for name in statistics} == {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rsplit(".", 2)[0] for name in statistics} == {"model.layer2.0", "model.layer2.0.downsample"}


def test_metrics_are_those_of_validations_in_training(tmp_path: Path) -> None:
    """Neither of the sanity check before it, nor of one by hand after it."""
    unfreeze = UnfreezeCallback(OnPlateau("val_loss", patience=1, threshold=10.0))
    module = Module(Stack())
    fit(tmp_path, module, unfreeze, num_sanity_val_steps=2)
    assert unfreeze.unfreezer is not None
    events = unfreeze.unfreezer.progress.events
    assert [(event.step, event.epoch) for event in events] == [(3, 1.0), (6, 2.0), (9, 3.0), (12, 4.0)]
    assert all(set(event.metrics) == {"val_loss"} for event in events)
    lightning.Trainer(accelerator="cpu", logger=False, callbacks=[unfreeze], enable_progress_bar=False).validate(
        module, data(), verbose=False
    )
    assert len(unfreeze.unfreezer.progress.events) == 4


def test_everything_is_open_afterwards_even_if_training_failed(tmp_path: Path) -> None:
    class Failing(Recorder):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("out of luck")

    module = Module(Stack())
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=100))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, module, unfreeze, recorder=Failing(unfreeze))
    assert all(p.requires_grad for p in module.parameters())
    fit(tmp_path, module, unfreeze)
    assert all(p.requires_grad for p in module.parameters())
    assert unfreeze.unfreezer is not None
    assert len(unfreeze.unfreezer.open_groups) == 1


def test_a_checkpoint_without_its_state_is_gone_on_from_by_the_clock(tmp_path: Path) -> None:
    class Nothing(UnfreezeCallback):
        """Under another name, so that its state is another's."""

    policy = GradualUnfreeze(every=3)
    fit(tmp_path, Module(Stack()), Nothing(policy))
    (checkpoint,) = tmp_path.glob("epoch=1-*")
    unfreeze = UnfreezeCallback(policy)
    with pytest.warns(UserWarning, match="no state of an UnfreezeCallback was saved at step 6"):
        recorder = fit(tmp_path / "again", Module(Stack()), unfreeze, checkpoint)
    assert len(recorder.opened[7]) == 3


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=2))
    first = fit(tmp_path, Module(Stack()), unfreeze)
    second = fit(tmp_path, Module(Stack()), unfreeze)
    assert first.opened == second.opened
    assert len(second.opened[1]) == 1


def test_options_are_checked_at_once_and_optimizers_at_the_start(tmp_path: Path) -> None:
    for option in ("stat_policy", "wrapped"):
        with pytest.raises(TypeError, match=option):
            UnfreezeCallback(GradualUnfreeze(every=2), **{option: ()})

    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.model.head.parameters(), 0.1), torch.optim.SGD(self.model.embed.parameters())]

    with pytest.raises(ValueError, match="optimizers: expected one, got 2"):
        fit(tmp_path, Two(Stack()), UnfreezeCallback(GradualUnfreeze(every=2)), accumulate_grad_batches=1)


@pytest.mark.slow
def test_flags_of_a_compiled_module_are_not_flipped(tmp_path: Path) -> None:
    module = torch.compile(Module(Stack()), backend="eager")
    with pytest.raises(ValueError, match=r'mode: expected "freeze", .* for a model that is compiled'):
        fit(tmp_path, module, UnfreezeCallback(GradualUnfreeze(every=2)))


def test_the_other_name_of_the_package_will_do(tmp_path: Path) -> None:
    package = pytest.importorskip("pytorch_lightning")

    class Bare(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Stack()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return fastft.AdamW(self.named_parameters(), lr=1e-2)

    unfreeze = UnfreezeCallback(GradualUnfreeze(every=3))
    recorder = fit(tmp_path, Bare(), unfreeze, package=package, loaders=(data(),))
    assert len(recorder.opened[12]) == 5
