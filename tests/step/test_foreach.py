"""The step over lists of tensors: its memory, tensors that are cut or joined, and no waiting for the device."""

import itertools
import weakref

import pytest
import torch
from conftest import TORCH
from torch.utils._python_dispatch import TorchDispatchMode

import popriskmin.step.foreach as foreach_module
from popriskmin import PRM

pytestmark = pytest.mark.usefixtures("small_blocks")


class _Allocations(TorchDispatchMode):
    """Count the bytes of tensors that live at once, beyond those that existed before."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                key = id(t)
                if key not in self.alive:
                    self.alive[key] = t.numel() * t.element_size()
                    weakref.finalize(t, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def _peak(device, **kwargs):
    if TORCH < (2, 1):
        pytest.skip("torch 2.0 has no foreach operations on the meta device, nor names for storages")
    shapes = [(64, 64), (128,), (32, 16, 4)] * 4
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = PRM(params, foreach=True, **kwargs)
    optimizer.step()
    known = [*params, *(p.grad for p in params)]
    known += [t for state in optimizer.state.values() for t in state.values()]
    with _Allocations(known) as mode:
        optimizer.step()
    return mode.peak / sum(p.numel() * p.element_size() for p in params)


@pytest.mark.parametrize("mask", ["snr", "soft", "hard"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"amsgrad": True}, {"debias": True}, {"maximize": True}, {"decoupled_weight_decay": False},
     {"mask_decay": True}, {"reduction": "per_tensor"}, {"debias": True, "capturable": True}],
)  # fmt: skip
def test_foreach_keeps_to_two_lists_of_temporaries(mask, extra):
    # On a device that is not the CPU the lists are taken whole; the meta device shows it.
    # Beside the lists, step counters and single numbers; the hard mask also needs one tensor at a time.
    assert 0.9 < _peak("meta", mask=mask, **extra) <= (2.35 if mask == "hard" else 2.03)


def test_foreach_on_the_cpu_needs_a_block_only(monkeypatch):
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 1024)
    # Joined tensors need a copy of everything, and the two temporaries: seven blocks, of which the model has 26.
    assert _peak("cpu") < 7.5 / 26


@pytest.fixture
def no_copies_to_a_device(monkeypatch):
    """Refuse what waits for a device though nothing is read back: a tensor made there of Python numbers."""
    make = torch.tensor

    def checked(data, **kwargs):
        if str(kwargs.get("device") or "cpu") != "cpu":
            raise AssertionError(f"torch.tensor(..., device={kwargs['device']}) waits for the device")
        return make(data, **kwargs)

    monkeypatch.setattr(torch, "tensor", checked)


FLAGS = [[False, True]] * 2


@pytest.mark.usefixtures("no_copies_to_a_device")
@pytest.mark.parametrize("foreach", [False, True])
def test_no_value_is_read_back_to_the_host(foreach):
    """Meta tensors have no values: a step that asked for one would raise."""
    if foreach and TORCH < (2, 1):
        pytest.skip("torch 2.0 has no foreach operations on the meta device")
    drawn = itertools.product(["snr", "soft", "hard", "threshold", "none"], ["per_param", "per_tensor"], *FLAGS)
    for i, (mask, reduction, debias, capturable) in enumerate(drawn):
        # So that any two options meet in all their values.
        amsgrad, decoupled = bool((i + i // 4) % 2), bool((i // 2 + i // 8) % 2)
        params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(3, 4), (5,), ()]]
        optimizer = PRM(params, lr=torch.tensor(1e-3), mask=mask, reduction=reduction, debias=debias, amsgrad=amsgrad,
                        decoupled_weight_decay=decoupled, foreach=foreach, capturable=capturable,
                        warmup_steps=1)  # fmt: skip
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.step()
        device = optimizer.state[params[0]]["step"].device.type
        assert device == ("meta" if capturable else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_tensors_of_any_layout_are_written_back(dtype, monkeypatch):
    """Small tensors are stepped as one; each must get its own part back, whatever its strides."""

    def values():
        torch.manual_seed(0)
        return [torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(2, 6)[:, ::2], torch.randn(())]

    results = []
    for fewest in (2, 100):
        monkeypatch.setattr(foreach_module, "FEWEST_JOINED", fewest)
        params = [torch.nn.Parameter(x.to(dtype)) for x in values()]
        optimizer = PRM(params, lr=0.1, amsgrad=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], values()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "capturable"])
def test_the_means_of_a_large_tensor_keep_their_digits(layout):
    shape = (64, 64, 16, 16)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        g = g.contiguous(memory_format=torch.channels_last)
    moved = []
    for foreach in (False, True):
        p = torch.nn.Parameter(torch.zeros_like(g))
        p.grad = g
        PRM([p], lr=1.0, betas=(0.0, 0.0), rho=0.9, eps=0.0, weight_decay=0.0, reduction="per_tensor", foreach=foreach,
            capturable=layout == "capturable", softness=0.5).step()  # fmt: skip
        moved.append(p.detach())
    # The first step's signal is its noise: q = 1 / (1 + softness), and the step is q * sign(g).
    for step in moved:
        torch.testing.assert_close(step, -g.sign() / 1.5, rtol=2e-6, atol=1e-6)
