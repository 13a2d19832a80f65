"""Fisher information, masks, the fitted head and frozen copies where processes share a model: as of the model alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import siblings_distributed as processes
import torch
from contract_cases import assert_near, assert_same
from siblings_distributed import (
    CLASSES,
    DISAGREEING,
    FROZEN,
    MODES,
    ROWS,
    TRAINED,
    WAYS,
    batches,
    build,
    distances,
    fishers,
    fitted,
    frozen,
    in_one_piece,
    masks,
    trains_as_before,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastft.retention import estimate_fisher, fit_head_
from fastft.retention.processes import digest_of, same_everywhere

# -- two processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of all scenarios, one for each rank."""
    return processes.run_in_processes(tmp_path_factory.mktemp("processes"))


def of_every_rank(results: dict[str, list[Any]], name: str) -> list[dict[str, Any]]:
    for result in results[name]:
        assert isinstance(result, dict), result  # else the traceback
    return results[name]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_fisher_information_is_that_of_the_whole_model(way: str, results: Any) -> None:
    expected = fishers(in_one_piece)
    for result in of_every_rank(results, f"{way}, fishers"):
        assert_near(result, expected)


@pytest.mark.slow
def test_fisher_information_by_other_ways_forward(results: Any) -> None:
    expected = fishers(in_one_piece)
    for result in of_every_rank(results, "fishers_by_other_ways_forward"):
        assert_near(result, {mode: expected[mode] for mode in ("exact", "empirical")})


@pytest.mark.slow
@pytest.mark.parametrize("way", TRAINED)
def test_backward_passes_after_an_estimate(way: str, results: Any) -> None:
    expected = trains_as_before(in_one_piece)
    assert all(g.abs().max() > 1e-3 for g in expected["grads"].values())
    for result in of_every_rank(results, f"{way}, trains_as_before"):
        assert_near(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_weights_are_chosen(way: str, results: Any) -> None:
    expected = masks(in_one_piece)
    for result in of_every_rank(results, f"{way}, masks"):
        for scope in ("model", "tensor", "whole"):
            assert_same(result[scope], expected[scope], scope)
        assert_near(result["parameters"], expected["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_head_is_fitted(way: str, results: Any) -> None:
    expected = fitted(in_one_piece)
    before = dict(build().named_parameters())
    for result in of_every_rank(results, f"{way}, fitted"):
        assert result["fit"] == pytest.approx(expected["fit"], rel=1e-9)
        for name, p in result["parameters"].items():
            if name.startswith("head."):
                # As near as the solver sees the minimum.
                torch.testing.assert_close(p, expected["parameters"][name], rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(p, before[name]), name
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("way", FROZEN)
def test_frozen_copies(way: str, results: Any) -> None:
    expected = frozen(in_one_piece)
    assert expected["loss"] > 1e-3
    for result in of_every_rank(results, f"{way}, frozen"):
        assert_near(result, expected)


@pytest.mark.slow
def test_distances_of_dtensors(results: Any) -> None:
    expected = distances(torch.Tensor.clone)
    assert all(g.abs().max() > 1e-4 for name, g in expected.items() if name.endswith("grad"))
    for result in of_every_rank(results, "distances"):
        assert_near(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", DISAGREEING)
def test_every_process_hears_of_a_disagreement(way: str, results: Any) -> None:
    first, second = of_every_rank(results, f"{way}, disagreements")
    other = "ValueError: batches: expected the same on every process (leave out a DistributedSampler), got batch "
    beginnings = {
        "fisher, rows": f"{other}0 with the digest ",
        "fisher, order": f"{other}0 with the digest ",
        "fisher, number": f"{other}2 with the digest ",
        "fisher, form": f"{other}1 with the digest ",
        "head, rows": f"{other}0 with the digest ",
        "head, number": f"{other}2 with the digest ",
        "masks": "ValueError: fisher: expected the same values, fraction and scope on every process, got masks with ",
    }
    for name, beginning in beginnings.items():
        assert first[name].startswith(beginning), first[name]
        assert first[name].endswith("on rank 1")
        assert second[name] == first[name]
    assert first["fisher, number"].endswith("on rank 0; 2 batches on rank 1")
    negative = "fisher: scale: expected finite values >= 0"
    assert first["negative"].endswith(f"on rank 0; {negative} on rank 1")
    assert second["negative"] == f"ValueError: {negative}"
    unknown = "fisher: the model has no parameter 'tail'"
    assert second["names"].startswith(f"ValueError: {unknown}")
    assert first["names"].startswith("ValueError: fisher: expected the same parameters on every process, got ")
    assert unknown in first["names"]
    none = "fisher: expected at least one parameter, got none"
    assert second["none"] == f"ValueError: {none}" and first["none"].endswith(f"; {none} on rank 1")


@pytest.mark.slow
def test_every_process_hears_of_an_overflow(results: Any) -> None:
    first, second = of_every_rank(results, "overflow")
    own = "head.weight: its gradients, or their squares, are not finite"
    assert second["fisher"] == f"ValueError: {own}"
    assert first["fisher"].endswith(
        f"expected finite gradients on every process, got finite on rank 0; {own} on rank 1"
    )


@pytest.mark.slow
def test_what_is_refused(results: Any) -> None:
    flattened = (
        "ValueError: model: expected parameters that are whole, or DTensors, got those that FullyShardedDataParallel "
        "has flattened: "
    )
    cut = (
        "ValueError: model: expected one that can be copied, got one that fully_shard was applied to: make the "
        "FrozenBase before, and apply fully_shard to its module as well"
    )
    or_else = "before the model is wrapped, or use torch.distributed.fsdp.fully_shard"
    expected = {
        "fsdp1, fisher": f"{flattened}call estimate_fisher {or_else}",
        "fsdp1, head": f"{flattened}call fit_head_ {or_else}",
        "fsdp1, masks": f"{flattened}use torch.distributed.fsdp.fully_shard",
        "fsdp1, base": f"{flattened}make the FrozenBase before the model is wrapped",
        "fsdp1, mofo": "ValueError: optimizer: expected parameters that are whole, got a piece of what",
        "fsdp, base": cut,
        "fsdp inside, base": cut,
        "fsdp, save": "ValueError: save: expected whole tensors, got a DTensor for scale: put them together on all",
    }
    for result in of_every_rank(results, "refusals"):
        assert {name.removesuffix(", True").removesuffix(", False") for name in result} == expected.keys()
        for name, message in result.items():
            beginning = expected[name.removesuffix(", True").removesuffix(", False")]
            assert message.startswith(beginning), message
    for result in of_every_rank(results, "replaced"):
        assert result["mofo"] == "ValueError: optimizer: expected parameters that are whole, got a DTensor of [7, 5]"


# -- one process -------------------------------------------------------------------------------------------------


def test_the_comparisons_are_not_trivial() -> None:
    found = fishers(in_one_piece)
    trained = {name for name, p in build().named_parameters() if p.requires_grad}
    for mode in MODES:
        assert found[mode].keys() == trained
        assert all(f.max() > 1e-6 for f in found[mode].values())
        mean = math.fsum(f.sum().item() for f in found[f"{mode}, normalized"].values())
        assert mean == pytest.approx(sum(f.numel() for f in found[mode].values()))
    assert not torch.allclose(found["exact"]["head.bias"], found["sampled"]["head.bias"], rtol=0.01)
    chosen = masks(in_one_piece)
    assert all(mask.any() for mask in chosen["tensor"].values())
    assert any(0 < mask.sum() < mask.numel() for mask in chosen["model"].values())
    assert not all(torch.equal(mask, chosen["tensor"][name]) for name, mask in chosen["model"].items())
    fit = fitted(in_one_piece)
    assert (fit["parameters"]["head.weight"] - build().head.weight).abs().min() > 1e-3
    assert fit["fit"]["rows"] == ROWS and 0.1 < fit["fit"]["loss"] < math.log(CLASSES)


def test_digests() -> None:
    """Alike where a batch is, and nowhere else; of what is not known they say the type."""
    x = torch.arange(6.0).reshape(2, 3)
    values: list[Any] = [
        x,
        x.reshape(3, 2),
        x.flip(0),
        x.bfloat16(),
        x.view(torch.int32),
        x[:0],
        torch.tensor(1.0),
        {"x": x},
        {"y": x},
        [x, x],
        [x],
        ([x], x),
        (x, [1, 2]),
        (x, [1, 3]),
        (x, ["1", 2]),
        (x, None),
        object(),
        x.to_sparse(),
    ]
    digests = [digest_of(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest_of({"x": x.clone()}) == digest_of({"x": x})
    assert digest_of(x.mT.contiguous().mT) == digest_of(x)
    assert digest_of(object()) == digest_of(object())


def test_batches_of_one_process_are_not_looked_at() -> None:
    given = [object(), object()]
    assert list(same_everywhere(given, [])) == given


@pytest.mark.parametrize("reshard", [True, False])
def test_one_process_that_shards_with_itself(mesh_of_one: Any, reshard: bool) -> None:
    """Also in bfloat16, whose gradients are squared in float32; layers that are not used get 0."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).bfloat16()
        layers[1].unused = nn.Linear(2, 2)
        return layers

    inputs = torch.linspace(-2.0, 2.0, 12).reshape(3, 4).sin().bfloat16()
    expected = estimate_fisher(model(), [inputs])
    spread = model()
    for layer in (spread[0], spread[1].unused):
        fully_shard(layer, mesh=mesh_of_one, reshard_after_forward=reshard)
    fully_shard(spread, mesh=mesh_of_one, reshard_after_forward=reshard)
    fisher = estimate_fisher(spread, iter([inputs]))
    assert all(isinstance(p, DTensor) for p in spread.parameters())
    assert list(fisher) == list(expected)
    for name, f in fisher.items():
        assert f.dtype == torch.float32
        assert torch.equal(f.full_tensor(), expected[name])  # type: ignore[attr-defined]
        assert (expected[name] == 0.0).all() == name.startswith("1.unused")


def test_a_model_whose_copies_do_the_work_is_refused() -> None:
    """As wrappers have them that nobody knows here: zeros would look like an answer."""
    model = nn.Linear(4, CLASSES)

    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return batch @ model.weight.detach().clone().requires_grad_().T  # type: ignore[operator, union-attr]

    with pytest.raises(ValueError, match=r"^model: expected gradients of its parameters, got none: a wrapper may"):
        estimate_fisher(model, [torch.ones(2, 4)], forward=forward)


def test_a_failure_leaves_the_model_sharded(mesh_of_one: Any) -> None:
    model = build()
    fully_shard(model, mesh=mesh_of_one)
    tokens, labels = batches()[0]
    with pytest.raises(ValueError, match=r"^batches: expected labels from 0 to 2"):
        estimate_fisher(model, [(tokens, labels + 1)], mode="empirical")
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with pytest.raises(ValueError, match=r"^batches: expected labels from 0 to 2"):
        fit_head_(model, "head", [(tokens, labels + 1)])
    assert all(isinstance(p, DTensor) for p in model.parameters())
