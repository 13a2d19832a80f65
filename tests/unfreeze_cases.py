"""Models of every shape that layer groups and the unfreezer meet, small; and a training loop over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

drawn = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

WIDTH = 8
CLASSES = 3


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.fc(self.norm(x))))


class Stack(nn.Module):
    """Groups: embeddings, blocks.0, blocks.1, ..., final_norm, head."""

    def __init__(self, depth: int = 3, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class VisionTransformer(nn.Module):
    """As in timm: parameters in the model itself, blocks in an nn.Sequential."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.patch_embed = nn.Linear(1, WIDTH)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x.unsqueeze(-1))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))
        return self.head(self.head_drop(self.fc_norm(x[:, 0])))


class ConvNet(nn.Module):
    """As a ResNet: stages in nn.Sequentials, the first block of each with a shortcut of its own, in-place ReLUs."""

    class Residual(nn.Module):
        def __init__(self, width: int, shortcut: bool) -> None:
            super().__init__()
            self.conv = nn.Conv1d(width, width, 3, padding=1)
            self.bn = nn.BatchNorm1d(width)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = nn.Sequential(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)) if shortcut else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv1 = nn.Conv1d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm1d(4, affine=False)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(self.Residual(4, True), self.Residual(4, False))
        self.layer2 = nn.Sequential(self.Residual(4, True))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x.unsqueeze(1))))
        return self.fc(self.layer2(self.layer1(x)).mean(-1))


class Recurrent(nn.Module):
    """As ALBERT: one block that is run several times, so its own outputs come back to it as inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in (0, 1, 0, 1):
            x = self.blocks[i](x)
        return self.head(x)


class Backwards(nn.Module):
    """Registered from output to input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.embed = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


class TwoTowers(nn.Module):
    """Two branches that meet late: nothing of one lies below the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.left, self.right = Stack(2, seed=6), Stack(2, seed=7)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x.flip(-1))


class TiedLM(nn.Module):
    """A language model whose head is its table of embeddings."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x.sum(-1).abs() * 7).long() % self.embed.num_embeddings)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))[:, :CLASSES]


MODELS: tuple[type[nn.Module], ...] = (Stack, VisionTransformer, ConvNet, Recurrent, Backwards, TwoTowers)


def batch(step: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step, always the same."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 5, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def backward(model: Callable[..., Any], step: int, rows: int = 6) -> Tensor:
    """A forward and a backward pass; the loss."""
    x, y = batch(step, rows)
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def params(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that an optimizer keeps, by parameter position and key."""
    positions = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}.{key}": value
        for i, p in enumerate(positions)
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


@dataclass(frozen=True)
class Listed:
    """A policy from a table: what is open from each step on."""

    table: tuple[tuple[int, tuple[int | str, ...]], ...]

    def __call__(self, progress: Any) -> tuple[int | str, ...]:
        return [wanted for start, wanted in self.table if start <= progress.step][-1]
