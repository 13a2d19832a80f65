"""Runs that are stopped, killed, and gone on with: nothing is lost, and not a bit differs."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import finetune_cases as cases
import pytest

from fastft.commands import shell
from fastft.commands.finetune import checkpoints, training
from fastft.commands.finetune.errors import InputError

pytestmark = pytest.mark.slow

Options = dict[str, Any]
STEPS = 48


@pytest.fixture(scope="module")
def long_run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, Path]:
    """(options, output) of a run with all that has a state, from beginning to end: 10 steps an epoch."""
    folder = tmp_path_factory.mktemp("long")
    options: Options = {
        "model": home / "bert",
        "train": home / "train.csv",
        "task": "text-classification",
        "text_column": "text",
        "label_column": "label",
        "steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "lr": 3e-3,
        "fit_head": True,
        "anchor_decay": 10,
        "discriminative_lr": 1.3,
        "unfreeze": ["on-plateau", "metric=eval_loss", "patience=1", "restore_best=true"],
        "rewarm_steps": 3,
        "unfreeze_state": "reset",
        "fuse_dropout": True,
        "replay": cases.write_rows(folder / "old.csv", cases.review_rows(140)[120:]),
        "replay_ratio": 0.1,
        "augment": ["token_dropout=0.1", "span_masking=0.2"],
        "neftune": 5,
        "checkpoint_every": 2,
        "keep": "last",
    }
    done = cases.finetune(**options, output=folder / "whole")
    assert done.status == 0, done.err
    return options, folder / "whole"


def assert_same(output: Path, whole: Path) -> None:
    """Two results are the same, but for times and paths."""
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert set(cases.tree(output)) == set(cases.tree(whole))
    first, second = (json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (output, whole))
    for part in ("before", "after", "drift", "kept", "plan", "data"):
        assert first[part] == second[part], part
    for part in ("evaluation", "open"):
        assert first["history"][part] == second["history"][part], part
    steps, others = ({e["step"]: e["loss"] for e in r["history"]["training"]} for r in (first, second))
    assert steps == others
    assert len(first["history"]["open"]) > 2  # layers did open on the way


CTRL_C = """
import os, signal
from fastft.commands.finetune import training

class Signalled(training.Stop):
    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

training.Stop = Signalled
"""


def test_ctrl_c_finishes_the_step_and_the_command_that_it_prints_goes_on(
    long_run: tuple[Options, Path], tmp_path: Path
) -> None:
    options, whole = long_run
    output = tmp_path / "my results"
    done = cases.finetune_apart(CTRL_C, **options, output=output)
    assert (done.status, done.out) == (130, ""), done.err
    said = done.err.splitlines()
    assert said[-2] == "fastft finetune: stopping after this step (once more: at once)"
    message = "fastft finetune: stopped after step 7; go on with: "
    assert said[-1].startswith(message)
    assert [p.name for p in output.iterdir()] == ["checkpoints"]  # and nothing that looks like a result

    command = shlex.split(said[-1].removeprefix(message))
    assert command[:2] == ["fastft", "finetune"]
    assert shell.main(command[1:]) == 0
    assert_same(output, whole)
    assert json.loads((output / "report.json").read_text(encoding="utf-8"))["resumed_from"] == 7


def test_bfloat16_weights_go_on_with_the_bits_beside_them(classify: Options, tmp_path: Path) -> None:
    classify.update(precision="bfloat16-weights", lr=1e-5, steps=9, anchor_decay=30, checkpoint_every=3, keep="last")
    assert cases.finetune(**{**classify, "output": tmp_path / "whole"}).status == 0
    done = cases.finetune_apart(CTRL_C, **classify)
    assert done.status == 130, done.err
    assert cases.finetune(output=classify["output"], resume=True).status == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", classify["output"])]
    assert weights[0] == weights[1]


KILLED_WHILE_IT_SAVES = """
import os, signal
from fastft.commands.finetune import training

save = training.Trainer._save_scaler

def save_or_die(self, folder):
    if self.state.global_step == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

training.Trainer._save_scaler = save_or_die
"""


def test_after_sigkill_it_goes_on_bit_for_bit(long_run: tuple[Options, Path], tmp_path: Path) -> None:
    options, whole = long_run
    output = tmp_path / "out"
    done = cases.finetune_apart(KILLED_WHILE_IT_SAVES, **options, output=output)
    assert done.status == -signal.SIGKILL, done.err
    assert [p.name for p in output.iterdir()] == ["checkpoints"]
    assert (output / "checkpoints" / "checkpoint-14" / "optimizer.pt").exists()  # but not all of it
    moved = Path(shutil.move(output, tmp_path / "moved"))

    done = cases.finetune(output=moved, resume=True)
    assert done.status == 0, done.err
    assert "going on after step 12\n" in done.err
    assert_same(moved, whole)


def test_a_second_ctrl_c_ends_it_at_once(classify: Options) -> None:
    done = signalled(signal.SIGINT, 3, {**classify, "checkpoint_every": 1}, times=2)
    assert done.status == 130
    message = f"interrupted; go on with: fastft finetune --output {classify['output']} --resume"
    assert done.err.splitlines()[-1] == f"fastft finetune: {message}"
    done = cases.finetune(output=classify["output"], resume=True)
    assert (done.status, "going on after step 2" in done.err) == (0, True)


def test_the_best_of_before_is_still_the_best_after_a_move(classify: Options, tmp_path: Path) -> None:
    # With an lr that ruins the model, the best is before the stop.
    options = {**classify, "steps": 8, "checkpoint_every": 2, "lr": 0.3, "schedule": "constant", "warmup": 0}
    whole = tmp_path / "whole"
    assert cases.finetune(**{**options, "output": whole}).status == 0
    stop_after(6, options)
    moved = Path(shutil.move(classify["output"], tmp_path / "moved"))
    done = cases.finetune(output=moved, resume=True)
    assert done.status == 0, done.err
    first, second = (json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (moved, whole))
    assert first["kept"] == second["kept"] and first["kept"]["step"] < 6
    assert (moved / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def signalled(number: int, step: int, options: Options, times: int = 1) -> cases.Done:
    """A run to which signals come in the middle of a step."""

    class Signalled(training.Stop):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                for _ in range(times):
                    signal.raise_signal(number)

    # In the background of a script, SIGINT is ignored to begin with.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "Stop", Signalled)
            return cases.finetune(**options)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_after(step: int, options: Options) -> None:
    """Run to the end of a step, and leave a checkpoint there."""
    done = signalled(signal.SIGTERM, step, options)
    assert done.status == 128 + signal.SIGTERM, done.err
    assert f"stopped after step {step};" in done.err


@pytest.fixture
def stopped(classify: Options) -> Options:
    """Options of a run that was stopped after its second of four steps."""
    stop_after(2, classify)
    return classify


def refused(done: cases.Done) -> str:
    """The one line with which a run was refused."""
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    return line


def test_what_an_unfinished_run_leaves_in_the_way(stopped: Options, home: Path, tmp_path: Path) -> None:
    output = stopped["output"]
    before = cases.tree(output)
    assert refused(cases.finetune(**stopped)) == (
        f"fastft finetune: --output: {output} has an unfinished run; go on with --resume, or drop it with --overwrite"
    )
    for name, value, message in (
        ("lr", 2e-3, "--lr: the run was started with 0.001, and got 0.002;"),
        ("steps", 5, "--steps: the run was started with 4, and got 5;"),
        ("epochs", 2, "--epochs: the run was started with none, and got 2;"),
        ("unfreeze", ["gradual", "every=1"], "--unfreeze: the run was started with none, and got gradual every=1;"),
        ("text_column", "id", "--text-column: the run was started with text, and got id;"),
        ("keep", "last", "--keep: the run was started with best, and got last;"),
    ):
        line = refused(cases.finetune(**{"output": output, "resume": True, name: value}))
        assert line.startswith(f"fastft finetune: {message}"), line
        assert line.endswith("leave it out to go on, or start anew with --overwrite")
    other = cases.write_rows(tmp_path / "other.csv", cases.review_rows(30))
    assert "--train: " in refused(cases.finetune(output=output, resume=True, train=other))
    assert "got both" in refused(cases.finetune(output=output, resume=True, overwrite=True))
    assert cases.tree(output) == before

    # The same options, given again, and data of the same content in another place.
    again = {**stopped, "train": Path(shutil.copy(home / "train.csv", tmp_path / "copy.csv"))}
    done = cases.finetune(**again, resume=True)
    assert done.status == 0, done.err
    assert "going on after step 2" in done.err
    assert not (output / "checkpoints").exists()
    assert "is finished; start a new one with --overwrite" in refused(cases.finetune(output=output, resume=True))


def test_changed_data_are_noticed(stopped: Options, tmp_path: Path) -> None:
    data = Path(shutil.copy(stopped["train"], tmp_path / "rows.csv"))
    assert cases.finetune(**{**stopped, "train": data}, overwrite=True).status == 0
    stop_after(2, {**stopped, "train": data, "overwrite": True})
    with open(data, "a") as file:
        file.write("999,one more row,positive\n")
    line = refused(cases.finetune(output=stopped["output"], resume=True))
    assert line.startswith(f"fastft finetune: --train: {data} does not hold what it did when the run was started")


def test_overwriting_drops_an_unfinished_run(stopped: Options) -> None:
    done = cases.finetune(**{**stopped, "lr": 2e-3}, overwrite=True)
    assert done.status == 0, done.err
    assert "going on" not in done.err
    assert not (stopped["output"] / "checkpoints").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(classify: Options, tmp_path: Path) -> None:
    assert cases.finetune(**{**classify, "output": tmp_path / "whole"}).status == 0
    stop_after(2, classify)
    for checkpoint in (classify["output"] / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    done = cases.finetune(output=classify["output"], resume=True)
    assert done.status == 0, done.err
    weights = [(folder / "model.safetensors").read_bytes() for folder in (classify["output"], tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_nothing_to_resume(classify: Options) -> None:
    line = refused(cases.finetune(output=classify["output"], resume=True))
    assert line == (
        f"fastft finetune: --resume: there is no unfinished run in {classify['output']}; start one without --resume"
    )
    assert "missing --output" in refused(cases.finetune(resume=True))


def test_interrupted_before_training_it_leaves_nothing(
    classify: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        assert (classify["output"] / "checkpoints").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "evaluate", interrupted)
    done = cases.finetune(**classify)
    assert (done.status, done.err.splitlines()[-1]) == (130, "fastft finetune: interrupted; nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_with_the_way_to_go_on(classify: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.commands.finetune import pipeline

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.RunReport, "write", full)
        done = cases.finetune(**classify)
    assert done.status == 1
    assert "could not finish: [Errno 28] No space left on device; go on with: fastft finetune --output" in done.err
    assert [p.name for p in classify["output"].iterdir()] == ["checkpoints"]
    assert cases.finetune(output=classify["output"], resume=True).status == 0


# -- the folder ----------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(b"1234")
    (path / "inner" / "state").write_bytes(b"12")
    checkpoints.mark_whole(path)
    return path


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert checkpoints.last_whole(tmp_path) is None
    early, late, latest = (checkpoint(tmp_path, step) for step in (8, 9, 10))  # 10 is later than 9
    assert checkpoints.last_whole(tmp_path) == latest
    (latest / "inner" / "state").unlink()
    assert checkpoints.last_whole(tmp_path) == late
    (late / "weights").write_bytes(b"123")
    assert checkpoints.last_whole(tmp_path) == early
    (early / "files.json").write_text("{")
    assert checkpoints.last_whole(tmp_path) is None


def test_two_processes_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with checkpoints.working(tmp_path / "out", {"version": 1}, resume=False) as folder:
        checkpoint(folder, 1)
        with (
            pytest.raises(InputError, match="another process is writing to"),
            checkpoints.working(tmp_path / "out", {"version": 1}, resume=False),
        ):
            pass
        assert checkpoints.last_whole(folder) == folder / "checkpoint-1"


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(classify: Options) -> None:
    (classify["output"] / "checkpoints").mkdir(parents=True)
    (classify["output"] / "checkpoints" / "thesis.tex").write_text("years of work")
    for overwrite in ({}, {"overwrite": True}):
        line = refused(cases.finetune(**classify, **overwrite))
        assert "checkpoints is in the way, and not ours; move it, or choose another output" in line
    assert (classify["output"] / "checkpoints" / "thesis.tex").read_text() == "years of work"


def test_a_digest_is_of_what_is_in_a_folder_and_how_it_is_called(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder, name, content in zip(folders, ("x", "x", "y", "x"), ("1", "1", "1", "2"), strict=True):
        folder.mkdir()
        (folder / name).write_text(content)
    found = [checkpoints.digest(folder) for folder in folders]
    assert found[0] == found[1] and len(set(found)) == 3


KILLED_IN_THE_FIRST_STEP = """
import os, signal
from fastft.commands.finetune import training

class Killed(training.Stop):
    def on_pre_optimizer_step(self, args, state, control, **_):
        os.kill(os.getpid(), signal.SIGKILL)

training.Stop = Killed
"""


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_as_it_did(classify: Options, tmp_path: Path) -> None:
    classify.update(fit_head=True, precision="bfloat16", lr=1e-2)
    assert cases.finetune(**{**classify, "output": tmp_path / "whole"}).status == 0
    assert cases.finetune_apart(KILLED_IN_THE_FIRST_STEP, **classify).status == -signal.SIGKILL
    done = cases.finetune(output=classify["output"], resume=True)
    assert done.status == 0 and "classifier fitted on 80 rows" in done.err
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", classify["output"])]
    assert weights[0] == weights[1]
