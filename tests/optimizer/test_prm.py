"""The class: parameters of every kind, tensor learning rates, copies, pickles and compiled steps."""

import copy
import pickle

import pytest
import torch

from popriskmin import PRM


def a_parameter(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, **kwargs))


@pytest.mark.parametrize("foreach", [False, True, None])
def test_a_sparse_gradient_in_a_later_group_moves_nothing(foreach):
    dense, embedding = a_parameter(2), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PRM([{"params": [dense]}, {"params": embedding.parameters()}], foreach=foreach)
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(foreach):
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PRM(embedding.parameters(), foreach=foreach)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="PRM does not support sparse gradients; use sparse=False"):
        optimizer.step()


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


def test_conjugated_complex_parameters_are_refused_as_torch_does():
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.cfloat).conj())
    p.grad = torch.ones_like(p)
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match="conjugated"):
            PRM([p], foreach=foreach).step()


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
    came_later = {"mask_decay": False, "min_q": 0.0, "variance": "streaming"}
    for name in came_later:
        del state["param_groups"][0][name]
        del state["defaults"][name]
    fresh = PRM.__new__(PRM)
    fresh.__setstate__(state)
    for name, value in came_later.items():
        assert fresh.param_groups[0][name] == value
        assert fresh.defaults[name] == value
    fresh.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("variance", ["streaming", "given"])
def test_the_compiled_step_is_the_same_step(foreach, variance):
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch before 2.1 has no torch.compiler.is_compiling")
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,)]]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = PRM(params, lr=0.1, foreach=foreach, variance=variance, min_q=0.1)
        optimizer.zero_grad(set_to_none=False)
        variances = {p: torch.zeros_like(p) for p in params}
        step = wrap(optimizer.step)
        for _ in range(4):
            for p in params:
                p.grad.copy_(torch.randn(p.shape))
                variances[p].copy_(torch.rand(p.shape))
            if variance == "given":
                optimizer.set_variances(variances)
            step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
