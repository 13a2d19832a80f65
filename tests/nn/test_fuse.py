"""``fuse_dropout_`` and back: which forwards it rewrites, that they compute the same, and Hugging Face's models."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dropout_distributed as distributed
import fuse_cases as cases
import pytest
import torch
from dropout_cases import same_bits
from started import run_together
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.nn import FuseReport, fuse, fuse_dropout_

transformers = pytest.importorskip("transformers")


def short(cls: type) -> str:
    return cls.__name__


def values(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """In float64, where another order of operations differs much less than another result."""
    torch.manual_seed(seed)
    return make().double()


def swapped_only(model: nn.Module) -> nn.Module:
    """A copy whose dropouts are fastft's, and whose forwards are its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = fastft.nn.Dropout
    return model


def outcome(model: nn.Module, x: Tensor | None = None, *, seed: int = 7, **kwargs: Any) -> list[Tensor]:
    """The result in training, and the gradients for x and all parameters."""
    model.train()
    model.zero_grad()
    inputs = [] if x is None else [x.detach().clone().requires_grad_()]
    torch.manual_seed(seed)
    result = model(*inputs, **kwargs)
    result = result if isinstance(result, Tensor) else result[0]
    result.square().sum().backward()
    grads = [t.grad for t in (*inputs, *model.parameters())]
    return [result.detach(), *(g.clone() for g in grads if g is not None)]


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 1
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * max(1.0, float(e.abs().max())))


# -- which forwards, by their code -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", (1, 5))
@pytest.mark.parametrize("cls", cases.FUSED, ids=short)
def test_fused_forwards_compute_the_same(cls: type[nn.Module], rows: int) -> None:
    model = build(cls)
    plain, x = swapped_only(model), values(rows, 8)
    expected = model.eval()(x)
    report = fuse_dropout_(model)
    assert report.fused == tuple(("", what) for what in cases.FUSED[cls]) and not report.left
    torch.testing.assert_close(model(x), expected)
    assert_near(outcome(model, x), outcome(plain, x))


def test_dropouts_deeper_down_are_found_too() -> None:
    model = build(cases.Nested)
    plain = swapped_only(model)
    report = fuse_dropout_(model)
    assert report.fused == (("", "dropout + add + norm"),)
    assert report.swapped == ("inner.dropout", "dropout")
    # self.inner.norm(...) + self.dropout(x) is a sum with something that is no variable.
    assert_near(outcome(model, values(5, 8)), outcome(plain, values(5, 8)))


@pytest.mark.parametrize("cls", cases.NOT_FUSED, ids=short)
def test_what_would_change_is_left_alone(cls: type[nn.Module]) -> None:
    model = build(cls)
    plain, x = swapped_only(model), values(5, 8)
    report = fuse_dropout_(model)
    assert not report.fused and report.swapped and not report.left
    for a, b in zip(outcome(model, x), outcome(plain, x), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("cls", cases.NOT_READABLE, ids=short)
def test_what_cannot_be_rewritten_is_left_and_reported(cls: type[nn.Module]) -> None:
    model = build(lambda: nn.Sequential(cls()))
    plain, x = swapped_only(model), values(5, 8)
    report = fuse_dropout_(model)
    assert not report.fused and report.swapped == ("0.dropout",)
    assert report.left == (("0", f"{cases.NOT_READABLE[cls]}: dropout and what follows it were not fused"),)
    for a, b in zip(outcome(model, x), outcome(plain, x), strict=True):
        assert same_bits(a, b)


def test_forwards_without_source_or_with_another_one_are_left(tmp_path: Path) -> None:
    text = "class Made(Base):\n    def forward(self, x):\n        return x + self.dropout(x)\n"
    namespace: dict[str, Any] = {"Base": cases.Base, "__name__": "made"}
    exec(text, namespace)
    assert "cannot be read" in fuse_dropout_(namespace["Made"]()).left[0][1]
    path = tmp_path / "made.py"
    exec(compile(text, str(path), "exec", dont_inherit=True), namespace)
    path.write_text(text.replace("x +", "2.0 * x +"))  # edited since
    assert fuse_dropout_(namespace["Made"]()).left[0][1].startswith("the source of its forward is not what runs")
    path = tmp_path / "made_again.py"
    path.write_text(text)
    exec(compile(text, str(path), "exec", dont_inherit=True), namespace)
    assert fuse_dropout_(namespace["Made"]()).fused == (("", "dropout + add"),)


def test_a_forward_replaced_on_the_module_is_left() -> None:
    model = build(cases.Residual)
    model.forward = lambda x: x * 3.0  # type: ignore[method-assign, assignment]
    report = fuse_dropout_(model)
    assert report.left[0][1].startswith("its forward was replaced on the module itself") and not report.fused
    assert torch.equal(model(torch.ones(1)), torch.full((1,), 3.0))


def test_in_place_dropout_is_called_as_it_is() -> None:
    model = build(lambda: cases.SeesWhatItDropped(inplace=True))
    plain, x = swapped_only(model), values(5, 8)
    fuse_dropout_(model)
    for a, b in zip(outcome(model, x), outcome(plain, x), strict=True):
        assert same_bits(a, b)


WATCHED = [
    (cases.PostNorm, ("dropout",)),
    (cases.PostNorm, ("norm",)),
    (cases.PostNorm, ("dense", "dropout", "norm")),
    (cases.Residual, ("dropout",)),
    (cases.Block, ("attention",)),
    (cases.Block, ("mlp.dropout", "mlp")),
    (cases.Block, ("attention.dropout",)),
]


@pytest.mark.parametrize(("cls", "names"), WATCHED, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v))
def test_watched_modules_are_called(cls: type[nn.Module], names: tuple[str, ...]) -> None:
    """Hooks on what was fused away see what they saw before, in order."""
    model = build(cls)
    plain, x, seen = swapped_only(model), values(5, 8), []
    fuse_dropout_(model)
    for m in (plain, model):
        log: list[tuple[str, Tensor]] = []
        for name in names:

            def hook(_: Any, args: Any, result: Any, name: str = name, log: Any = log) -> None:
                log.append((name, (result if isinstance(result, Tensor) else result[0]).detach()))

            m.get_submodule(name).register_forward_hook(hook)
        outcome(m, x)
        seen.append(log)
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]] == list(names)
    for (_, a), (_, b) in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


def test_modules_that_are_watched_globally_are_called() -> None:
    calls: list[str] = []
    model = build(cases.PostNorm)
    fuse_dropout_(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda m, a, r: calls.append(type(m).__name__)):
        model(values(5, 8))
    assert calls == ["Linear", "Dropout", "LayerNorm", "PostNorm"]
    model(values(5, 8))
    assert len(calls) == 4


def test_parts_may_be_replaced_after_fusing() -> None:
    model = build(cases.Block)
    fuse_dropout_(model)
    model.mlp = build(lambda: nn.Linear(8, 8))
    model.attention.dropout = nn.Identity()
    plain = build(cases.Block)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.mlp, plain.attention.dropout = copy.deepcopy(model.mlp), nn.Identity()
    assert_near(outcome(model, values(5, 8)), outcome(plain, values(5, 8)))
    model = build(cases.PostNorm)
    fuse_dropout_(model)
    plain = swapped_only(model)
    fuse_dropout_(plain).undo()
    for m in (model, plain):
        m.norm = nn.GroupNorm(2, 8).double()
    torch.testing.assert_close(model.eval()(values(5, 8)), plain.eval()(values(5, 8)))


def test_p_and_modes_are_read_when_called() -> None:
    model = build(cases.Residual)
    fuse_dropout_(model)
    x = values(50, 8)
    assert isinstance(model.dropout, nn.Dropout)
    model.dropout.p = 1.0
    assert torch.equal(model(x), x)
    model.dropout.p = 0.5
    model.dropout.eval()
    assert torch.equal(model(x), x + model.dense(x))  # type: ignore[operator]


# -- the classes -------------------------------------------------------------------------------------------


def test_fused_classes_pass_for_the_original_ones() -> None:
    model = build(cases.Decorated)
    fuse_dropout_(model)
    cls = type(model)
    assert cls is not cases.Decorated and isinstance(model, cases.Decorated)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Decorated", "Decorated", "fuse_cases")
    assert cls.forward.__doc__ == "With a docstring." and cls.forward.__qualname__ == "Decorated.forward"
    assert cls.forward.__annotations__ == cases.Decorated.forward.__annotations__
    # The default of the argument, the decorator, and tracebacks that lead to the source.
    x = values(2, 8)
    assert torch.equal(model.eval()(x), 2.0 * (x + model.dense(x)))
    with pytest.raises(Exception, match="shapes cannot be multiplied") as caught:
        model(values(2, 3))
    frames = [(Path(entry.path).name, entry.statement) for entry in caught.traceback]
    assert any(n == "fuse_cases.py" and "self.dropout(self.dense(x))" in str(s) for n, s in frames)
    assert type(build(cases.Decorated)) is cases.Decorated
    twin = build(cases.Decorated)
    fuse_dropout_(twin)
    assert type(twin) is cls


def test_wrappers_that_a_base_class_adds_stay_and_run_once() -> None:
    model = build(cases.Wrapped)
    fuse_dropout_(model)
    model(values(2, 8))
    assert model.__dict__["outermost"] == 1


@pytest.mark.parametrize("cls", cases.FUSED, ids=short)
def test_copies_and_pickles_are_fused_too(cls: type[nn.Module]) -> None:
    model = build(cls)
    fuse_dropout_(model)
    x, file = values(5, 8), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    expected = outcome(model, x)
    for twin in twins:
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert all(same_bits(a, b) for a, b in zip(outcome(twin, x), expected, strict=True))
        fuse_dropout_(twin).undo()
        assert type(twin) is cls and type(model) is not cls


def test_a_pickle_opens_where_the_forward_can_no_longer_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(cases.Residual)
    fuse_dropout_(model)
    data = pickle.dumps(model)

    def refuse(*_: Any) -> Any:
        raise fuse.NotReadable("not today")

    monkeypatch.setattr(fuse, "fused_class", refuse)
    plain = pickle.loads(data)
    assert type(plain) is cases.Residual
    assert all(same_bits(a, b) for a, b in zip(outcome(plain, values(5, 8)), outcome(model, values(5, 8)), strict=True))


def test_fusing_twice_and_undoing() -> None:
    model = build(lambda: nn.Sequential(cases.Block(), cases.PostNorm(), fastft.nn.Dropout(0.5)))
    before, state = [type(m) for m in model.modules()], [vars(m).keys() for m in model.modules()]
    first, second = fuse_dropout_(model), fuse_dropout_(model)
    assert first.fused and len(first.swapped) == 3 and second == FuseReport(model)
    for report in (first, second):  # the second undoes the first call's changes too
        report.undo()
        assert [type(m) for m in model.modules()] == before  # the last dropout was fastft's before
        assert [vars(m).keys() for m in model.modules()] == state
        report.undo()
        assert [type(m) for m in model.modules()] == before
        assert fuse_dropout_(model) == first and [type(m) for m in model.modules()] != before


def test_undoing_takes_back_what_was_added_and_fused_later() -> None:
    model = build(lambda: nn.Sequential(cases.PostNorm()))
    report = fuse_dropout_(model)
    model.append(build(cases.Residual))
    assert fuse_dropout_(model).fused == (("1", "dropout + add"),)
    report.undo()
    assert [type(m) for m in model] == [cases.PostNorm, cases.Residual]
    assert not [m for m in model.modules() if isinstance(m, fastft.nn.Dropout)]


def test_a_report_shows_what_was_done_and_not_the_model() -> None:
    model = build(cases.Residual)
    report = fuse_dropout_(model)
    assert report.model is model and str(report) == "fused       1           dropout + add\nswapped     1  dropout"
    assert repr(report) == "FuseReport(fused=(('', 'dropout + add'),), swapped=('dropout',), left=())"


def test_other_dropouts_and_numbers_are_reported() -> None:
    class Own(nn.Dropout):
        pass

    layers = nn.ModuleList(
        [Own(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.1)]
    )
    report = fuse_dropout_(layers)
    assert dict(report.left) == {
        "0": "Own is not nn.Dropout itself",
        "1": "Dropout1d is not nn.Dropout itself",
        "2": "AlphaDropout is not nn.Dropout itself",
        "3.dropout": "a number, which the module hands to a function that drops by itself",
    }
    assert not report.swapped and not report.fused
    assert str(fuse_dropout_(nn.Linear(2, 2))) == "no dropout found"


# -- Hugging Face ------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
PARTS = [f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.output", "output")]
POST_NORM = dict.fromkeys(PARTS, "dropout + add + norm")
ATTENTION = "its p goes into an attention function, which drops by itself"
EMBEDDED, SELF = "embeddings.dropout", [f"encoder.layer.{i}.attention.self.dropout" for i in (0, 1)]
POST_NORM_DROPOUTS = [f"{name}.dropout" for name in PARTS]


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False)


def roberta() -> nn.Module:
    return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50, **SMALL), add_pooling_layer=False)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2Model(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **SMALL
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": TOKENS}),
    "roberta": (roberta, {"input_ids": TOKENS}),
    "gpt2": (gpt2, {"input_ids": TOKENS}),
    "vit": (vit, {"pixel_values": values(2, 3, 16, 16)}),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@every_model
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_models_compute_the_same(name: str, attention: str) -> None:
    make, inputs = MODELS[name]
    model = build(make).eval()
    model.set_attn_implementation(attention)
    plain = swapped_only(model)
    keys, expected = list(model.state_dict()), model(**inputs)[0]
    names = [n for n, _ in model.named_parameters()]
    report = fuse_dropout_(model)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_parameters()] == names
    assert not model.training and not any(m.training for m in model.modules())
    evaluated = model(**inputs)[0]
    if name in ("gpt2", "vit"):  # no norm was fused
        assert same_bits(evaluated, expected)
    torch.testing.assert_close(evaluated, expected, rtol=1e-9, atol=1e-9)
    assert_near(outcome(model, **inputs), outcome(plain, **inputs))
    report.undo()
    assert same_bits(model.eval()(**inputs)[0], expected)


@every_model
def test_models_train_and_their_state_goes_round(name: str) -> None:
    make, inputs = MODELS[name]
    model, fused = build(make), build(make)
    fuse_dropout_(fused)
    assert fused.load_state_dict(model.state_dict()).missing_keys == []
    optimizer, losses = torch.optim.AdamW(fused.parameters(), 3e-3), []
    target = values(*fused.eval()(**inputs)[0].shape, seed=3)
    fused.train()
    for _ in range(15):
        loss = (fused(**inputs)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    model.load_state_dict(fused.state_dict())
    torch.testing.assert_close(model.eval()(**inputs)[0], fused.eval()(**inputs)[0], rtol=1e-9, atol=1e-9)


def test_the_reports_of_bert_and_roberta() -> None:
    for make in (bert, roberta):
        report = fuse_dropout_(build(make))
        assert dict(report.fused) == POST_NORM and len(report.fused) == 4
        assert sorted(report.swapped) == sorted([EMBEDDED, *SELF, *POST_NORM_DROPOUTS])
        assert report.left == tuple((dropout, ATTENTION) for dropout in SELF)
        assert str(report).splitlines() == [
            "fused       2  encoder.layer.*.attention.output          dropout + add + norm",
            "fused       2  encoder.layer.*.output                    dropout + add + norm",
            "swapped     1  embeddings.dropout",
            "swapped     2  encoder.layer.*.attention.self.dropout",
            "swapped     2  encoder.layer.*.attention.output.dropout",
            "swapped     2  encoder.layer.*.output.dropout",
            f"left        2  encoder.layer.*.attention.self.dropout    {ATTENTION}",
        ]


def test_the_report_of_gpt2() -> None:
    report = fuse_dropout_(build(gpt2))
    # What follows the attention, and what follows the MLP.
    assert report.fused == tuple((f"h.{i}", "dropout + add") for i in (0, 0, 1, 1))
    parts = ("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout")
    assert report.swapped == ("drop", *(f"h.{i}.{part}" for i in (0, 1) for part in parts))
    assert report.left == tuple((f"h.{i}.attn.attn_dropout", ATTENTION) for i in (0, 1))


def test_the_report_of_vit() -> None:
    report = fuse_dropout_(build(vit))
    assert {what for _, what in report.fused} == {"dropout + add"} and len(report.fused) >= 2
    assert EMBEDDED in report.swapped
    assert any("attention" in name for name, _ in report.left)


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("name", ("bert", "gpt2"))
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    make, inputs = MODELS[name]
    model = build(make)
    fuse_dropout_(model)
    embedded = dict(inputs)
    embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids")).detach().requires_grad_()
    expected = outcome(model, **embedded)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    first = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True)
    function = first._gradient_checkpointing_func
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda *a, **k: (calls.append(1), function(*a, **k))[1]
    assert_near(outcome(model, **embedded), expected)
    assert len(calls) == 2  # once a layer


def test_outputs_that_hooks_record_are_the_same() -> None:
    for name in ("bert", "gpt2"):
        make, inputs = MODELS[name]
        model = build(make).eval()
        model.set_attn_implementation("eager")
        wanted = {"output_hidden_states": True, "output_attentions": True}
        expected = model(**inputs, **wanted)
        fuse_dropout_(model)
        actual = model(**inputs, **wanted)
        for kind in ("hidden_states", "attentions"):
            assert len(actual[kind]) == len(expected[kind]) >= 2
            for a, e in zip(actual[kind], expected[kind], strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("bert", "gpt2"))
def test_compiled_models(name: str) -> None:
    make, inputs = MODELS[name]
    model = build(make)
    expected = model.eval()(**inputs)[0]
    fuse_dropout_(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-9, atol=1e-9)
    model.train()
    torch.manual_seed(0)
    first, second = compiled(**inputs)[0], compiled(**inputs)[0]
    torch.manual_seed(0)
    assert torch.equal(compiled(**inputs)[0], first) and not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.compiler.reset()


@pytest.mark.slow
def test_pickled_models_are_fused_and_can_be_saved(tmp_path: Path) -> None:
    model = build(bert).eval()
    fuse_dropout_(model)
    model.save_pretrained(tmp_path)
    plain = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    torch.testing.assert_close(plain(TOKENS)[0], model(TOKENS)[0], rtol=1e-9, atol=1e-9)
    twin = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert same_bits(twin(TOKENS)[0], model(TOKENS)[0])


def test_a_checkpoint_around_a_fused_module() -> None:
    for cls in (cases.PostNorm, cases.Block):
        model, x = build(cls), values(5, 8).requires_grad_()
        fuse_dropout_(model)
        found = []
        for reentrant in (None, True, False):
            torch.manual_seed(1)
            y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            model.zero_grad()
            x.grad = None
            y.square().sum().backward()
            found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


# -- two processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddp_has_the_masks_of_each_ranks_seed(tmp_path: Path) -> None:
    paths = [str(Path(distributed.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [tmp_path / f"log_{rank}.txt" for rank in range(distributed.WORLD)]
    command = [sys.executable, str(distributed.__file__)]
    run_together(([*command, str(rank), str(tmp_path)], environment, log) for rank, log in enumerate(logs))
    ranks = [torch.load(tmp_path / f"results_{rank}.pt", weights_only=True) for rank in range(2)]
    for seeding in ("alike", "by rank"):
        (alone_0, wrapped_0), (alone_1, wrapped_1) = ranks[0][seeding], ranks[1][seeding]
        assert torch.equal(alone_0[0], alone_1[0]) == (seeding == "alike")
        for (y, _), (wrapped, _) in ((alone_0, wrapped_0), (alone_1, wrapped_1)):
            assert torch.equal(y, wrapped)  # wrapping changes no mask
        for a, b, mine, other in zip(wrapped_0[1], wrapped_1[1], alone_0[1], alone_1[1], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, (mine + other) / 2)
