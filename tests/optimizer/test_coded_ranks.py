"""8-bit state of parameters that are sharded over ranks: the step, and checkpoints to other numbers of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import SHARDS
from ranks import run_ranks
from torch import nn

from popriskmin import PRM

pytestmark = pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_var")
OPTIONS = [{}, {"mask": "snr", "reduction": "per_tensor"}, {"debias": True, "amsgrad": True, "foreach": False}]


class Net(nn.Module):
    """An odd number of rows of one block; rows that end within a block; fewer rows than ranks; and narrow ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(128, 151), nn.Linear(151, 1500), nn.Linear(1500, 3)
        self.narrow = nn.Parameter(torch.zeros(1500, 4))

    def forward(self, x):
        return self.last((self.second(self.first(x).tanh()) + self.narrow.sum(1)).tanh())


def make(shard=True, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Net()
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, PRM(model.named_parameters(), **{"lr": 0.003, "state_dtype": "8bit", **options})


def backward(model, step):
    """The same batch on every rank, so that a rank more or less changes no gradient."""
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    model(torch.randn(16, 128, generator=generator)).square().mean().backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def whole(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)().detach()


def check_steps_are_those_of_the_parts(options):
    """Where no block is cut, each rank steps as an optimizer of its parts alone."""
    model, optimizer = make(**options)
    parts = [nn.Parameter(p.detach().to_local().clone()) for p in model.parameters()]
    alone = PRM(parts, lr=0.003, state_dtype="8bit", **options)
    for step in range(4):
        backward(model, step)
        for p, part in zip(model.parameters(), parts):
            part.grad = p.grad.to_local().clone()
        optimizer.step()
        alone.step()
    own = model.first.weight
    [part] = [part for p, part in zip(model.parameters(), parts) if p is own]
    assert torch.equal(own.to_local(), part)
    codes, mine = optimizer.state[own]["codes"], alone.state[part]["codes"]
    assert codes.shape == (151, 1, 400)
    assert torch.equal(codes.to_local().view_as(mine), mine)
    assert "exp_avg" in optimizer.state[model.narrow]


def check_it_trains_as_float32_in_one_process(options):
    model, optimizer = make(**options)
    plain, exact = make(shard=False, state_dtype=torch.float32, **options)
    start = [p.detach().clone() for p in plain.parameters()]
    for m, o in ((model, optimizer), (plain, exact)):
        train(m, o, range(8))
    for p, w, first in zip(model.parameters(), plain.parameters(), start):
        assert (whole(p) - w).norm() < 0.15 * (w - first).norm() + 1e-4
    rows, wanted = optimizer.get_mask_stats(by="parameter"), exact.get_mask_stats(by="parameter")
    for name, row in wanted.items():
        assert rows[name]["parameter_count"] == row["parameter_count"]
        assert rows[name]["mean_q"] == pytest.approx(row["mean_q"], rel=0.1, abs=0.01)


def check_tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for inner, message in ((256, None), (192, r"columns in multiples of 128.*\(40, 192\)")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, inner), nn.Tanh(), nn.Linear(inner, 40))
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = PRM(model.named_parameters(), lr=0.003, state_dtype="8bit")
        if message:
            backward(model, 0)
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
            continue
        parts = [nn.Parameter(model[i].weight.detach().to_local().clone()) for i in (0, 2)]
        alone = PRM(parts, lr=0.003, state_dtype="8bit")
        for step in range(3):
            backward(model, step)
            for i, part in zip((0, 2), parts):
                part.grad = model[i].weight.grad.to_local().clone()
            optimizer.step()
            alone.step()
        for i, part in zip((0, 2), parts):
            assert torch.equal(model[i].weight.to_local(), part)


def on_two_ranks(rank):
    for options in OPTIONS:
        if "reduction" not in options:
            check_steps_are_those_of_the_parts(options)
        check_it_trains_as_float32_in_one_process(options)
    check_tensor_parallel()


def test_two_ranks_step_their_parts(tmp_path):
    run_ranks(tmp_path, 2, on_two_ranks)


def parts(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def everything(model, optimizer):
    return {
        name: {key: whole(value).clone() for key, value in {"weight": p, **optimizer.state[p]}.items()}
        for name, p in model.named_parameters()
    }


def save(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model, optimizer = make(amsgrad=True)
    train(model, optimizer, range(3))
    dcp.save(parts(model, optimizer), checkpoint_id=folder / "sharded")
    gathered = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    gathered, saved = copy.deepcopy(gathered), everything(model, optimizer)
    train(model, optimizer, range(3, 5))
    ends = everything(model, optimizer)
    if rank == 0:
        torch.save({"gathered": gathered, "saved": saved, "ends": ends}, folder / "expected.pt")


def assert_near(found, wanted):
    """What was coded once more, in other blocks, is within a step of the code; see popriskmin.step.codes."""
    m, v, s = (wanted[name] for name in MOMENTS)
    for name, value, step in zip(MOMENTS, (m, v, s), (v.sqrt() / 8 + m.abs() / 16, v / 8, s / 8)):
        far = (whole(found[name]) - value).abs() > step
        assert not far.any(), (name, whole(found[name])[far], value[far], v[far])


def load(rank, folder):
    """By so many ranks, into 8-bit state and from there into float32 and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    expected = torch.load(folder / "expected.pt", weights_only=True)
    model, optimizer = make(amsgrad=True)
    state = parts(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for name, tensors in everything(model, optimizer).items():
        for key, value in tensors.items():
            assert torch.equal(value, expected["saved"][name][key]), (name, key)
    plain = PRM(model.named_parameters(), state_dtype=torch.float32, amsgrad=True)
    plain.load_state_dict(optimizer.state_dict())
    again = PRM(model.named_parameters(), state_dtype="8bit", amsgrad=True)
    again.load_state_dict(plain.state_dict())
    for p in model.parameters():
        read, back = optimizer.mask_state_of(p), again.mask_state_of(p)
        held = {name: whole(plain.state[p][name]) for name in MOMENTS}
        for name in MOMENTS:
            assert torch.equal(held[name], whole(read[name]))
        assert_near(back, held)
    train(model, optimizer, range(3, 5))
    for name, tensors in everything(model, optimizer).items():
        end = expected["ends"][name]["weight"]
        if dist.get_world_size() == 2:
            assert torch.equal(tensors["weight"], end)
        else:  # which rank rounds a scalar decides which way
            moved = (end - expected["saved"][name]["weight"]).norm()
            assert (tensors["weight"] - end).norm() < 0.1 * moved + 1e-6


def load_gathered(rank, folder):
    """Between sharded and whole parameters, and between states, by state dicts that are not sharded."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    reference, holder = make(amsgrad=True)
    set_optimizer_state_dict(reference, holder, expected["gathered"], options=options)
    wanted = {
        name: {key: whole(holder.mask_state_of(p)[key]) for key in MOMENTS} for name, p in reference.named_parameters()
    }
    for name, p in reference.named_parameters():
        for key, value in holder.state[p].items():
            assert torch.equal(whole(value), expected["saved"][name][key]), (name, key)
    for shard in (True, False):
        for state_dtype in ("8bit", torch.float32):
            model, optimizer = make(shard, amsgrad=True, state_dtype=state_dtype)
            set_optimizer_state_dict(model, optimizer, expected["gathered"], options=options)
            floats = get_optimizer_state_dict(model, optimizer, options=options)
            for name, p in model.named_parameters():
                held = optimizer.mask_state_of(p)
                if shard or state_dtype != "8bit":
                    assert all(torch.equal(whole(held[key]), wanted[name][key]) for key in MOMENTS), (name, shard)
                else:
                    assert_near(held, wanted[name])
            if state_dtype != "8bit":
                set_optimizer_state_dict(reference, holder, floats, options=options)
                for name, p in reference.named_parameters():
                    assert_near(holder.mask_state_of(p), wanted[name])


def on_two_ranks_again(rank, folder):
    save(rank, folder)
    dist.barrier()
    load(rank, folder)
    load_gathered(rank, folder)


def test_checkpoints_go_to_other_ranks_and_states(tmp_path):
    run_ranks(tmp_path, 2, on_two_ranks_again, tmp_path)
    for ranks in (1, 4):
        (tmp_path / str(ranks)).mkdir()
        run_ranks(tmp_path / str(ranks), ranks, load, tmp_path)
