"""Augmentation of tensors and images: mixed labels, off at eval, repeatable, and whose random numbers are used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from fastft.data import Augmented, Compose, CutMix, MixUp, RandomCrop, RandomFlip, SeededTransform
from fastft.data.images import BatchAugment, stretch

CLASSES = 5
MADE: dict[str, Callable[[int], BatchAugment]] = {
    "flip": lambda seed: RandomFlip(seed=seed),
    "crop": lambda seed: RandomCrop(2, seed=seed),
    "mixup": lambda seed: MixUp(CLASSES, 1.0, seed=seed),
    "cutmix": lambda seed: CutMix(CLASSES, seed=seed),
}


def batch(n: int = 16, height: int = 6, width: int = 9) -> tuple[Tensor, Tensor]:
    """Every pixel is another number, so that its origin shows; zero does not occur."""
    images = 1 + torch.arange(n * 3 * height * width).double().reshape(n, 3, height, width)
    return images, torch.arange(n) % CLASSES


# -- what they do --------------------------------------------------------------------------------------------


def test_flips_mirror_whole_images() -> None:
    images, labels = batch(400)
    changed, same = RandomFlip(0.3)(images, labels)
    flipped = (changed == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(flipped, ~(changed == images).all(dim=(1, 2, 3)))
    assert abs(flipped.double().mean().item() - 0.3) < 4.5 * (0.3 * 0.7 / 400) ** 0.5
    assert same is labels
    assert torch.equal(RandomFlip(1.0)(images, labels)[0], images.flip(-1))


def test_crops_move_images_and_fill_with_zero() -> None:
    images, labels = batch(300)
    changed, same = RandomCrop(2)(images, labels)
    assert changed.shape == images.shape and same is labels and changed.is_contiguous()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    moves = set()
    for own, crop in zip(padded, changed, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(own[:, top : top + 6, left : left + 9], crop)
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) == 25


@pytest.mark.parametrize("kind", [MixUp, CutMix])
@given(n=st.integers(1, 12), alpha=st.sampled_from([0.1, 1.0, 5.0]), soft=st.booleans(), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_a_label_holds_as_much_of_each_class_as_the_image(
    kind: type[MixUp | CutMix], n: int, alpha: float, soft: bool, seed: int
) -> None:
    # Image i is 1 in channel i and of class i, so what an image is made of can be read from its channels.
    images = torch.eye(n)[:, :, None, None].expand(n, n, 6, 9)
    labels = torch.eye(n) if soft else torch.arange(n)
    changed, mixed = kind(n, alpha, seed)(images, labels)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.sum(1), torch.ones(n))
    torch.testing.assert_close(changed.mean((2, 3)), mixed)
    own = mixed.diagonal()
    assert (own[own < 1] == own.min()).all()  # one share for the whole batch, but for images mixed with themselves
    if kind is MixUp:
        torch.testing.assert_close(changed, changed[:, :, :1, :1].expand_as(changed))


@pytest.mark.slow
def test_mixing_draws_its_share_from_a_beta_distribution() -> None:
    mixup, images = MixUp(2, alpha=0.4), torch.eye(2)[:, :, None, None]
    shares = []
    for _ in range(2000):
        _, mixed = mixup(images, torch.arange(2))
        if mixed[0, 0] < 1:
            shares.append(mixed[0, 0].item())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.08)


@given(n=st.integers(1, 8), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 200))
@settings(deadline=None, max_examples=80)
def test_cutmix_pastes_one_rectangle_and_counts_its_pixels(n: int, height: int, width: int, seed: int) -> None:
    images, _ = batch(n, height, width)
    labels = torch.arange(n)  # each its own class, so that the label shows the share
    before = images.clone()
    changed, mixed = CutMix(n, seed=seed)(images, labels)
    assert torch.equal(images, before)
    torch.testing.assert_close(mixed.sum(1), torch.ones(n))
    for i in range(n):
        pasted = (changed[i] != images[i]).any(0)
        share = pasted.double().mean().item()
        if share:
            rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            assert len(rows) * len(columns) == pasted.sum()  # a rectangle
            assert mixed[i, i].item() == pytest.approx(1 - share, abs=1e-6)
            (other,) = (j for j in range(n) if j != i and mixed[i, j] > 0)
            assert torch.equal(changed[i][:, pasted], images[other][:, pasted])


def test_cutmix_cuts_the_area_that_it_has_drawn() -> None:
    shares = []
    for seed in range(300):
        random_numbers = np.random.default_rng(seed)
        top, bottom = stretch(1000, 0.5, random_numbers)
        assert 0 <= top <= bottom <= 1000 and bottom - top <= 500
        shares.append((bottom - top) / 1000)
    assert np.mean(shares) == pytest.approx(0.4375, abs=0.02)  # ∫ of the part within: ½·(1 − ¼·½)


def test_they_are_composed() -> None:
    images, labels = batch()
    both = Compose(RandomFlip(1.0), RandomCrop(1), MixUp(CLASSES), CutMix(CLASSES))
    changed, mixed = both(images, labels)
    assert changed.shape == images.shape and mixed.shape == (16, CLASSES)
    torch.testing.assert_close(mixed.sum(1), torch.ones(16))
    both.eval()
    assert both(images, labels) == (images, labels)


# -- when, and with what random numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_off_at_eval_and_for_nothing(name: str) -> None:
    images, labels = batch()
    module = MADE[name](0)
    assert not torch.equal(module(images, labels)[0], images)
    module.eval()
    changed, same = module(images, labels)
    assert changed is images and same is labels and module.calls == 1
    module.train()
    empty = images[:0], labels[:0]
    assert module(*empty)[0] is empty[0]
    assert module(images[:1], labels[:1])[0].shape == (1, 3, 6, 9)


@pytest.mark.parametrize("name", MADE)
def test_calls_depend_on_the_seed_and_their_number_and_can_be_resumed(name: str) -> None:
    images, labels = batch()

    def run(module: BatchAugment, calls: int) -> list[Tensor]:
        torch.manual_seed(random.randrange(2**31))  # who else draws does not matter
        return [module(images, labels)[0] for _ in range(calls)]

    first = MADE[name](3)
    done = run(first, 3)
    assert len({change.numpy().tobytes() for change in done}) == 3
    state = first.state_dict()
    rest = run(first, 2)
    again = MADE[name](3)
    assert all(map(torch.equal, run(again, 3), done))
    resumed = MADE[name](3)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, run(resumed, 2), rest))
    assert not all(map(torch.equal, run(MADE[name](4), 3), done))


def test_bytes_can_be_flipped_cropped_and_cut() -> None:
    images, labels = torch.randint(256, (8, 3, 6, 9), dtype=torch.uint8), torch.arange(8) % CLASSES
    for name in ("flip", "crop", "cutmix"):
        assert MADE[name](0)(images, labels)[0].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"images: expected floating-point numbers, got torch\.uint8"):
        MADE["mixup"](0)(images, labels)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomFlip(1.5), r"p: expected a number from 0 to 1, got 1\.5"),
        (lambda: RandomCrop(0), "padding: expected an integer >= 1, got 0"),
        (lambda: MixUp(0), "classes: expected an integer >= 1, got 0"),
        (lambda: CutMix(3, alpha=0), "alpha: expected a finite number > 0, got 0"),
        (lambda: MixUp(3, seed=-1), "seed: expected an integer >= 0, got -1"),
        (lambda: MixUp(3)(torch.zeros(2, 3), torch.zeros(2)), r"images: expected .*, got \(2, 3\)"),
        (
            lambda: MixUp(3)(torch.zeros(2, 3, 4, 4), torch.zeros(2)),
            r"labels: expected class indices \[n\] or probabilities \[n, 3\], got torch\.float32 \(2,\)",
        ),
    ],
)
def test_wrong_input(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# -- transforms of others ------------------------------------------------------------------------------------


def noisy(image: Tensor) -> Tensor:
    """Draws as torchvision's transforms do, and as users' own: from all global generators."""
    return image + torch.rand(()) + np.random.rand() + random.random()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_transform_is_repeatable(workers: int) -> None:
    examples = [(torch.zeros(2), label) for label in range(12)]
    dataset = Augmented(examples, SeededTransform(noisy, column=0), seed=4)
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[union-attr]
    expected = [dataset[i][0].tolist() for i in range(12)]
    after = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[union-attr]
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]  # type: ignore[arg-type]
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=workers)  # type: ignore[arg-type]
    found = [
        (image.tolist(), int(label)) for images, labels in loader for image, label in zip(images, labels, strict=True)
    ]
    assert found == [(image, label) for label, image in enumerate(expected)]
    assert len({image[0] for image in expected}) == 12
    dataset.set_epoch(1)
    assert dataset[3][0].tolist() != expected[3]
    dataset.eval()
    assert dataset[3][0] is examples[3][0]


def test_transforms_with_their_own_generator_are_called_their_way() -> None:
    class Albumentations:
        """The part of its interface that counts."""

        def set_random_seed(self, seed: int) -> None:
            assert 0 <= seed < 2**32
            self.random = random.Random(seed)

        def __call__(self, *, image: Any) -> dict[str, Any]:
            return {"image": image + self.random.random()}

    dataset = Augmented([{"image": 0.0, "label": 1}] * 3, SeededTransform(Albumentations()))
    found = [dataset[i] for i in range(3)]
    assert found == dataset.__getitems__(range(3)) and all(row["label"] == 1 for row in found)
    assert len({row["image"] for row in found}) == 3


def test_the_global_generators_are_put_back_after_an_error() -> None:
    def fails(image: Any) -> Any:
        raise RuntimeError("no")

    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="no"):
        Augmented([{"image": 0}], SeededTransform(fails))[0]
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
