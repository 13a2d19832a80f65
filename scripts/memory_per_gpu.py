"""``python scripts/memory_per_gpu.py``: docs/_generated/memory-per-gpu.md, by arithmetic on the shapes of Llama models.

The bytes of weights, gradients, moments, low bits and anchor are those of ``fastft.doctor``, for the parts of the
parameters that ``fully_shard`` gives to the first process. With ``--check`` it writes nothing and fails if the file is
not up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import torch

from fastft.diagnosis.settings import Memory, Stored, Weights, memory_of, name_of
from fastft.optim.low_precision import StateDtype
from fastft.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "_generated" / "memory-per-gpu.md"
GPUS = (1, 8, 16, 64)
SETTINGS: tuple[tuple[Weights, StateDtype], ...] = (
    (Weights(torch.float32), None),
    (Weights(torch.bfloat16, extra_bits=16), None),
    (Weights(torch.bfloat16), torch.float32),
    (Weights(torch.bfloat16, extra_bits=16), "8bit"),
)
PARTS = ("weights", "gradients", "moments", "low_bits", "anchor")
"""The fields of ``Memory`` that have a column."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama 2."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def layer(self) -> dict[str, Shape]:
        """The parameters of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }

    def root(self) -> dict[str, Shape]:
        """Those around the layers."""
        embeddings = (self.vocabulary, self.hidden)
        return {"embed_tokens": embeddings, "norm": (self.hidden,), "lm_head": embeddings}

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of all."""
        yield from self.root().items()
        for i in range(self.layers):
            yield from ((f"layers.{i}.{name}", shape) for name, shape in self.layer().items())


MODELS = (
    Decoder("7B", 4096, 32, 11008, 32, 32),
    Decoder("13B", 5120, 40, 13824, 40, 40),
    Decoder("70B", 8192, 80, 28672, 64, 8),
)


def elements(shapes: dict[str, Shape]) -> int:
    """Of all together."""
    return sum(prod(shape) for shape in shapes.values())


def part(shape: Shape, gpus: int) -> Shape:
    """The first process's rows: the most that one has."""
    return (-(-shape[0] // gpus), *shape[1:])


@cache
def memory_of_one(shape: Shape, kept: Weights, state_dtype: StateDtype) -> Memory:
    """The bytes of a parameter of this shape."""
    like = torch.empty(shape, dtype=kept.dtype, device="meta")
    return memory_of([Stored("", like)], kept, state_dtype, main=None, anchored=True)


def memory(model: Decoder, gpus: int, kept: Weights, state_dtype: StateDtype) -> Memory:
    """The bytes on one GPU of several."""
    each = [memory_of_one(part(shape, gpus), kept, state_dtype) for _, shape in model.parameters()]
    sums = {part: sum(getattr(found, part) for found in each) for part in PARTS}
    return replace(each[0], **sums, elements=0, largest_gradient=max(found.largest_gradient for found in each))


def gigabytes(nbytes: float) -> str:
    """``"14.5"``."""
    return f"{nbytes / 1e9:,.1f}" if nbytes else "-"


def memory_rows(model: Decoder) -> list[list[str]]:
    """Of each setting on each number of GPUs."""
    rows = []
    for kept, state_dtype in SETTINGS:
        for gpus in GPUS:
            found = memory(model, gpus, kept, state_dtype)
            parts = [*(getattr(found, part) for part in PARTS), found.total()]
            rows.append([str(kept), found.moments_as, str(gpus), *map(gigabytes, parts)])
    return rows


def whole_for_a_while(model: Decoder, itemsize: int) -> int:
    """Bytes that ``fully_shard`` puts together: the root, the layer that runs and the next, and a layer's gradients."""
    return itemsize * (elements(model.root()) + 3 * elements(model.layer()))


def sent(model: Decoder, gpus: int, itemsize: int) -> tuple[float, float]:
    """Bytes that reach one GPU in a step: (weights, gradients).

    The layers are gathered for the forward pass and again for the backward pass, the root once.
    """
    layers, root = model.layers * elements(model.layer()), elements(model.root())
    others = (gpus - 1) / gpus
    return others * itemsize * (2 * layers + root), others * itemsize * (layers + root)


def document() -> str:
    """The whole page."""
    titles = ["kept as", "moments as", "GPUs", *(part.replace("_", " ") for part in PARTS), "together"]
    parts = [
        f"<!-- Made by scripts/{Path(__file__).name}; do not edit. -->",
        "# Memory per GPU",
        "GB (10⁹ bytes) on the GPU that has most, with `fully_shard` over all of them, of models of the shapes of "
        "Llama 2, all trained and anchored. By arithmetic, as [`fastft doctor`](../doctor.md) counts; nothing here was "
        "measured. Without an anchor, or with one in host memory, subtract its column; with "
        "`fastft.optim.step_in_backward`, almost all of the gradients'. Activations come on top, and so does what "
        "`fully_shard` puts together for a while.",
    ]
    for model in MODELS:
        size = elements(dict(model.parameters()))
        parts += [
            f"## {model.name}: {size / 1e9:.2f} · 10⁹ parameters",
            "\n".join(markdown(titles, memory_rows(model))),
        ]
    dtypes = (torch.bfloat16, torch.float32)
    rows = [
        [model.name, *(gigabytes(whole_for_a_while(model, dtype.itemsize)) for dtype in dtypes)] for model in MODELS
    ]
    parts += [
        "## Put together for a while",
        "GB, with `fully_shard` on each layer and on the model: embeddings, last norm and head, which stay whole from "
        "the forward pass to the backward pass; the layer that runs, and the next one, which is fetched meanwhile; the "
        "gradients of one layer.",
        "\n".join(markdown(["", *map(name_of, dtypes)], rows)),
        "## Sent in a step",
        "GB that reach each GPU, with bfloat16 weights and gradients: those of `fully_shard`, whatever the optimizer. "
        "fastft adds one all-reduce of two float64 numbers where a step clips, may be skipped, or has a `GradScaler`, "
        "and nothing where not.",
        "\n".join(
            markdown(
                ["", "GPUs", "weights", "gradients"],
                [
                    [model.name, str(gpus), *map(gigabytes, sent(model, gpus, torch.bfloat16.itemsize))]
                    for model in MODELS
                    for gpus in GPUS[1:]
                ],
            )
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if ``--check`` finds the page stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    parser.add_argument("--page", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    text = document()
    if not options.check:
        options.page.write_text(text, encoding="utf-8")
    elif not options.page.exists() or options.page.read_text(encoding="utf-8") != text:
        print(f"{options.page} is stale: run python scripts/{Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
