"""Four ranks: every way of torch to spread a model over them, and checkpoints from so many ranks to fewer.

Each is held against one process that sees the whole batch.
"""

import os

import pytest
import torch
import torch.distributed as dist
from conftest import SHARDS
from ranks import run_ranks, torchrun
from torch import nn

from popriskmin import PRM, RiskMonitor

pytestmark = pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")

STEPS = 5
BATCH = 16
# The pull to the first weights, which a checkpoint must bring along.
START = {"shrinkage": 1.0, "shrink_to": "start", "batch_size": BATCH, "n_dataset": 10 * BATCH, "debias": True}
OPTIONS = [
    {}, {"mask": "soft", "reduction": "per_tensor"}, {"debias": True, "mask_decay": True, "amsgrad": True}, START,
]  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.bias = nn.Linear(6, 8), nn.Linear(8, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.down(self.up(x).tanh()) + self.bias


def net():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2 * STEPS, BATCH, n, generator=generator) for n in (6, 4))


def train(model, optimizer, steps=range(STEPS), rows=slice(None)):
    x, y = data()
    for step in steps:
        optimizer.zero_grad()
        (model(x[step, rows]) - y[step, rows]).square().mean().backward()
        optimizer.step()


def prm(parameters, **options):
    return PRM(parameters, lr=0.03, weight_decay=0.1, **options)


def whole(model):
    tensors = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return [tensor.detach().clone() for tensor in tensors]


def one_process(steps=range(STEPS), **options):
    model = net()
    optimizer = prm(model.named_parameters(), **options)
    train(model, optimizer, steps)
    return whole(model), optimizer


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def mine(rank, world_size=4):
    share = BATCH // world_size
    return slice(rank * share, (rank + 1) * share)


def check_ddp(rank, options):
    model = net()
    optimizer = prm(model.named_parameters(), **options)
    train(nn.parallel.DistributedDataParallel(model), optimizer, rows=mine(rank))
    assert_equal(whole(model), one_process(**options)[0])


def check_hybrid_shards(rank, options):
    """HSDP: two replicas of two shards each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = prm(model.named_parameters(), **options)
    train(model, optimizer, rows=mine(rank))
    weights, expected = one_process(**options)
    assert_equal(whole(model), weights)
    for name, row in expected.get_mask_stats(by="parameter").items():
        assert optimizer.get_mask_stats(by="parameter")[name] == pytest.approx(row, rel=1e-4, abs=1e-7)


def check_tensor_parallel(rank, options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    parallelize_module(model, init_device_mesh("cpu", (4,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = prm(model.named_parameters(), **options)
    train(model, optimizer)
    assert_equal(whole(model), one_process(**options)[0])


def check_zero(rank, options):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), PRM, lr=0.03, weight_decay=0.1, **options)
    train(nn.parallel.DistributedDataParallel(model), optimizer, rows=mine(rank))
    assert_equal(whole(model), one_process(**options)[0])


def sharded(keep_best=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = prm(model.named_parameters(), **START)
    return model, optimizer, watched(model, optimizer, model if keep_best else None)


def watched(model, optimizer, keep_best):
    """A monitor whose held-out loss is lowest after three steps of training."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    teacher, learnt = net(), one_process(range(3), **START)[0]
    with torch.no_grad():
        for own, value in zip(teacher.parameters(), learnt):
            own.copy_(value)
        y = teacher(x)
    held_out = {"held_out": lambda: (model(x) - y).square().mean(1), "held_out_every": 1, "keep_best": keep_best}
    return RiskMonitor(optimizer, every=1, n_dataset=100, batch_size=BATCH, **held_out)


def check_looks_do_not_change_training(rank):
    """FSDP2 keeps the outermost parameters whole after an evaluation, and would use them once more after a step."""
    model, optimizer, monitor = sharded()
    train(model, optimizer, rows=mine(rank))
    assert_equal(whole(model), one_process(**START)[0])
    assert [step for step, _ in monitor.held_out_curve] == list(range(1, STEPS + 1))


def best_of_one_process():
    model = net()
    optimizer = prm(model.named_parameters(), **START)
    monitor = watched(model, optimizer, model)
    train(model, optimizer, range(2 * STEPS))
    return monitor.restore_best(), whole(model)


def parts(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save(rank, folder, ending):
    import torch.distributed.checkpoint as dcp

    model, optimizer, monitor = sharded(keep_best=True)
    train(model, optimizer, rows=mine(rank, dist.get_world_size()))
    seen = monitor.state_dict()  # by every rank, as the weights that it keeps are gathered
    if rank == 0:
        torch.save(seen, f"{folder}.monitor")
    if ending == "async":
        # It talks in a group of its own, while training goes on in the other.
        done = dcp.async_save(parts(model, optimizer), checkpoint_id=folder, process_group=dist.new_group())
        train(model, optimizer, range(STEPS, STEPS + 2), rows=mine(rank, dist.get_world_size()))
        done.result()
    else:
        dcp.save(parts(model, optimizer), checkpoint_id=folder)


def load_and_go_on(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer, monitor = sharded(keep_best=True)
    state = parts(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    saved = torch.load(f"{folder}.monitor", weights_only=True)
    monitor.load_state_dict(saved)
    before = len(monitor.samples)
    train(model, optimizer, range(STEPS, 2 * STEPS), rows=mine(rank, dist.get_world_size()))
    # Each sample ends with the next step's gradients, and the one under way is not saved where it lies on many ranks.
    assert len(monitor.samples) == before + STEPS - 1
    assert_equal(whole(model), one_process(range(2 * STEPS), **START)[0])
    for p, first in zip(model.parameters(), net().parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["start"].full_tensor(), first)
    best, weights = best_of_one_process()
    assert monitor.restore_best() == best == 3 < STEPS  # kept by the run that wrote the checkpoint
    assert_equal(whole(model), weights)


def on_four_ranks(rank, folder):
    for options in OPTIONS:
        check_ddp(rank, options)
        check_hybrid_shards(rank, options)
        check_tensor_parallel(rank, options)
        check_zero(rank, options)
    check_looks_do_not_change_training(rank)
    for ending in ("sync", "async"):
        save(rank, f"{folder}/{ending}", ending)
    dist.barrier()
    load_and_go_on(rank, f"{folder}/sync")


def test_four_ranks_do_what_one_process_does_and_fewer_go_on_from_there(tmp_path):
    """One test, as starting the processes takes most of its time."""
    run_ranks(tmp_path, 4, on_four_ranks, tmp_path)
    run_ranks(tmp_path / "sync", 2, load_and_go_on, tmp_path / "sync")
    run_ranks(tmp_path / "async", 1, load_and_go_on, tmp_path / "async")


def train_and_save_every_step(folder, fatal_step):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.fsdp import fully_shard

    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    # The agent's store outlives a restart, and gloo would find the addresses of dead processes in it.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore(attempt, store), rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    fully_shard(model)
    optimizer = PRM(model.named_parameters(), lr=0.03, debias=True, reduction="per_tensor")
    x = torch.randn(8, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    first = 0
    while (folder / f"{first}/.metadata").exists():
        first += 1
    if first > 0:
        state = parts(model, optimizer)
        dcp.load(state, checkpoint_id=folder / str(first - 1))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(first, 8):
        if step == fatal_step and rank == 1 and attempt == "0":
            os.kill(os.getpid(), 9)
        optimizer.zero_grad()
        model(x[step, rank]).square().mean().backward()
        optimizer.step()
        dcp.save(parts(model, optimizer), checkpoint_id=folder / str(step))
    weights = whole(model)
    if rank == 0:
        torch.save({"weights": weights, "started at": first}, folder / "end.pt")
    dist.barrier()


def test_a_killed_rank_that_torchrun_starts_again_ends_with_the_undisturbed_weights(tmp_path):
    ends = []
    for name, fatal_step in (("undisturbed", None), ("killed", 5)):
        (tmp_path / name).mkdir()
        torchrun(train_and_save_every_step, tmp_path / name, fatal_step, restarts=1)
        ends.append(torch.load(tmp_path / name / "end.pt", weights_only=True))
    assert [end["started at"] for end in ends] == [0, 5]
    for a, b in zip(ends[0]["weights"], ends[1]["weights"], strict=True):
        assert torch.equal(a, b)
