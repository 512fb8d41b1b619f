"""The diagnosis takes every state that an optimizer can have, changes nothing, and makes a page that fits."""

import math
import re

import pytest
import torch
from conftest import SHARDS
from diagnosed import run
from ranks import run_ranks
from torch import nn

from popriskmin import PRM
from popriskmin.diagnosis.diagnosis import Diagnosis, Row, diagnose


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "per_tensor"}, {"debias": True}, {"bias_correction": False}, {"amsgrad": True}, {"mask": "soft"},
        {"reduction": "per_tensor", "mask": "soft", "debias": True}, {"state_dtype": torch.bfloat16},
        {"capturable": True}, {"betas": (0.95, 0.99), "rho": 0.9}, {"foreach": False}, {"lr": torch.tensor(1e-3)},
    ],
)  # fmt: skip
def test_every_kind_of_mask_and_state(options):
    """Where the mean is three times the deviation and where there is none, whatever the options."""
    found = {row.name: row for row in diagnose(run({"body.weight": (3, 1), "noise.weight": (0, 1)}, **options)).rows}
    assert found["body.weight"].cause == "open"
    assert found["noise.weight"].cause == "noise"
    assert found["noise.weight"].over_noise == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_types(dtype):
    p = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = PRM([("w", p)], lr=1e-4)
    for _ in range(60):
        p.grad = torch.randn(64, 64, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
        optimizer.step()
    row = diagnose(optimizer).rows[0]
    assert row.cause == "noise"
    assert row.parameter_count == optimizer.get_mask_stats()["parameter_count"] == 64 * 64 * (1 + dtype.is_complex)


def test_a_given_variance():
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = PRM([("w", p)], variance="given")
    for _ in range(60):
        p.grad = torch.randn(64, 64)
        optimizer.set_variances({p: torch.ones(64, 64)})
        optimizer.step()
    row = diagnose(optimizer).rows[0]
    assert row.cause == "noise"
    assert row.over_noise == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_numbers_are_those_of_the_mask_statistics(reduction):
    options = {"reduction": reduction, "softness": 2.0, "boundary": "empirical", "batch_size": 4, "n_dataset": 10}
    optimizer = run({"a.weight": (1, 1), "b.weight": (0, 1), "c": (0.5, 1, (7,))}, steps=30, **options)
    stats = optimizer.get_mask_stats(by="parameter")
    for row in diagnose(optimizer).rows:
        for key in ("mean_q", "active_fraction", "snr", "parameter_count"):
            assert getattr(row, key) == pytest.approx(stats[row.name][key], rel=1e-5), key
        assert {type(value) for value in row} <= {int, float, str}


def test_asking_changes_nothing():
    optimizer = run({"w": (1, 1)}, steps=20)
    p = optimizer.param_groups[0]["params"][0]
    before = {key: value.clone() for key, value in optimizer.state[p].items()}, p.detach().clone()
    diagnose(optimizer)
    assert torch.equal(before[1], p)
    assert all(torch.equal(before[0][key], value) for key, value in optimizer.state[p].items())


def test_the_page_fits_and_gathers_layers_that_differ_in_their_number():
    tensors = {}
    for layer in range(12):
        tensors[f"model.decoder.layers.{layer}.self_attention.query_projection.weight"] = (1, 1, (16, 16))
        tensors[f"model.decoder.layers.{layer}.router.weight"] = (0.05, 1, (32, 64))
    found = diagnose(run(tensors, steps=100, mask_eps=1.0))
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("query_projection" in line and " 12 " in line for line in lines) == 1
    assert len(found.rows) == 24
    assert len(lines) < 30


def test_thousands_of_tensors_make_a_short_page():
    rows = [
        Row(f"w{i}", 0, 100, 10, 0.01, 0.0, 0.1, 1.0, 1.0, 0.0, 0.0, "epsilon" if i % 3 else "noise", "reason", "cure")
        for i in range(30_000)
    ]
    page = str(Diagnosis(rows))
    assert len(page.splitlines()) < 60
    assert re.search(r"\.\.\. and 29970 further tensors: 19970 epsilon, 10000 noise", page)
    assert "epsilon: and 19995 more." in page


def test_one_transfer_to_the_host(monkeypatch):
    optimizer = run({f"l{i}.weight": (1, 1, (4, 4)) for i in range(20)}, steps=15)
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self) or original(self))
    for name in ("item", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("read back by itself"))
    diagnose(optimizer)
    assert len(calls) == 2  # the step counts, and the sums


def test_before_the_first_step_it_says_so():
    found = diagnose(PRM([nn.Parameter(torch.zeros(3))]))
    assert (found.rows, found.problems) == ([], [])
    assert "No parameter (with any elements) has taken a step yet: call diagnose after some dozens" in str(found)


def test_what_is_refused():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(
        TypeError, match=r"needs a popriskmin.PRM, got AdamW: .* load_state_dict\(adamw.state_dict\(\)\)"
    ):
        diagnose(torch.optim.AdamW([p]))

    for threshold in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold must be a number in"):
            diagnose(run({"w": (1, 1)}, steps=1), threshold=threshold)


def _sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"reduction": "per_tensor", "mask": "soft"}):
        whole, parts = (_trained(shard, options) for shard in (None, lambda m: fully_shard(m, mesh=mesh)))
        for expected, row in zip(whole, parts):
            assert (expected[:4], expected[-3:]) == (row[:4], row[-3:]), options
            assert row[4:-3] == pytest.approx(expected[4:-3], rel=1e-3, abs=1e-6, nan_ok=True), options


def _trained(shard, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    if shard is not None:
        shard(model)
    optimizer = PRM(model.named_parameters(), lr=0.01, **options)
    x, y = torch.randn(25, 16, 7), torch.randn(25, 16, 3)
    for step in range(25):
        optimizer.zero_grad()
        (model(x[step]) - y[step]).square().mean().backward()
        optimizer.step()
    return diagnose(optimizer).rows


@pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")
def test_sharded_parameters(tmp_path):
    run_ranks(tmp_path, 2, _sharded)


def test_an_optimizer_for_each_parameter():
    tensors = {"body.weight": (2, 1), "router.weight": (0.3, 1)}
    together = diagnose(run(tensors))
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.zeros(64, 64)) for name in tensors}
    optimizers = [PRM([(name, p)], lr=1e-3) for name, p in params.items()]
    for _ in range(200):
        for (name, p), optimizer in zip(params.items(), optimizers):
            p.grad = tensors[name][0] + tensors[name][1] * torch.randn(p.shape, generator=generator)
            optimizer.step()
    apart = diagnose(optimizers)
    assert [row._replace(group=0) for row in apart.rows] == together.rows
    assert [row.group for row in apart.rows] == [0, 1]
    assert diagnose(iter(optimizers)) == diagnose(tuple(optimizers)) == apart
    unnamed = [PRM([nn.Parameter(torch.ones(2))]) for _ in range(3)]
    for optimizer in unnamed:
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
    assert [(row.name, row.group) for row in diagnose(unnamed).rows] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ValueError, match="at least one optimizer, got none"):
        diagnose([])
    with pytest.raises(TypeError, match="diagnose needs a popriskmin.PRM, got AdamW"):
        diagnose([optimizers[0], torch.optim.AdamW([nn.Parameter(torch.ones(1))])])
