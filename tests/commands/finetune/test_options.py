"""Options: what flags and YAML are read as, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.commands.finetune.errors import InputError
from fastft.commands.finetune.options import (
    FIELDS,
    POLICIES,
    Options,
    as_json,
    first_difference,
    from_json,
    given,
    make_policy,
    options_from,
)
from fastft.unfreeze import GradualUnfreeze, Phases

NEEDED = {
    "model": "m",
    "train": "rows.csv",
    "task": "text-classification",
    "text_column": "text",
    "label_column": "label",
    "output": "out",
}


def options(**flags: Any) -> Options:
    return options_from(given({**NEEDED, **flags}, None))


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("lr", "3e-4", 3e-4),
        ("epochs", "0.5", 0.5),
        ("steps", "12", 12),
        ("warmup", "0.25", 0.25),
        ("warmup", "7", 7),
        ("warmup", "0", 0),
        ("train", "a.tsv", Path("a.tsv")),
        ("unfreeze", ["gradual", "every=0.5", "unit=epoch"], {"policy": "gradual", "every": 0.5, "unit": "epoch"}),
        ("unfreeze", ["on-plateau", "metric=eval_loss"], {"policy": "on-plateau", "metric": "eval_loss"}),
        ("unfreeze", ["none"], None),
        ("layer_groups", ["embed*", "head"], ["embed*", "head"]),
    ],
)
def test_values_of_flags(name: str, value: Any, read: Any) -> None:
    found = getattr(options(**{name: value}), name)
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": "fast"}, "--lr: expected a number above 0, got 'fast'"),
        ({"lr": "0"}, "--lr: expected a number above 0, got '0'"),
        ({"lr": "nan"}, "--lr: expected a number above 0, got 'nan'"),
        ({"lr": "inf"}, "--lr: expected a number above 0, got 'inf'"),
        ({"weight_decay": "-1"}, "--weight-decay: expected a number of at least 0, got '-1'"),
        ({"eval_fraction": "1"}, "--eval-fraction: expected a number above 0 and at most 0.9, got '1'"),
        ({"layer_decay": "1.5"}, "--layer-decay: expected a number above 0 and at most 1, got '1.5'"),
        ({"batch_size": "0"}, "--batch-size: expected a whole number of at least 1, got '0'"),
        ({"batch_size": "2.5"}, "--batch-size: expected a whole number of at least 1, got '2.5'"),
        ({"seed": str(2**63)}, "--seed: expected a whole number of at least 0, got"),
        ({"warmup": "1.5"}, "--warmup: expected a whole number of steps, or a part of all steps below 1, got '1.5'"),
        ({"warmup": "9", "steps": "8"}, "--warmup: expected at most the 8 steps of the run, got 9"),
        ({"task": "classification"}, "expected text-classification or causal-lm, got 'classification'; closest"),
        ({"schedule": "lineal"}, "--schedule: expected linear or cosine or constant, got 'lineal'"),
        ({"epochs": "1", "steps": "2"}, "expected --epochs or --steps, got both"),
        ({"eval": "e.csv", "eval_fraction": "0.2"}, "expected --eval-fraction or --eval, got both"),
        ({"layer_decay": "0.9", "discriminative_lr": "2"}, "expected --discriminative-lr or --layer-decay, got both"),
        ({"task": "causal-lm"}, "--label-column: expected none with causal-lm, got 'label'"),
        ({"label_column": "text"}, "--label-column: expected another column than --text-column, got 'text'"),
        ({"lr": "0.1", "anchor_decay": "20"}, "lr * anchor_decay: expected at most 1"),
        ({"rewarm_steps": "3"}, "--rewarm-steps: expected only together with --unfreeze"),
        ({"unfreeze": ["gradul", "every=3"]}, "--unfreeze: expected one of none, gradual, chain-thaw"),
        ({"unfreeze": ["gradual"]}, "--unfreeze: gradual needs every=, as in: gradual every=100; it takes every=,"),
        ({"unfreeze": ["gradual", "3"]}, "--unfreeze: expected KEY=VALUE after the policy's name, got '3'"),
        ({"unfreeze": ["gradual", "evry=3"]}, "gradual takes every=, start=1, unit=step; got 'evry'; closest"),
        ({"unfreeze": ["gradual", "every=-3"]}, "--unfreeze: every: expected an integer >= 1, got -3"),
        ({"unfreeze": ["on-plateau"]}, "on-plateau needs metric=, as in: on-plateau metric=eval_loss"),
        ({"unfreeze": ["phases"]}, "--unfreeze: phases needs phases= (in the --config file)"),
    ],
)  # fmt: skip
def test_wrong_values_are_reported_in_a_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        options(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"missing --train, --text-column$"):
        options_from(given({k: v for k, v in NEEDED.items() if k not in ("train", "text_column")}, None))
    with pytest.raises(InputError, match="missing --label-column, which text-classification needs"):
        options_from(given({k: v for k, v in NEEDED.items() if k != "label_column"}, None))


def test_a_language_model_has_no_head_to_fit() -> None:
    chosen = {k: v for k, v in NEEDED.items() if k != "label_column"} | {"task": "causal-lm", "fit_head": True}
    with pytest.raises(InputError, match="--fit-head: expected only with --task text-classification"):
        options_from(given(chosen, None))


def test_yaml_is_read_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "# my run\n"
        "model: m\ntrain: rows.csv\ntask: causal-lm\ntext-column: text\noutput: out\n"
        "lr: 3e-4\n"  # a text, to YAML
        "max_length:\n"  # not set
        "fuse-dropout: yes\n"
        "unfreeze: lisa n_layers=3\n"
        "layer_groups:\n  - emb*\n  - [layer.0, layer.1]\n"
    )
    found = options_from(given({"train": "other.csv"}, tmp_path / "run.yaml"))
    assert found.lr == 3e-4 and found.max_length is None and found.fuse_dropout is True
    assert found.train == Path("other.csv")
    assert found.unfreeze == {"policy": "lisa", "n_layers": 3}
    assert found.layer_groups == ["emb*", ["layer.0", "layer.1"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1", "there is no option 'learning_rte'; closest:"),
        ("lr: [1, 2]", "run.yaml: lr: expected a number above 0, got [1, 2]"),
        ("lr: true", "run.yaml: lr: expected a number above 0, got True"),
        ("resume: 1", "run.yaml: resume: expected true or false, got 1"),
        ("text_column: [a]", "run.yaml: text_column: expected a text, got ['a']"),
        ("- lr", "run.yaml: expected lines like 'lr: 3.0e-4', got ['lr']"),
        ("lr: {", "run.yaml: not YAML: "),
        ("unfreeze: {phases: [{from: 5, open: [head]}]}", "from: expected 0 and then ever larger"),
        ("unfreeze: {every: 5}", "run.yaml: unfreeze: expected one of none, gradual"),
    ],
)  # fmt: skip
def test_wrong_yaml_is_reported_in_a_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(InputError) as error:
        given({}, tmp_path / "run.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--config: cannot read .*no\.yaml: .*No such file"):
        given({}, tmp_path / "no.yaml")


def test_either_or_has_a_default_unless_the_other_is_given() -> None:
    assert (options().epochs, options().steps) == (3.0, None)
    assert (options(steps="5").epochs, options(steps="5").steps) == (None, 5)
    assert (options().eval_fraction, options(eval="e.csv").eval_fraction) == (0.1, None)


def test_policies_are_made_with_the_seed_of_the_run() -> None:
    assert make_policy({"policy": "gradual", "every": 5}, seed=3) == GradualUnfreeze(every=5)
    assert make_policy({"policy": "lisa"}, seed=3).seed == 3  # type: ignore[attr-defined]
    assert make_policy({"policy": "lisa", "seed": 1}, seed=3).seed == 1  # type: ignore[attr-defined]
    assert isinstance(make_policy({"policy": "phases", "phases": [{"from": 0, "open": "head"}]}, 0), Phases)
    assert all(name in FIELDS["unfreeze"].metadata["help"] for name in POLICIES)


def test_options_survive_a_file_and_only_what_matters_makes_a_difference() -> None:
    started = options(lr="2e-4", unfreeze=["lisa", "n_layers=1"], layer_groups=["a", "b"], warmup="3")
    stored = from_json(json.loads(json.dumps(as_json(started))))
    again = options_from(stored)
    assert as_json(again) == as_json(started)
    assert again.train.is_absolute()
    assert first_difference(given({"lr": "0.0002", "layer_groups": ["a", "b"]}, None), stored) is None
    assert (
        first_difference(given({"output": "elsewhere", "overwrite": True, "train": "moved.csv"}, None), stored) is None
    )
    for name, value in (("lr", "2e-3"), ("fuse_dropout", True), ("warmup", "0.1"), ("max_length", "9"), ("seed", "1")):
        difference = first_difference(given({name: value}, None), stored)
        assert difference is not None and difference.startswith(
            f"--{name.replace('_', '-')}: the run was started with "
        )
