"""The whole run: read, check, train, write. Nothing is written before everything was checked."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed

from fastft.data import neftune
from fastft.environment import environment, quiet_transformers
from fastft.integrations.transformers import optimizer_of
from fastft.layers import LayerGroup, layer_groups
from fastft.names import listed
from fastft.nn import fuse_dropout_
from fastft.optim import TrainingPlan, plan_training
from fastft.output import staged
from fastft.retention import drift_report, fit_head_
from fastft.unfreeze import GradualUnfreeze, Phases, open_at

from . import checkpoints, model
from .data import Data, load, mixed, tokenized
from .errors import InputError
from .model import Pretrained
from .options import (
    WEIGHTS,
    Options,
    as_json,
    first_difference,
    flag_of,
    from_json,
    make_policy,
    options_from,
)
from .report import RunReport
from .training import Training, prepare, say, scores

PACKAGES = ("transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "matplotlib")


@dataclasses.dataclass
class Start:
    """The options of a run that begins or goes on."""

    options: Options
    run: dict[str, Any]
    """The content of ``run.json``."""
    resumed: bool


@dataclasses.dataclass
class ReadyRun:
    """All that is needed to train, checked."""

    data: Data
    pretrained: Pretrained
    groups: list[LayerGroup]
    plan: TrainingPlan
    train: Any
    """Map-style."""
    evaluation: datasets.Dataset
    head: str | None
    """To be fitted before training, on ``rows``."""
    rows: datasets.Dataset
    """Those to train on, as they are: neither replayed nor augmented."""
    cut: int
    notes: list[str]


def finetune(values: Mapping[str, Any]) -> str:
    """Run with these values of :class:`Options`.

    Returns:
        The text to print.

    Raises:
        UserError: an option or a file cannot be used; nothing was written.
        Stopped: a signal came; a checkpoint is left to go on from.
    """
    began = time.perf_counter()
    with quiet_transformers(), quiet_datasets():
        start = begin(values)
        options = start.options
        set_seed(options.seed)
        ready = get_ready(options)
        for line in (about_model(ready), *ready.notes, about_plan(ready.plan, options)):
            say(line)
        with checkpoints.working(options.output, start.run, start.resumed) as folder:
            report = train(start, ready, folder)
            report.seconds = time.perf_counter() - began
            with staged(options.output, overwrite=True) as place:
                save(ready.pretrained, options.model, place)
                report.write(place)
    return str(report)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of datasets unless stderr is a terminal."""
    bars = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


def begin(values: Mapping[str, Any]) -> Start:
    """The options that were given or, for a run that goes on, those it was started with."""
    output = values.get("output")
    if not values.get("resume"):
        options = options_from(values)
        if options.output.resolve() == options.model.resolve():
            raise InputError(f"--output: expected another folder than --model, got {options.output} for both")
        checkpoints.refuse_unusable(options.output, options.overwrite)
        run = {"version": checkpoints.VERSION, "options": as_json(options), "digests": digests(options)}
        return Start(options, run, resumed=False)

    if output is None:
        raise InputError("missing --output: the folder of the run to go on with")
    if values.get("overwrite"):
        raise InputError("expected --resume or --overwrite, got both")
    found = checkpoints.run_in(output)
    if found is None:
        finished = (output / "report.json").is_file()
        raise InputError(
            f"--resume: the run in {output} is finished; start a new one with --overwrite"
            if finished
            else f"--resume: there is no unfinished run in {output}; start one without --resume"
        )
    stored = from_json(found["options"])
    if difference := first_difference(values, stored):
        raise InputError(f"{difference}; leave it out to go on, or start anew with --overwrite")
    options = options_from({**stored, **values})
    now = digests(options)
    for name, path in options.files.items():
        if now.get(name) != found["digests"].get(name):
            raise InputError(
                f"{flag_of(name)}: {path} does not hold what it did when the run was started; "
                "bring that back, or start anew with --overwrite"
            )
    return Start(options, found, resumed=True)


def digests(options: Options) -> dict[str, str]:
    """Hashes of what a run reads."""
    found = {}
    for name, path in options.files.items():
        if path.exists():  # reading it raises the better error
            found[name] = checkpoints.digest(path)
    return found


def get_ready(options: Options) -> ReadyRun:
    """Read and check everything."""
    data = load(options)
    pretrained = model.load(options.model, options.task, data.labels, WEIGHTS[options.precision])
    limit = model.token_limit(pretrained.model, pretrained.tokenizer)
    if options.max_length is not None and limit is not None and options.max_length > limit:
        raise InputError(
            f"--max-length: expected at most {limit:,}, the most that the model can take, got {options.max_length:,}"
        )
    head = model.new_head(pretrained) if options.fit_head else None
    try:
        groups = layer_groups(pretrained.model, options.layer_groups)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_policy(options, groups)

    ids = {label: i for i, label in enumerate(pretrained.labels)}
    parts = [data.train, data.evaluation, *([] if data.replay is None else [data.replay])]
    tables, cuts = zip(*(tokenized(rows, pretrained.tokenizer, limit, options, ids) for rows in parts), strict=True)
    try:
        train = mixed(tables[0], tables[2] if data.replay is not None else None, pretrained.tokenizer, options)
        plan = plan_training(
            len(train),
            options.batch_size,
            steps=options.steps,
            epochs=options.epochs,
            accumulate=options.gradient_accumulation,
            warmup=options.warmup,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    notes = list(data.notes)
    if cut := sum(cuts):
        notes.append(f"{cut:,} of {sum(map(len, parts)):,} texts were cut off after {options.max_length:,} tokens")
    notes += pretrained.notes
    notes += still_closed(options, groups, plan)
    if options.fuse_dropout:
        done = fuse_dropout_(pretrained.model)
        notes.append(f"dropout: {len(done.swapped)} swapped, {len(done.fused)} fused with what follows them")
    return ReadyRun(data, pretrained, groups, plan, train, tables[1], head, tables[0], cut, notes)


def check_policy(options: Options, groups: list[LayerGroup]) -> None:
    """Raise where the policy does not fit the model, also in its later phases."""
    if options.unfreeze is None:
        return
    policy = make_policy(options.unfreeze, options.seed)
    try:
        for start in policy.starts if isinstance(policy, Phases) else [0]:
            open_at(policy, groups, int(start), epoch=start)
    except ValueError as error:
        raise InputError(f"--unfreeze: {error}") from error


def still_closed(options: Options, groups: list[LayerGroup], plan: TrainingPlan) -> list[str]:
    """A line about layers that the run is too short to open, where gradual unfreezing was asked for by steps."""
    chosen = options.unfreeze
    if chosen is None or chosen["policy"] != "gradual" or chosen.get("unit", "step") != "step":
        return []
    opened = open_at(make_policy(chosen, options.seed), groups, plan.total_steps - 1)
    if len(opened) == len(groups):
        return []
    enough = GradualUnfreeze.open_by(0.5, plan.total_steps, groups).every
    return [
        f"{len(groups) - len(opened)} of {len(groups)} layers stay closed, as {plan.total_steps:,} steps are too few "
        f"for every={chosen['every']}; with every={enough} all are open after about half of the steps"
    ]


def train(start: Start, ready: ReadyRun, folder: Path) -> RunReport:
    """Evaluate, train, evaluate; the report, but for the time of all."""
    options, pretrained = start.options, ready.pretrained
    use_cache = getattr(pretrained.model.config, "use_cache", None)
    training = prepare(options, pretrained, ready.groups, ready.plan, ready.train, ready.evaluation, folder)
    trainer = training.trainer
    start_weights = model.weights_of(pretrained, options.model)
    last = checkpoints.last_whole(folder)
    if last is None:
        # Also where an earlier start came as far: the Trainer sets the model up when it is first asked to evaluate.
        start.run["before"] = scores(trainer.evaluate(), options.task)
        if ready.head is not None:
            start.run["fitted_head"] = fit_head(pretrained, ready.head, trainer.get_eval_dataloader(ready.rows))
        checkpoints.write_json(folder / checkpoints.RUN, start.run)
    else:
        say(f"going on after step {checkpoints.step_of(last):,}")
    set_seed(options.seed)  # whatever was drawn before
    with neftune(pretrained.model, options.neftune) if options.neftune else nullcontext():
        seconds = run_trainer(training, last)

    state = trainer.state
    history = list(state.log_history)  # without the evaluation that follows
    chosen = state.best_model_checkpoint if options.keep == "best" else None
    after = scores(trainer.evaluate(), options.task)
    optimizer = optimizer_of(trainer)
    lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if use_cache is not None:  # the Trainer has turned it off, and those who generate want it
        pretrained.model.config.use_cache = use_cache
    drift = drift_report(pretrained.model, start_weights, ready.groups)
    return RunReport(
        task=options.task,
        options=as_json(options),
        plan=dataclasses.asdict(ready.plan),
        data=about_data(ready, start),
        model={
            "class": type(pretrained.model).__name__,
            "parameters": sum(p.numel() for p in pretrained.model.parameters()),
            "new": pretrained.new,
            "fitted_head": start.run.get("fitted_head"),
            "layers": {group.name: group.numel for group in ready.groups},
        },
        before=start.run["before"],
        after=after,
        kept={
            "step": state.global_step if chosen is None else checkpoints.step_of(Path(chosen)),
            "of": state.global_step,
            "best": chosen is not None,
        },
        drift=drift.total.relative or 0.0,
        layer_drift={layer.group: layer.relative for layer in drift.groups if layer.relative is not None},
        history=history,
        lr_ratios=(min(lrs) / lrs[0], max(lrs) / lrs[0]),
        skipped_steps=int(optimizer.skipped_steps),
        resumed_from=None if last is None else checkpoints.step_of(last),
        training_seconds=seconds,
        seconds=0.0,
        notes=ready.notes,
        environment={**environment(PACKAGES), "device": str(trainer.args.device)},
    )


def fit_head(pretrained: Pretrained, head: str, batches: Any) -> dict[str, float]:
    """Fit the head before training, and print how well that went."""
    try:
        fit = fit_head_(pretrained.model, head, batches)
    except ValueError as error:
        raise InputError(f"--fit-head: {error}") from error
    others = [name for name in pretrained.new if not name.startswith(f"{head}.")]
    kept = f"; left as they were made, at random: {listed(others)}" if others else ""
    say(f"{head} fitted on {fit.rows:,} rows: accuracy {fit.accuracy:.4g}, loss {fit.loss:.4g} on them{kept}")
    return fit._asdict()


def run_trainer(training: Training, checkpoint: Path | None) -> float:
    """Train to the end, or until a signal comes; the seconds that it took."""
    began = time.perf_counter()
    with training.stop.listening():
        training.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - began


def about_model(ready: ReadyRun) -> str:
    """The model in a line."""
    loaded = ready.pretrained
    size = sum(p.numel() for p in loaded.model.parameters())
    advice = "" if ready.head else " (at random; --fit-head fits the head first)"
    new = f"; new: {listed(loaded.new)}{advice}" if loaded.new else ""
    return f"{type(loaded.model).__name__}, {size:,} parameters in {len(ready.groups)} layers{new}"


def about_plan(plan: TrainingPlan, options: Options) -> str:
    """The length of the run in a line."""
    epochs = f"{plan.total_steps / plan.steps_per_epoch:.3g}"
    return (
        f"{plan.total_steps:,} steps of {plan.effective_batch_size:,} rows ({epochs} epoch{'s' * (epochs != '1')}), "
        f"lr {options.lr:g} after {plan.warmup_steps:,} steps to warm up"
    )


def about_data(ready: ReadyRun, start: Start) -> dict[str, Any]:
    """The rows, for the report."""
    train, evaluation = ready.data.train.counts, ready.data.evaluation.counts
    return {
        "train_rows": len(ready.data.train),
        "evaluation_rows": len(ready.data.evaluation),
        "replay_rows": len(ready.data.replay or ()),
        "cut_texts": ready.cut,
        "labels": {
            label: {"id": i, "train": train.get(label, 0), "evaluation": evaluation.get(label, 0)}
            for i, label in enumerate(ready.pretrained.labels)
        },
        "sha256": start.run["digests"],
    }


def save(pretrained: Pretrained, folder: Path, place: Path) -> None:
    """Save the model, in one file so that none of an earlier result stays in use, and its tokenizer."""
    pretrained.model.save_pretrained(place, max_shard_size=2**62)
    # Loaded anew: the one that was used has our max_length written into it.
    model.load_tokenizer(folder).save_pretrained(place)
    for weights in place.glob("*.safetensors"):  # safetensors keeps them from everyone else
        weights.chmod((place / "config.json").stat().st_mode)
