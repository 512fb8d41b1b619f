"""Variances over ranks, and of microbatches on several ranks: three gloo processes with real DistributedDataParallel.

One group of processes runs all the checks, as starting them takes most of the time.
"""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from conftest import TORCH
from ranks import CONTEXT
from simulated import Rows, given, mean_loss, still
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from popriskmin import PRM
from popriskmin.variance import Examples, Microbatches, Ranks

R, WIDTH = 3, 5000

VIEWS = [True, False]


def rows_of(rank, step=0, passes=1, width=WIDTH):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return 2 + torch.randn(passes, 4, width, generator=generator)


def over_ranks(step=0, scale=1.0):
    """Return the mean over ranks of what each has as its gradient, and the estimate of its variance."""
    gradients = torch.stack([scale * rows_of(r, step)[0].mean(0) for r in range(R)]).double()
    return gradients.mean(0), gradients.var(0) / R


def parallel(model, **options):
    # Buckets of 4,096 bytes, so that there are several.
    return DistributedDataParallel(model, bucket_cap_mb=2**-8, **options)


def close(got, expected):
    # What rounding leaves of a difference of squares of up to 20.
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=2e-5)


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_ranks(rank, view, set_to_none):
    model = Rows(WIDTH)
    ddp = parallel(model, gradient_as_bucket_view=view)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    for step in range(4):
        mean_loss(ddp, rows_of(rank, step)[0]).backward()
        mean, variance = over_ranks(step)
        close(flat(model), mean)
        optimizer.step()
        close(given(optimizer), variance)
        optimizer.zero_grad(set_to_none=set_to_none)


def check_it_is_unbiased(rank):
    width = 100_000
    ddp = parallel(Rows(width))
    optimizer = still(ddp.parameters())
    Ranks(optimizer, ddp)
    mean_loss(ddp, rows_of(rank, width=width)[0]).backward()
    optimizer.step()
    truth = 1 / 4 / R
    assert abs(given(optimizer).double().mean().item() / truth - 1) < 5 * (2 / (R - 1) / width) ** 0.5


def check_drift(rank):
    width, steps = 500, 60
    ddp = parallel(Rows(width))
    optimizer = still(ddp.parameters(), rho=0.9)
    Ranks(optimizer, ddp)
    for step in range(steps):
        mean_loss(ddp, rows_of(rank, step, width=width)[0] + step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert given(optimizer).mean().item() / (1 - 0.9**steps) * 4 * R == pytest.approx(1, abs=0.05)


def check_clipping_and_scaling(rank, view):
    model = Rows(WIDTH)
    ddp = parallel(model, gradient_as_bucket_view=view)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if TORCH >= (2, 3) else None
    for step in range(4):
        bad = scaler is not None and step == 1 and rank == 2
        loss = mean_loss(ddp, rows_of(rank, step)[0]) * (float("inf") if bad else 1.0)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if not (scaler is not None and step == 1):
            mean, variance = over_ranks(step)
            close(flat(model), 0.5 * mean / mean.norm())
            # In units in which they are about 1.
            close(given(optimizer) * (mean.norm() / 0.5).item() ** 2, variance)
        optimizer.zero_grad()


def check_accumulation(rank, view, synced):
    """Ranks: under no_sync() by the sums of the ranks, without it by adding up; the same in the mean."""
    model = Rows(WIDTH)
    ddp = parallel(model, gradient_as_bucket_view=view)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    for step in range(3):
        for k in range(2):
            last = k == 1
            with contextlib.nullcontext() if last or synced else ddp.no_sync():
                mean_loss(ddp, rows_of(rank, 2 * step + k)[0]).backward()
        means, variances = zip(*[over_ranks(2 * step + k) for k in range(2)])
        close(flat(model), sum(means))
        optimizer.step()
        if synced:
            close(given(optimizer), sum(variances))
        else:
            sums = [sum(rows_of(r, 2 * step + k)[0].mean(0) for k in range(2)) for r in range(R)]
            close(given(optimizer), torch.stack(sums).double().var(0) / R)
        optimizer.zero_grad()


class Choosing(nn.Module):
    """Rank 0 alone reaches `rare`, and no rank reaches `never`."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.always, self.rare, self.never = (nn.Parameter(torch.zeros(7)) for _ in range(3))

    def forward(self, x):
        return (x * (self.always + self.rare if self.rank == 0 else self.always)).sum(-1)


def check_unused_parameters(rank):
    model = Choosing(rank)
    ddp = parallel(model, find_unused_parameters=True)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    for step in range(3):
        mean_loss(ddp, rows_of(rank, step, width=7)[0]).backward()
        assert model.never.grad is None
        optimizer.step()
        gradients = torch.stack([rows_of(r, step, width=7)[0].mean(0) for r in range(R)])
        rare = gradients * torch.tensor([1.0, 0, 0])[:, None]
        close(given(optimizer), torch.cat([gradients.var(0), rare.var(0)]) / R)
        optimizer.zero_grad()


def check_other_hooks(rank):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook

    model = Rows(WIDTH)
    ddp = parallel(model)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp, hook=fp16_compress_hook)
    for step in range(3):
        mean_loss(ddp, rows_of(rank, step)[0]).backward()
        mean, variance = over_ranks(step)
        torch.testing.assert_close(flat(model).double(), mean, rtol=2e-3, atol=2e-3)
        optimizer.step()
        # The squares are not compressed; the mean is, by which the variance is off at most.
        assert (given(optimizer) - variance).abs().max() < 2 * 2e-3 * mean.max() ** 2
        optimizer.zero_grad()
    taken = parallel(Rows(WIDTH))
    taken.register_comm_hook(None, allreduce_hook)
    with pytest.raises(RuntimeError, match="If it has one, pass that to Ranks in place of registering it"):
        Ranks(still(taken.parameters()), taken)


def check_static_graph(rank):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    ddp = parallel(model, static_graph=True)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    for step in range(3):
        ddp(rows_of(rank, step, width=6)[0]).mean().backward()
        gradients = []
        for r in range(R):
            loss = model(rows_of(r, step, width=6)[0]).mean()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        optimizer.step()
        close(given(optimizer), torch.stack(gradients).var(0) / R)
        optimizer.zero_grad()


def check_half_precision(rank):
    model = Rows(WIDTH, torch.float16)
    ddp = parallel(model)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp)
    mean_loss(ddp, rows_of(rank)[0].half()).backward()
    optimizer.step()
    assert given(optimizer).dtype == torch.float32
    mean, variance = over_ranks()
    assert abs(given(optimizer).double().mean() - variance.mean()) < 0.01 * mean.square().mean()


def check_removed(rank):
    model = Rows(WIDTH)
    ddp = parallel(model)
    optimizer = still(model.parameters())
    Ranks(optimizer, ddp).remove()
    mean_loss(ddp, rows_of(rank)[0]).backward()
    close(flat(model), over_ranks()[0])
    with pytest.raises(RuntimeError, match="no variance: call set_variances"):
        optimizer.step()


def check_what_is_refused(rank):
    model = Rows(WIDTH)
    ddp = parallel(model)
    optimizer = still(model.named_parameters())
    with pytest.raises(TypeError, match="ddp must be a DistributedDataParallel module, got Rows"):
        Ranks(optimizer, model)
    with pytest.raises(ValueError, match="there are 3 ranks: pass ddp=the DistributedDataParallel module"):
        Microbatches(optimizer)
    with pytest.raises(ValueError, match="does not average over the 3 ranks here: use Ranks"):
        Examples(optimizer, model, mean_loss)
    alone = [dist.new_group([r]) for r in range(R)][rank]
    with pytest.raises(ValueError, match="Ranks needs at least 2 ranks, got 1"):
        Ranks(optimizer, DistributedDataParallel(model, process_group=alone))
    Ranks(optimizer, ddp)
    mean_loss(model, rows_of(rank)[0]).backward()  # beside the module that averages
    with pytest.raises(RuntimeError, match="gradient of parameter first was not averaged over ranks: let the last"):
        optimizer.step()


def accumulate_with(ddp, rank, step, passes=3):
    rows = rows_of(rank, step, passes)
    for k, x in enumerate(rows):
        with ddp.no_sync() if k < passes - 1 else contextlib.nullcontext():
            (mean_loss(ddp, x) / passes).backward()


def check_microbatches(rank, view):
    model = Rows(WIDTH)
    ddp = parallel(model, gradient_as_bucket_view=view)
    optimizer = still(model.parameters())
    Microbatches(optimizer, ddp)
    for step in range(3):
        accumulate_with(ddp, rank, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        of_passes = torch.stack([rows_of(r, step, 3).mean(1).double() for r in range(R)])
        mean = of_passes.mean((0, 1))
        close(flat(model), 0.5 * mean / mean.norm())
        close(given(optimizer) * (mean.norm() / 0.5).item() ** 2, (of_passes.var(1) / 3).mean(0) / R)
        optimizer.zero_grad()


def check_microbatches_on_ranks_by_themselves(rank):
    model = Rows(WIDTH)
    optimizer = still(model.parameters())
    Microbatches(optimizer, ddp=False)
    for x in rows_of(rank, passes=3):
        mean_loss(model, x).backward()
    optimizer.step()
    close(given(optimizer), 3 * rows_of(rank, passes=3).mean(1).double().var(0))


def check_microbatches_need_no_sync(rank):
    ddp = parallel(Rows(WIDTH))
    optimizer = still(ddp.parameters())
    Microbatches(optimizer, ddp)
    mean_loss(ddp, rows_of(rank)[0]).backward()
    with torch.no_grad():  # an evaluation between says nothing
        ddp(rows_of(rank)[0])
    loss = mean_loss(ddp, rows_of(rank)[0])
    with pytest.raises(RuntimeError, match="averaged over ranks before it was complete: run all but the last"):
        loss.backward()
    ddp = parallel(Rows(WIDTH))
    optimizer = still(ddp.parameters())
    Microbatches(optimizer, ddp)
    with ddp.no_sync():
        for x in rows_of(rank, passes=2):
            mean_loss(ddp, x).backward()
    with pytest.raises(RuntimeError, match=r"ran under no_sync\(\), so that the ranks' gradients differ"):
        optimizer.step()


def check_replicas_stay_alike(rank, source):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    ddp = parallel(model)
    optimizer = PRM(model.parameters(), lr=0.05, variance="given")
    source(optimizer, ddp)
    for step in range(5):
        rows = rows_of(rank, step, 2, width=6)
        with ddp.no_sync():
            ddp(rows[0]).square().mean().backward()
        ddp(rows[1]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(R)]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others)


CHECKS = [
    *[(check_ranks, view, set_to_none) for view in VIEWS for set_to_none in (True, False)],
    (check_it_is_unbiased,),
    (check_drift,),
    *[(check_clipping_and_scaling, view) for view in VIEWS],
    *[(check_accumulation, view, synced) for view in VIEWS for synced in (True, False)],
    (check_unused_parameters,),
    (check_other_hooks,),
    (check_static_graph,),
    (check_half_precision,),
    (check_removed,),
    (check_what_is_refused,),
    *[(check_microbatches, view) for view in VIEWS],
    (check_microbatches_on_ranks_by_themselves,),
    (check_microbatches_need_no_sync,),
    *[(check_replicas_stay_alike, source) for source in (Ranks, Microbatches)],
]


def label(check):
    return "-".join(getattr(part, "__name__", str(part)) for part in check)


def run(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=R)
    said = {}
    for check, *arguments in CHECKS:
        try:
            check(rank, *arguments)
        except BaseException as error:
            said[label((check, *arguments))] = f"rank {rank}: {type(error).__name__}: {error}"[:2000]
        with contextlib.suppress(Exception):
            dist.barrier()
    results.put(said)
    dist.destroy_process_group()
    # Without the interpreter's shutdown, during which a thread of gloo that still frees its last message aborts.
    os._exit(0)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    results = CONTEXT.SimpleQueue()
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    processes = [CONTEXT.Process(target=run, args=(rank, rendezvous, results), daemon=True) for rank in range(R)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, 9)
    assert [process.exitcode for process in processes] == [0] * R
    gathered = {}
    for _ in range(R):
        for name, message in results.get().items():
            gathered.setdefault(name, []).append(message)
    return gathered


@pytest.mark.parametrize("check", CHECKS, ids=label)
def test_on_three_ranks(failures, check):
    assert failures.get(label(check), []) == []
