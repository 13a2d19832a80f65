"""The shared problem: ranks, batches and the linear probe."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fastft.problems import Classifier, batches_by_length, fit_linear_probe
from fastft.problems.reviews import own_rank


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


def test_every_row_comes_once_and_batches_hold_rows_of_like_length() -> None:
    lengths = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = list(batches_by_length(lengths, 32, torch.Generator().manual_seed(0)))
    assert sorted(i for rows in batches for i in rows) == list(range(1000))
    assert batches == list(batches_by_length(lengths, 32, torch.Generator().manual_seed(0)))
    assert batches != list(batches_by_length(lengths, 32, torch.Generator().manual_seed(1)))
    spread = sum(max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in batches) / len(batches)
    assert spread < 50  # of 199 for batches drawn at random


def test_the_linear_probe_is_the_minimum_of_its_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    labels = (x[:, 0] + 0.5 * torch.randn(300) > 0).long()
    model = Classifier(nn.Identity(), 8)
    fit_linear_probe(model.head, x, labels, l2=1e-2)
    weight = model.head.weight.detach().double().requires_grad_()
    bias = model.head.bias.detach().double().requires_grad_()
    loss = cross_entropy(x.double() @ weight.T + bias, labels) + 1e-2 * weight.square().sum()
    slope = torch.autograd.grad(loss, [weight, bias])
    assert max(g.abs().max().item() for g in slope) < 1e-5
    assert ((x @ model.head.weight.T + model.head.bias).argmax(1) == labels).float().mean() > 0.75
