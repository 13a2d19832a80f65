"""Augment batches of images in the training loop: flip, crop, mix. Modules, which ``eval()`` switches off."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft.checks import check_count, check_positive


class BatchAugment(nn.Module):
    """The base of augmentations of a batch of images [n, channels, height, width] and its labels.

    What the k-th call in training changes depends on (seed, kind of change, rank, k) alone. k is in the
    ``state_dict``, so a resumed run goes on with the same changes. In eval mode everything passes untouched.

    Args:
        seed: of all changes.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        check_count("seed", seed, 0)
        self.seed, self.calls = seed, 0

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Changed copies of images [n, channels, height, width] and labels: class indices [n], or [n, classes]."""
        if images.ndim != 4:
            raise ValueError(f"images: expected [n, channels, height, width], got {tuple(images.shape)}")
        if not self.training or not len(images):
            return images, labels
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        random = np.random.default_rng((self.seed, zlib.crc32(type(self).__name__.encode()), rank, self.calls))
        self.calls += 1
        return self.change(images, labels, random)

    def change(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Augment one batch with the random numbers of this call; each kind of augmentation has its own."""
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = int(state["calls"])


class Compose(nn.Sequential):
    """Several augmentations, one after the other: ``Compose(RandomFlip(), RandomCrop(4), MixUp(10))``."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        for step in self:
            images, labels = step(images, labels)
        return images, labels


class RandomFlip(BatchAugment):
    """Each image is mirrored left to right with probability p."""

    def __init__(self, p: float = 0.5, seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a number from 0 to 1, got {p!r}")
        self.p = p

    def change(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        flipped = torch.from_numpy(random.random(len(images)) < self.p).to(images.device)
        return torch.where(flipped[:, None, None, None], images.flip(-1), images), labels


class RandomCrop(BatchAugment):
    """Each image is moved by up to ``padding`` pixels each way and filled up with 0."""

    def __init__(self, padding: int = 4, seed: int = 0) -> None:
        super().__init__(seed)
        check_count("padding", padding)
        self.padding = padding

    def change(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        n, _, height, width = images.shape
        offsets = torch.from_numpy(random.integers(0, 2 * self.padding + 1, (2, n, 1))).to(images.device)
        rows = offsets[0] + torch.arange(height, device=images.device)
        columns = offsets[1] + torch.arange(width, device=images.device)
        padded = F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1)
        which = torch.arange(n, device=images.device)[:, None, None]
        return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous(), labels


class Mixing(BatchAugment):
    """The base of augmentations that mix each image of a batch, and its label, with another one of the batch.

    Labels become probabilities [n, classes], float32, as ``cross_entropy`` takes them; each sums to one.

    Args:
        classes: how many there are.
        alpha: the share λ of the image itself is drawn from Beta(α, α), once for a batch.
        seed: of all changes.
    """

    def __init__(self, classes: int, alpha: float, seed: int = 0) -> None:
        super().__init__(seed)
        check_count("classes", classes)
        check_positive("alpha", alpha)
        self.classes, self.alpha = classes, alpha

    def mixed_labels(self, labels: Tensor, other: Tensor, share: float) -> Tensor:
        """``share`` of each label and the rest of that of image ``other`` [n]."""
        if labels.ndim == 2 and labels.shape[1] == self.classes and labels.is_floating_point():
            probabilities = labels
        elif labels.ndim == 1 and not labels.is_floating_point():
            probabilities = F.one_hot(labels.long(), self.classes).float()
        else:
            raise ValueError(
                f"labels: expected class indices [n] or probabilities [n, {self.classes}], "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        return share * probabilities + (1 - share) * probabilities[other]


class MixUp(Mixing):
    """Images are blended: λ·x + (1 − λ)·x′ (Zhang et al. 2018, https://arxiv.org/abs/1710.09412)."""

    def __init__(self, classes: int, alpha: float = 0.2, seed: int = 0) -> None:
        super().__init__(classes, alpha, seed)

    def change(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        if not images.is_floating_point():
            raise ValueError(f"images: expected floating-point numbers, got {images.dtype}")
        share = random.beta(self.alpha, self.alpha)
        other = torch.from_numpy(random.permutation(len(images))).to(images.device)
        return share * images + (1 - share) * images[other], self.mixed_labels(labels, other, share)


class CutMix(Mixing):
    """A rectangle of about 1 − λ of the area is taken from another image (Yun et al. 2019, https://arxiv.org/abs/1905.04899).

    The label's share is that of the pixels.
    """

    def __init__(self, classes: int, alpha: float = 1.0, seed: int = 0) -> None:
        super().__init__(classes, alpha, seed)

    def change(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        side = math.sqrt(1 - random.beta(self.alpha, self.alpha))
        top, bottom = stretch(height, side, random)
        left, right = stretch(width, side, random)
        other = torch.from_numpy(random.permutation(len(images))).to(images.device)
        images = images.clone(memory_format=torch.contiguous_format)
        images[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return images, self.mixed_labels(labels, other, share)


def stretch(size: int, share: float, random: np.random.Generator) -> tuple[int, int]:
    """(begin, end) of a stretch of about ``share`` of ``size`` with a random middle, cut off at 0 and ``size``."""
    middle, half = random.integers(size), size * share / 2
    return max(0, round(middle - half)), min(size, round(middle + half))
