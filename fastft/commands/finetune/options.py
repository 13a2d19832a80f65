"""The options of ``fastft finetune``: one dataclass from which flags, YAML keys, help and checks are derived."""

# ruff: noqa: RUF009 (option() is dataclasses.field())

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.data import TextAugment
from fastft.names import closest
from fastft.optim import AdamW
from fastft.unfreeze import (
    LISA,
    BlockCoordinate,
    ChainThaw,
    GradualUnfreeze,
    LinearProbeThenFinetune,
    OnPlateau,
    Phases,
    Policy,
)

from .errors import InputError

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.float32, "bfloat16-weights": torch.bfloat16}
"""The dtype of the weights, by ``--precision``."""
CLASSIFICATION, CAUSAL_LM = "text-classification", "causal-lm"

POLICIES: dict[str, Any] = {
    "gradual": GradualUnfreeze,
    "chain-thaw": ChainThaw,
    "lp-ft": LinearProbeThenFinetune,
    "lisa": LISA,
    "block-coordinate": BlockCoordinate,
    "on-plateau": OnPlateau,
    "phases": Phases,
}

Read = Callable[[Any], Any]
"""Makes a value of a flag's text or of a YAML value; a ``ValueError`` says what was expected and what was given."""


# -- kinds of values -----------------------------------------------------------------------------------------


def number(least: float, most: float = math.inf, *, above: bool = False) -> Read:
    """A finite number of at least (``above``: more than) ``least`` and at most ``most``."""
    bound = f"{'above' if above else 'of at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")

    def read(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)  # YAML reads 3e-4 as a text
        except (TypeError, ValueError):
            found = math.nan
        if not (least < found if above else least <= found) or not found <= most or math.isinf(found):
            raise ValueError(f"expected a number {bound}, got {value!r}")
        return found

    return read


def count(least: int) -> Read:
    """A whole number of at least ``least``."""

    def read(value: Any) -> int:
        text = "" if isinstance(value, bool) else str(value)
        if not text.lstrip("-").isdecimal() or not least <= int(text) < 2**63:
            raise ValueError(f"expected a whole number of at least {least}, got {value!r}")
        return int(text)

    return read


def one_of(*choices: str) -> Read:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"expected {' or '.join(choices)}, got {value!r}{closest(str(value), choices)}")
        return str(value)

    return read


def text(value: Any) -> str:
    if isinstance(value, (Mapping, list, bool)) or str(value) == "":
        raise ValueError(f"expected a text, got {value!r}")
    return str(value)


def path(value: Any) -> Path:
    return Path(text(value)).expanduser()


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def warmup(value: Any) -> float | int:
    """Steps, or a part of all steps."""
    for read in (count(0), number(0)):
        try:
            found: float | int = read(value)
        except ValueError:
            continue
        if isinstance(found, int) or found < 1:
            return found
    raise ValueError(f"expected a whole number of steps, or a part of all steps below 1, got {value!r}")


def patterns(value: Any) -> Any:
    """Groups of names, as :func:`fastft.layers.layer_groups` takes them; it checks them against the model."""
    if isinstance(value, Mapping):
        return {str(name): patterns(several) for name, several in value.items()}
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"expected module names or glob patterns, from input to output, got {value!r}")
    return [item if isinstance(item, str) else patterns(item) for item in value]


def unfreezing(value: Any) -> dict[str, Any] | None:
    """``{"policy": name, parameter: value, ...}``, or None for "none"; from words, a text of words, or such a dict."""
    if isinstance(value, Mapping):
        chosen = {"policy": "phases", **value} if "phases" in value else dict(value)
    else:
        name, *pairs = value.split() if isinstance(value, str) else list(value)
        chosen = {"policy": name}
        for pair in pairs:
            key, equals, word = str(pair).partition("=")
            if not equals:
                raise ValueError(f"expected KEY=VALUE after the policy's name, got {pair!r}")
            chosen[key] = literal(word)
    if chosen.get("policy") == "none":
        return None
    make_policy(chosen, seed=0)
    return chosen


def augmenting(value: Any) -> str:
    """A spec, as :meth:`fastft.data.TextAugment.from_spec` takes it, with the full path of a table of synonyms."""
    words = [value] if isinstance(value, str) else list(value)
    try:
        parts = TextAugment.split_spec(",".join(map(str, words)))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("augment: ")) from None
    tables = [part for part in parts if part[0] == "synonyms"]
    if len(tables) > 1:
        raise ValueError("expected synonyms=P:FILE once")
    for part in tables:
        part[2:] = [str(Path(file).expanduser().resolve()) for file in part[2:]]
    return ",".join(f"{name}={':'.join(values)}" for name, *values in parts)


def literal(word: str) -> Any:
    """A number, true or false where it is one; else the word."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def make_policy(chosen: Mapping[str, Any], seed: int) -> Policy:
    """The policy that was chosen; one that is random and was given no seed gets the run's.

    Raises:
        ValueError: there is no such policy, or it does not take these parameters; the message lists those it takes.
    """
    given = {key: value for key, value in chosen.items() if key != "policy"}
    name = chosen.get("policy")
    if name not in POLICIES:
        raise ValueError(f"expected one of none, {', '.join(POLICIES)}, got {name!r}{closest(str(name), POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    takes = ", ".join(f"{key}=" if p.default is p.empty else f"{key}={p.default}" for key, p in known.items())
    for key in given:
        if key not in known:
            raise ValueError(f"{name} takes {takes}; got {key!r}{closest(key, known)}")
    for key, parameter in known.items():
        if key not in given and parameter.default is parameter.empty:
            how = " (in the --config file)" if name == "phases" else f", as in: {name} {key}=100"
            how = ", as in: on-plateau metric=eval_loss" if key == "metric" else how
            raise ValueError(f"{name} needs {key}={how}; it takes {takes}")
    if "seed" in known:
        given.setdefault("seed", seed)
    policy: Policy = POLICIES[name](**given)
    return policy


# -- the options ---------------------------------------------------------------------------------------------

DATA = "model and data"
WIDENING = "checking and widening the data"
TRAINING = "training"
KEEPING = "keeping what the model knows"
OPENING = "opening layers over time"
RUNNING = "output and checkpoints"


def option(section: str, read: Read, default: Any, help: str, metavar: Any = "", **more: Any) -> Any:
    """A field of :class:`Options`. ``neutral=True``: a resumed run may have another value."""
    return dataclasses.field(
        default=default, metadata={"section": section, "read": read, "help": help, "metavar": metavar, **more}
    )


@dataclass(frozen=True)
class Options:
    """All options of a run, each as its ``read`` returns it."""

    model: Path = option(
        DATA, path, None, "folder of the pre-trained model and its tokenizer, as save_pretrained writes it", "DIR"
    )
    train: Path = option(
        DATA, path, None, "the rows to train on: .csv, .tsv, .jsonl (each also with .gz) or .parquet", "FILE"
    )
    eval: Path | None = option(DATA, path, None, "the rows to evaluate on; without, a part of --train", "FILE")
    eval_fraction: float | None = option(
        DATA, number(0, 0.9, above=True), None, "the part of --train to hold out, by a hash of the text", "PART"
    )
    task: str = option(DATA, one_of(CLASSIFICATION, CAUSAL_LM), None, f"{CLASSIFICATION} or {CAUSAL_LM}", "TASK")
    text_column: str = option(DATA, text, None, "the column with the texts", "NAME")
    label_column: str | None = option(DATA, text, None, f"the column with the labels, for {CLASSIFICATION}", "NAME")
    max_length: int | None = option(
        DATA,
        count(2),
        None,
        "cut texts off after N tokens (without, one beyond the model's limit is refused)",
        "N",
    )

    dedupe: bool = option(WIDENING, flag, False, "leave out rows of --train whose text repeats another, also nearly")
    check_leakage: Path | None = option(
        WIDENING,
        path,
        None,
        "leave out rows of --train and --replay whose text is in FILE, also nearly: texts to be tested on, in a column "
        "of the same name",
        "FILE",
    )
    augment: str | None = option(
        WIDENING,
        augmenting,
        None,
        "change texts while training: token_dropout=P, span_masking=P:LENGTH, synonyms=P:FILE (a word, a tab and its "
        "synonyms on each line)",
        "NAME=P",
    )
    neftune: float | None = option(
        WIDENING, number(0, above=True), None, "noise on the embeddings while training, such as 5 (NEFTune)", "X"
    )

    epochs: float | None = option(TRAINING, number(0, above=True), None, "how often to go through --train", "N")
    steps: int | None = option(TRAINING, count(1), None, "optimizer steps, instead of epochs", "N")
    batch_size: int = option(TRAINING, count(1), 16, "rows in a forward pass", "N")
    gradient_accumulation: int = option(TRAINING, count(1), 1, "forward passes in an optimizer step", "N")
    lr: float = option(TRAINING, number(0, above=True), 5e-5, "peak learning rate, of the topmost layer", "LR")
    schedule: str = option(
        TRAINING, one_of("linear", "cosine", "constant"), "linear", "lr after warm-up: linear, cosine, constant", "NAME"
    )
    warmup: float | int = option(TRAINING, warmup, 0.1, "steps to warm up, or the part of all steps", "N")
    weight_decay: float = option(TRAINING, number(0), 0.01, "decoupled; not of biases and norms", "X")
    max_grad_norm: float = option(TRAINING, number(0), 1.0, "clip gradients to this norm, in the step; 0: do not", "X")
    discriminative_lr: float | None = option(
        TRAINING, number(1), None, "divide lr by this from each layer to the one below, such as 2.6", "X"
    )
    layer_decay: float | None = option(
        TRAINING,
        number(0, 1, above=True),
        None,
        "multiply lr by this from each layer to the one below, such as 0.75",
        "X",
    )
    precision: str = option(
        TRAINING,
        one_of(*WEIGHTS),
        "float32",
        "float32; bfloat16 (autocast over float32 weights); or bfloat16-weights (these in bfloat16, with 16 bits "
        "beside each, so that no step is lost)",
        "NAME",
    )
    fuse_dropout: bool = option(TRAINING, flag, False, "use fastft's dropout, which stores no mask")
    seed: int = option(TRAINING, count(0), 0, "of a new head, the order of rows, dropout and random policies", "N")

    fit_head: bool = option(
        KEEPING, flag, False, "fit a new head while the rest is frozen, then train all (LP-FT): far less is forgotten"
    )
    anchor_decay: float = option(
        KEEPING, number(0), 0.0, "pull weights toward their pre-trained values; 100 holds each within about 1/100", "X"
    )
    anchor_mode: str = option(
        KEEPING, one_of("decoupled", "l2"), "decoupled", "decoupled, or l2 (added to the gradient: L2-SP)", "NAME"
    )

    replay: Path | None = option(
        KEEPING, path, None, "old rows to mix in, such as the model was trained on; columns as in --train", "FILE"
    )
    replay_ratio: float = option(
        KEEPING, number(0, 0.99, above=True), 0.05, "the share of --replay in what is trained on", "PART"
    )

    unfreeze: dict[str, Any] | None = option(
        OPENING,
        unfreezing,
        None,
        f"{', '.join(name for name in POLICIES if name != 'phases')} and its parameters, "
        "as in: gradual every=100; phases go in the --config file",
        ("POLICY", "KEY=VALUE"),
    )
    unfreeze_state: str = option(
        OPENING,
        one_of("keep", "reset", "offload"),
        "keep",
        "the optimizer state of layers that close: keep, reset or offload",
        "NAME",
    )
    rewarm_steps: int = option(OPENING, count(0), 0, "steps to warm lr up for layers that open in mid-run", "N")
    layer_groups: Any = option(
        OPENING,
        patterns,
        None,
        "module names or glob patterns, one a layer, from input to output (default: read from the model)",
        "PATTERN",
    )

    output: Path = option(RUNNING, path, None, "where the model, report.json and plot.png go", "DIR", neutral=True)
    keep: str = option(
        RUNNING,
        one_of("best", "last"),
        "best",
        "the model to keep: best (the lowest loss on the evaluation rows) or last",
        "NAME",
    )
    checkpoint_every: int | None = option(
        RUNNING, count(1), None, "evaluate and save a checkpoint every N steps (default: every epoch)", "N"
    )
    resume: bool = option(
        RUNNING, flag, False, "go on with the unfinished run in --output; its options need not be given again",
        neutral=True,
    )  # fmt: skip
    overwrite: bool = option(
        RUNNING, flag, False, "write into an output that is not empty; an unfinished run in it is dropped", neutral=True
    )

    @property
    def files(self) -> dict[str, Path]:
        """The files and folders that a run reads, by the option that names them."""
        found = {name: getattr(self, name) for name in BY_CONTENT}
        for name, *_, file in TextAugment.split_spec(self.augment) if self.augment else ():
            if name == "synonyms":
                found["augment"] = Path(file)
        return {name: path for name, path in found.items() if path is not None}


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
BY_CONTENT = ("model", "train", "eval", "check_leakage", "replay")
"""A resumed run may find these in another place, but with the same content."""
REQUIRED = ("model", "train", "task", "text_column", "output")
EITHER_OR = {"epochs": ("steps", 3.0), "eval_fraction": ("eval", 0.1), "discriminative_lr": ("layer_decay", None)}
"""{option: (the option that excludes it, its default where neither is given)}."""


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every option, and ``--config``."""
    parser.allow_abbrev = False  # an abbreviation would mean something else once there is another option
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with any of these options; flags override it")
    groups: dict[str, Any] = {}
    for name, field in FIELDS.items():
        about = field.metadata
        group = groups.get(about["section"]) or parser.add_argument_group(about["section"])
        groups[about["section"]] = group
        words: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": about["help"] + default_of(name)}
        if about["read"] is flag:
            # What a file may turn on, a flag may turn off.
            words["action"] = "store_true" if about.get("neutral") else argparse.BooleanOptionalAction
        else:
            words["metavar"] = about["metavar"]
            if about["read"] in (patterns, unfreezing, augmenting):
                words["nargs"] = "+"
        group.add_argument(flag_of(name), **words)


def default_of(name: str) -> str:
    """An option's default, to be shown behind its help."""
    default = EITHER_OR[name][1] if name in EITHER_OR else FIELDS[name].default
    if default is None or isinstance(default, bool):
        return ""
    return f" (default: {shown(default)})"


def given(flags: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """The values that were given, by option: those of the YAML file, overridden by those of the flags.

    Raises:
        InputError: the file cannot be read, a key is no option, or an option cannot have this value.
    """
    values: dict[str, Any] = {}
    if config is not None:
        for name, value in read_yaml(config).items():
            if name not in FIELDS:
                raise InputError(f"{config}: there is no option {name!r}{closest(name, FIELDS)}")
            if value is not None:
                values[name] = read_value(name, value, f"{config}: {name}")
    for name, value in flags.items():
        values[name] = read_value(name, value, flag_of(name))
    return values


def read_yaml(config: Path) -> dict[str, Any]:
    """The file's keys, with _ for -, and their values."""
    import yaml

    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: cannot read {config}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{config}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{config}: expected lines like 'lr: 3.0e-4', got {document!r:.80}")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def read_value(name: str, value: Any, where: str) -> Any:
    """The value of an option, checked by itself."""
    try:
        return FIELDS[name].metadata["read"](value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def options_from(values: Mapping[str, Any]) -> Options:
    """The options, checked together.

    Raises:
        InputError: an option is missing, or some do not go together.
    """
    missing = [flag_of(name) for name in REQUIRED if name not in values]
    if missing:
        raise InputError(f"missing {', '.join(missing)}")
    chosen = dict(values)
    for one, (other, fallback) in EITHER_OR.items():
        if one in values and other in values:
            raise InputError(f"expected {flag_of(one)} or {flag_of(other)}, got both")
        if other not in values:
            chosen.setdefault(one, fallback)
    options = Options(**chosen)
    if options.task == CLASSIFICATION and options.label_column is None:
        raise InputError(f"missing --label-column, which {CLASSIFICATION} needs")
    if options.task == CAUSAL_LM and options.label_column is not None:
        raise InputError(f"--label-column: expected none with {CAUSAL_LM}, got {options.label_column!r}")
    if options.task == CAUSAL_LM and options.fit_head:
        raise InputError(f"--fit-head: expected only with --task {CLASSIFICATION}, got {CAUSAL_LM}")
    if options.label_column == options.text_column:
        raise InputError(f"--label-column: expected another column than --text-column, got {options.text_column!r}")
    if options.unfreeze is None:
        for name in ("unfreeze_state", "rewarm_steps"):
            if getattr(options, name) != FIELDS[name].default:
                raise InputError(f"{flag_of(name)}: expected only together with --unfreeze")
    if options.replay is None and options.replay_ratio != FIELDS["replay_ratio"].default:
        raise InputError("--replay-ratio: expected only together with --replay")
    try:
        check_together(options)
    except ValueError as error:
        raise InputError(f"--lr, --anchor-decay: {str(error).removeprefix('param_groups[0]: ')}") from error
    if isinstance(options.warmup, int) and options.steps is not None and options.warmup > options.steps:
        raise InputError(f"--warmup: expected at most the {options.steps} steps of the run, got {options.warmup}")
    return options


def check_together(options: Options) -> None:
    """Check that lr and anchor_decay fit together, by the optimizer's own rule: in a step of one parameter."""
    if options.anchor_decay == 0.0:
        return
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    pull: dict[str, Any] = {"anchor_decay": options.anchor_decay, "anchor_mode": options.anchor_mode}
    AdamW([p], lr=options.lr, anchor="init", **pull).step()


def as_json(options: Options) -> dict[str, Any]:
    """The options as JSON holds them, paths in full; what is not set is left out."""
    found = {}
    for name in FIELDS:
        value = getattr(options, name)
        if value is not None and name not in ("resume", "overwrite"):
            found[name] = str(value.resolve()) if isinstance(value, Path) else value
    return found


def from_json(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The values that :func:`as_json` wrote, as :func:`given` returns them."""
    return {name: read_value(name, value, name) for name, value in stored.items()}


def first_difference(values: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """The first of ``values`` that would change the results of a run that was started with ``stored``."""
    for name, value in values.items():
        started = stored.get(name, FIELDS[name].default)
        if not FIELDS[name].metadata.get("neutral") and name not in BY_CONTENT and value != started:
            started = "none" if started is None else started
            return f"{flag_of(name)}: the run was started with {shown(started)}, and got {shown(value)}"
    return None


def shown(value: Any) -> str:
    """A value as it would be written after a flag."""
    if isinstance(value, Mapping) and "policy" in value:
        return " ".join([value["policy"], *(f"{k}={v}" for k, v in value.items() if k != "policy")])
    return f"{value:g}" if isinstance(value, float) else str(value)
