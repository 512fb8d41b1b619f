"""The library on a CUDA device, where there is one: what a user's loop meets beyond the kernel's own tests."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from steps import through_a_file
from torch import nn

from popriskmin import PRM, Examples, Microbatches, RiskMonitor, SoftnessController, coherence, diagnose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IMPLEMENTATIONS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
OPTIONS = [
    {},
    {"mask": "soft", "reduction": "per_tensor"},
    {"mask": "threshold", "amsgrad": True},
    {"debias": True, "warmup_steps": 2},
    {"state_dtype": torch.bfloat16},
    {"shrinkage": 1.0, "batch_size": 16, "n_dataset": 200},
    {"shrinkage": 2.0, "batch_size": 16, "n_dataset": 200, "shrink_to": "start", "reduction": "per_tensor"},
]


@pytest.fixture
def waiting_is_an_error():
    """Return what makes any wait for the device an error from now on, until it is called with False."""

    def switch(on=True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    torch.cuda.set_sync_debug_mode("default")


def network(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.LayerNorm(33), nn.ReLU(), nn.Linear(33, 1)).to(device)


def batches(count, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 20, generator=generator)
        yield x.to(device), (x.sum(1, keepdim=True) + torch.randn(16, 1, generator=generator)).to(device)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def assert_near(model, other, atol=2e-4):
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_training_goes_as_on_the_cpu(how, options, capturable):
    here, there = network("cpu"), network("cuda")
    train(here, PRM(here.parameters(), lr=1e-2, foreach=False, **options), batches(20))
    train(there, PRM(there.parameters(), lr=1e-2, capturable=capturable, **how, **options), batches(20, "cuda"))
    assert_near(here, there, atol=4e-3 if "state_dtype" in options else 2e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_no_step_waits_for_the_device(how, options, waiting_is_an_error):
    model = network("cuda")
    optimizer = PRM(model.parameters(), lr=1e-2, **how, **options)
    data = list(batches(6, "cuda"))
    train(model, optimizer, data[:2])
    waiting_is_an_error()
    train(model, optimizer, data[2:])
    waiting_is_an_error(False)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_is_the_default(options):
    results = []
    for how in ({}, {"fused": True}):
        model = network("cuda")
        train(model, PRM(model.parameters(), lr=1e-2, **how, **options), batches(3, "cuda"))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_where_nothing_can_be_compiled_that_is_said_and_foreach_steps(tmp_path):
    code = (
        "import torch, popriskmin; w = torch.nn.Parameter(torch.ones(3, device='cuda')); w.grad = torch.ones_like(w);"
        "popriskmin.PRM([w]).step(); assert (w < 1).all(); popriskmin.PRM([w], fused=True).step()"
    )
    environment = {**os.environ, "CC": "false", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "always"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said = "<string>:1: UserWarning: PRM works without its fused step for cuda, several times slower: Triton cannot"
    assert said in done.stderr
    assert re.search("RuntimeError: fused=True, but .*Triton cannot compile or launch a kernel here", done.stderr)


def test_images_in_channels_last_and_parameters_that_come_later():
    """Tensors that lie otherwise, and counts that differ, without a wait or a copy of gradients."""
    results = []
    for device, how in (("cpu", {"foreach": False}), ("cuda", {}), ("cuda", {"capturable": True})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(180, 1))
        model = model.to(device, memory_format=torch.channels_last)
        optimizer = PRM(model.parameters(), lr=1e-2, **how)
        model[4].requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for i in range(6):
            if i == 3:
                model[4].requires_grad_(True)
            x = torch.randn(4, 3, 8, 8, generator=generator).to(device, memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append(model)
    assert_near(results[0], results[1])
    assert_near(results[0], results[2])


class Normals:
    """Normal numbers, the same for whoever asks likewise."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, shape, complex=False):
        return torch.randn(shape, generator=self.generator, dtype=torch.cfloat if complex else torch.float)


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("odd", [False, True])
def test_a_mixed_group(reduction, odd, waiting_is_an_error):
    """Types, layouts, an empty one and one on the CPU; a complex one and one with gaps, which are looked at singly."""
    results = []
    for device in ("cpu", "cuda"):
        draw = Normals()
        values = [draw((5, 4)), draw((5, 4)).double(), draw((4, 5)).t(), draw(3).bfloat16(), draw((0, 3)), draw(())]
        values = [v.to(device) for v in values] + [draw(6)]
        if odd:
            values += [draw(3, complex=True).to(device), draw((4, 6)).to(device).repeat_interleave(2, 0)[::2]]
        params = [nn.Parameter(v) for v in values]
        optimizer = PRM(params, lr=0.1, reduction=reduction, foreach=False if device == "cpu" else None)
        for i in range(4):
            for p in params:
                p.grad = draw(p.shape, complex=p.is_complex()).to(p)
            waiting_is_an_error(device == "cuda" and i > 1)
            optimizer.step()
            waiting_is_an_error(False)
        assert all(state["step"] == 4 for state in optimizer.state.values())
        results.append([p.detach().cpu() for p in params])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("before", [{"fused": True}, {"foreach": True}, {"capturable": True}])
@pytest.mark.parametrize("after", [{"fused": True}, {"foreach": True}, {"capturable": True, "fused": True}])
@pytest.mark.parametrize(("start", "end"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_checkpoints_move_between_devices(before, after, start, end):
    if "cpu" in (start, end):
        from popriskmin.step.kernels import cpu

        if cpu.unusable() and (before if start == "cpu" else after).get("fused"):
            pytest.skip("the kernel for the CPU is not built here")
    data = list(batches(12))
    straight = network("cpu")
    train(straight, PRM(straight.parameters(), lr=1e-2, foreach=False), data)

    first = network(start)
    optimizer = PRM(first.parameters(), lr=1e-2, **before)
    train(first, optimizer, [(x.to(start), y.to(start)) for x, y in data[:6]])
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = through_a_file(saved, map_location=end)
    second = network(end)
    resumed = PRM(second.parameters(), lr=1e-2, **after)
    second.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    train(second, resumed, [(x.to(end), y.to(end)) for x, y in data[6:]])
    assert_near(straight, second)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_scaler_in_float16_leaves_out_what_overflows(how):
    """Gradients of infinity move nothing, neither parameters nor state."""
    model = network("cuda")
    optimizer = PRM(model.parameters(), lr=1e-2, **how)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for i, (x, y) in enumerate(batches(6, "cuda")):
        held = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss * (float("inf") if i == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        now = (model.state_dict(), optimizer.state_dict()["state"])
        same = all(torch.equal(held[0][name], now[0][name]) for name in now[0])
        assert same == (i == 3)
        if i == 3:
            assert all(torch.equal(held[1][k][name], now[1][k][name]) for k in now[1] for name in now[1][k])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_compiled_step_goes_like_the_eager_one():
    compiled, eager = network("cuda"), network("cuda")
    # A learning rate on the device, and steps counted there, are not compiled anew.
    optimizer = PRM(compiled.parameters(), lr=torch.tensor(1e-2, device="cuda"), capturable=True)
    step = torch.compile(optimizer.step)
    for x, y in batches(5, "cuda"):
        optimizer.zero_grad()
        loss_of(compiled, x, y).backward()
        step()
    train(eager, PRM(eager.parameters(), lr=1e-2, foreach=False), batches(5, "cuda"))
    assert_near(eager, compiled)


def test_a_whole_training_step_is_captured_in_a_graph():
    captured, eager = network("cuda"), network("cuda")
    data = list(batches(8, "cuda"))
    optimizer = PRM(captured.parameters(), lr=1e-2, capturable=True, fused=True)
    x, y = (tensor.clone() for tensor in data[0])

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss_of(captured, x, y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for new_x, new_y in data[1:]:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
    train(eager, PRM(eager.parameters(), lr=1e-2, foreach=False), data)
    assert_near(eager, captured)


@pytest.mark.parametrize("build", [PRM, torch.optim.AdamW])
def test_the_monitor_sees_what_it_sees_on_the_cpu_and_does_not_wait(build, waiting_is_an_error):
    estimates = []
    for device in ("cpu", "cuda"):
        model = network(device)
        optimizer = build(model.parameters(), lr=1e-3)
        monitor = RiskMonitor(optimizer, every=2, n_dataset=320, batch_size=16)
        data = list(batches(40, device))
        train(model, optimizer, data[:4])
        if device == "cuda":
            waiting_is_an_error()
        train(model, optimizer, data[4:])
        if device == "cuda":
            waiting_is_an_error(False)
        estimates.append(monitor.estimate())
    # To the rounding of float32 over 40 steps; terms of either sign cancel in the sums.
    assert estimates[1] == pytest.approx(estimates[0], rel=1e-2, abs=1e-4)


def test_masks_are_read_and_diagnosed_as_on_the_cpu():
    told = []
    for device in ("cpu", "cuda"):
        model = network(device)
        optimizer = PRM(model.named_parameters(), lr=1e-3, mask="soft")
        train(model, optimizer, batches(60, device))
        rows = optimizer.get_mask_stats(by="parameter")
        told.append((rows, [(row.name, row.cause) for row in diagnose(optimizer).rows]))
    for name, row in told[0][0].items():
        assert told[1][0][name]["mean_q"] == pytest.approx(row["mean_q"], abs=2e-3)
    assert told[0][1] == told[1][1]


def test_variances_over_microbatches_and_examples():
    found = []
    for device in ("cpu", "cuda"):
        one, two = network(device), network(device)
        by_parts = PRM(one.parameters(), lr=1e-2, variance="given")
        Microbatches(by_parts)
        for x, y in batches(5, device):
            by_parts.zero_grad()
            for rows in torch.arange(16).split(4):
                (loss_of(one, x[rows], y[rows]) / 4).backward()
            by_parts.step()
        by_examples = PRM(two.parameters(), lr=1e-2, variance="given")
        source = Examples(by_examples, two, loss_of)
        for x, y in batches(5, device):
            by_examples.zero_grad()
            source.backward(x, y)
            by_examples.step()
        agreement = coherence(two, loss_of, *next(iter(batches(1, device)))).overall
        found.append((one, two, agreement.m_coherence))
    assert_near(found[0][0], found[1][0])
    assert_near(found[0][1], found[1][1])
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-2)


def test_the_softness_controller_steers():
    softness = []
    for device in ("cpu", "cuda"):
        model = network(device)
        optimizer = PRM(model.parameters(), lr=1e-3)
        SoftnessController(optimizer, mean_q=0.5, every=5)
        train(model, optimizer, batches(60, device))
        softness.append(optimizer.param_groups[0]["softness"])
    assert softness[1] == pytest.approx(softness[0], rel=2e-2)


def test_a_sharded_model_on_one_rank_trains_as_without(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no public FSDP2")
    import torch.distributed as dist

    plain, sharded = network("cuda"), network("cuda")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        fsdp.fully_shard(sharded)
        optimizer = PRM(sharded.parameters(), lr=1e-2, fused=True)
        train(sharded, optimizer, batches(10, "cuda"))
        assert 0 < optimizer.get_mask_stats()["mean_q"] <= 1
        train(plain, PRM(plain.parameters(), lr=1e-2, foreach=False), batches(10, "cuda"))
        for a, b in zip(plain.parameters(), sharded.parameters()):
            torch.testing.assert_close(a.detach(), b.full_tensor().detach(), rtol=1e-3, atol=2e-4)
    finally:
        dist.destroy_process_group()
