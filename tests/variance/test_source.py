"""What all sources share, through `Microbatches`: when gradients start anew, and what is done to them until a step."""

import pytest
import torch
from conftest import TORCH
from simulated import Rows, flat_grad, given, mean_loss, still
from torch import nn

from popriskmin import PRM
from popriskmin.variance import Examples, Microbatches
from popriskmin.variance.source import norms

WIDTH, K = 50, 4


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(K, 8, WIDTH) + 3 * torch.randn(WIDTH)


@pytest.fixture
def watched():
    model = Rows(WIDTH)
    optimizer = still(model.parameters())
    return model, optimizer, Microbatches(optimizer)


def accumulate(model, rows, scale=1.0):
    for x in rows:
        (mean_loss(model, x) * (scale / len(rows))).backward()


def expected(rows):
    return rows.mean(1).var(0) / len(rows)


def check(optimizer, rows, times=1.0):
    torch.testing.assert_close(given(optimizer), times * expected(rows), rtol=1e-5, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_start_anew_when_cleared_after_a_step(watched, rows, set_to_none):
    model, optimizer, _ = watched
    for step in range(3):
        accumulate(model, rows + step * rows.sin())
        optimizer.step()
        check(optimizer, rows + step * rows.sin())
        optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_start_anew_when_cleared_without_a_step(watched, rows, set_to_none, passes):
    model, optimizer, _ = watched
    accumulate(model, 100 * rows[:passes])
    optimizer.zero_grad(set_to_none=set_to_none)
    accumulate(model, rows)
    optimizer.step()
    check(optimizer, rows)


def test_gradients_cleared_after_a_pass_that_failed(watched, rows):
    model, optimizer, _ = watched
    accumulate(model, rows)
    handle = model.last.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mean_loss(model, rows[0]).backward()
    handle.remove()
    optimizer.zero_grad()
    accumulate(model, rows)
    optimizer.step()
    check(optimizer, rows)


def test_gradients_kept_after_a_pass_that_failed_are_refused(watched, rows):
    model, _, _ = watched
    mean_loss(model, rows[0]).backward()
    handle = model.last.register_hook(lambda g: 1 / 0)
    last = model.last.sum()  # the pass takes what was computed last first
    with pytest.raises(ZeroDivisionError):
        (last + model.first.sum()).backward()
    handle.remove()
    assert model.first.grad._version == 1
    with pytest.raises(RuntimeError, match="zero_grad.. after one that failed"):
        mean_loss(model, rows[1]).backward()


def test_gradients_that_were_not_cleared_are_refused(watched, rows):
    model, optimizer, _ = watched
    accumulate(model, rows)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"parameter \d was not cleared after the last step: call optimizer.zero_gr"):
        mean_loss(model, rows[0]).backward()
    optimizer.zero_grad()
    accumulate(model, rows)
    optimizer.step()
    with pytest.raises(RuntimeError, match="not cleared after the last step"):
        optimizer.step()


def test_gradients_changed_while_accumulated_are_refused(watched, rows):
    model, _, _ = watched
    mean_loss(model, rows[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="changed while it was accumulated.*clip or unscale it only after the last"):
        mean_loss(model, rows[1]).backward()


def test_a_gradient_copied_to_another_place_goes_on(watched, rows):
    model, optimizer, _ = watched
    for x in rows:
        (mean_loss(model, x) / K).backward()
        for p in model.parameters():
            p.grad = p.grad.clone()
    optimizer.step()
    check(optimizer, rows)


def test_gradients_that_never_arrived_are_refused(rows):
    model = Rows(WIDTH)
    optimizer = still(model.named_parameters())
    Microbatches(optimizer)
    accumulate(model, rows)
    optimizer.zero_grad()
    optimizer.step()  # without gradients there is nothing to say
    model.double()
    accumulate(model, rows.double())
    with pytest.raises(
        RuntimeError, match="parameter first has a gradient that Microbatches has not seen arrive: build"
    ):
        optimizer.step()


def test_a_parameter_that_was_frozen_is_refused_once_it_has_a_gradient(rows):
    model = Rows(WIDTH)
    model.last.requires_grad_(False)
    optimizer = still(model.named_parameters())
    Microbatches(optimizer)
    accumulate(model, rows)
    optimizer.step()
    optimizer.zero_grad()
    model.last.requires_grad_(True)
    accumulate(model, rows)
    with pytest.raises(RuntimeError, match="parameter last has a gradient that Microbatches has not seen"):
        optimizer.step()


def test_a_gradient_cleared_in_place_and_not_reached_again_has_no_variance(watched, rows):
    model, optimizer, _ = watched
    for _ in range(2):
        accumulate(model, rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for x in rows:
        (model.first * x.mean(0)[: WIDTH - 3]).sum().div(K).backward()
    optimizer.step()
    z = given(optimizer)
    torch.testing.assert_close(z[: WIDTH - 3], expected(rows)[: WIDTH - 3])
    assert torch.equal(z[WIDTH - 3 :], torch.zeros(3))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closure_makes_the_gradients(watched, rows, by_keyword):
    model, optimizer, _ = watched

    def closure():
        optimizer.zero_grad()
        accumulate(model, rows)
        return 7.0

    for _ in range(2):
        assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 7.0
        check(optimizer, rows)


def test_gradients_taken_by_autograd_grad_do_not_count(watched, rows):
    model, optimizer, _ = watched
    for x in rows:
        loss = mean_loss(model, x) / K
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
    optimizer.step()
    check(optimizer, rows)


def test_hooks_of_the_parameters_come_first(watched, rows):
    model, optimizer, _ = watched
    for p in model.parameters():
        p.register_hook(lambda g: 3 * g)
    accumulate(model, rows)
    optimizer.step()
    check(optimizer, rows, times=9)


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_by_norm(watched, rows, foreach):
    model, optimizer, _ = watched
    accumulate(model, rows)
    before = flat_grad(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01, foreach=foreach)
    factor = (flat_grad(optimizer).norm() / before.norm()).item()
    assert factor < 0.01
    optimizer.step()
    check(optimizer, rows, times=factor**2)


def test_every_tensor_may_be_clipped_by_itself(watched, rows):
    model, optimizer, _ = watched
    accumulate(model, rows)
    model.first.grad.mul_(0.5)
    model.last.grad.mul_(-0.125)
    optimizer.step()
    scale = torch.cat([torch.full((WIDTH - 3,), 0.25), torch.full((3,), 0.125**2)])
    torch.testing.assert_close(given(optimizer), scale * expected(rows))


def test_a_gradient_of_zeros_takes_the_factor_of_the_others(watched, rows):
    model, optimizer, _ = watched
    rows = rows[:2].clone()
    rows[1, :, WIDTH - 3 :] = -rows[0, :, WIDTH - 3 :]
    accumulate(model, rows)
    assert not model.last.grad.any()
    for p in model.parameters():
        p.grad.mul_(0.5)
    optimizer.step()
    check(optimizer, rows, times=0.25)


def test_gradients_that_are_all_zero(watched):
    model, optimizer, _ = watched
    accumulate(model, torch.zeros(K, 8, WIDTH))
    optimizer.step()
    assert torch.equal(given(optimizer), torch.zeros(WIDTH))


def test_gradients_whose_norm_overflows(watched, rows):
    model, optimizer, _ = watched
    accumulate(model, 1e18 * rows)  # their squares are finite, the sum of them is not
    assert norms([model.first.grad])[0].isinf()
    optimizer.step()
    check(optimizer, rows, times=1e36)


def test_infinite_gradients_reach_the_optimizer(watched, rows):
    model, optimizer, _ = watched
    rows[1, 0, 5] = torch.inf
    rows[2, 0, 6] = torch.nan
    accumulate(model, rows)
    optimizer.step()
    finite = given(optimizer).isfinite()
    assert not finite[5]
    assert not finite[6]


@pytest.mark.skipif(TORCH < (2, 3), reason="torch.amp.GradScaler")
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loss_scaler(rows, unscale, set_to_none):
    model = Rows(WIDTH)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=1)
    steps = []
    for attempt in range(4):
        bad = attempt == 1
        for k, x in enumerate(rows):
            x = x * torch.inf if bad and k == 2 else x * (attempt + 1)
            scaler.scale(mean_loss(model, x) / K).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            factor = (flat_grad(optimizer).norm() / (rows.mean((0, 1)) * (attempt + 1)).norm()).item()
            assert (factor < 0.1) == unscale
            check(optimizer, rows, times=(factor * (attempt + 1)) ** 2)
        steps.append(optimizer.state[model.first]["step"].item())
        optimizer.zero_grad(set_to_none=set_to_none)
    assert steps == [1, 1, 2, 3]  # the second was skipped


def test_only_groups_that_ask_for_it_are_watched(rows):
    model = Rows(WIDTH)
    optimizer = still(
        [{"params": [model.first]}, {"params": [model.last], "variance": "streaming", "rho": 0.5}],
    )
    Microbatches(optimizer)
    accumulate(model, rows)
    optimizer.step()
    torch.testing.assert_close(given(optimizer)[: WIDTH - 3], expected(rows)[: WIDTH - 3])
    torch.testing.assert_close(given(optimizer)[WIDTH - 3 :], 0.5 * model.last.grad**2)


def test_a_source_can_be_removed(watched, rows):
    model, optimizer, source = watched
    with pytest.raises(RuntimeError, match="has a source of variances already: call its remove"):
        Microbatches(optimizer)
    with pytest.raises(RuntimeError, match="has a source of variances already"):
        Examples(optimizer, model, mean_loss)
    source.remove()
    source.remove()
    accumulate(model, rows)
    with pytest.raises(RuntimeError, match="no variance: call set_variances"):
        optimizer.step()
    optimizer.zero_grad()
    Microbatches(optimizer)
    accumulate(model, rows)
    optimizer.step()
    check(optimizer, rows)


def test_an_optimizer_that_takes_no_variances_is_refused():
    for optimizer in (PRM(Rows(WIDTH).parameters()), torch.optim.AdamW(Rows(WIDTH).parameters())):
        with pytest.raises(
            ValueError, match=r"Microbatches needs an optimizer with .* build it as PRM\(..., variance="
        ):
            Microbatches(optimizer)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = still(embedding.parameters())  # kept: a source goes with its optimizer
    Microbatches(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 has a sparse gradient.*sparse=False"):
        embedding(torch.tensor([1])).sum().backward()


def test_an_optimizer_and_its_source_can_be_freed(rows):
    import gc
    import weakref

    model = Rows(WIDTH)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    accumulate(model, rows)
    optimizer.step()
    alive = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_checkpoints_hold_nothing_of_a_source(watched, rows, tmp_path):
    model, optimizer, _ = watched
    accumulate(model, rows)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    fresh = Rows(WIDTH)
    resumed = still(fresh.parameters())
    Microbatches(resumed)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for model_, optimizer_ in ((model, optimizer), (fresh, resumed)):
        optimizer_.zero_grad()
        accumulate(model_, rows.cos())
        optimizer_.step()
    assert torch.equal(given(optimizer), given(resumed))


def test_norms_of_half_precision_do_not_overflow():
    grads = [torch.full((1000,), 1e4, dtype=torch.float16), torch.tensor([3.0, 4.0]), torch.tensor([3 + 4j])]
    assert [norm.item() for norm in norms(grads)] == pytest.approx([1e4 * 1000**0.5, 5, 5], rel=1e-3)
    assert [norm.dtype for norm in norms(grads)] == [torch.float32] * 3
