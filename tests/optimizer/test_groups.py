"""Parameter groups from name patterns: which parameter is in which, what decays, what is refused; and names."""

import re
from fnmatch import fnmatchcase

import pytest
import torch
from conftest import TORCH
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from popriskmin import PRM
from popriskmin.optimizer.groups import param_groups, parameter_names


class LlamaRMSNorm(nn.Module):
    """As other libraries write theirs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))  # known by its class, not by its shape
        self.mix = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))
        self.conv = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
        self.rnn = nn.LSTM(4, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.other = LlamaRMSNorm()
        self.router = nn.Linear(4, 2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight


def names(group):
    return [name for name, _ in group["params"]]


def group_of(groups, name):
    return next(group for group in groups if name in names(group))


def test_everything_once_and_decay_by_kind():
    model = Model()
    groups = param_groups(model, weight_decay=0.1)
    assert len(groups) == 2
    by_name = {name: group["weight_decay"] for group in groups for name in names(group)}
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    expected_off = {
        name
        for name in by_name
        if "bias" in name or "norm" in name or name in ("conv.1.weight", "conv.2.weight", "other.weight")
    }
    assert {name for name, decay in by_name.items() if decay == 0} == expected_off
    # Among them the ones with names of their own, and not what only lies inside of a norm, or has few dimensions.
    assert {"layers.0.self_attn.in_proj_bias", "rnn.bias_hh_l0", "conv.1.bias"} <= expected_off
    assert {"tokens.weight", "scale", "other.mix.weight", "rnn.weight_ih_l0"} <= set(by_name) - expected_off
    assert set(by_name.values()) == {0.0, 0.1}


def test_the_first_pattern_counts_and_the_rest_comes_last():
    groups = param_groups(
        Model(),
        {"router.*": {"mask": "none"}, "layers.0.*": {"softness": 3.0}, "layers.*": {"softness": 0.1}},
        weight_decay=0.1,
    )
    assert [group["pattern"] for group in groups] == [
        "router.*", "router.*", "layers.0.*", "layers.0.*", "layers.*", "layers.*", None, None,
    ]  # fmt: skip
    assert group_of(groups, "router.bias") == {
        "params": [("router.bias", groups[1]["params"][0][1])],
        "weight_decay": 0.0,
        "mask": "none",
        "pattern": "router.*",
    }
    assert group_of(groups, "layers.0.linear1.weight")["softness"] == 3.0
    assert group_of(groups, "layers.1.linear1.weight")["softness"] == 0.1
    assert "mask" not in group_of(groups, "scale")


def test_decay_of_a_pattern_is_for_what_decays():
    groups = param_groups(Model(), {"layers.*": {"weight_decay": 0.5}, "tokens.*": {"weight_decay": 0.0}})
    decay = {name: group["weight_decay"] for group in groups for name in names(group)}
    assert decay["layers.0.linear1.weight"] == 0.5
    assert decay["layers.0.linear1.bias"] == decay["layers.0.norm1.weight"] == decay["tokens.weight"] == 0
    assert decay["router.weight"] == 0.01


def shrinkages(groups):
    return {name: group.get("shrinkage") for group in groups for name in names(group)}


def test_biases_norms_and_embeddings_do_not_shrink():
    model = Model()
    model.pos_embed = nn.Parameter(torch.zeros(1, 7, 4))
    decay = {name: group["weight_decay"] for group in param_groups(model) for name in names(group)}
    found = shrinkages(param_groups(model, shrinkage=2.0))
    assert set(found) == set(decay)
    # The head is tied to the embedding.
    embeddings = {"tokens.weight", "pos_embed"}
    assert {name for name, z in found.items() if z == 2} == {name for name in decay if decay[name]} - embeddings
    assert {name for name, z in found.items() if z == 0} == {name for name in decay if not decay[name]} | embeddings
    # Embeddings decay as they did.
    groups = param_groups(model, shrinkage=2.0, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert set(names(groups[1])) == embeddings


def test_a_pattern_shrinks_the_first_layer_alone_or_an_embedding():
    found = shrinkages(param_groups(Model(), {"layers.0.*": {"shrinkage": 2.0}}))
    assert {name for name, z in found.items() if z == 2} == {
        "layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight", "layers.0.linear1.weight",
        "layers.0.linear2.weight",
    }  # fmt: skip
    # What is not shrunk there stays so, whatever the optimizer's own shrinkage is; the rest is left to that.
    assert {name for name, z in found.items() if z == 0} == {
        name for name in found if name.startswith("layers.0.") and ("bias" in name or "norm" in name)
    }
    assert found["router.weight"] is found["tokens.weight"] is None
    found = shrinkages(param_groups(Model(), {"tokens.*": {"shrinkage": 1.0}, "router.*": {}}, shrinkage=3.0))
    assert (found["tokens.weight"], found["router.weight"], found["router.bias"]) == (1.0, 3.0, 0.0)


def test_prm_shrinks_what_the_groups_say():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = PRM(param_groups(model, {"2.*": {"shrinkage": 0.0}}, shrinkage=1e3), batch_size=2, n_dataset=100)
    for _ in range(30):
        optimizer.zero_grad()
        (model(torch.randint(5, (2,))) * torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert [bool((p == 0).all()) for p in model.parameters()] == [False, True, False, False, False]
    with pytest.raises(ValueError, match="shrinkage must be a finite number >= 0, got -1"):
        PRM(param_groups(model, shrinkage=-1.0))


def test_tied_weights_come_once_and_answer_to_any_of_their_names():
    model = Model()
    for pattern in ("tokens.weight", "head.*"):
        groups = param_groups(model, {pattern: {"lr": 0.5}})
        assert group_of(groups, "tokens.weight")["lr"] == 0.5
        params = [param for group in groups for _, param in group["params"]]
        assert len(params) == len(set(params)) == len(list(model.parameters()))


def test_a_weight_tied_to_a_norm_does_not_decay():
    model = nn.ModuleDict({"scale": nn.ParameterList([torch.ones(4)]), "norm": nn.LayerNorm(4)})
    model["scale"][0] = model["norm"].weight
    assert [group["weight_decay"] for group in param_groups(model)] == [0.0]


def test_frozen_parameters_are_kept_and_move_once_unfrozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    optimizer = PRM(param_groups(model))
    before = model[0].weight.detach().clone()
    for moved in (False, True):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, before) != moved
        model[0].weight.requires_grad_(True)


def test_a_parametrized_bias_is_a_bias():
    model = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(model, "bias", nn.Identity())
    nn.utils.parametrize.register_parametrization(model, "weight", nn.Identity())
    groups = param_groups(model)
    assert {tuple(names(group)): group["weight_decay"] for group in groups} == {
        ("parametrizations.weight.original",): 0.01,
        ("parametrizations.bias.original",): 0.0,
    }


def test_prm_takes_the_groups_and_shows_the_names():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "router": nn.Linear(4, 2)})
    optimizer = PRM(param_groups(model, {"router.*": {"mask": "none"}}), lr=0.1)
    model["router"](model["body"](torch.randn(3, 4))).square().sum().backward()
    optimizer.step()
    stats = optimizer.get_mask_stats(by="parameter")
    assert list(stats) == ["router.weight", "router.bias", "body.weight", "body.bias"]
    assert stats["router.weight"]["mean_q"] == 1 > stats["body.weight"]["mean_q"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.01, 0.0]
    fresh = PRM(param_groups(model, {"router.*": {"mask": "none"}}), lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["pattern"] for group in fresh.param_groups] == ["router.*", "router.*", None, None]


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.skipif(TORCH < (2, 6), reason="names"))])
def test_adamw_takes_the_groups_too(named):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(param_groups(model, {"0.*": {"lr": 0.5}}, weight_decay=0.3, named=named))
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.5, 0.3, 1), (0.5, 0.0, 1), (1e-3, 0.0, 2),
    ]  # fmt: skip
    model(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()


def test_the_error_for_what_matches_nothing_names_what_is_near():
    def message(pattern, model=None):
        with pytest.raises(ValueError, match=re.escape(repr(pattern))) as caught:
            param_groups(model or Model(), {pattern: {"mask": "none"}})
        return str(caught.value)

    assert "router.*" in message("ruoter.*")
    assert "layers.0.self_attn.*" in message("layers.0.self_atn.*")
    assert "layers.0.*" in message("layer.0.*")
    assert "router.*" in message("router")
    assert "the first are 0.weight, 0.bias" in message("xyz", nn.Sequential(nn.Linear(1, 1)))
    assert message("Router.*").startswith("the pattern 'Router.*' matches no parameter name; near it are ")


def test_the_error_for_what_is_taken_by_an_earlier_pattern():
    with pytest.raises(ValueError, match=r"everything that 'router.weight' .*, as router.weight by 'router.\*'"):
        param_groups(Model(), {"router.*": {}, "router.weight": {"mask": "none"}})


@pytest.mark.parametrize(
    ("model", "patterns", "error", "match"),
    [
        ([], None, TypeError, "model must be a torch.nn.Module, got list"),
        (nn.ReLU(), None, ValueError, "model has no parameters: ReLU"),
        (nn.Linear(1, 1), ["weight"], TypeError, "patterns must be a dict .* got list"),
        (nn.Linear(1, 1), {"weight": "none"}, TypeError, "patterns must be a dict .* got 'weight': 'none'"),
        (nn.Linear(1, 1), {3: {}}, TypeError, "got 3: {}"),
        (nn.Linear(1, 1), {"weight": {"params": []}}, ValueError, "'weight' must not hold 'params'"),
    ],
)
def test_bad_arguments(model, patterns, error, match):
    with pytest.raises(error, match=match):
        param_groups(model, patterns)


@given(st.lists(st.sampled_from(["layers.*", "layers.0.*", "*bias", "router.*", "tokens.*", "*"]), unique=True))
def test_groups_part_the_parameters(patterns):
    """Whatever the patterns: every parameter is in one group, whose pattern is the first that matches it."""
    model = Model()
    aliases = {name: [name] for name, _ in model.named_parameters()}
    aliases["tokens.weight"].append("head.weight")
    expected = {
        name: next((p for p in patterns if any(fnmatchcase(a, p) for a in also)), None)
        for name, also in aliases.items()
    }
    options = {pattern: {} for pattern in patterns}
    if set(patterns) - set(expected.values()):
        with pytest.raises(ValueError, match="taken by an earlier pattern"):
            param_groups(model, options)
        return
    groups = param_groups(model, options)
    assert sum(len(group["params"]) for group in groups) == len(aliases)
    assert {name: group["pattern"] for group in groups for name in names(group)} == expected


def test_names_are_told_apart():
    groups = [{"params": [1, 2], "param_names": ["a", "b"]}, {"params": [3], "param_names": ["a"]}, {"params": [4]}]
    assert parameter_names(groups) == [["group 0: a", "b"], ["group 1: a"], [3]]
