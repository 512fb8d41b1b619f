"""How many weights lie at their origin: by hand, before the first step, by group and name, and on two ranks."""

import pytest
import torch
from conftest import SHARDS
from ranks import run_ranks
from torch import nn

from popriskmin import PRM, Masked, unwrap

COUNTS = {"batch_size": 8, "n_dataset": 200}


def with_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        model[0].weight[:, 2:] = 0  # 5 of 7 columns
        model[0].weight[3] = 0  # 1 of 5 rows
        model[1].weight[:, 1] = 0  # 1 of 3 columns
        model[1].weight[2, 0, 0, 0] = 0
    return model


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


LINEAR = {"scalar_fraction": 27 / 35, "column_fraction": 5 / 7, "row_fraction": 1 / 5, "parameter_count": 35}
CONVOLUTION = {"scalar_fraction": 17 / 48, "column_fraction": 1 / 3, "row_fraction": 0.0, "parameter_count": 48}
TOTAL = {"scalar_fraction": 44 / 83, "column_fraction": 6 / 10, "row_fraction": 1 / 9, "parameter_count": 83}


def test_it_is_what_one_counts_by_hand():
    model = with_zeros()
    for make in (PRM, lambda groups: Masked(torch.optim.AdamW(groups)), lambda groups: unwrap(Wrapper(PRM(groups)))):
        optimizer = make([{"params": list(layer.named_parameters(str(i)))} for i, layer in enumerate(model)])
        assert optimizer.shrunk() == pytest.approx(TOTAL)
        assert optimizer.shrunk(by="group") == {0: pytest.approx(LINEAR), 1: pytest.approx(CONVOLUTION)}
        assert list(optimizer.shrunk(by="parameter")) == ["0.weight", "1.weight"]
        assert optimizer.shrunk(by="parameter")["0.weight"] == pytest.approx(LINEAR)


def test_complex_weights_count_as_two():
    p = nn.Parameter(torch.tensor([[1.0, 0.0], [1j, 0.0]]))
    row = {"scalar_fraction": 6 / 8, "column_fraction": 0.5, "row_fraction": 0.0, "parameter_count": 8}
    assert PRM([p]).shrunk() == row


def test_from_the_start_it_counts_what_never_moved():
    p = nn.Parameter(torch.randn(3, 4))
    optimizer = PRM([p], weight_decay=0.0, shrinkage=1.0, shrink_to="start", **COUNTS)
    full = {"scalar_fraction": 1.0, "column_fraction": 1.0, "row_fraction": 1.0, "parameter_count": 12}
    assert optimizer.shrunk() == full
    p.grad = torch.zeros(3, 4)
    p.grad[1, 2] = 1.0
    optimizer.step()
    assert optimizer.shrunk() == pytest.approx(
        {"scalar_fraction": 11 / 12, "column_fraction": 3 / 4, "row_fraction": 2 / 3, "parameter_count": 12}
    )


def test_without_a_matrix_there_is_nothing_to_count():
    optimizer = PRM([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0, 2))], shrinkage=1.0, **COUNTS)
    assert optimizer.shrunk() is None
    assert optimizer.shrunk(by="parameter") == {}
    with pytest.raises(ValueError, match="by must be None, 'group' or 'parameter', got 'layer'"):
        optimizer.shrunk(by="layer")


def _rank(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for shard in (
        lambda model: fully_shard(model, mesh=mesh),
        lambda model: parallelize_module(model, mesh, {"0": RowwiseParallel()}),
    ):
        model = with_zeros()
        shard(model)
        for to in ("zero", "start"):
            optimizer = PRM(model.named_parameters(), lr=0.0, shrinkage=1.0, shrink_to=to, **COUNTS)
            for _ in range(2):
                rows = optimizer.shrunk(by="parameter")
                if to == "zero":
                    assert rows == {"0.weight": pytest.approx(LINEAR), "1.weight": pytest.approx(CONVOLUTION)}
                else:
                    assert {row["scalar_fraction"] for row in rows.values()} == {1.0}
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()


@pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")
def test_two_ranks_count_as_one_process_does(tmp_path):
    run_ranks(tmp_path, 2, _rank)
