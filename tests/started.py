"""Processes that tests start: all of them end, whatever happens, and say why if one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_together(commands: Iterable[tuple[list[str], Mapping[str, str], Path]]) -> None:
    """Run commands at the same time, and wait for all of them.

    Args:
        commands: of each process the command, its environment, and the file that gets what it prints.

    Raises:
        AssertionError: one did not return 0; with the end of what they have all printed.
    """
    processes, logs = [], []
    for command, environment, log in commands:
        logs.append(log)
        with open(log, "w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-4000:] for log in logs)


def end_together() -> NoReturn:
    """End this process, as the last thing that it does, once all of its process group are about to.

    Python is not taken down: DTensor's caches keep gloo's threads alive after ``destroy_process_group``, and one that
    lets go of a tensor while the interpreter ends aborts the process. Nor are connections closed that another process
    still reads from.
    """
    store = dist.PrefixStore("end_together", dist.distributed_c10d._get_default_store())
    others = dist.get_world_size() - 1
    store.add("here", 1)
    wait_for(store, "here", others + 1)
    if dist.get_rank() == 0:  # which may be the one that keeps the store
        wait_for(store, "left", others)
    else:
        store.add("left", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait_for(store: dist.Store, key: str, count: int) -> None:
    """Until a counter of the store is as high as that."""
    started = time.monotonic()
    while store.add(key, 0) < count:
        if time.monotonic() > started + 120:
            raise TimeoutError(f"waited for {count} processes, of which {store.add(key, 0)} came")
        time.sleep(0.01)
