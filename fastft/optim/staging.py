"""Anchors that stay in host memory: brought to the GPU a part ahead of the step that reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PART_BYTES = 64 << 20
"""About how much anchor a part holds: two such buffers lie on the GPU, whatever the model's size."""


class Buffers:
    """Two buffers on a device that parts take in turn, and the stream that fills them."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self.memory = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[torch.cuda.Event | None] = [None, None]


class Staging:
    """The anchors of one part: where they lie on the host, and where the step will read them."""

    def __init__(self, buffers: Buffers, slot: int, anchors: Sequence[Tensor]) -> None:
        self.buffers, self.slot, self.host = buffers, slot, list(anchors)
        self.filled: torch.cuda.Event | None = None
        self.views = []
        at = 0
        for anchor in self.host:
            flat = buffers.memory[slot][at : at + anchor.nbytes].view(anchor.dtype)
            self.views.append(flat.as_strided(anchor.shape, anchor.stride()))
            at += aligned(anchor.nbytes)

    def fetch(self) -> None:
        """Start the copies, once the step that last read this buffer is through."""
        if self.buffers.stream is None:
            self._copy()
            return
        free = self.buffers.free[self.slot]
        if free is None:  # the buffer was allocated on the stream that steps
            free = torch.cuda.current_stream(self.buffers.device).record_event()
        self.buffers.stream.wait_event(free)
        with torch.cuda.stream(self.buffers.stream):
            self._copy()
            self.filled = self.buffers.stream.record_event()

    def wait(self) -> None:
        """Let the current stream wait for the copies."""
        if self.filled is not None:
            torch.cuda.current_stream(self.buffers.device).wait_event(self.filled)

    def done(self) -> None:
        """The step that reads the buffer has been launched."""
        if self.buffers.stream is not None:
            self.buffers.free[self.slot] = torch.cuda.current_stream(self.buffers.device).record_event()

    def _copy(self) -> None:
        for view, anchor in zip(self.views, self.host, strict=True):
            view.copy_(anchor, non_blocking=True)


def staging_for(device: torch.device, parts: Sequence[Sequence[Tensor]]) -> list[Staging]:
    """One staging for each part's anchors (dense tensors in host memory), over two shared buffers."""
    nbytes = max(sum(aligned(anchor.nbytes) for anchor in part) for part in parts)
    buffers = Buffers(device, nbytes)
    return [Staging(buffers, index % 2, part) for index, part in enumerate(parts)]


def aligned(nbytes: int) -> int:
    """Rounded up to 256, as CUDA aligns allocations."""
    return (nbytes + 255) // 256 * 256
