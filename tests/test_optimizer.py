"""The class: its arguments, groups and errors, and how it lives in ordinary training loops."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import TORCH

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
            "variance": "streaming"}  # fmt: skip
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
    ({"betas": (torch.tensor(0.9), 0.99)}, "betas[0] must be a number in [0, 1), got tensor(0.9000)"),
    ({"rho": 1.0}, "rho must be a number in [0, 1), got 1.0"),
    ({"rho": -0.5}, "rho must be a number in [0, 1), got -0.5"),
    ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
    ({"mask_eps": -1.0}, "mask_eps must be a finite number >= 0, got -1.0"),
    ({"softness": -1.0}, "softness must be a finite number >= 0, got -1.0"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
    ({"weight_decay": None}, "weight_decay must be a finite number >= 0, got None"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number >= 0, got 1.5"),
    ({"mask": "sharp"}, "mask must be one of snr, soft, hard, none, got 'sharp'"),
    ({"boundary": "fresh"}, "boundary must be one of batch, empirical, got 'fresh'"),
    ({"reduction": "mean"}, "reduction must be one of per_param, per_tensor, got 'mean'"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ({"n_dataset": 0}, "n_dataset must be a whole number >= 1, got 0"),
    ({"batch_size": 8, "n_dataset": 8}, "n_dataset must be larger than batch_size, got n_dataset=8 and batch_size=8"),
    ({"boundary": "empirical"}, "needs batch_size and n_dataset, got batch_size=None and n_dataset=None"),
    ({"boundary": "empirical", "n_dataset": 100}, "got batch_size=None and n_dataset=100"),
    ({"debias": True, "bias_correction": False}, "debias=True needs bias_correction=True"),
    ({"mask_decay": True, "decoupled_weight_decay": False}, "mask_decay=True needs decoupled_weight_decay=True"),
    ({"state_dtype": torch.float16}, "torch.float32 or torch.float64, got torch.float16"),
    ({"debias": "off"}, "debias must be True or False, got 'off'"),
    ({"amsgrad": 1}, "amsgrad must be True or False, got 1"),
    ({"fused": "yes"}, "fused must be None, True or False, got 'yes'"),
    ({"mask": ["snr"]}, "mask must be one of snr, soft, hard, none, got ['snr']"),
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


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(foreach):
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PRM(embedding.parameters(), foreach=foreach)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="PRM does not support sparse gradients; use sparse=False"):
        optimizer.step()


def test_every_option_can_be_set_per_group():
    whole = {"lr": 0.1, "betas": (0.5, 0.9), "rho": 0.5, "eps": 1e-4, "weight_decay": 0.3, "softness": 3.0,
             "batch_size": 8, "boundary": "empirical", "n_dataset": 100, "mask": "soft", "reduction": "per_tensor",
             "warmup_steps": 1, "amsgrad": True, "mask_eps": 1e-8, "debias": True, "mask_decay": True,
             "maximize": True, "state_dtype": torch.float64, "foreach": False}  # fmt: skip
    for name, value in whole.items():
        one, other = a_parameter(6), a_parameter(6)
        extra = {"batch_size": 8, "n_dataset": 100} if name in ("boundary", "batch_size", "n_dataset") else {}
        grouped = PRM([{"params": [a_parameter(3)]}, {"params": [one], **extra, name: value}], lr=0.01)
        plain = PRM([other], **{"lr": 0.01, **extra, name: value})
        torch.manual_seed(0)
        for _ in range(3):
            one.grad = torch.randn(6)
            other.grad = one.grad.clone()
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


def test_parameters_without_gradient_late_ones_empty_ones_and_scalars():
    never, late, scalar, empty = (
        a_parameter(3),
        a_parameter(3),
        torch.nn.Parameter(torch.tensor(1.0)),
        a_parameter(0, 2),
    )
    optimizer = PRM([never, late, scalar, empty], lr=0.1)
    for step in range(4):
        scalar.grad, empty.grad = torch.tensor(1.0 + step), torch.ones(0, 2)
        late.grad = torch.ones(3) * (1 + step) if step >= 2 else None
        optimizer.step()
    assert never not in optimizer.state
    assert torch.equal(never, torch.ones(3))
    assert (optimizer.state[scalar]["step"], optimizer.state[late]["step"], optimizer.state[empty]["step"]) == (4, 2, 4)
    # A tensor counts its own steps: the late one moves as a new optimizer would move it.
    alone = a_parameter(3)
    other = PRM([alone], lr=0.1)
    for step in (2, 3):
        alone.grad = torch.ones(3) * (1 + step)
        other.step()
    assert torch.equal(alone, late)


def test_late_groups_start_at_their_first_step():
    first, second = a_parameter(3), a_parameter(3)
    optimizer = PRM([first], lr=0.1, warmup_steps=2)
    for _ in range(3):
        first.grad = torch.ones(3)
        optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    rows = optimizer.get_mask_stats(by="group")
    assert rows[1]["mean_q"] == 1
    assert rows[0]["mean_q"] < 1


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_learning_rate_is_read_at_every_step(capturable, foreach):
    lr = torch.tensor(0.1)
    w, plain = a_parameter(4), a_parameter(4)
    optimizer = PRM([w], lr=lr, foreach=foreach, capturable=capturable)
    other = PRM([plain], lr=0.1)
    for value in (0.1, 0.01, 0.5):
        lr.fill_(value)
        other.param_groups[0]["lr"] = value
        w.grad = torch.randn(4)
        plain.grad = w.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(w, plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_learning_rate_of_shape_1_serves_tensors_of_any_shape(foreach):
    results = []
    for lr in (torch.tensor([0.1]), 0.1):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3,), (2,), ()]]
        optimizer = PRM(params, lr=lr, foreach=foreach)
        for p in params:
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        results.append(params)
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_the_default_device_is_not_the_parameters(foreach):
    p = a_parameter(3)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = PRM([p], foreach=foreach)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 1
    assert not torch.equal(p, before)


@pytest.mark.parametrize(("name", "value"), [("mask", "sfot"), ("reduction", "per_tesnor")])
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


def test_conjugated_complex_parameters_are_refused_as_torch_does():
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.cfloat).conj())
    p.grad = torch.ones_like(p)
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match="conjugated"):
            PRM([p], foreach=foreach).step()


def test_closure_returns_the_loss_and_sees_gradients_enabled():
    w = a_parameter(3)
    optimizer = PRM([w])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3
    assert optimizer.step() is None


def test_hooks_before_and_after_the_step():
    w = a_parameter(2)
    optimizer = PRM([w])
    w.grad = torch.ones(2)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", w.detach().clone())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", w.detach().clone())))
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], torch.ones(2))
    assert torch.equal(seen[1][1], w)


SCHEDULERS = {
    "warmup and cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 7)],
        milestones=[3],
    ),
    "one cycle, which also moves betas": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cyclic, with betas": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(name, tensor_lr):
    if name.startswith("cyclic") and TORCH < (2, 1):
        pytest.skip("CyclicLR of torch 2.0 cycles only SGD's momentum")
    w, adam_w = a_parameter(4), a_parameter(4)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = PRM([w], lr=lr, mask="none")
    adam = torch.optim.AdamW([adam_w], lr=0.1)
    schedules = [SCHEDULERS[name](o) for o in (optimizer, adam)]
    torch.manual_seed(0)
    for _ in range(10):
        w.grad = torch.randn(4)
        adam_w.grad = w.grad.clone()
        for o, schedule in zip((optimizer, adam), schedules):
            o.step()
            schedule.step()
    torch.testing.assert_close(w, adam_w)


def test_gradient_accumulation_is_the_large_batch():
    x, y = torch.randn(32, 5), torch.randn(32, 1)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 1)
        optimizer = PRM(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts)):
                (torch.nn.functional.mse_loss(model(a), b) / parts).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_clipping():
    model = torch.nn.Linear(5, 1)
    optimizer = PRM(model.parameters())
    (1e6 * model(torch.ones(2, 5)).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), clipped):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * g)


def test_grad_scaler_unscales_and_skips_overflows():
    scaler_class = getattr(torch.amp, "GradScaler", None)
    if scaler_class is None:
        pytest.skip("torch before 2.3 has no GradScaler for the CPU")
    scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=1)
    w, plain = a_parameter(4), a_parameter(4)
    optimizer, other = PRM([w], lr=0.1), PRM([plain], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        other.zero_grad()
        loss = (w * (step + 1)).sum()
        scaler.scale(loss).backward()
        if step == 2:
            w.grad[0] = float("inf")
        else:
            (plain * (step + 1)).sum().backward()
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(w, plain)
    assert optimizer.state[w]["step"] == 4


def test_autocast_training_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = PRM(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_repr_shows_the_options():
    text = repr(PRM([a_parameter(1)], softness=3.0))
    assert text.startswith("PRM (")
    assert "softness: 3.0" in text


def test_pickle_and_deepcopy_go_on_alike():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = PRM(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        o.zero_grad()
        m(torch.ones(1, 3)).square().sum().backward()
        o.step()
    for other in (copied_model, pickled_model):
        assert torch.equal(model.weight, other.weight)


def test_an_older_pickle_gets_options_that_came_later():
    optimizer = PRM([a_parameter(2)])
    state = optimizer.__getstate__()
    del state["param_groups"][0]["mask_decay"]
    del state["defaults"]["mask_decay"]
    fresh = PRM.__new__(PRM)
    fresh.__setstate__(state)
    assert fresh.param_groups[0]["mask_decay"] is False
    assert fresh.defaults["mask_decay"] is False


@pytest.mark.parametrize("foreach", [False, True])
def test_the_compiled_step_is_the_same_step(foreach):
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch before 2.1 has no torch.compiler.is_compiling")
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,)]]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = PRM(params, lr=0.1, foreach=foreach)
        optimizer.zero_grad(set_to_none=False)
        step = wrap(optimizer.step)
        for _ in range(4):
            for p in params:
                p.grad.copy_(torch.randn(p.shape))
            step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
