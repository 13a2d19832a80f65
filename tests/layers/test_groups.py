"""Layer groups: what models are read as, and what is said where they cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from unfreeze_cases import (
    MODELS,
    WIDTH,
    Backwards,
    Block,
    ConvNet,
    Recurrent,
    Stack,
    TiedLM,
    TwoTowers,
    VisionTransformer,
    drawn,
)

from fastft.unfreeze import LayerGroup, layer_groups

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12}
WORDS = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def bert(**options: Any) -> PretrainedConfig:
    return transformers.BertConfig(**SMALL, **WORDS, max_position_embeddings=16, **options)


def gpt2(**options: Any) -> PretrainedConfig:
    return transformers.GPT2Config(**WORDS, n_embd=8, n_layer=2, n_head=2, n_positions=16, **options)


def llama(**options: Any) -> PretrainedConfig:
    return transformers.LlamaConfig(**SMALL, **WORDS, **options)


def t5(**options: Any) -> PretrainedConfig:
    return transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, **options
    )


def vit(**options: Any) -> PretrainedConfig:
    return transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, **options)


def blocks(path: str, depth: int = 2) -> list[str]:
    return [f"{path}.{i}" for i in range(depth)]


T5_BLOCKS = ["embeddings", *blocks("encoder.block"), "encoder.final_layer_norm", *blocks("decoder.block"), "final_norm"]
UNTIED = {"tie_word_embeddings": False}
READ_AS: list[tuple[str, PretrainedConfig, list[str], dict[str, tuple[str, ...]]]] = [
    ("BertModel", bert(), ["embeddings", *blocks("encoder.layer"), "head"], {}),
    ("BertForSequenceClassification", bert(), ["embeddings", *blocks("bert.encoder.layer"), "head"], {}),
    (
        "BertForMaskedLM",
        bert(),
        ["embeddings", *blocks("bert.encoder.layer"), "head"],
        {"head": ("cls.predictions.decoder.weight",)},
    ),
    ("BertForMaskedLM", bert(**UNTIED), ["embeddings", *blocks("bert.encoder.layer"), "head"], {}),
    ("GPT2Model", gpt2(), ["embeddings", *blocks("h"), "final_norm"], {}),
    (
        "GPT2LMHeadModel",
        gpt2(),
        ["embeddings", *blocks("transformer.h"), "final_norm"],
        {"final_norm": ("lm_head.weight",)},
    ),
    ("GPT2LMHeadModel", gpt2(**UNTIED), ["embeddings", *blocks("transformer.h"), "final_norm", "head"], {}),
    ("GPT2ForSequenceClassification", gpt2(), ["embeddings", *blocks("transformer.h"), "final_norm", "head"], {}),
    ("LlamaForCausalLM", llama(**UNTIED), ["embeddings", *blocks("model.layers"), "final_norm", "head"], {}),
    (
        "LlamaForCausalLM",
        llama(tie_word_embeddings=True),
        ["embeddings", *blocks("model.layers"), "final_norm"],
        {"final_norm": ("lm_head.weight",)},
    ),
    ("T5ForConditionalGeneration", t5(), T5_BLOCKS, {"final_norm": ("lm_head.weight",)}),
    ("T5ForConditionalGeneration", t5(**UNTIED), [*T5_BLOCKS, "head"], {}),
    ("ViTModel", vit(), ["embeddings", *blocks("layers"), "final_norm", "head"], {}),
    ("ViTForImageClassification", vit(), ["embeddings", *blocks("vit.layers"), "final_norm", "head"], {}),
]


def make(name: str, config: PretrainedConfig) -> PreTrainedModel:
    model = getattr(transformers, name)(copy.deepcopy(config))
    if getattr(config, "scale_decoder_outputs", None) is False:  # T5 1.1: its head is its own
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def names(groups: list[LayerGroup]) -> list[str]:
    return [group.name for group in groups]


def check_partition(model: nn.Module, groups: list[LayerGroup]) -> None:
    """Every parameter and every module with some in exactly one group, under one of its names."""
    grouped = [p for group in groups for p in group.parameters]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    known = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        assert group.parameters, group
        assert [id(known[n]) for n in group.param_names] == [id(p) for p in group.parameters]
        for module in group.modules:
            inside = {id(p) for p in module.parameters()}
            shared = {id(known[n]) for n in group.shared}
            assert inside <= {id(p) for p in group.parameters} | shared
    modules = [id(inner) for group in groups for module in group.modules for inner in module.modules()]
    assert len(modules) == len(set(modules))


@pytest.mark.parametrize(
    ("name", "config", "expected", "shared"),
    READ_AS,
    ids=[f"{name}-{'tied' if shared else 'untied'}" for name, _, _, shared in READ_AS],
)
def test_transformers_models_are_read_unaided(
    name: str, config: PretrainedConfig, expected: list[str], shared: dict[str, tuple[str, ...]]
) -> None:
    model = make(name, config)
    groups = layer_groups(model)
    assert names(groups) == expected
    assert {group.name: group.shared for group in groups if group.shared} == shared
    kinds = {"embeddings": "embeddings", "final_norm": "norm", "encoder.final_layer_norm": "norm", "head": "head"}
    assert [group.kind for group in groups] == [kinds.get(group.name, "block") for group in groups]
    check_partition(model, groups)


def test_embeddings_that_are_read_twice_are_one_layer() -> None:
    model = make("T5ForConditionalGeneration", t5())
    embeddings, *_, last = layer_groups(model)
    assert set(embeddings.modules) == {model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens}
    assert set(last.modules) == {model.decoder.final_layer_norm, model.decoder.dropout, model.lm_head}


def test_embeddings_that_are_read_twice_are_one_layer_also_in_groups_by_name() -> None:
    model = make("T5ForConditionalGeneration", t5())
    groups = layer_groups(model, ["shared", "encoder.*", "decoder.*", "lm_head"])
    assert names(groups) == ["shared", "encoder", "decoder"]
    assert set(groups[0].modules) == {model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens}
    assert [group.shared for group in groups] == [(), (), ("lm_head.weight",)]


def test_a_module_that_is_registered_twice_is_one_module() -> None:
    model = Stack()
    model.decoder = nn.ModuleDict({"embed": model.embed, "out": nn.Linear(WIDTH, 1)})
    groups = layer_groups(model)
    check_partition(model, groups)
    assert groups[0].modules == (model.embed,)
    assert groups[-1].modules == (model.head, model.decoder["out"])


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel", "T5EncoderModel"])
def test_one_layer_is_enough(name: str) -> None:
    configs = {
        "BertModel": bert(),
        "LlamaModel": llama(),
        "T5EncoderModel": t5(),
    }
    config = configs[name]
    setattr(config, "num_layers" if name.startswith("T5") else "num_hidden_layers", 1)
    groups = layer_groups(make(name, config))
    assert [group.kind for group in groups][:2] == ["embeddings", "block"]
    assert sum(group.kind == "block" for group in groups) == 1


@pytest.mark.parametrize("cls", [*MODELS, TiedLM])
def test_other_models_are_read_unaided(cls: type[nn.Module]) -> None:
    stack = ["embeddings", *blocks("blocks", 3), "final_norm", "head"]
    towers = ["embeddings", *blocks("left.blocks"), "left.norm+left.head+right.embed", *blocks("right.blocks")]
    expected = {
        Stack: stack,
        VisionTransformer: stack,
        ConvNet: ["embeddings", *blocks("layer1"), "layer2.0", "head"],
        Recurrent: ["embeddings", *blocks("blocks"), "head"],
        Backwards: ["embeddings", *blocks("blocks", 3), "head"],
        TwoTowers: [*towers, "final_norm", "head"],
        TiedLM: ["embeddings", *blocks("blocks"), "final_norm"],
    }
    model = cls()
    groups = layer_groups(model)
    assert names(groups) == expected[cls]
    check_partition(model, groups)


def test_what_has_no_parameters_goes_with_what_comes_before_it() -> None:
    model = ConvNet()
    first, second, *_, head = layer_groups(model)
    assert first.modules == (model.conv1, model.bn1, model.act1)
    assert second.modules == (model.layer1[0],)
    assert head.modules == (model.fc,)
    vision = VisionTransformer()
    embeddings, *_, norm, _ = layer_groups(vision)
    assert embeddings.param_names == ("cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias")
    assert embeddings.modules == (vision.patch_embed, vision.pos_drop)
    assert norm.modules == (vision.norm, vision.fc_norm, vision.head_drop)


@pytest.mark.parametrize(
    ("model", "expected", "kinds"),
    [
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Linear(4, 1)),
            ["0", "2", "3"],
            "block block head",
        ),
        (nn.Sequential(nn.Linear(2, 3)), ["0"], "head"),
        (nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))}), ["net.0", "net.1"], "block head"),
        (nn.Sequential(Block(), Block(), nn.Linear(8, 1)), ["0", "1", "2"], "block block head"),
        (nn.Sequential(Block(), Block()), ["0", "1"], "block block"),
        # Blocks of several classes, alike by a common base.
        (
            nn.ModuleDict({"layers": nn.ModuleList([Block(), type("Other", (Block,), {})()]), "out": nn.Linear(8, 1)}),
            ["layers.0", "layers.1", "head"],
            "block block head",
        ),
        # Only the outermost lists count: a stage is a block.
        (
            nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))),
            ["embeddings", "1.0", "1.1"],
            "embeddings block block",
        ),
    ],
    ids=["sequential", "single", "wrapped", "mixed", "blocks", "subclasses", "stages"],
)
def test_sequentials(model: nn.Module, expected: list[str], kinds: str) -> None:
    groups = layer_groups(model)
    assert names(groups) == expected
    assert [group.kind for group in groups] == kinds.split()
    check_partition(model, groups)


def test_blocks_that_share_everything_are_merged_into_the_first() -> None:
    model = Stack(2)
    model.blocks.append(Block())
    model.blocks[2].load_state_dict(model.blocks[1].state_dict())
    model.blocks[2].fc, model.blocks[2].norm = model.blocks[1].fc, model.blocks[1].norm
    groups = layer_groups(model)
    assert names(groups) == ["embeddings", "blocks.0", "blocks.1", "final_norm", "head"]
    assert groups[2].modules == (model.blocks[1], model.blocks[2])
    assert groups[2].shared == ()


@given(data=st.data())
@drawn
def test_any_tree_is_cut_cleanly_or_refused(data: st.DataObject) -> None:
    def grow(depth: int) -> nn.Module:
        kind = data.draw(st.sampled_from(["linear", "relu", "norm", "block", "list", "sequential", "dict", "holder"]))
        if depth == 0 or kind in ("linear", "relu", "norm", "block"):
            return {"relu": nn.ReLU, "norm": lambda: nn.LayerNorm(8), "block": Block}.get(
                kind, lambda: nn.Linear(8, 8)
            )()
        children = [grow(depth - 1) for _ in range(data.draw(st.integers(1, 3)))]
        if kind == "list":
            return nn.ModuleList(children)
        if kind == "sequential":
            return nn.Sequential(*children)
        held = nn.ModuleDict({f"m{i}": child for i, child in enumerate(children)})
        if kind == "holder":
            held.register_parameter("own", nn.Parameter(torch.ones(2)))
        return held

    model = grow(3)
    order = [id(p) for p in model.parameters()]
    if not order:
        with pytest.raises(ValueError, match="expected a model with parameters"):
            layer_groups(model)
        return
    try:
        groups = layer_groups(model)
    except ValueError as error:
        assert "cannot tell its layers" in str(error)
        return
    check_partition(model, groups)
    assert [id(p) for group in groups for p in group.parameters] == order
    assert len(set(names(groups))) == len(groups)


# -- groups by name ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Nothing that could be read unaided."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
        self.fc = nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["scale", "body", "fc"], {"scale": 1, "body": 4, "fc": 2}),
        ([["scale", "body.0"], "body.2.*", "fc.*"], {"scale+body.0": 3, "body.2": 2, "fc": 2}),
        (
            {"embeddings": ["scale", "body.0*"], "middle": "body.2", "head": "fc"},
            {"embeddings": 3, "middle": 2, "head": 2},
        ),
        (["fc", "*.bias", ["scale", "*.weight"]], None),
        (["*"], {"*": 7}),
    ],
    ids=["modules", "lists", "dict", "overlap", "all"],
)
def test_groups_by_name(groups: Any, expected: dict[str, int] | None) -> None:
    model = Pair()
    if expected is None:
        with pytest.raises(ValueError, match=r"in several: fc\.weight \(in 'fc' and 'scale\+\*\.weight'\)"):
            layer_groups(model, groups)
        return
    made = layer_groups(model, groups)
    assert {group.name: len(group.parameters) for group in made} == expected
    check_partition(model, made)
    kinds = {"embeddings": "embeddings", "head": "head"}
    assert [group.kind for group in made] == [kinds.get(group.name, "block") for group in made]


def test_a_module_name_means_no_other_module_that_begins_like_it() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    groups = layer_groups(model, ["0", "1", [str(i) for i in range(2, 12)]])
    assert [len(group.parameters) for group in groups] == [2, 2, 20]


def test_groups_by_name_find_their_modules() -> None:
    model = Pair()
    first, second = layer_groups(model, [["scale", "body"], "fc"])
    assert (first.modules, second.modules) == ((model.body,), (model.fc,))
    first, second, _ = layer_groups(model, ["body.0", "body.2", ["scale", "fc"]])
    assert (first.modules, second.modules) == ((model.body[0], model.body[1]), (model.body[2],))


def test_ready_groups_are_taken_as_they_are() -> None:
    model = Stack()
    groups = layer_groups(model)
    assert layer_groups(model, groups) == groups
    with pytest.raises(ValueError, match=r"in none: embed\.weight, embed\.bias"):
        layer_groups(model, groups[1:])
    with pytest.raises(ValueError, match=r"in several: head\.weight \(in 'head' and 'again'\)"):
        layer_groups(model, [*groups, LayerGroup("again", "other", groups[-1].parameters[:1], ("x",), ())])
    with pytest.raises(ValueError, match="'embeddings' holds parameters that the model does not have"):
        layer_groups(Stack(), groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["scale", "body"], r"in none: fc\.weight, fc\.bias$"),
        (["scale", "body", "fc", "fc.bias"], r"in several: fc\.bias \(in 'fc' and 'fc\.bias'\)"),
        (["scale", "bodi", "fc"], r"'bodi' matches no parameter; closest: body"),
        (["scale", 3], r"expected module names, glob patterns or lists of them .* got 3"),
        ([[]], r"got \[\]"),
        ([], "expected every parameter in exactly one group"),
    ],
)
def test_groups_that_do_not_fit(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_groups(Pair(), groups)


def test_everything_that_is_not_covered_is_listed_but_not_without_end() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    with pytest.raises(ValueError, match=r"in none: 1\.weight, 1\.bias, .* and 6 more"):
        layer_groups(model, ["0"])


def test_tied_parameters_are_in_the_first_group_that_uses_them() -> None:
    model = TiedLM()
    by_name = layer_groups(model, {"blocks": "blocks", "head": ["lm_head", "norm"], "embeddings": "embed"})
    assert names(by_name) == ["blocks", "head"]  # nothing is left of the embeddings
    assert by_name[1].param_names == ("lm_head.weight", "norm.weight", "norm.bias")
    assert by_name[1].shared == ()
    apart = layer_groups(model, ["embed", "blocks", ["norm", "lm_head"]])
    assert apart[2].shared == ("lm_head.weight",)
    unsaid = layer_groups(model, ["embed", "blocks", "norm"])  # its one weight is covered
    assert model.lm_head in unsaid[0].modules


def test_a_model_that_cannot_be_read_is_shown() -> None:
    with pytest.raises(ValueError) as caught:
        layer_groups(Pair())
    assert str(caught.value).splitlines() == [
        "Pair: cannot tell its layers: it is no nn.Sequential, and has no nn.ModuleList or nn.Sequential of like "
        "modules with modules inside. Its tree:",
        "  Pair",
        "    scale: 1",
        "    body: Sequential, 21",
        "      0: Linear, 9",
        "      1: Tanh",
        "      2: Linear, 12",
        "    fc: Linear, 4",
        "Pass module names or glob patterns, from input to output, for instance groups=['scale', 'body', 'fc']",
    ]
    assert layer_groups(Pair(), ["scale", "body", "fc"])  # as it says


def test_a_large_tree_is_shown_in_few_lines() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "many": nn.ModuleList(nn.Linear(3, 3) for _ in range(500))})
    with pytest.raises(ValueError) as caught:
        layer_groups(model)
    assert "      0 … 499: Linear, 12\n" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 15


# -- wrappers ------------------------------------------------------------------------------------------------


class PeftLike(nn.Module):
    """The outline of a PeftModel around a LoraModel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = inner


@pytest.mark.parametrize("wrap", ["compile", "parts", "peft", "data_parallel"])
def test_wrappers_do_not_show_in_names(wrap: str) -> None:
    model, plain = Stack(), layer_groups(Stack())
    wrapped: nn.Module = model
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "parts":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")
    elif wrap == "peft":
        wrapped = PeftLike(model)
    else:
        wrapped = nn.DataParallel(model)
    groups = layer_groups(wrapped)
    assert [(g.name, g.kind, g.param_names) for g in groups] == [(g.name, g.kind, g.param_names) for g in plain]
    assert [id(p) for g in groups for p in g.parameters] == [id(p) for p in model.parameters()]
    assert names(layer_groups(wrapped, ["embed", "blocks.*", ["norm", "head"]])) == ["embed", "blocks", "norm+head"]
