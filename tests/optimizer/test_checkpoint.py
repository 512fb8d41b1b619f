"""Saving and loading: bit for bit, across dtypes and implementations, and from AdamW."""

import copy

import pytest
import torch
from conftest import HOW, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import through_a_file
from strategies import made_up_variances, options

from popriskmin import PRM
from popriskmin.optimizer.checkpoint import STATE_FORMAT

SHAPES = [(4, 3), (5,), (), (0, 2)]


def make(optimizer=PRM, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return params, optimizer(params, **kwargs)


def run(params, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if optimizer.param_groups[0].get("variance") == "given":
            variances = made_up_variances([p.grad.double() for p in params])
            optimizer.set_variances({p: torch.tensor(z) for p, z in zip(params, variances)})
        optimizer.step()


@settings(max_examples=40)
@given(
    options=options(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), how=st.sampled_from(HOW)
)
def test_going_on_is_the_uninterrupted_run_bit_for_bit(options, dtype, how):
    params, optimizer = make(dtype=dtype, **how, **options)
    run(params, optimizer, 3, seed=1)
    saved = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    run(params, optimizer, 3, seed=2)

    fresh_params, fresh = make(dtype=dtype, **how)
    with torch.no_grad():
        for p, value in zip(fresh_params, saved["params"]):
            p.copy_(value)
    fresh.load_state_dict(saved["optimizer"])
    run(fresh_params, fresh, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, fresh_params))
    for a, b in zip(params, fresh_params):
        assert optimizer.state[a].keys() == fresh.state[b].keys()
        assert all(torch.equal(optimizer.state[a][k], fresh.state[b][k]) for k in optimizer.state[a])


def test_a_tensor_learning_rate_is_saved_and_kept_apart():
    params, optimizer = make(lr=torch.tensor(0.1))
    run(params, optimizer, 2, seed=1)
    saved = through_a_file(optimizer.state_dict())
    _, fresh = make(lr=torch.tensor(0.5))
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == pytest.approx(0.1)
    fresh.param_groups[0]["lr"].fill_(0.7)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_checkpoint_without_later_options_leaves_them_as_built():
    params, optimizer = make()
    run(params, optimizer, 2, seed=1)
    saved = through_a_file(optimizer.state_dict())
    for name in ("min_q", "variance"):
        del saved["param_groups"][0][name]
    fresh_params, fresh = make(min_q=0.2, variance="given")
    fresh.load_state_dict(saved)
    assert (fresh.param_groups[0]["min_q"], fresh.param_groups[0]["variance"]) == (0.2, "given")
    run(fresh_params, fresh, 1, seed=2)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (fresh.param_groups[0]["min_q"], fresh.param_groups[0]["variance"]) == (0.0, "streaming")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_float32_state(dtype):
    params, optimizer = make(dtype=dtype)
    run(params, optimizer, 3, seed=1)
    fresh_params, fresh = make(dtype=dtype)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for a, b in zip(params, fresh_params):
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_var"):
            assert fresh.state[b][name].dtype == torch.float32
            assert torch.equal(fresh.state[b][name], optimizer.state[a][name])
    # The values would not survive a trip through the parameter's dtype: the test above can fail.
    exp_avg = optimizer.state[params[0]]["exp_avg"]
    assert not torch.equal(exp_avg.to(dtype).float(), exp_avg)


def test_state_dtype_is_the_optimizers_own():
    params, optimizer = make(state_dtype=torch.float64)
    run(params, optimizer, 2, seed=1)
    assert optimizer.state[params[0]]["exp_avg_var"].dtype == torch.float64
    fresh_params, fresh = make()
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state[fresh_params[0]]["exp_avg_var"].dtype == torch.float32
    again_params, again = make(state_dtype=torch.float64)
    again.load_state_dict(fresh.state_dict())
    assert again.state[again_params[0]]["exp_avg_var"].dtype == torch.float64


@pytest.mark.parametrize("written", [*HOW, {"capturable": True}])
@pytest.mark.parametrize("read", [*HOW, {"capturable": True}])
def test_a_checkpoint_survives_a_change_of_implementation(written, read):
    params, optimizer = make(lr=0.1, **written)
    run(params, optimizer, 3, seed=1)
    fresh_params, fresh = make(**read)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    group = fresh.param_groups[0]
    assert group["lr"] == 0.1
    assert (group["foreach"], group["capturable"]) == (read.get("foreach"), read.get("capturable", False))
    with torch.no_grad():
        for a, b in zip(fresh_params, params):
            a.copy_(b)
    run(params, optimizer, 3, seed=2)
    run(fresh_params, fresh, 3, seed=2)
    for a, b in zip(params, fresh_params):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_complex_state():
    z = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = PRM([z])
    z.grad = torch.randn(3, dtype=torch.complex64)
    optimizer.step()
    fresh = PRM([z])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(fresh.state[z]["exp_avg_var"], optimizer.state[z]["exp_avg_var"])
    assert fresh.state[z]["exp_avg_var"].dtype == torch.complex64


@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize(("debias", "variance"), [(False, "streaming"), (True, "streaming"), (True, "given")])
def test_an_adam_checkpoint_is_taken_over(theirs, extra, debias, variance):
    if extra.get("fused") and TORCH < (2, 4):
        pytest.skip("torch before 2.4 has no fused Adam on the CPU")
    params, adam = make(theirs, lr=0.05, betas=(0.8, 0.95), weight_decay=0.2, **extra)
    run(params, adam, 20, seed=1)
    fresh_params, fresh = make(softness=2.0, rho=0.9, debias=debias, variance=variance)
    fresh.load_state_dict(through_a_file(adam.state_dict()), keep=())
    group = fresh.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.05, (0.8, 0.95), 0.2)
    assert (group["softness"], group["rho"], group["debias"], group["fused"]) == (2.0, 0.9, debias, None)
    for a, b in zip(params, fresh_params):
        state = fresh.state[b]
        assert state["step"] == 20
        assert torch.equal(state["exp_avg"], adam.state[a]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], adam.state[a]["exp_avg_sq"])
        m_hat, v_hat = state["exp_avg"] / (1 - 0.8**20), state["exp_avg_sq"] / (1 - 0.95**20)
        expected = (v_hat - m_hat**2).clamp(min=0) * (1 - 0.9 ** (19 if debias and variance == "streaming" else 20))
        torch.testing.assert_close(state["exp_avg_var"], expected)
    run(fresh_params, fresh, 1, seed=2)
    # s was not zero, so the mask is neither fully open nor shut at the switch.
    assert 0.01 < fresh.get_mask_stats()["mean_q"] < 0.9


def test_the_moments_carry_on_exactly():
    """With the mask open, the run that switches from AdamW is AdamW's own."""
    params, adam = make(torch.optim.AdamW, lr=0.05)
    run(params, adam, 5, seed=1)
    switched_params, _ = make()
    with torch.no_grad():
        for a, b in zip(switched_params, params):
            a.copy_(b)
    switched = PRM(switched_params, mask="none", foreach=True)
    switched.load_state_dict(copy.deepcopy(adam.state_dict()), keep=())
    run(params, adam, 5, seed=2)
    run(switched_params, switched, 5, seed=2)
    for a, b in zip(params, switched_params):
        assert torch.equal(a, b) if TORCH >= (2, 6) else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_amsgrad_without_a_saved_maximum_starts_at_v():
    params, adam = make(torch.optim.AdamW)
    run(params, adam, 3, seed=1)
    saved = adam.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    fresh_params, fresh = make()
    fresh.load_state_dict(saved)
    for p in fresh_params:
        assert torch.equal(fresh.state[p]["max_exp_avg_sq"], fresh.state[p]["exp_avg_sq"])


def unchanged_after(fresh_params, fresh, saved, message, error=ValueError):
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(error, match=message):
        fresh.load_state_dict(saved)
    after = fresh.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_what_does_not_fit_is_named_and_changes_nothing():
    params, optimizer = make()
    run(params, optimizer, 2, seed=1)
    good = optimizer.state_dict()

    newer = copy.deepcopy(good)
    newer["param_groups"][0]["state_format"] = STATE_FORMAT + 1
    unchanged_after(params, optimizer, newer, f"newer popriskmin.*{STATE_FORMAT + 1}.*upgrade popriskmin")

    shape = copy.deepcopy(good)
    shape["state"][1]["exp_avg_sq"] = torch.zeros(7)
    unchanged_after(params, optimizer, shape, r"exp_avg_sq of parameter 1 has shape \(7,\).*has shape \(5,\)")

    mask = copy.deepcopy(good)
    mask["param_groups"][0]["mask"] = "sharp"
    unchanged_after(params, optimizer, mask, "mask must be one of .* got 'sharp'")

    sgd_params, sgd = make(torch.optim.SGD, lr=0.1, momentum=0.9)
    run(sgd_params, sgd, 2, seed=1)
    unchanged_after(params, optimizer, sgd.state_dict(), "takes the state of PRM, AdamW or Adam")

    fewer = PRM(params[:2]).state_dict()
    unchanged_after(params, optimizer, fewer, "doesn't match the size of optimizer's group")
    two = PRM([{"params": params[:2]}, {"params": params[2:]}]).state_dict()
    unchanged_after(params, optimizer, two, "different number of parameter groups")


def test_users_hooks_see_the_checkpoint_as_it_is():
    params, optimizer = make()
    if not hasattr(optimizer, "register_load_state_dict_pre_hook"):
        pytest.skip("torch before 2.1 has no load_state_dict hooks")
    run(params, optimizer, 2, seed=1)
    fresh_params, fresh = make()
    seen = []

    def double(_, state_dict):
        seen.extend(type(v) for v in state_dict["state"][0].values())
        state_dict["state"][0]["exp_avg"] = 2 * state_dict["state"][0]["exp_avg"]
        return state_dict

    fresh.register_load_state_dict_pre_hook(double)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.state[fresh_params[0]]["exp_avg"].dtype))
    expected = 2 * optimizer.state[params[0]]["exp_avg"]
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(fresh.state[fresh_params[0]]["exp_avg"], expected)
    assert seen == [torch.Tensor] * 4 + [torch.float32]


def test_parameter_names_go_into_the_checkpoint():
    model = torch.nn.Linear(2, 1)
    optimizer = PRM(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float64, None])
def test_the_state_dtype_is_saved_by_name_and_stays_the_optimizers_own(state_dtype):
    params, optimizer = make(state_dtype=state_dtype)
    run(params, optimizer, 2, seed=0)
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["state_dtype"] == {torch.bfloat16: "bfloat16", torch.float64: "float64"}.get(
        state_dtype
    )
    assert optimizer.param_groups[0]["state_dtype"] == state_dtype
    fresh_params, fresh = make(state_dtype=state_dtype)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["state_dtype"] == state_dtype
    run(fresh_params, fresh, 1, seed=1)


def test_adamws_tensor_betas_are_taken_as_numbers():
    params, theirs = make(torch.optim.AdamW)
    run(params, theirs, 2, seed=0)
    saved = theirs.state_dict()
    saved["param_groups"][0]["betas"] = (torch.tensor(0.8), torch.tensor(0.99))
    fresh_params, fresh = make()
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["betas"] == pytest.approx((0.8, 0.99))
    run(fresh_params, fresh, 1, seed=1)


def test_a_step_counter_saved_as_a_number():
    params, optimizer = make()
    run(params, optimizer, 2, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    _, fresh = make()
    fresh.load_state_dict(saved)
    assert torch.equal(next(iter(fresh.state.values()))["step"], torch.tensor(2.0))


def test_state_of_parameters_that_have_not_stepped_stays_absent():
    params, optimizer = make()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    fresh_params, fresh = make()
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert list(fresh.state) == [fresh_params[0]]
    run(fresh_params, fresh, 1, seed=0)
    assert [int(fresh.state[p]["step"]) for p in fresh_params] == [2, 1, 1, 1]


def test_what_is_kept_stays_whatever_the_checkpoint_says():
    _, theirs = make(torch.optim.AdamW, lr=3e-4, weight_decay=0.3, betas=(0.8, 0.9))
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda epoch: 0.5)
    run(theirs.param_groups[0]["params"], theirs, 2, seed=1)
    saved = theirs.state_dict()
    _, ours = make(lr=0.01, weight_decay=0.2)
    ours.load_state_dict(saved, keep=("lr", "betas"))
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.01, 0.3, (0.9, 0.999))
    # A scheduler that is built now starts from what was kept.
    torch.optim.lr_scheduler.LambdaLR(ours, lambda epoch: 0.1)
    assert group["lr"] == pytest.approx(1e-3)
    assert ours.state[group["params"][0]]["step"] == 2
    # PRM's own checkpoints, too.
    _, again = make(lr=0.5, softness=7.0)
    again.load_state_dict(ours.state_dict(), keep=["softness"])
    assert (again.param_groups[0]["softness"], again.param_groups[0]["lr"]) == (7.0, group["lr"])


def test_a_learning_rate_that_an_adamw_checkpoint_replaces_is_warned_of(recwarn):
    _, theirs = make(torch.optim.AdamW, lr=3e-4)
    run(theirs.param_groups[0]["params"], theirs, 1, seed=1)
    _, ours = make(lr=0.01)
    with pytest.warns(
        UserWarning, match=r"group 0 takes the learning rate of the checkpoint, 0.0003, and no longer"
    ) as said:
        ours.load_state_dict(theirs.state_dict())
    assert said[0].filename == __file__
    assert ours.param_groups[0]["lr"] == 3e-4
    recwarn.clear()
    for keep in (("lr",), ()):
        make(lr=0.01)[1].load_state_dict(theirs.state_dict(), keep=keep)
    make(lr=3e-4)[1].load_state_dict(theirs.state_dict())
    make(lr=0.01)[1].load_state_dict(ours.state_dict())  # as torch does with its own
    assert not [w for w in recwarn if "learning rate" in str(w.message)]


def test_bad_names_to_keep_are_refused_and_nothing_is_loaded():
    _, theirs = make(lr=3e-4)
    run(theirs.param_groups[0]["params"], theirs, 1, seed=1)
    _, ours = make(lr=0.01)
    with pytest.raises(TypeError, match=r"got the one name 'lr': write keep=\('lr',\)"):
        ours.load_state_dict(theirs.state_dict(), keep="lr")
    with pytest.raises(ValueError, match="keep has 'weigth_decay', which is no option: did you mean weight_decay"):
        ours.load_state_dict(theirs.state_dict(), keep=["weigth_decay"])
    assert not ours.state
    assert ours.param_groups[0]["lr"] == 0.01


def test_adamws_tensor_options_are_taken_as_numbers():
    _, theirs = make(torch.optim.AdamW, lr=0.01)
    run(theirs.param_groups[0]["params"], theirs, 1, seed=1)
    saved = theirs.state_dict()
    saved["param_groups"][0].update(eps=torch.tensor(1e-6, dtype=torch.float64), weight_decay=torch.tensor(0.25))
    for keep, expected in (((), 0.25), (("weight_decay",), 0.5)):
        params, ours = make(lr=0.01, weight_decay=0.5)
        ours.load_state_dict(saved, keep=keep)
        assert (ours.param_groups[0]["eps"], ours.param_groups[0]["weight_decay"]) == (1e-6, expected)
        run(params, ours, 1, seed=2)
