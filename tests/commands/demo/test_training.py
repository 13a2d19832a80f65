"""The demo's parts: ranks, batches, schedule, linear probe, and how results are put into words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fastft.commands.demo.evaluate import difference, own_rank, standard_error
from fastft.commands.demo.report import running_mean, verdict
from fastft.commands.demo.train import Classifier, fit_linear_probe, shuffled
from fastft.optim import warm_up_then_decay


def test_ranks_agree_with_a_count_one_pair_at_a_time() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(40, 6), torch.randn(40, 6)
    expected = []
    for i, query in enumerate(queries):
        own = cosine_similarity(query, keys[i], dim=0)
        expected.append(1 + sum(cosine_similarity(query, key, dim=0) > own for j, key in enumerate(keys) if j != i))
    assert own_rank(queries, keys).tolist() == [int(rank) for rank in expected]
    assert len(set(map(int, expected))) > 5


def test_a_model_that_maps_all_texts_to_one_point_retrieves_nothing() -> None:
    assert own_rank(torch.ones(5, 3), torch.ones(5, 3)).tolist() == [5] * 5


def test_a_paired_difference_is_known_better_than_either_mean() -> None:
    torch.manual_seed(0)
    a = torch.rand(1000) < 0.5
    b = a.clone()
    b[:30] = ~b[:30]
    value, error = difference(a, b)
    assert value == pytest.approx(a.double().mean().item() - b.double().mean().item())
    assert error < standard_error(a) / 2
    flips = torch.where(a[:30], 1.0, -1.0).double()
    whole = torch.cat([flips, torch.zeros(970, dtype=torch.float64)])
    assert error == pytest.approx(whole.std().item() / math.sqrt(1000))


def test_every_row_comes_once_and_batches_hold_rows_of_like_length() -> None:
    lengths = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = list(shuffled(lengths, 32, torch.Generator().manual_seed(0)))
    assert sorted(i for rows in batches for i in rows) == list(range(1000))
    assert batches == list(shuffled(lengths, 32, torch.Generator().manual_seed(0)))
    assert batches != list(shuffled(lengths, 32, torch.Generator().manual_seed(1)))
    spread = sum(max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in batches) / len(batches)
    assert spread < 50  # of 199 for batches drawn at random


def test_the_schedule_rises_and_falls_in_straight_lines() -> None:
    factor = warm_up_then_decay(steps=100, warmup=0.1)
    assert [factor(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [factor(i) for i in (10, 55, 99, 100)] == pytest.approx([1.0, 0.5, 1 / 90, 0.0])
    assert warm_up_then_decay(steps=1, warmup=0.1)(0) == 1.0


def test_the_linear_probe_is_the_minimum_of_its_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    labels = (x[:, 0] + 0.5 * torch.randn(300) > 0).long()
    model = Classifier(nn.Identity(), 8)
    fit_linear_probe(model, x, labels, l2=1e-2)
    weight = model.head.weight.detach().double().requires_grad_()
    bias = model.head.bias.detach().double().requires_grad_()
    loss = cross_entropy(x.double() @ weight.T + bias, labels) + 1e-2 * weight.square().sum()
    slope = torch.autograd.grad(loss, [weight, bias])
    assert max(g.abs().max().item() for g in slope) < 1e-5
    assert ((x @ model.head.weight.T + model.head.bias).argmax(1) == labels).float().mean() > 0.75


def test_a_difference_too_small_to_mean_anything_is_called_so() -> None:
    assert verdict("kept", "cost", 0.057, 0.006) == "kept 5.7 ± 0.6 points"
    assert verdict("kept", "cost", -0.057, 0.006) == "cost 5.7 ± 0.6 points"
    assert verdict("kept", "cost", 0.006, 0.005) == "kept 0.6 ± 0.5 points (not a clear difference)"


def test_running_mean_uses_what_there_is_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], width=3) == [1.5, 2.0, 3.0, 3.5]
