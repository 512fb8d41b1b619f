"""Figures and pooled masks of parameters that FSDP2 shards over two ranks: what is sent, and what one rank says."""

import pytest
import torch
from conftest import SHARDS
from ranks import run_ranks
from torch import nn

from popriskmin import PRM


def net():
    torch.manual_seed(0)
    # 5 rows and 1 row on 2 ranks: uneven parts, and none at all.
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(16, 7, generator=generator)).square().mean().backward()
    optimizer.step()


def _check(rank):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    def messages(function):
        with CommDebugMode() as sent:
            result = function()
        return sent.get_total_counts(), result

    for options in ({}, {"reduction": "per_tensor"}, {"reduction": "per_tensor", "capturable": True, "debias": True},
                    {"reduction": "per_tensor", "warmup_steps": 2, "mask": "soft"}):  # fmt: skip
        pooled = "reduction" in options
        model, single = net(), net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer, alone = (PRM(m.named_parameters(), lr=0.05, **options) for m in (model, single))
        for seed in range(5):
            step(model, optimizer, seed)
            step(single, alone, seed)
        sent, _ = messages(optimizer.step)
        alone.step()
        assert sent == (1 if pooled else 0)
        for p, expected in zip(model.parameters(), single.parameters()):
            torch.testing.assert_close(p.full_tensor(), expected, rtol=1e-5, atol=1e-6)
        for by in (None, "group", "parameter"):
            sent, stats = messages(lambda by=by, o=optimizer: o.get_mask_stats(by=by))
            assert sent == (1 if pooled else 2)
            rows, expected = (stats, alone.get_mask_stats(by=by)) if by else ({0: stats}, {0: alone.get_mask_stats()})
            assert list(rows) == list(expected)
            for key, row in rows.items():
                assert row == pytest.approx(expected[key], rel=1e-4, abs=1e-7), (options, by, key)
        if rank == 0:  # alone: it would hang if this sent anything
            mine = optimizer.get_mask_stats(local=True)
            assert mine["parameter_count"] == 3 * 7 + 3 + 5 + 1
        sent, mine = messages(lambda o=optimizer: o.get_mask_stats(by="parameter", local=True))
        assert sent == 0
        assert list(mine) == (["0.weight", "0.bias", "2.weight", "2.bias"] if rank == 0 else ["0.weight", "0.bias"])
        if not pooled:
            whole = optimizer.get_mask_stats()
            total = torch.tensor(
                [float(sum(row[key] for row in mine.values())) for key in ("signal_sq", "noise_scale")]
            )
            dist.all_reduce(total)
            assert total.tolist() == pytest.approx([whole["signal_sq"], whole["noise_scale"]], rel=1e-5)


def _check_nan(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = PRM(model.named_parameters(), lr=0.05)
    step(model, optimizer, 0)
    if rank == 0:
        optimizer.state[model[0].weight]["exp_avg"].to_local()[0, 0] = float("nan")
    rows = optimizer.get_mask_stats(by="parameter")
    for key in ("mean_q", "min_q", "max_q"):
        assert rows["0.weight"][key] != rows["0.weight"][key]
        assert rows["0.bias"][key] == rows["0.bias"][key]


def _checks(rank):
    _check(rank)
    _check_nan(rank)


@pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")
def test_messages_local_figures_and_nan_on_two_ranks(tmp_path):
    run_ranks(tmp_path, 2, _checks)


def test_local_is_all_of_it_where_nothing_is_sharded():
    model = net()
    optimizer = PRM(model.named_parameters(), lr=0.05)
    step(model, optimizer, 0)
    for by in (None, "group", "parameter"):
        assert optimizer.get_mask_stats(by=by, local=True) == optimizer.get_mask_stats(by=by)
