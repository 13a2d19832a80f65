"""fastft in the Hugging Face Trainer, in this process: what the optimizer is made of, and when the callback acts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import carried_by, metadata_of
from torch import Tensor, nn
from trainer_runs import Recorder, arguments, tiny_bert, tiny_gpt2, token_rows, values
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
)
from unfreeze_cases import assert_equal, bits

import fastft
from fastft.integrations import transformers as integration
from fastft.integrations.transformers import (
    UnfreezeCallback,
    new_parameters,
    optimizer_cls_and_kwargs,
    optimizer_of,
)
from fastft.optim import biases_and_norms, layerwise_lr
from fastft.unfreeze import GradualUnfreeze, OnPlateau, layer_groups

HEAD = {"classifier.weight", "classifier.bias"}
NAMES = ("embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "head")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("bert")
    return lambda dropout=0.1: tiny_bert(folder / str(dropout), dropout)


def trainer(model: Any, args: Any, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"train_dataset": token_rows(40), "eval_dataset": token_rows(16, seed=1)}
    return Trainer(model, args, callbacks=list(callbacks), **{**defaults, **options})


def anchor_of(run: Trainer) -> dict[str, Tensor]:
    return carried_by(run.optimizer.state_dict(), "anchor")


# -- one line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "function"])
def test_one_line_swaps_torchs_fused_adamw(how: str, bert: Any, tmp_path: Path) -> None:
    numbers = {"learning_rate": 1e-2, "adam_epsilon": 1e-4, "max_grad_norm": 1.0}
    theirs = bert()
    before = values(theirs.named_parameters())
    trainer(theirs, arguments(tmp_path / "a", optim="adamw_torch_fused", **numbers)).train()

    ours = bert()
    args = arguments(tmp_path / "b", **numbers)
    swapped = {
        "plain": lambda: (fastft.AdamW, {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-4}),
        "function": lambda: optimizer_cls_and_kwargs(args, ours),
    }
    run = trainer(ours, args, optimizer_cls_and_kwargs=swapped[how]())
    run.train()
    assert type(run.optimizer.optimizer) is fastft.AdamW
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)
        # A bias of the keys has no effect, and so no gradient.
        assert "key.bias" in name or not torch.allclose(p, before[name], rtol=1e-3, atol=1e-4), name


def test_the_groups_are_those_of_the_trainer(bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    model = bert()
    cls, kwargs = optimizer_cls_and_kwargs(args, model)
    theirs = trainer(model, args).create_optimizer()
    ours = cls(**kwargs)
    for group, reference in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert group["params"] and len(group["params"]) == len(reference["params"])
        assert all(p is q for p, q in zip(group["params"], reference["params"], strict=True))
        assert group["param_names"] == [n for n, p in model.named_parameters() if any(p is q for q in group["params"])]
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == reference[key]


def test_options_go_to_the_optimizer(bert: Any, tmp_path: Path) -> None:
    cls, kwargs = optimizer_cls_and_kwargs(
        arguments(tmp_path), bert(), anchor_decay=2.0, anchor_mode="l2", max_grad_norm=0.3, betas=(0.7, 0.8)
    )
    optimizer = cls(**kwargs)
    assert {(g["anchor_decay"], g["anchor_mode"], g["betas"]) for g in optimizer.param_groups} == {
        (2.0, "l2", (0.7, 0.8))
    }
    assert optimizer._max_grad_norm == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_each_layer_may_have_its_own_lr(adapters: bool, bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", num_train_epochs=1)
    model = lora(tmp_path) if adapters else bert()
    groups = layer_groups(model)
    params = layerwise_lr(groups, args.learning_rate, 0.5, no_decay=biases_and_norms)
    adamw = optimizer_cls_and_kwargs(args, model, params=params, anchor_decay=30.0)
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=1), rewarm_steps=2)
    run = trainer(model, args, unfreeze, optimizer_cls_and_kwargs=adamw)
    run.train()
    made = run.optimizer.param_groups
    lr = {group["layer_group"]: group["initial_lr"] for group in made}
    assert lr == {group.name: 1e-3 * 0.5**depth for depth, group in enumerate(reversed(groups))}
    decay = {p: group["weight_decay"] for group in made for p in group["params"]}
    assert set(decay) == set(model.parameters())
    for name, p in model.named_parameters():
        plain = 0.0 if p.dim() <= 1 else 0.1
        assert decay[p] == (plain + 30.0 if "lora_" in name else plain), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_decay": -1.0}, "anchor_decay: expected a finite number >= 0, got -1.0"),
        ({"anchor_decay": 2000.0}, r"lr \* anchor_decay: expected at most 1 .* got 0.001 \* 2000 = 2"),
        ({"anchor_decay": 1.0, "exclude": "clasifier"}, "exclude: 'clasifier' matches no parameter; closest:"),
        (
            {"anchor_decay": 1.0, "exclude": ["bert", "classifier"]},
            "expected 0 where all that is trained is new, got 1.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_cls_and_kwargs(arguments(tmp_path), bert(), **options)


# -- the anchor ----------------------------------------------------------------------------------------------


def test_new_parameters_are_those_the_checkpoint_did_not_have(bert: Any, tmp_path: Path) -> None:
    model = bert()
    assert new_parameters(model) == HEAD
    model.float().eval()
    assert new_parameters(model) == HEAD
    outer = nn.Module()
    outer.encoder, outer.top = model, nn.Linear(2, 2)
    assert new_parameters(outer) == {"top.weight", "top.bias", *(f"encoder.{name}" for name in HEAD)}
    assert new_parameters(tiny_gpt2(tmp_path / "gpt2", GPT2LMHeadModel)) == set()  # tied to the embeddings
    for unknown in (copy.deepcopy(model), BertForSequenceClassification(BertConfig(hidden_size=12, vocab_size=9))):
        with pytest.raises(ValueError, match=r"exclude: cannot tell which .* info\[\"missing_keys\"\] of from_pretr"):
            new_parameters(unknown)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exclude", "free"),
    [(None, HEAD), ((), set()), ("classifier.bias", {"classifier.bias"}), (["bert.pooler", "classifier"], None)],
)
def test_the_anchor_is_what_was_pretrained(exclude: Any, free: set[str] | None, bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, num_train_epochs=1)
    model = bert()
    before = values(model.named_parameters())
    run = trainer(
        model,
        args,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model, anchor_decay=1.0, exclude=exclude),
    )
    run.train()
    expected = set(before) - (
        free if free is not None else HEAD | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    )
    assert_equal(anchor_of(run), {name: before[name] for name in expected})


@pytest.mark.slow
def test_the_anchor_pulls(bert: Any, tmp_path: Path) -> None:
    away = {}
    for decay in (0.0, 30.0):
        args = arguments(tmp_path, learning_rate=1e-2)
        model = bert()
        before = values(model.named_parameters())
        run = trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model, anchor_decay=decay))
        run.train()
        away[decay] = sum(float((p - before[n]).square().sum()) for n, p in model.named_parameters() if n not in HEAD)
    assert away[30.0] < 0.7 * away[0.0]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["the pretrained model", "the checkpoint"])
def test_a_resumed_run_keeps_the_first_anchor(source: str, bert: Any, tmp_path: Path) -> None:
    """Also where the script loads what it resumes from, in which nothing is new any more."""

    def run(model: Any, resume: Path | None = None) -> Trainer:
        args = arguments(tmp_path, learning_rate=1e-2)
        adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=30.0)
        made = trainer(model, args, optimizer_cls_and_kwargs=adamw)
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return made

    first = bert()
    pretrained = values(first.named_parameters())
    whole = run(first)
    checkpoint = tmp_path / "checkpoint-6"
    again = bert() if source == "the pretrained model" else type(first).from_pretrained(checkpoint)
    resumed = run(again, checkpoint)
    assert_equal(values(again.named_parameters()), values(first.named_parameters()))
    assert_equal(anchor_of(resumed), anchor_of(whole))
    assert_equal(anchor_of(resumed), {n: t for n, t in pretrained.items() if n not in HEAD})


@pytest.mark.slow
def test_an_anchor_in_a_file_is_not_copied_into_checkpoints(bert: Any, tmp_path: Path) -> None:
    model = bert()
    folder = model.name_or_path
    args = arguments(tmp_path, num_train_epochs=1)
    anchor = fastft.Anchor.from_safetensors(folder, model, exclude=sorted(new_parameters(model)))
    adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=3.0, anchor=anchor)
    run = trainer(model, args, optimizer_cls_and_kwargs=adamw)
    run.train()
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert carried_by(saved, "anchor") == {}
    assert Path(metadata_of(saved)["anchor_file"]["path"]).parent == Path(folder)
    again = bert()
    anchor = fastft.Anchor.from_safetensors(folder, again, exclude=sorted(new_parameters(again)))
    adamw = optimizer_cls_and_kwargs(args, again, anchor_decay=3.0, anchor=anchor)
    trainer(again, args, optimizer_cls_and_kwargs=adamw).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again.named_parameters()), values(model.named_parameters()))


# -- adapters ------------------------------------------------------------------------------------------------


def lora(folder: Path, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = tiny_gpt2(folder / "gpt2", GPT2ForSequenceClassification)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, **options
    )
    torch.manual_seed(2)
    return peft.get_peft_model(model, config)


@pytest.mark.slow
def test_lora_is_pulled_to_where_the_model_was_pretrained_without_a_copy(tmp_path: Path) -> None:
    model = lora(tmp_path)
    before = values(model.named_parameters())
    args = arguments(tmp_path / "run")
    adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=30.0, lr=1e-2)
    run = trainer(model, args, optimizer_cls_and_kwargs=adamw)
    run.train()
    names = dict(model.named_parameters())
    trained = {name for name, p in names.items() if p.requires_grad}
    factors = {name for name in trained if "lora_" in name}
    assert len(factors) == 6 and len(trained - factors) == 1  # and the new head
    optimizer = run.optimizer.optimizer
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decay == {name: 30.1 if name in factors else 0.1 for name in trained}
    assert {name for name in trained if names[name] in optimizer.state} == trained
    assert len(optimizer.state) == len(trained)
    assert anchor_of(run) == {}
    assert_equal(
        {n: names[n].detach() for n in names if n not in trained}, {n: before[n] for n in before if n not in trained}
    )
    assert all(not torch.equal(names[name], before[name]) for name in trained)


def test_lora_alone_needs_not_know_what_is_new(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(tiny_gpt2(tmp_path / "gpt2", GPT2LMHeadModel))  # which nobody knows to be loaded
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    args = arguments(tmp_path / "run")
    for exclude, decays in ((None, {30.1}), ("*lora_A*", {30.1, 0.1}), ("*lora*", None)):
        if decays is None:
            with pytest.raises(ValueError, match="expected 0 where all that is trained is new"):
                optimizer_cls_and_kwargs(args, model, anchor_decay=30.0, exclude=exclude)
        else:
            _, kwargs = optimizer_cls_and_kwargs(args, model, anchor_decay=30.0, exclude=exclude)
            assert {group["weight_decay"] for group in kwargs["params"]} == decays
            assert {n for g in kwargs["params"] if g["weight_decay"] == 0.1 for n, _ in g["params"]} == {
                n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n and exclude
            }


@pytest.mark.slow
def test_lora_resumes_and_merges(tmp_path: Path) -> None:
    def run(resume: str | None = None) -> tuple[Any, UnfreezeCallback, Recorder]:
        model = lora(tmp_path)
        args = arguments(tmp_path / "run")
        unfreeze = UnfreezeCallback(GradualUnfreeze(every=4))
        recorder = Recorder(unfreeze)
        adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=3.0, lr=1e-2, max_grad_norm=0.5)
        trainer(model, args, unfreeze, recorder, optimizer_cls_and_kwargs=adamw).train(resume_from_checkpoint=resume)
        return model, unfreeze, recorder

    model, unfreeze, whole = run()
    _, _, resumed = run(str(tmp_path / "run" / "checkpoint-6"))
    assert_equal(resumed.end()["params"], whole.end()["params"])
    assert_equal(resumed.end()["moments"], whole.end()["moments"])
    assert {len(opened) for opened in resumed.opened.values()} == {2, 3, 4}
    assert resumed.opened == {step: opened for step, opened in whole.opened.items() if step > 6}

    inputs = {"input_ids": torch.stack([row["input_ids"] for row in token_rows(4)])}
    model.eval()
    expected = model(**inputs).logits
    base = tiny_gpt2(tmp_path / "gpt2", GPT2ForSequenceClassification).eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, dict(base.named_parameters())[name])}
    # What was never opened is as it was pre-trained, bit for bit.
    assert unfreeze.unfreezer is not None
    assert "transformer.h.2.attn.c_attn.weight" in moved
    assert all("c_attn.weight" in name or "score" in name for name in moved)


def test_a_pretrained_module_that_peft_copies_is_anchored(tmp_path: Path) -> None:
    model = lora(tmp_path, modules_to_save=["ln_f", "score"])
    args = arguments(tmp_path / "run", num_train_epochs=1)
    adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=3.0)
    copies = {f"base_model.model.transformer.ln_f.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    assert set(adamw[1]["anchor"].names) == copies
    with pytest.raises(ValueError, match='anchor_mode: expected "decoupled" with LoRA'):
        optimizer_cls_and_kwargs(args, model, anchor_decay=3.0, anchor_mode="l2")


# -- when the callback acts ----------------------------------------------------------------------------------


def sizes(recorder: Recorder) -> list[int]:
    """The number of open groups after step 1, 2, ..."""
    assert list(recorder.opened) == list(range(1, len(recorder.opened) + 1))
    return [len(opened) for opened in recorder.opened.values()]


@pytest.mark.slow
def test_epochs_and_optimizer_steps_are_counted(bert: Any, tmp_path: Path) -> None:
    # 40 rows in 10 batches, 4 at a time: 3 steps an epoch, the last of 2 batches.
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    for policy, expected in (
        (GradualUnfreeze(every=1, unit="epoch"), [1, 1, 2, 2, 2, 3, 3, 3, 4]),
        (GradualUnfreeze(every=2), [1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ):
        unfreeze = UnfreezeCallback(policy)
        recorder = Recorder(unfreeze)
        trainer(bert(), args, unfreeze, recorder).train()
        assert sizes(recorder) == expected


@pytest.mark.slow
def test_what_is_closed_does_not_move(bert: Any, tmp_path: Path) -> None:
    for mode in ("requires_grad", "freeze"):
        model = bert()
        before = values(model.named_parameters())
        args = arguments(tmp_path, num_train_epochs=1)
        unfreeze = UnfreezeCallback(GradualUnfreeze(every=3), mode=mode)
        adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=3.0)
        trainer(model, args, unfreeze, optimizer_cls_and_kwargs=adamw).train()
        assert unfreeze.unfreezer is not None
        opened = {
            name
            for group in unfreeze.unfreezer.groups
            if group.name in unfreeze.unfreezer.open_groups
            for name in group.param_names
        }
        assert unfreeze.unfreezer.open_groups == NAMES[-2:]
        assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == opened


def test_evaluations_in_training_are_passed_to_the_policy(bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, num_train_epochs=1, eval_on_start=True)
    unfreeze = UnfreezeCallback(OnPlateau("eval_b_loss", patience=1, threshold=100.0))
    recorder = Recorder(unfreeze)
    data = {"a": token_rows(8, seed=2), "b": token_rows(8, seed=3)}
    run = trainer(bert(), args, unfreeze, recorder, eval_dataset=data)
    run.evaluate()  # before there is anything to unfreeze
    run.train()
    run.evaluate()  # and afterwards
    assert unfreeze.unfreezer is not None
    events = [event for event in unfreeze.unfreezer.progress.events if "eval_b_loss" in event.metrics]
    assert [(event.step, event.epoch) for event in events] == [(0, 0.0), (2, 0.4), (4, 0.8), (5, 1.0)]
    logged = [entry["eval_b_loss"] for entry in run.state.log_history if "eval_b_loss" in entry]
    assert [event.metrics["eval_b_loss"] for event in events] == logged[:-1]
    # The first is the best, and each later one opens a group, for the very next step.
    assert sizes(recorder) == [1, 1, 2, 2, 3]
    assert len(unfreeze.unfreezer.open_groups) == 4


@pytest.mark.slow
def test_going_back_to_the_best_brings_back_what_was_evaluated(bert: Any, tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    class Watcher(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen[state.global_step] = values(model.named_parameters())

    args = arguments(tmp_path, num_train_epochs=1, learning_rate=1e-2)
    unfreeze = UnfreezeCallback(OnPlateau("eval_loss", patience=1, threshold=100.0, restore_best=True))
    model = bert()
    trainer(model, args, Watcher(), unfreeze).train()
    assert sorted(seen) == [2, 4, 5]
    # It goes back last after step 5, when a group opens.
    assert_equal({n: p.detach() for n, p in model.named_parameters() if n in HEAD}, {n: seen[2][n] for n in HEAD})
    assert not torch.equal(seen[5]["classifier.weight"], seen[2]["classifier.weight"])


@pytest.mark.slow
def test_torchs_own_adamw_resumes_too(bert: Any, tmp_path: Path) -> None:
    def train(resume: str | None = None) -> tuple[Any, Recorder]:
        model = bert()
        unfreeze = UnfreezeCallback(GradualUnfreeze(every=4), state_policy="reset")
        recorder = Recorder(unfreeze)
        args = arguments(tmp_path, optim="adamw_torch", learning_rate=1e-2, num_train_epochs=2)
        run = trainer(model, args, unfreeze, recorder)
        run.train(resume_from_checkpoint=resume)
        assert integration.STATE_KEY not in run.optimizer.param_groups[0]  # in the saved ones only
        return model, recorder

    model, whole = train()
    again, resumed = train(str(tmp_path / "checkpoint-6"))
    assert_equal(values(again.named_parameters()), values(model.named_parameters()))
    assert resumed.opened == {step: opened for step, opened in whole.opened.items() if step > 6}
    saved = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=True)
    assert [integration.STATE_KEY in group for group in saved["param_groups"]] == [True, False]


@pytest.mark.slow
def test_a_checkpoint_without_its_state_is_gone_on_from_by_the_clock(bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, num_train_epochs=1)
    trainer(bert(), args).train()
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=2))
    recorder = Recorder(unfreeze)
    with pytest.warns(UserWarning, match="no state of an UnfreezeCallback was saved at step 2"):
        trainer(bert(), args, unfreeze, recorder).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {step: len(opened) for step, opened in recorder.opened.items()} == {3: 2, 4: 3, 5: 3}


@pytest.mark.slow
def test_everything_is_open_afterwards_and_a_second_run_begins_anew(bert: Any, tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.armed and state.global_step == 3:
                raise RuntimeError("out of luck")

    failing = Failing()
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=2))
    recorder = Recorder(unfreeze)
    model = bert()
    run = trainer(model, arguments(tmp_path, num_train_epochs=1), unfreeze, failing, recorder)
    with pytest.raises(RuntimeError, match="out of luck"):
        run.train()
    failing.armed = False
    for _ in range(2):
        recorder.opened = {}
        run.train()
        assert all(p.requires_grad for p in model.parameters())
        assert sizes(recorder) == [1, 2, 2, 3, 3]
        assert integration.STATE_KEY not in run.optimizer.state_dict()["param_groups"][0]


@pytest.mark.slow
def test_batch_norm_stays_put_while_closed(tmp_path: Path) -> None:
    class Net(nn.Module):
        """No transformers model at all, and the Trainer calls train() before each step."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stages = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3)))

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.stages(input_ids.float() / 50)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Net()
    before = bits(dict(model.named_buffers()))
    args = arguments(tmp_path, num_train_epochs=1)
    trainer(model, args, UnfreezeCallback(GradualUnfreeze(every=3))).train()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {name.rsplit(".", 1)[0] for name in moved} == {"stages.1.1", "stages.2.1"}


# -- what is refused, and what is warned of ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["stat_policy", "wrapped"])
def test_an_option_that_is_not_for_the_user_is_refused_at_once(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        UnfreezeCallback(GradualUnfreeze(every=2), **{option: ()})


@pytest.mark.slow
def test_a_state_of_other_layers_is_refused_and_leaves_all_open(bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, num_train_epochs=1)
    trainer(bert(), args, UnfreezeCallback(GradualUnfreeze(every=2))).train()
    model = bert()
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=2), groups=["bert", "classifier"])
    run = trainer(model, args, unfreeze)
    with pytest.raises(ValueError, match=r"state_dict: expected the groups \['bert', 'classifier'\], got"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.warns(DeprecationWarning, match=r"close\(\) is called undo\(\) now"):
        unfreeze.close()
    unfreeze.undo()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_the_optimizer_of_a_trainer_is_found_behind_accelerates(bert: Any, tmp_path: Path) -> None:
    ours = (fastft.AdamW, {"lr": 1e-3})
    run = trainer(bert(), arguments(tmp_path, num_train_epochs=1), optimizer_cls_and_kwargs=ours)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got NoneType"):
        optimizer_of(run)
    run.train()
    optimizer = optimizer_of(run)
    assert type(optimizer) is fastft.AdamW and optimizer is not run.optimizer
    assert int(optimizer.skipped_steps) == 0
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(TypeError, match=r"trainer: expected one that trains with fastft\.AdamW, got AdamW"):
        optimizer_of(run)


@pytest.mark.slow
def test_flags_of_a_compiled_model_are_not_flipped(bert: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ValueError, match=r'mode: expected "freeze", .* for a model that is compiled'):
        trainer(bert(), args, UnfreezeCallback(GradualUnfreeze(every=2))).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours", "mode", "around", "warned"),
    [
        (1.0, 0.5, "requires_grad", set(), "the Trainer clips before fastft.AdamW does"),
        (1.0, None, "freeze", {"ddp"}, "the norm that the Trainer clips by counts closed groups, too"),
        (0.0, 0.5, "freeze", {"ddp"}, None),
        (1.0, None, "requires_grad", set(), None),
        (1.0, None, "freeze", set(), None),
    ],
)
def test_clipping_twice_is_warned_of(
    theirs: float,
    ours: float | None,
    mode: str,
    around: set[str],
    warned: str | None,
    bert: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(integration, "around", lambda _: around)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=theirs, eval_strategy="no", save_strategy="no")
    model = bert()
    adamw = optimizer_cls_and_kwargs(args, model, max_grad_norm=ours)
    run = trainer(model, args, UnfreezeCallback(GradualUnfreeze(every=2), mode=mode), optimizer_cls_and_kwargs=adamw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    said = [str(w.message) for w in caught if "max_grad_norm" in str(w.message)]
    assert bool(said) == (warned is not None)
    if warned is not None:
        assert said[0].startswith(f"{warned}: pass max_grad_norm to fastft.AdamW and max_grad_norm=0.0")


@pytest.mark.slow
def test_the_norm_that_is_logged_is_that_of_the_step(bert: Any, tmp_path: Path) -> None:
    norms = []

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            norms.append(float(kwargs["optimizer"].optimizer.grad_norm))

    args = arguments(tmp_path, num_train_epochs=1)
    model = bert()
    adamw = optimizer_cls_and_kwargs(args, model, max_grad_norm=0.5)
    run = trainer(model, args, UnfreezeCallback(GradualUnfreeze(every=2)), Watcher(), optimizer_cls_and_kwargs=adamw)
    run.train()
    logged = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.5
