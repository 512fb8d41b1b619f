"""`state_dtype="8bit"`: it trains as float32's state does, resumes bit for bit, and everything reads it."""

import copy
import pickle

import pytest
import torch
from conftest import HOW
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import through_a_file
from strategies import made_up_variances, options

from popriskmin import PRM, diagnose
from popriskmin.mask import pulling_gradient, shrunk
from popriskmin.optimizer.mask_state import recompute
from popriskmin.step import coded

SHAPES = [(70, 64), (130, 33), (5,), (0, 2)]  # the second ends within a block


def make(dtype=torch.float32, shapes=SHAPES, **kwargs):
    """Return parameters and an optimizer, with 8-bit state unless told otherwise."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return params, PRM(params, **{"state_dtype": "8bit", **kwargs})


def run(params, optimizer, steps, seed=1):
    """Step with gradients of a mean that differs from tensor to tensor and of noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = (torch.randn(p.shape, generator=generator) + i).to(p.dtype)
        if optimizer.param_groups[0]["variance"] == "given":
            given_variances = made_up_variances([p.grad.double() for p in params])
            optimizer.set_variances({p: torch.tensor(z) for p, z in zip(params, given_variances)})
        optimizer.step()


@settings(max_examples=6)
@given(options=options(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), blocks=st.booleans())
def test_going_on_is_the_uninterrupted_run_bit_for_bit(options, dtype, blocks):
    how = {"foreach": not blocks, **options}
    params, optimizer = make(dtype, **how)
    run(params, optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    fresh, other = make(dtype, **how)
    with torch.no_grad():
        for p, value in zip(fresh, params):
            p.copy_(value)
    other.load_state_dict(saved)
    for pair in ((params, optimizer), (fresh, other)):
        run(*pair, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, fresh))
    assert torch.equal(optimizer.state[params[1]]["codes"], other.state[fresh[1]]["codes"])


@settings(max_examples=15)
@given(options=options(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_step_follows_from_the_state_as_it_is_stored(options, dtype):
    """Held against the formulas of `popriskmin.mask`, at the state that is read back after the step."""
    params, optimizer = make(dtype, **options)
    run(params, optimizer, 3)
    before = [p.detach().clone() for p in params]
    run(params, optimizer, 1, seed=4)
    hyper = optimizer._applied[0]
    for p, w in zip(params[:2], before):
        state = optimizer.mask_state_of(p)
        m, s, c, _, _, q = recompute(state, 4, hyper)
        v = state["max_exp_avg_sq" if hyper.amsgrad else "exp_avg_sq"]
        divisor = (v / c.bias2).sqrt() + hyper.eps
        if hyper.decoupled_weight_decay:
            w = w * (1 - hyper.lr * hyper.weight_decay * (q if hyper.mask_decay else 1))
        w = w - hyper.lr * q * (m / c.bias1) / divisor
        if hyper.shrinkage:
            start = state["start"] if hyper.shrink_to == "start" else None
            w = shrunk(w, hyper.lr * pulling_gradient(s, q, c, hyper) / divisor, start)
        torch.testing.assert_close(p.detach(), w.to(dtype), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("extra", [{}, {"mask": "soft", "reduction": "per_tensor"}, {"debias": True, "amsgrad": True}])
def test_the_mask_is_as_open_as_with_float32s_state(extra):
    """Over 80 steps on the same gradients; the weights end next to those of float32's state."""
    found = []
    for state_dtype in (torch.float32, "8bit"):
        params, optimizer = make(state_dtype=state_dtype, lr=1e-3, **extra)
        start = [p.detach().clone() for p in params]
        run(params, optimizer, 80)
        found.append((optimizer.get_mask_stats(by="parameter"), [p - w for p, w in zip(params, start)]))
    (rows, moved), (coded_rows, coded_moved) = found
    for i in (0, 1):
        assert coded_rows[i]["mean_q"] == pytest.approx(rows[i]["mean_q"], rel=0.05, abs=0.005)
        assert (coded_moved[i] - moved[i]).norm() < 0.12 * moved[i].norm() + 1e-3


def test_it_takes_3_and_an_eighth_bytes_a_parameter():
    params, optimizer = make(shapes=[(128, 128), (300, 100)])
    run(params, optimizer, 1)
    tensors = [x for p in params for name, x in optimizer.state[p].items() if name != "step"]
    size, count = sum(x.numel() * x.element_size() for x in tensors), sum(p.numel() for p in params)
    assert 3.125 <= size / count < 3.14


def test_small_and_complex_tensors_keep_float32():
    params, optimizer = make(shapes=[(63, 65), (4096,)])
    params.append(torch.nn.Parameter(torch.randn(70, 70, dtype=torch.complex64)))
    optimizer.add_param_group({"params": params[-1:]})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ["codes" in optimizer.state[p] for p in params] == [False, True, False]
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, None])
def test_checkpoints_go_to_and_from_other_states(other):
    params, optimizer = make(amsgrad=True, shrink_to="start")
    run(params, optimizer, 4)
    plain_params, plain = make(state_dtype=other, amsgrad=True, shrink_to="start")
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, w in zip(params, plain_params):
        read, held = optimizer.mask_state_of(p), plain.state[w]
        assert set(read) == set(held)
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_var", "max_exp_avg_sq"):
            torch.testing.assert_close(
                read[name], held[name].float(), rtol=0.01 if other == torch.bfloat16 else 0, atol=0
            )
    _, back = make(amsgrad=True)
    back.load_state_dict(through_a_file(plain.state_dict()))
    for p, w in zip(params, back.param_groups[0]["params"]):
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_var"):
            one, two = optimizer.mask_state_of(p)[name], back.mask_state_of(w)[name]
            assert ((one - two).abs() <= 0.04 * one.abs() + 0.02 * (name == "exp_avg")).all()


def test_adamw_is_taken_over():
    params, _ = make()
    adamw = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    adamw.step()
    optimizer = PRM(params, state_dtype="8bit")
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    held, wanted = optimizer.mask_state_of(params[0]), adamw.state[params[0]]
    assert ((held["exp_avg_sq"] / wanted["exp_avg_sq"] - 1).abs() < 1 / 8).float().mean() > 0.99
    run(params, optimizer, 1)


@pytest.mark.parametrize("codes", [torch.zeros(1, 3, 400, dtype=torch.uint8), torch.zeros(1, 35, 400), "none"])
def test_blocks_that_do_not_fit_are_refused(codes):
    params, optimizer = make()
    run(params, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["codes"] = codes
    with pytest.raises(ValueError, match=r"codes of parameter 0 are .*torch\.uint8 of shape \(1, 35, 400\)"):
        make()[1].load_state_dict(saved)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="state_dtype must be None, '8bit', .* got '4bit'"):
        make(state_dtype="4bit")
    with pytest.raises(ValueError, match="'8bit' needs differentiable=False"):
        make(differentiable=True)
    params, optimizer = make(fused=True, shapes=[(70, 64)])
    with torch.no_grad():
        params[0].set_(params[0].detach().t().contiguous().t())
    with pytest.raises(RuntimeError, match="tensor 0 .*'8bit' needs it contiguous, and it has strides"):
        run(params, optimizer, 1)


def test_copies_and_pickles_go_on_alike():
    params, optimizer = make()
    run(params, optimizer, 2)
    copied_params, copied = copy.deepcopy((params, optimizer))
    pickled_params, pickled = pickle.loads(pickle.dumps((params, optimizer)))
    for pair in ((params, optimizer), (copied_params, copied), (pickled_params, pickled)):
        run(*pair, 2, seed=5)
    for one, two, three in zip(params, copied_params, pickled_params):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_parts_change_nothing(monkeypatch, reduction):
    results = []
    for size in (coded.CPU_BLOCK, 256):
        monkeypatch.setattr(coded, "CPU_BLOCK", size)
        params, optimizer = make(reduction=reduction, fused=False)
        run(params, optimizer, 3)
        results.append(params)
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=0 if reduction == "per_param" else 1e-5, atol=0)


def test_a_tensor_that_is_not_contiguous_steps_as_its_copy():
    results = []
    for transposed in (False, True):
        torch.manual_seed(0)
        w = torch.randn(80, 60)
        p = torch.nn.Parameter(w.t().contiguous().t() if transposed else w)
        optimizer = PRM([p], state_dtype="8bit", amsgrad=True, foreach=True)
        for _ in range(3):
            p.grad = torch.sin(p.detach() * 3)
            optimizer.step()
        results.append(p)
    assert torch.equal(*results)


def in_rows(width, **extra):
    """Step a parameter whose blocks are by rows, as those of a sharded one, its columns from 192 on zeros."""
    [p], optimizer = make(shapes=[(40, width)], foreach=True, **extra)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(4, 40, 256, generator=generator)
    values[..., 192:] = 0
    p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        p.copy_(values[0, :, :width])
    optimizer.state[p]["codes"] = torch.zeros(40, 2, 400, dtype=torch.uint8)
    for grad in values[1:]:
        p.grad = grad[:, :width].clone()
        optimizer.step()
    return p, optimizer


def test_rows_that_are_no_whole_blocks_step_as_if_filled_up_with_zeros():
    (one, optimizer), (two, filled_up) = in_rows(192, amsgrad=True), in_rows(256, amsgrad=True)
    assert torch.equal(one, two[:, :192])
    assert torch.equal(optimizer.state[one]["codes"], filled_up.state[two]["codes"])
    for name, value in optimizer.mask_state_of(one).items():
        assert name == "step" or torch.equal(value, filled_up.mask_state_of(two)[name][:, :192])


@pytest.mark.parametrize("width", [192, 256])
def test_blocks_by_rows_load_where_blocks_are_of_the_whole(width):
    p, optimizer = in_rows(width)
    [w], other = make(shapes=[(40, width)])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[w]["codes"].shape == (1, 40 * width // 128, 400)
    one, two = optimizer.mask_state_of(p), other.mask_state_of(w)
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_var"):
        exact = width == 256
        assert ((one[name] - two[name]).abs() <= (0 if exact else 0.04 * one[name].abs() + 0.02)).all()
    run([w], other, 1)


def test_statistics_and_diagnosis_read_what_the_step_used():
    params, optimizer = make()
    run(params, optimizer, 5)
    _plain_params, plain = make(state_dtype=torch.float32)
    plain.load_state_dict(optimizer.state_dict())
    plain._applied = list(optimizer._applied)
    assert optimizer.get_mask_stats() == plain.get_mask_stats()
    assert optimizer.get_mask_stats(by="parameter") == plain.get_mask_stats(by="parameter")
    assert str(diagnose(optimizer)) == str(diagnose(plain))


def test_capturable_counts_on_the_device():
    params, optimizer = make(capturable=True)
    plain_params, plain = make()
    for pair in ((params, optimizer), (plain_params, plain)):
        run(*pair, 3)
    for one, two in zip(params, plain_params):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_data_of_another_size_is_refused_and_nothing_moves(how):
    params, optimizer = make(**how)
    run(params, optimizer, 2)
    params[0].data = torch.ones(3, 3)
    params[0].grad = torch.ones(3, 3)
    before = [p.detach().clone() for p in params]
    counts = [int(optimizer.state[p]["step"]) for p in params]
    with pytest.raises(RuntimeError, match=r"cannot take it: its codes, of|its state is of another size"):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    assert [int(optimizer.state[p]["step"]) for p in params] == counts
