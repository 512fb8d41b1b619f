"""The arguments of `PRM`: their defaults, what is refused, and options that differ by group or change on the way."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch

from popriskmin import PRM


def a_parameter(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, **kwargs))


def test_arguments_and_defaults_of_the_readme():
    signature = inspect.signature(PRM)
    published = {"lr": 1e-3, "betas": (0.9, 0.999), "rho": 0.99, "eps": 1e-8, "weight_decay": 0.01, "softness": 1.0,
                 "batch_size": None, "boundary": "batch", "n_dataset": None, "mask": "snr", "reduction": "per_param",
                 "warmup_steps": 0, "amsgrad": False, "bias_correction": True,
                 "decoupled_weight_decay": True}  # fmt: skip
    ours = {"mask_eps": None, "debias": False, "mask_decay": False, "state_dtype": None, "maximize": False,
            "foreach": None, "capturable": False, "differentiable": False, "fused": None, "min_q": 0.0,
            "variance": "streaming", "shrinkage": 0.0, "shrink_to": "zero", "stochastic_rounding": False}  # fmt: skip
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "params"}
    assert defaults == published | ours
    assert list(defaults)[:15] == list(published)


BAD = [
    ({"lr": -1e-3}, "lr must be finite and >= 0, got -0.001"),
    ({"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
    ({"lr": "fast"}, "lr must be a number or a tensor, got 'fast'"),
    ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element, got shape (2,)"),
    ({"lr": torch.tensor(-1.0)}, "lr must be finite and >= 0, got tensor(-1.)"),
    ({"betas": (1.0, 0.999)}, "betas[0] must be a number in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] must be a number in [0, 1), got -0.1"),
    ({"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
    ({"betas": (torch.tensor(1.5), 0.99)}, "betas[0] must be a number in [0, 1), got 1.5"),
    ({"rho": 1.0}, "rho must be a number in [0, 1), got 1.0"),
    ({"rho": -0.5}, "rho must be a number in [0, 1), got -0.5"),
    ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
    ({"mask_eps": -1.0}, "mask_eps must be a finite number >= 0, got -1.0"),
    ({"softness": -1.0}, "softness must be a finite number >= 0, got -1.0"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
    ({"weight_decay": None}, "weight_decay must be a finite number >= 0, got None"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number >= 0, got 1.5"),
    ({"mask": "sharp"}, "mask must be one of snr, soft, hard, threshold, none, got 'sharp'"),
    ({"boundary": "fresh"}, "boundary must be one of batch, empirical, got 'fresh'"),
    ({"reduction": "mean"}, "reduction must be one of per_param, per_tensor, got 'mean'"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ({"n_dataset": 0}, "n_dataset must be a whole number >= 1, got 0"),
    ({"batch_size": 8, "n_dataset": 8}, "n_dataset must be larger than batch_size, got n_dataset=8 and batch_size=8"),
    ({"boundary": "empirical"}, "needs batch_size and n_dataset, got batch_size=None and n_dataset=None"),
    ({"boundary": "empirical", "n_dataset": 100}, "got batch_size=None and n_dataset=100"),
    ({"debias": True, "bias_correction": False}, "debias=True needs bias_correction=True"),
    ({"mask_decay": True, "decoupled_weight_decay": False}, "mask_decay=True needs decoupled_weight_decay=True"),
    ({"min_q": -0.1}, "min_q must be a number in [0, 1], got -0.1"),
    ({"min_q": 1.5}, "min_q must be a number in [0, 1], got 1.5"),
    ({"min_q": float("nan")}, "min_q must be a number in [0, 1], got nan"),
    ({"min_q": None}, "min_q must be a number in [0, 1], got None"),
    ({"variance": "microbatches"}, "variance must be one of streaming, given, got 'microbatches'"),
    ({"shrinkage": -1.0}, "shrinkage must be a finite number >= 0, got -1.0"),
    ({"shrinkage": 1.0}, "shrinkage needs batch_size and n_dataset"),
    ({"shrinkage": 1.0, "batch_size": 8}, "shrinkage needs batch_size and n_dataset"),
    ({"shrinkage": 1.0, "batch_size": 8, "n_dataset": 8}, "shrinkage needs minibatches, or variance='given'"),
    ({"shrink_to": "origin"}, "shrink_to must be one of zero, start, got 'origin'"),
    ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
    ({"stochastic_rounding": True, "differentiable": True}, "stochastic_rounding=True needs differentiable=False"),
    ({"variance": None}, "variance must be one of streaming, given, got None"),
    ({"state_dtype": torch.float16}, "torch.float32 or torch.float64, got torch.float16"),
    ({"debias": "off"}, "debias must be True or False, got 'off'"),
    ({"amsgrad": 1}, "amsgrad must be True or False, got 1"),
    ({"fused": "yes"}, "fused must be None, True or False, got 'yes'"),
    ({"mask": ["snr"]}, "mask must be one of snr, soft, hard, threshold, none, got ['snr']"),
    ({"lr": torch.tensor(1j)}, "lr must be real, got tensor(0.+1.j)"),
    ({"eps": 1e200}, "eps must be so small that its square is finite, or mask_eps be given, got eps=1e+200"),
    ({"learning_rate": 0.1}, "learning_rate"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_a_bad_argument_is_named_with_its_value(kwargs, message):
    with pytest.raises(TypeError if "learning_rate" in kwargs else ValueError, match=re.escape(message)):
        PRM([a_parameter(2)], **kwargs)


@pytest.mark.parametrize(("kwargs", "message"), [*BAD[:-1], ({"beta": (0.9, 0.99)}, "did you mean betas?")])
def test_a_bad_group_is_refused_and_nothing_is_added(kwargs, message):
    optimizer = PRM([a_parameter(2)])
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [a_parameter(2)], **kwargs})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        PRM([{"params": [a_parameter(2)], **kwargs}])


def test_an_unknown_option_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"unknown option weigth_decay.*: did you mean weight_decay\?"):
        PRM([{"params": [a_parameter(2)], "weigth_decay": 0.1}])


def test_groups_may_carry_keys_of_schedulers_and_users():
    optimizer = PRM([{"params": [a_parameter(2)], "name": "head", "lr_scale": 0.5, "initial_lr": 0.1}])
    assert optimizer.param_groups[0]["name"] == "head"


def test_numpy_numbers_act_and_are_saved_as_pythons_own(tmp_path):
    ours, theirs = a_parameter(3), a_parameter(3)
    theirs.data.copy_(ours.data)
    optimizers = [PRM([ours], warmup_steps=np.int64(2), lr=np.float32(0.5)), PRM([theirs], warmup_steps=2, lr=0.5)]
    for p, optimizer in zip((ours, theirs), optimizers):
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.equal(ours, theirs)
    torch.save(optimizers[0].state_dict(), tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["param_groups"][0]["warmup_steps"] == 2


def test_numpy_numbers_are_numbers():
    PRM(
        [a_parameter(2)],
        lr=np.float32(0.1),
        weight_decay=np.float64(0.1),
        batch_size=np.int64(4),
        warmup_steps=np.int32(1),
    )


def test_not_an_iterable_of_parameters():
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        PRM(a_parameter(2))
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        PRM([a_parameter(2)]).add_param_group([a_parameter(2)])
    with pytest.raises(ValueError, match="empty parameter list"):
        PRM([])


def test_every_option_can_be_set_per_group():
    whole = {"lr": 0.1, "betas": (0.5, 0.9), "rho": 0.5, "eps": 1e-4, "weight_decay": 0.3, "softness": 3.0,
             "batch_size": 8, "boundary": "empirical", "n_dataset": 100, "mask": "soft", "reduction": "per_tensor",
             "warmup_steps": 1, "amsgrad": True, "mask_eps": 1e-8, "debias": True, "mask_decay": True,
             "maximize": True, "state_dtype": torch.float64, "foreach": False, "min_q": 0.5,
             "variance": "given"}  # fmt: skip
    for name, value in whole.items():
        one, other = a_parameter(6), a_parameter(6)
        extra = {"batch_size": 8, "n_dataset": 100} if name in ("boundary", "batch_size", "n_dataset") else {}
        grouped = PRM([{"params": [a_parameter(3)]}, {"params": [one], **extra, name: value}], lr=0.01)
        plain = PRM([other], **{"lr": 0.01, **extra, name: value})
        torch.manual_seed(0)
        for _ in range(3):
            one.grad = torch.randn(6)
            other.grad = one.grad.clone()
            if name == "variance":
                grouped.set_variances({one: torch.full((6,), 0.5)})
                plain.set_variances({other: torch.full((6,), 0.5)})
            grouped.step()
            plain.step()
        assert torch.equal(one, other), name


def test_batch_size_schedules_take_effect_and_bad_ones_move_nothing():
    w = a_parameter(4)
    optimizer = PRM([w], boundary="empirical", batch_size=10, n_dataset=1000, softness=1.0, lr=0.1)
    w.grad = torch.ones(4)
    optimizer.step()
    before = optimizer.get_mask_stats()
    optimizer.param_groups[0]["batch_size"] = 500
    assert optimizer.get_mask_stats() == before
    moved = w.detach().clone()
    optimizer.step()
    noise = optimizer.state[w]["exp_avg_var"].sum().item() / (1 - 0.99**2)
    assert optimizer.get_mask_stats()["noise_scale"] == pytest.approx(noise * (500 / 500))
    optimizer.param_groups[0]["batch_size"] = 1000
    stepped = w.detach().clone()
    assert not torch.equal(moved, stepped)
    with pytest.raises(ValueError, match="n_dataset=1000 and batch_size=1000"):
        optimizer.step()
    assert torch.equal(w, stepped)
    assert optimizer.state[w]["step"] == 2


@pytest.mark.parametrize(("name", "value"), [("mask", "sfot"), ("reduction", "per_tesnor"), ("variance", "gievn")])
def test_a_bad_value_written_to_a_group_moves_nothing(name, value):
    p = a_parameter(3)
    p.grad = torch.ones_like(p)
    optimizer = PRM([p])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        optimizer.step()
    for key, tensor in optimizer.state_dict()["state"][0].items():
        assert torch.equal(tensor, before[0][key])


def test_repr_shows_the_options():
    text = repr(PRM([a_parameter(1)], softness=3.0))
    assert text.startswith("PRM (")
    assert "softness: 3.0" in text


class SAM(torch.optim.Optimizer):
    """As the much copied one: its options go into the groups that the base optimizer shares."""

    def __init__(self, params, base_optimizer, rho, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": False, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)


def test_the_radius_of_sam_is_not_taken_for_rho_without_a_word():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="rho=0.05 and 'adaptive', as SAM"):
        SAM([p], PRM, rho=0.05, lr=0.1)
    optimizer = PRM([p], lr=0.1)
    optimizer.param_groups[0].update(rho=0.06, adaptive=True)
    with pytest.warns(UserWarning, match="rho=0.06 and 'adaptive', as SAM"):
        optimizer.step()
