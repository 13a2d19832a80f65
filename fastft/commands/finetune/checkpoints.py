"""The checkpoints of an unfinished run: which are whole, and the options and data that the run was started with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError

FOLDER = "checkpoints"
"""In the output folder; gone when the run is done."""
RUN = "run.json"
WHOLE = "files.json"
VERSION = 1


def run_in(output: Path) -> dict[str, Any] | None:
    """The content of ``run.json`` of the unfinished run in an output folder; None if there is none.

    Raises:
        InputError: another release has left it.
    """
    try:
        found = json.loads((output / FOLDER / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise InputError(f"{output / FOLDER}: left by another release of fastft; start anew with --overwrite")
    return found


def refuse_unusable(output: Path, overwrite: bool) -> None:
    """Raise :class:`InputError` if a new run cannot write to ``output``."""
    folder = output / FOLDER
    there = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"--output: {there} may not be written to")
    if folder.exists() and not (folder / RUN).is_file():
        raise InputError(f"--output: {folder} is in the way, and not ours; move it, or choose another output")
    if overwrite or not output.exists():
        return
    if folder.exists():
        raise InputError(f"--output: {output} has an unfinished run; go on with --resume, or drop it with --overwrite")
    if any(output.iterdir()):
        raise InputError(f"--output: {output} is not empty; choose another, or write into it with --overwrite")


@contextmanager
def working(output: Path, run: dict[str, Any], resume: bool) -> Iterator[Path]:
    """The folder for the checkpoints of a run, which no other process may use in the meantime.

    Begins with none unless ``resume``. When the block ends well, the folder goes; when it fails before there is a
    whole checkpoint, so does all that was made here.
    """
    folder = output / FOLDER
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for path in () if resume else list(folder.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(folder / RUN, run)
            yield folder
            shutil.rmtree(folder)
    finally:
        if made and last_whole(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            for path in made[1:]:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from using a folder for as long as this process lives."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output: another process is writing to {folder.parent}") from None
        yield
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write all of a file or nothing."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def mark_whole(checkpoint: Path) -> None:
    """Note which files a checkpoint consists of, now that all of them are written."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    write_json(checkpoint / WHOLE, files)


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that is all there, and was not cut off while it was written or deleted."""
    numbered = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((checkpoint for checkpoint in numbered if is_whole(checkpoint)), None)


def keep_only(folder: Path, steps: Collection[int | None]) -> None:
    """Delete all other checkpoints."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in steps:
            shutil.rmtree(checkpoint)


def is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def step_of(checkpoint: Path) -> int:
    """The number of the step after which it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def digest(path: Path) -> str:
    """A hash of a file's content, or of the files that lie directly in a folder and their names."""
    sha = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            sha.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()
