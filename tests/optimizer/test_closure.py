"""When a step's gradients are there: at once without a closure, else after it."""

import pytest
import torch

from popriskmin import PRM
from popriskmin.optimizer.closure import with_gradients

OPTIMIZERS = [PRM, torch.optim.AdamW, torch.optim.SGD]


@pytest.fixture(params=OPTIMIZERS)
def watched(request):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = request.param([w], lr=0.1)
    seen = []

    def see():
        seen.append((w.grad.clone(), w.detach().clone()))

    optimizer.register_step_pre_hook(lambda _, args, kwargs: with_gradients(args, kwargs, see))
    return w, optimizer, seen


def closure_of(w):
    def closure():
        w.grad = torch.full((2,), 3.0)
        return 7.0

    return closure


def test_without_a_closure_the_gradients_are_there_before_the_step(watched):
    w, optimizer, seen = watched
    w.grad = torch.ones(2)
    assert optimizer.step() is None
    ((grad, before),) = seen
    assert torch.equal(grad, torch.ones(2))
    assert torch.equal(before, torch.ones(2))
    assert not torch.equal(w, before)


@pytest.mark.parametrize("by_name", [True, False])
def test_with_a_closure_they_are_there_after_it_and_before_the_step(watched, by_name):
    w, optimizer, seen = watched
    loss = optimizer.step(closure=closure_of(w)) if by_name else optimizer.step(closure_of(w))
    assert loss == 7.0
    ((grad, before),) = seen
    assert torch.equal(grad, torch.full((2,), 3.0))
    assert torch.equal(before, torch.ones(2))


def test_a_closure_that_is_none_counts_as_none_given(watched):
    w, optimizer, seen = watched
    w.grad = torch.ones(2)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert len(seen) == 2


def test_an_error_ends_the_step():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = PRM([w], lr=0.1)

    def refuse():
        raise RuntimeError("not measured")

    optimizer.register_step_pre_hook(lambda _, args, kwargs: with_gradients(args, kwargs, refuse))
    with pytest.raises(RuntimeError, match="not measured"):
        optimizer.step(closure_of(w))
    assert torch.equal(w, torch.ones(2))
