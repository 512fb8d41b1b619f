"""Parameters sharded over ranks by FSDP2: two gloo processes on the CPU must do what one process does."""

import pytest
import torch
from conftest import SHARDS
from ranks import run_ranks
from torch import nn

from popriskmin import PRM, RiskMonitor, diagnose

pytestmark = pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")

OPTIONS = [
    {},
    {"foreach": False},
    {"mask": "soft", "reduction": "per_tensor"},
    {"mask": "soft", "reduction": "per_tensor", "foreach": False, "debias": True},
    {"mask": "soft", "debias": True, "mask_decay": True, "amsgrad": True},
    {"reduction": "per_tensor", "capturable": True},
    {"variance": "given", "min_q": 0.1},
    {"variance": "given", "mask": "soft", "reduction": "per_tensor"},
    {"reduction": "per_tensor", "state_dtype": torch.bfloat16},
    {"shrinkage": 2.0, "batch_size": 16, "n_dataset": 96},
    {"shrinkage": 6.0, "batch_size": 16, "n_dataset": 96, "shrink_to": "start", "foreach": False},
    {"shrinkage": 2.0, "batch_size": 16, "n_dataset": 96, "shrink_to": "start", "reduction": "per_tensor"},
]


def _train(shard, options):
    torch.manual_seed(0)
    # 5 rows on 2 ranks: uneven shards.
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    shard(model)
    optimizer = PRM(model.named_parameters(), lr=0.05, weight_decay=0.1, **options)
    monitor = RiskMonitor(optimizer, every=2, n_dataset=40, batch_size=16)
    x, y = torch.randn(6, 16, 7), torch.randn(6, 16, 3)
    for step in range(6):
        optimizer.zero_grad()
        (model(x[step]) - y[step]).square().mean().backward()
        if options.get("variance") == "given":
            optimizer.set_variances({p: 0.5 * p.grad.square() for p in model.parameters()})
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    stats = optimizer.get_mask_stats(by="parameter"), optimizer.shrunk(by="parameter")
    return [w.detach().clone() for w in weights], *stats, monitor.estimate()


def _rank(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for options in OPTIONS:
        weights, stats, shrunk, estimate = _train(lambda model: fully_shard(model, mesh=mesh), options)
        expected_weights, expected_stats, expected_shrunk, expected_estimate = _train(lambda model: None, options)
        for got, expected in zip(weights, expected_weights):
            # Stored in bfloat16, the state is rounded by each element's place, which sharding changes.
            narrow = options.get("state_dtype") == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-3 if narrow else 1e-6)
        for name, row in expected_stats.items():
            assert stats[name] == pytest.approx(row, rel=0.05 if narrow else 1e-4, abs=1e-6), (options, name)
        assert shrunk == expected_shrunk, options
        if "shrinkage" in options:
            assert any(row["scalar_fraction"] > 0 for row in shrunk.values()), options
        assert estimate == pytest.approx(expected_estimate, rel=0.05 if narrow else 1e-3, abs=1e-6), options


def test_fully_shard_on_two_ranks_equals_one_process(tmp_path):
    run_ranks(tmp_path, 2, _rank)


def _flat_rank(rank, use_orig_params):
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(5, 7), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = PRM(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="figures are of this rank's part alone"):
        count = optimizer.get_mask_stats()["parameter_count"]
    assert 0 < count < 42
    assert "this rank's part alone" in str(diagnose(optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.get_mask_stats(local=True)["parameter_count"] == count


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_statistics_of_fsdp1_say_that_they_are_of_one_rank(tmp_path, use_orig_params):
    run_ranks(tmp_path, 2, _flat_rank, use_orig_params)
