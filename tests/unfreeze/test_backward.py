"""mode="freeze" in a plain model: backward work of closed modules is saved, and no gradient that is due gets lost."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from unfreeze_cases import (
    MODELS,
    WIDTH,
    Backwards,
    Block,
    ConvNet,
    Listed,
    Recurrent,
    Stack,
    TiedLM,
    TwoTowers,
    VisionTransformer,
    backward,
    batch,
)

import fastft
from fastft.unfreeze import GradualUnfreeze, Policy, Unfreezer, layer_groups
from fastft.unfreeze.hooks import tensors_in

TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 12}


def only(*opened: int | str) -> Policy:
    return Listed(((0, opened),))


def unfreezer(model: nn.Module, *opened: int | str, mode: Any = "freeze", **options: Any) -> Unfreezer:
    return Unfreezer(model, fastft.AdamW(model.named_parameters()), only(*opened), mode=mode, **options)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_of_open(model: nn.Module, masked: nn.Module, opened: list[str], rtol: float = 0.0) -> None:
    """Those of open groups as in the model where nothing is closed, bit for bit unless ``rtol`` is given."""
    expected, got = gradients(model), gradients(masked)
    names = [n for group in layer_groups(model) if group.name in opened for n in group.param_names]
    assert names
    for name in names:
        assert expected[name] is not None
        assert got[name] is not None, name
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=rtol / 100, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [*MODELS, TiedLM])
def test_open_groups_get_their_gradients_whatever_is_closed(cls: type[nn.Module]) -> None:
    """One open group, two neighbours, two far apart, all but one: every group of every model in turn."""
    plain = cls()
    backward(plain, 0)
    n = len(layer_groups(plain))
    for opened in {s for i in range(n) for s in ((i,), (i, (i + 1) % n), (i, (i + n // 2) % n), (*{*range(n)} - {i},))}:
        masked = cls()
        holder = unfreezer(masked, *opened, norm_policy="train", tied="closed")
        backward(masked, 0)
        closed_ties = {p for p, users in holder._users.items() if not users <= set(opened)}
        groups = [g.name for i, g in enumerate(holder.groups) if i in opened and not closed_ties & {*g.parameters}]
        if groups:
            assert_gradients_of_open(plain, masked, groups)
        if cls in (Stack, VisionTransformer, ConvNet) and opened == (n - 1,):
            # All below is closed, so nothing of it has a graph; parameters of the model itself may.
            left = [name for name, g in gradients(masked).items() if g is not None]
            assert not [name for name in left if not name.startswith(("head", "fc", "norm"))]


@pytest.mark.parametrize(
    ("cls", "opened", "without"),
    [
        (Stack, (3, 4, 5), ["embed.", "blocks.0", "blocks.1"]),
        (Stack, (2, 5), ["embed.", "blocks.0"]),
        (VisionTransformer, (4, 5), ["cls_token", "pos_embed", "patch_embed", "blocks."]),
        (ConvNet, (3, 4), ["conv1", "layer1"]),
        # Nothing open lies below the second tower, though it was registered after the first.
        (TwoTowers, (1, 2), ["left.embed", "right.blocks", "right.embed"]),
        # The open block's output comes back to the closed one: only the embeddings can do without a graph.
        (Recurrent, (2, 3), ["embed."]),
        # Nothing but the last is above the open group here: it runs first.
        (Backwards, (1, 2), ["embed.", "blocks.2"]),
    ],
)
def test_closed_modules_with_nothing_open_below_get_no_gradients(
    cls: type[nn.Module], opened: tuple[int, ...], without: list[str]
) -> None:
    model = cls()
    holder = unfreezer(model, *opened, norm_policy="train")
    if cls is TwoTowers:
        assert holder.open_groups == ("left.blocks.0", "left.blocks.1")
    backward(model, 0)
    got = gradients(model)
    hidden = [name for name in got if name.startswith(tuple(without))]
    if cls is TwoTowers:
        hidden = [name for name in hidden if not name.startswith("right.embed")]  # in one group with left.head
    assert hidden
    assert not [name for name in hidden if got[name] is not None]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", ["freeze", "requires_grad"])
def test_operations_follow_the_open_part(mode: Any) -> None:
    def operations(*opened: int) -> int:
        model = Stack(8)
        holder = unfreezer(model, *opened, mode=mode)
        backward(model, 0)
        with FlopCounterMode(display=False) as counter:
            backward(model, 0)
        holder.undo()
        return counter.get_total_flops()

    block = 2 * 6 * WIDTH * WIDTH
    saved = operations(*range(11)) - operations(*range(5, 11))
    assert saved == 4 * 2 * block + 2 * 6 * 5 * WIDTH
    # What a closed module returns requires grad with mode="freeze": the gradient of the first open one's inputs.
    inputs_of_head = 2 * 6 * WIDTH * 3
    assert operations(9, 10) - operations(10) == (0 if mode == "freeze" else inputs_of_head)


def hf(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.arange(12).reshape(2, 6) % 11
    words = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "bert":
        config = transformers.BertConfig(**TINY, **words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.tensor([0, 1])}
    if name == "llama":
        config = transformers.LlamaConfig(**TINY, **words, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        config.decoder_start_token_id = 0
        model = transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model, {"input_ids": ids, "labels": ids}
    config = transformers.ViTConfig(**TINY, image_size=8, patch_size=4)
    images = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.tensor([0, 1])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_transformers_models_save_backward_work_and_keep_their_gradients(name: str) -> None:
    plain, inputs = hf(name)
    masked = copy.deepcopy(plain)
    plain.train()(**inputs).loss.backward()
    n = len(layer_groups(plain))
    half = range(n // 2, n)
    holder = unfreezer(masked, *half)
    masked.train()(**inputs).loss.backward()
    # In T5 the order in which the gradients of what is used in many places are added up depends on the graph.
    assert_gradients_of_open(plain, masked, list(holder.open_groups), rtol=1e-5 if name == "t5" else 0.0)
    closed = [group for group in holder.groups if group.name not in holder.open_groups]
    # In T5 this is all of the encoder, although every block of the decoder reads it.
    assert all(p.grad is None for group in closed for p in group.parameters)
    assert f"detached, without backward work, in the last forward pass: {', '.join(g.name for g in closed)}" in str(
        holder.report()
    )


def turn_checkpointing_on(model: Any, reentrant: bool) -> None:
    """Without the hook on the embeddings, which not every version of transformers sets."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    model.disable_input_require_grads()


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["freeze", "requires_grad"])
def test_gradient_checkpointing_in_transformers(name: str, reentrant: bool, mode: Any) -> None:
    plain, inputs = hf(name)
    checkpointed = copy.deepcopy(plain)
    plain.train()(**inputs).loss.backward()
    holder = unfreezer(checkpointed, 2, 3, 4, mode=mode)
    # After the unfreezer was made.
    turn_checkpointing_on(checkpointed, reentrant)
    checkpointed.train()(**inputs).loss.backward()
    assert_gradients_of_open(plain, checkpointed, list(holder.open_groups))
    embedded = checkpointed.get_input_embeddings()(inputs["input_ids"])
    if mode == "requires_grad":
        assert embedded.requires_grad == reentrant
        noted = "made to require grad" in str(holder.report())
        assert noted == reentrant
    holder.undo()
    checkpointed.requires_grad_(False)
    assert not checkpointed.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_gradient_checkpointing_in_a_model_that_is_not_called_itself() -> None:
    """As a trainer does that calls its module's methods."""
    outer = nn.Module()
    outer.inner, inputs = hf("bert")
    plain = copy.deepcopy(outer.inner)
    plain.train()(**inputs).loss.backward()
    optimizer = fastft.AdamW(outer.named_parameters())
    holder = Unfreezer(outer, optimizer, GradualUnfreeze(100, start=2))
    turn_checkpointing_on(outer.inner, reentrant=True)
    outer.inner.train()(**inputs).loss.backward()
    with_gradients = {name for name, p in outer.inner.named_parameters() if p.grad is not None}
    opened = {n.removeprefix("inner.") for g in holder.groups if g.name in holder.open_groups for n in g.param_names}
    assert with_gradients == opened
    for name, p in plain.named_parameters():
        if name in opened:
            torch.testing.assert_close(outer.inner.get_parameter(name).grad, p.grad)


def test_checkpointing_that_is_turned_on_in_mid_training() -> None:
    model, inputs = hf("bert")
    optimizer = fastft.AdamW(model.named_parameters())
    holder = Unfreezer(model, optimizer, GradualUnfreeze(1, start=2))
    model.train()(**inputs).loss.backward()
    turn_checkpointing_on(model, reentrant=True)
    optimizer.zero_grad()
    holder.step()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for group in holder.groups[2:] for p in group.parameters)


class Checkpointed(Stack):
    """Which checkpoints its blocks by itself, so that nobody can see that from outside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("opened", [(3, 4, 5, 6), (6,), (0, 2), (2,), (2, 6)])
def test_checkpointing_by_hand(reentrant: bool, opened: tuple[int, ...]) -> None:
    plain, checkpointed = Stack(4), Checkpointed(reentrant)
    backward(plain, 0)
    holder = unfreezer(checkpointed, *opened)
    for _ in range(2):
        checkpointed.zero_grad()
        backward(checkpointed, 0)
        assert_gradients_of_open(plain, checkpointed, list(holder.open_groups))


def test_checkpointing_that_loses_gradients_is_reported() -> None:
    model = Checkpointed(reentrant=True)
    optimizer = fastft.AdamW(model.parameters())
    holder = Unfreezer(model, optimizer, only(3, 4, 5, 6))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        backward(model, 0)
    with pytest.warns(UserWarning, match=r"arrived at open groups: blocks\.2, blocks\.3;.*use_reentrant=False"):
        optimizer.step()
    note = "no gradient arrived in the first step after it opened: blocks.2, blocks.3"
    assert note in holder.report().notes
    # Said once, not in every step.
    with pytest.warns(UserWarning) as caught:
        backward(model, 1)
        optimizer.step()
    assert not [w for w in caught if "no gradient arrived" in str(w.message)]


def test_gradients_of_inputs_are_kept() -> None:
    plain, masked = Stack(), Stack()
    unfreezer(masked, 4, 5)
    expected, got = (batch(0)[0].requires_grad_() for _ in range(2))
    plain(expected).sum().backward()
    masked(got).sum().backward()
    assert torch.equal(got.grad, expected.grad)


class Carrier(nn.Module):
    """A closed block whose input reaches it in something other than an argument."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, WIDTH)
        outer = self

        class Inner(Block):
            def forward(self, x: Any) -> Tensor:
                return super().forward(outer.unwrap(x))

        self.wrap, self.unwrap = wrap, unwrap
        self.blocks = nn.ModuleList([Inner()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.wrap(self.embed(x))))


@dataclasses.dataclass
class Held:
    x: Any


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Giver(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = [x]

    def give(self) -> Tensor:
        return self.x[0]


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: {"a": [(1, x)]}, lambda c: c["a"][0][1]),
        (lambda x: Held(Held(x)), lambda c: c.x.x),
        (Slotted, lambda c: c.x),
        (lambda x: types.SimpleNamespace(x=[x]), lambda c: c.x[0]),
        (lambda x: lambda: x, lambda c: c()),
        (lambda x: functools.partial(lambda y: y, x), lambda c: c()),
        (lambda x: Giver(x).give, lambda c: c()),
        (Giver, lambda c: c.give()),
        (lambda x: (y for y in [x]), next),
    ],
    ids=["containers", "dataclass", "slots", "namespace", "closure", "partial", "method", "module", "generator"],
)
def test_gradients_flow_through_arguments_of_any_kind(wrap: Any, unwrap: Any) -> None:
    plain, masked = Carrier(wrap, unwrap), Carrier(wrap, unwrap)
    backward(plain, 0)
    unfreezer(masked, "embeddings")
    backward(masked, 0)
    assert_gradients_of_open(plain, masked, ["embeddings"])


def test_arguments_that_refer_to_themselves_are_looked_through() -> None:
    x = torch.ones(1)
    circle: list[Any] = [x]
    circle.append(circle)
    assert tensors_in(((circle,), {"mask": None, "n": 3})) == [x]
    assert tensors_in(([x] * 10**4, {})) is not None
    assert tensors_in(([[x] for _ in range(10**4)], {})) is None  # not without end


def test_in_place_operations_on_what_closed_modules_return() -> None:
    plain = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 3))
    masked = copy.deepcopy(plain)
    backward(plain, 0)
    holder = unfreezer(masked, "2")
    backward(masked, 0)
    assert_gradients_of_open(plain, masked, list(holder.open_groups))
    assert masked[0].weight.grad is None


def test_what_a_closed_module_returns_requires_grad_as_before() -> None:
    model = Stack()
    holder = unfreezer(model, "head")
    x, _ = batch(0)
    closed = model.blocks[0](model.embed(x))
    assert closed.requires_grad
    assert not closed.is_leaf
    with torch.no_grad():
        assert not model.blocks[0](model.embed(x)).requires_grad
    model(x)
    assert "final_norm" in holder.report().notes[0]
    assert torch.is_grad_enabled()


def test_grad_mode_is_given_back_when_a_closed_module_fails() -> None:
    model = Stack()
    unfreezer(model, "head")
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 99))
    assert torch.is_grad_enabled()
    model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch(0)[0])
    assert torch.is_grad_enabled()


class Pausing(nn.Linear):
    """The main thread enters it after the other one, and leaves it after the other one."""

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            assert self.entered.wait(60)
            self.both_in.set()
            assert self.other_left.wait(60)
        else:
            self.entered.set()
            assert self.both_in.wait(60)
        return super().forward(x)


def test_threads_keep_their_own_grad_mode() -> None:
    model = nn.Sequential(Pausing(5, WIDTH), nn.Linear(WIDTH, 3))
    pausing = model[0]
    pausing.entered, pausing.both_in, pausing.other_left = (threading.Event() for _ in range(3))
    unfreezer(model, "1")
    modes = []

    def evaluate() -> None:
        with torch.no_grad():
            model(batch(0)[0])
            modes.append(torch.is_grad_enabled())
        pausing.other_left.set()

    other = threading.Thread(target=evaluate)
    other.start()
    loss = backward(model, 0)
    other.join()
    assert modes == [False]
    assert torch.is_grad_enabled()
    assert loss.isfinite()
    assert model[1].weight.grad is not None
    assert model[0].weight.grad is None


def test_functional_gradients_of_all_parameters() -> None:
    """Fisher information, per-sample gradients: closed parameters have them as before."""
    model = Stack()
    x, y = batch(0)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    unfreezer(model, "head")
    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(got[name], expected[name])
    assert vmap(model)(x.unsqueeze(1)).shape == (6, 1, 3)


def test_parameters_put_in_the_place_of_closed_ones_get_gradients() -> None:
    model = Stack()
    unfreezer(model, "head")
    model.blocks[0].fc.weight = nn.Parameter(model.blocks[0].fc.weight.detach().clone())
    backward(model, 0)
    assert model.blocks[0].fc.weight.grad is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["freeze", "requires_grad"])
def test_copies_of_the_model_are_free_of_the_unfreezer(how: str, mode: Any) -> None:
    model = ConvNet()
    holder = unfreezer(model, "head", mode=mode)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.requires_grad_(True)
    twin.train()
    before = twin.layer1[0].bn.running_mean.clone()
    backward(twin, 0)
    assert all(p.grad is not None for p in twin.parameters())
    assert not torch.equal(twin.layer1[0].bn.running_mean, before)
    backward(model, 0)
    assert model.conv1.weight.grad is None
    holder.undo()
    assert not model.layer1[0]._forward_pre_hooks
    assert not model.layer1[0]._forward_hooks


def test_evaluation_does_not_change_what_is_reported() -> None:
    model = Stack()
    holder = unfreezer(model, "head")
    assert holder.report().notes == ("in the last forward pass no closed group could go without backward work",)
    backward(model, 0)
    saved = holder.report().notes
    assert saved == (
        "detached, without backward work, in the last forward pass: "
        "embeddings, blocks.0, blocks.1, blocks.2, final_norm",
    )
    with torch.no_grad():
        model(batch(0)[0])
    assert holder.report().notes == saved
