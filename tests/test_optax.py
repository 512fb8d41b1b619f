import os
import pathlib
import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from frameworks import framework
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import made_up_variances, options
from torch import nn

if sys.version_info < (3, 11):
    pytest.skip("jax needs Python 3.11", allow_module_level=True)
jax = framework("jax")
optax = framework("optax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from popriskmin import PRM  # noqa: E402
from popriskmin.mask import MASKS  # noqa: E402
from popriskmin.optax import _MASKS, mask_stats, prm, scale_by_population_risk  # noqa: E402

# Compiling takes longer than all else here.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 13):  # XLA ends a process with a flag that it does not know
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_num_cpu_devices", 4)  # for arrays that are sharded; all others lie on the first

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 3, 2), "d": ()}
# Each shape is compiled anew, which takes longer than all else.
FEW = ("a", "b")
OF_ALL_DIMENSIONS = ("b", "c", "d")


def arrays(seed, dtype=np.float64, scale=1.0, mean=0.5):
    rng = np.random.default_rng(seed)
    return {name: (scale * (rng.normal(size=shape) + mean)).astype(dtype) for name, shape in SHAPES.items()}


def few():
    return {name: jnp.asarray(x) for name, x in arrays(0, np.float32).items() if name in FEW}


def in_torch(start, grads, variances, drawn):
    """Return the weights after each step of PRM in torch, and its statistics at the end."""
    params = {name: nn.Parameter(torch.from_numpy(np.array(x))) for name, x in start.items()}
    # The loop, which states the mathematics.
    optimizer = PRM(params.values(), **drawn, foreach=False)
    ends = []
    for grad, variance in zip(grads, variances):
        for name, p in params.items():
            p.grad = torch.from_numpy(np.array(grad[name]))
        if drawn.get("variance") == "given":
            optimizer.set_variances({p: torch.from_numpy(np.array(variance[name])) for name, p in params.items()})
        optimizer.step()
        ends.append({name: p.detach().numpy().copy() for name, p in params.items()})
    return ends, optimizer.get_mask_stats()


def in_jax(start, grads, variances, drawn, jit=True):
    solver = prm(**{"learning_rate": drawn["lr"], **{k: v for k, v in drawn.items() if k not in ("lr", "maximize")}})
    params = jax.tree.map(jnp.asarray, start)
    state = solver.init(params)
    update = jax.jit(solver.update) if jit else solver.update
    ends = []
    for grad, variance in zip(grads, variances):
        extra = {"variances": variance} if drawn.get("variance") == "given" else {}
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
        ends.append(jax.tree.map(np.asarray, params))
    return ends, mask_stats(state)


@given(options(), st.integers(0, 1000), st.sampled_from([1e-4, 1.0, 100.0]))
@settings(max_examples=15)
def test_it_is_torchs_prm_in_float64(drawn, seed, scale):
    drawn = {**drawn, "maximize": False}
    start, *grads = (
        {name: x for name, x in arrays(seed + i, scale=scale if i else 1.0).items() if name in OF_ALL_DIMENSIONS}
        for i in range(5)
    )
    variances = [dict(zip(grad, made_up_variances(list(grad.values())))) for grad in grads]
    jax.config.update("jax_enable_x64", True)
    try:
        ours, stats = in_jax(start, grads, variances, drawn, jit=False)
    finally:
        jax.config.update("jax_enable_x64", False)
    theirs, expected = in_torch(start, grads, variances, drawn)
    for one, other in zip(ours, theirs, strict=True):
        for name in start:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-10, atol=1e-10)
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"mask": "soft", "debias": True, "reduction": "per_tensor"},
        {"mask": "threshold", "min_q": 0.1, "amsgrad": True},
        {"shrinkage": 2.0, "batch_size": 10, "n_dataset": 100, "boundary": "empirical"},
        {"shrinkage": 2.0, "batch_size": 10, "n_dataset": 100, "shrink_to": "start", "mask": "none"},
    ],
)
def test_it_is_torchs_prm_in_float32_to_rounding(drawn):
    drawn = {"lr": 0.01, "weight_decay": 0.1, **drawn}
    grads = [arrays(i + 1, np.float32) for i in range(20)]
    jax.config.update("jax_disable_most_optimizations", False)  # as users have it
    try:
        ours, stats = in_jax(arrays(0, np.float32), grads, grads, drawn)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    theirs, expected = in_torch(arrays(0, np.float32), grads, grads, drawn)
    for name in SHAPES:
        np.testing.assert_allclose(ours[-1][name], theirs[-1][name], rtol=2e-5, atol=2e-5)
    assert stats["mean_q"] == pytest.approx(expected["mean_q"], rel=1e-4)
    assert stats["parameter_count"] == expected["parameter_count"]


def test_it_knows_the_masks_of_torch():
    assert _MASKS.keys() == MASKS.keys()


def quadratic(params):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


def trained(solver, params, steps=5, how="jit"):
    state = solver.init(params)

    def step(carry, _=None):
        params, state = carry
        updates, state = solver.update(jax.grad(quadratic)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    if how == "scan":
        return jax.lax.scan(step, (params, state), length=steps)[0]
    step = jax.jit(step) if how == "jit" else step
    carry = (params, state)
    for _ in range(steps):
        carry, _ = step(carry)
    return carry


ALL = {"shrinkage": 1.0, "shrink_to": "start", "amsgrad": True, "batch_size": 2, "n_dataset": 20, "debias": True}


def close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-6)


def test_jit_scan_and_vmap_agree_with_the_loop():
    params = few()
    solver = prm(optax.linear_schedule(0.1, 0.01, 5), weight_decay=optax.constant_schedule(0.1), **ALL)
    plain = trained(solver, params, how="loop")
    close(trained(solver, params), plain)
    close(trained(solver, params, how="scan"), plain)
    two = jax.tree.map(lambda x: jnp.stack([x, x + 1]), params)
    both = jax.vmap(lambda params: trained(solver, params, how="scan")[0])(two)
    close(jax.tree.map(lambda x: x[0], both), plain[0])
    other = trained(solver, jax.tree.map(lambda x: x + 1, params), how="loop")
    close(jax.tree.map(lambda x: x[1], both), other[0])


def test_a_schedule_counts_from_zero():
    solver = prm(lambda count: jnp.where(count == 0, 0.5, 0.0), weight_decay=0.0)
    params = jnp.ones(2)
    state = solver.init(params)
    updates, state = solver.update(jnp.ones(2), state, params)
    np.testing.assert_allclose(updates, -0.25, rtol=1e-5)
    updates, state = solver.update(jnp.ones(2), state, params)
    assert np.all(np.asarray(updates) == 0)


def test_scale_by_population_risk_composes_to_prm():
    params = few()
    chained = optax.chain(
        scale_by_population_risk(softness=3.0, debias=True),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    whole = prm(0.01, weight_decay=0.1, softness=3.0, debias=True)
    one, other = trained(chained, params), trained(whole, params)
    close(one[0], other[0])
    assert mask_stats(one[1]) == pytest.approx(mask_stats(other[1]))


def test_multi_transform_and_masked_take_parts():
    params = few()
    labels = {"a": "prm", "b": "sgd"}
    solver = optax.multi_transform({"prm": prm(0.01, **ALL), "sgd": optax.sgd(0.1)}, labels)
    ends, state = trained(solver, params)
    alone, own = trained(prm(0.01, **ALL), {"a": params["a"]})
    close({"a": ends["a"]}, alone)
    assert mask_stats(state) == pytest.approx(mask_stats(own), rel=1e-4)
    assert mask_stats(state)["parameter_count"] == 12
    assert set(mask_stats(state, by="parameter")) == {"['a']"}
    masked = optax.masked(prm(0.01, **ALL), {"a": True, "b": False})
    close(trained(masked, params)[0]["a"], alone["a"])


def test_hyperparameters_are_injected():
    params = few()
    injected = optax.inject_hyperparams(prm)(
        learning_rate=0.01, softness=optax.constant_schedule(3.0), shrinkage=1.0, batch_size=2, n_dataset=20
    )
    plain = prm(0.01, softness=3.0, shrinkage=1.0, batch_size=2, n_dataset=20)
    one, other = trained(injected, params), trained(plain, params)
    close(one[0], other[0])
    assert mask_stats(one[1])["mean_q"] == pytest.approx(mask_stats(other[1])["mean_q"], rel=1e-4)


def test_gradients_are_accumulated_by_multisteps():
    """Its inner update runs at every micro-step, and its outcome is thrown away at all but the last."""
    solver, accumulating = prm(0.01, **ALL), optax.MultiSteps(prm(0.01, **ALL), every_k_schedule=2)
    params = few()
    ends, state = params, solver.init(params)
    small, of_small = params, accumulating.init(params)
    update = jax.jit(accumulating.update)
    for i in range(3):
        micro = [{name: jnp.asarray(arrays(2 * i + j, np.float32)[name]) for name in FEW} for j in range(2)]
        for grads in micro:
            updates, of_small = update(grads, of_small, small)
            small = optax.apply_updates(small, updates)
        updates, state = solver.update(jax.tree.map(lambda a, b: (a + b) / 2, *micro), state, ends)
        ends = optax.apply_updates(ends, updates)
    close(small, ends)
    assert mask_stats(of_small) == pytest.approx(mask_stats(state), rel=1e-4)


def test_a_mask_of_ones_own():
    def half(signal, noise, hyper):
        return jnp.full_like(signal, 0.5) * (signal > hyper.softness * noise)

    solver = prm(0.1, weight_decay=0.0, mask=half, softness=0.5)
    params = jnp.ones(3)
    updates, state = jax.jit(solver.update)(jnp.ones(3), solver.init(params), params)
    np.testing.assert_allclose(updates, -0.05, rtol=1e-5)
    assert mask_stats(state)["mean_q"] == 0.5
    wrong = prm(0.1, mask=lambda signal, noise, hyper: signal.mean())
    with pytest.raises(ValueError, match=r"must return q in the signal's shape \(3,\), got \(\)"):
        wrong.update(jnp.ones(3), wrong.init(params), params)


def test_half_precision_keeps_its_state_in_float32():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    solver = prm(0.1, **ALL)
    ends, state = trained(solver, params, how="scan")
    assert ends["w"].dtype == jnp.bfloat16
    assert {state.mu["w"].dtype, state.nu["w"].dtype, state.var["w"].dtype} == {jnp.dtype(jnp.float32)}
    guarded = optax.apply_if_finite(solver, 3)  # whose branches must agree in types
    close(trained(guarded, params)[0], ends)


def test_weights_are_drawn_to_zero_exactly():
    solver = prm(0.1, weight_decay=0.0, shrinkage=3.0, batch_size=10, n_dataset=100)
    params = {"w": jnp.full((2, 50), 0.05), "b": jnp.full(50, 0.05)}
    state, key, update = solver.init(params), jax.random.key(0), jax.jit(solver.update)
    for i in range(60):
        grads = {name: jax.random.normal(jax.random.fold_in(key, i), x.shape) for name, x in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.mean(np.asarray(params["w"]) == 0) > 0.5
    assert np.all(np.asarray(params["b"]) != 0)  # of one dimension


def test_variances_are_given_with_each_update():
    solver = prm(0.1, weight_decay=0.0, variance="given")
    params = {"w": jnp.ones(3)}
    state = solver.init(params)
    updates, state = solver.update({"w": jnp.ones(3)}, state, params, variances={"w": jnp.array([0.0, 1.0, 4.0])})
    np.testing.assert_allclose(updates["w"], [-0.1, -0.05, -0.02], rtol=1e-4)
    with pytest.raises(ValueError, match=r"variance='given' needs update\(grads, state, params, variances=...\)"):
        solver.update({"w": jnp.ones(3)}, state, params)
    streaming = prm(0.1)
    with pytest.raises(ValueError, match="variance='streaming' takes no variances"):
        streaming.update(params, streaming.init(params), params, variances=params)


def test_pickle_and_orbax_take_the_state(tmp_path):
    checkpoint = framework("orbax.checkpoint")
    params = few()
    solver = prm(0.01, **ALL)
    params, state = trained(solver, params)
    close(pickle.loads(pickle.dumps(jax.device_get(state))), state)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        target = {"params": jax.tree.map(jnp.zeros_like, params), "state": solver.init(params)}
        loaded = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(loaded["state"]) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves({"params": params, "state": state}), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert mask_stats(loaded["state"]) == mask_stats(state)
    grads = jax.grad(quadratic)(params)
    close(solver.update(grads, loaded["state"], loaded["params"]), solver.update(grads, state, params))


def stepped(solver, place):
    """Return the weights and the state after three steps with arrays that are placed so."""

    @jax.jit
    def step(params, state, grads):
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rows = np.arange(32, dtype=np.float32).reshape(8, 4)
    params = place(rows / 16 - 1)
    state = solver.init(params)
    for i in range(3):
        params, state = step(params, state, place(np.sin(rows + i)))
    return params, state


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_sharded_arrays_stay_sharded(reduction):
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    assert len(sharding.device_set) == 4
    solver = prm(0.1, reduction=reduction)
    whole, of_whole = stepped(solver, jnp.asarray)
    params, state = stepped(solver, lambda x: jax.device_put(x, sharding))
    assert params.sharding.is_equivalent_to(sharding, 2), params.sharding
    assert state.var.sharding.is_equivalent_to(sharding, 2), state.var.sharding
    np.testing.assert_allclose(params, whole, rtol=1e-6)
    assert mask_stats(state)["mean_q"] == pytest.approx(mask_stats(of_whole)["mean_q"], abs=1e-6)


def test_statistics_before_a_step_and_of_what_has_none():
    solver = prm(0.1)
    state = solver.init(jnp.ones(2))
    assert mask_stats(state) is None
    assert mask_stats(state, by="parameter") == {}
    with pytest.raises(TypeError, match="needs the state of popriskmin.optax.prm, got tuple without one"):
        mask_stats(optax.adam(0.1).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="by must be None or 'parameter', got 'group'"):
        mask_stats(state, by="group")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
        ({"rho": 2}, r"rho must be a number in \[0, 1\), got 2"),
        ({"softness": -1}, "softness must be a finite number >= 0"),
        ({"mask": "snrr"}, "mask must be one of snr, soft, hard, threshold, none, got 'snrr'"),
        ({"boundary": "empirical"}, "boundary='empirical' needs batch_size and n_dataset"),
        ({"shrinkage": 1.0}, "shrinkage needs batch_size and n_dataset"),
        ({"shrinkage": 1.0, "batch_size": 9, "n_dataset": 9}, "n_dataset must be larger than batch_size"),
        ({"shrink_to": "here"}, "shrink_to must be one of zero, start, got 'here'"),
        ({"min_q": 2}, r"min_q must be a number in \[0, 1\], got 2"),
        ({"warmup_steps": 0.5}, "warmup_steps must be a whole number >= 0, got 0.5"),
        ({"debias": True, "bias_correction": False}, "debias=True needs bias_correction=True"),
        ({"mask": "threshold", "bias_correction": False}, "mask='threshold' needs bias_correction=True"),
        ({"mask_decay": True, "decoupled_weight_decay": False}, "mask_decay=True needs decoupled_weight_decay=True"),
    ],
)
def test_a_bad_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        prm(**{"learning_rate": 0.1, **wrong})


def test_missing_and_complex_parameters_are_named():
    solver = prm(0.1)
    with pytest.raises(ValueError, match="weight_decay and shrinkage need the parameters"):
        solver.update(jnp.ones(2), solver.init(jnp.ones(2)))
    with pytest.raises(TypeError, match=r"parameter \['w'\] is complex: optax.contrib.split_real_and_imaginary"):
        solver.init({"w": jnp.ones(2, jnp.complex64)})
    split = optax.contrib.split_real_and_imaginary(prm(0.1))
    params = {"w": jnp.ones(2, jnp.complex64)}
    split.update(params, split.init(params), params)


def test_the_page_runs():
    """The blocks of docs/jax.md, one after another."""
    text = (ROOT / "docs/jax.md").read_text()
    namespace = {"__name__": "documentation"}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/jax.md", "exec"), namespace)


def test_the_flax_example(monkeypatch, capsys):
    framework("flax")
    monkeypatch.setattr(sys, "argv", ["with_jax.py", "--epochs", "2"])
    runpy.run_path(str(ROOT / "examples/with_jax.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["adamw", "prm"]
    assert all(0.2 < float(row.split()[3].strip(",")) <= 1 for row in rows)
    assert 0 < float(rows[1].split()[-1]) < 1


def test_the_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jax_step.py", "--rounds", "2"])
    names = runpy.run_path(str(ROOT / "benchmarks/jax_step.py"))
    monkeypatch.setitem(names["parameters"].__globals__, "WIDTH", 16)
    monkeypatch.setitem(names["parameters"].__globals__, "LAYERS", 1)
    names["main"]()
    rows = capsys.readouterr().out.splitlines()
    assert "0.2M scalars" in rows[0]
    assert len(rows) == 6
    assert all(row.endswith("times optax.adamw") for row in rows[1:])
