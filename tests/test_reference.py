"""The page that states the algorithm, against every implementation of it."""

import inspect
import sys

import numpy as np
import pytest
import torch
from conftest import IMPLEMENTATIONS
from frameworks import framework
from hypothesis import given, settings
from hypothesis import strategies as st

from popriskmin import PRM, reference

SHAPES = [(3, 5), (70,), (), (4, 4, 3)]


@st.composite
def numbers(draw):
    """Draw the options that the page has, as PRM takes them."""
    drawn = {
        "lr": draw(st.sampled_from([1e-3, 0.1])),
        "betas": (draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.9, 0.999]))),
        "rho": draw(st.sampled_from([0.0, 0.9, 0.99])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.5])),
        "mask": draw(st.sampled_from(["snr", "soft"])),
        "softness": draw(st.sampled_from([0.3, 4.0])),
        "boundary": draw(st.sampled_from(["batch", "empirical"])),
        "shrinkage": draw(st.sampled_from([0.0, 2.13])),
    }
    batch_size = draw(st.integers(1, 100))
    return {**drawn, "batch_size": batch_size, "n_dataset": batch_size + draw(st.integers(1, 1000))}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def gradients(seed, steps=5):
    means = tensors(seed + 1)
    return [[mean + noise for mean, noise in zip(means, tensors(seed + 2 + i))] for i in range(steps)]


def from_the_page(seed, drawn):
    """Return the weights that the page ends at."""
    names = inspect.signature(reference.step).parameters
    options = {name: value for name, value in drawn.items() if name in names}
    c = drawn["batch_size"] / (drawn["n_dataset"] - drawn["batch_size"])
    options |= {"mask": getattr(reference, drawn["mask"]), "c": c, "a": c if drawn["boundary"] == "empirical" else 1.0}
    weights = tensors(seed)
    states = [reference.begin(w) for w in weights]
    for grads in gradients(seed):
        stepped = [reference.step(w, g, state, **options) for w, g, state in zip(weights, grads, states)]
        weights, states = zip(*stepped)
    return weights


def from_prm(seed, drawn, **how):
    params = [torch.nn.Parameter(w) for w in tensors(seed)]
    optimizer = PRM(params, **drawn, **how)
    for grads in gradients(seed):
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


@settings(max_examples=40)
@given(numbers(), st.integers(0, 1000), st.sampled_from(IMPLEMENTATIONS))
def test_every_implementation_is_what_the_page_says(drawn, seed, how):
    torch.testing.assert_close(from_prm(seed, drawn, **how), list(from_the_page(seed, drawn)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", IMPLEMENTATIONS, ids=str)
def test_the_hard_mask_too(how):
    drawn = {"mask": "hard", "boundary": "empirical", "batch_size": 1, "n_dataset": 4, "lr": 0.1}
    torch.testing.assert_close(from_prm(3, drawn, **how), list(from_the_page(3, drawn)), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax needs Python 3.11")
@settings(max_examples=5)
@given(numbers(), st.integers(0, 1000))
def test_jaxs_is_what_the_page_says(drawn, seed):
    jax, optax = framework("jax"), framework("optax")
    from popriskmin.optax import prm

    jax.config.update("jax_enable_x64", True)
    try:
        solver = prm(drawn["lr"], **{name: value for name, value in drawn.items() if name != "lr"})
        params = [jax.numpy.asarray(w.numpy()) for w in tensors(seed)]
        state = solver.init(params)
        for grads in gradients(seed):
            updates, state = solver.update([g.numpy() for g in grads], state, params)
            params = optax.apply_updates(params, updates)
    finally:
        jax.config.update("jax_enable_x64", False)
    for ours, theirs in zip(from_the_page(seed, drawn), params):
        np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=1e-9, atol=1e-9)
