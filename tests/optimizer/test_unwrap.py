"""What wraps an optimizer: wrappers made as frameworks make theirs, and torch's own ZeroRedundancyOptimizer."""

import pytest
import torch
from conftest import TORCH
from ranks import run_ranks
from torch import nn

import popriskmin
from popriskmin import PRM, Microbatches, RiskMonitor, SoftnessController, diagnose, unwrap
from popriskmin.optimizer.unwrap import unwrapped


class Around(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by its type, which has not been built as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


class Disguised:
    """As Lightning's and Fabric's: a new class, of the wrapper and the wrapped, over a copy of its attributes."""

    def __init__(self, optimizer):
        self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")})
        self.__class__ = type("Disguised" + type(optimizer).__name__, (Disguised, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Hidden:
    """A wrapper whose `optimizer` is no optimizer, and raises AttributeError where it looks into itself."""

    def __init__(self, optimizer):
        self._optimizer, self.optim = optimizer, "adamw"

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name) if "_optimizer" in self.__dict__ else None


def layer_and(**options):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    return layer, PRM(layer.named_parameters(), lr=0.01, **options)


def steps(layer, optimizer, count=30):
    for _ in range(count):
        optimizer.zero_grad()
        layer(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


WRAPPERS = [
    lambda o: o,
    Around,
    Disguised,
    Hidden,
    lambda o: Around(Disguised(o)),
    lambda o: Disguised(Around(Around(o))),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_innermost_optimizer_is_found(wrap):
    for inner in (layer_and()[1], torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)):
        assert unwrap(wrap(inner)) is inner
    assert popriskmin.unwrap is unwrap


def test_a_subclass_is_its_own():
    class Mine(PRM):
        pass

    optimizer = Mine([nn.Parameter(torch.ones(1))])
    assert unwrap(optimizer) is optimizer


def test_wrappers_that_go_round_end():
    class Round(torch.optim.SGD):
        pass

    one, other = (Round([torch.ones(1)], lr=0.1) for _ in range(2))
    one.optimizer, other.optimizer = other, one
    assert unwrap(one) is other


@pytest.mark.parametrize("wrap", WRAPPERS[1:4])
def test_everything_that_reads_an_optimizer_takes_its_wrapper(wrap):
    layer, optimizer = layer_and()
    wrapped = wrap(optimizer)
    monitor = RiskMonitor(wrapped, every=1)
    controller = SoftnessController(wrapped, mean_q=0.9, every=5, floor=0)
    steps(layer, optimizer)
    assert monitor.estimate().steps == 30
    assert controller.readings
    assert optimizer.param_groups[0]["softness"] < 1
    assert diagnose(wrapped).rows == diagnose(optimizer).rows
    assert unwrap(wrapped).get_mask_stats() == optimizer.get_mask_stats()


@pytest.mark.parametrize("wrap", WRAPPERS[1:4])
def test_sources_take_wrappers_and_one_optimizer_has_one_source(wrap):
    layer, optimizer = layer_and(variance="given")
    source = Microbatches(wrap(optimizer))
    for _ in range(2):
        layer(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg_var"].all()
    with pytest.raises(RuntimeError, match="has a source of variances already"):
        Microbatches(optimizer)
    source.remove()
    Microbatches(wrap(optimizer))


def test_what_holds_no_prm_is_named_with_its_wrapper():
    adamw = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
    for build in (lambda o: SoftnessController(o, mean_q=0.5), diagnose):
        with pytest.raises(TypeError, match=r"needs a popriskmin.PRM, got Around around AdamW: .*Hand the framework"):
            build(Around(adamw))
    needed = "Microbatches needs an optimizer with .*, got Around around AdamW without one"
    with pytest.raises(ValueError, match=needed):
        Microbatches(Around(adamw))
    with pytest.raises(TypeError, match="got Around around SGD"):
        RiskMonitor(Around(torch.optim.SGD([torch.ones(1)], lr=0.1)))
    for given in (None, 3, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=f"unwrap takes a torch optimizer, .*, got {type(given).__name__}"):
            unwrap(given)


def _zero(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), PRM, lr=0.01)
    monitor = RiskMonitor(optimizer, every=1)
    controller = SoftnessController(optimizer, mean_q=0.9, every=5, floor=0)
    steps(nn.parallel.DistributedDataParallel(model), optimizer)
    inner = unwrap(optimizer)
    assert type(inner) is PRM
    mine = sum(len(group["params"]) for group in inner.param_groups)
    assert 0 < mine < 4
    assert unwrapped(optimizer).elsewhere == 4 - mine
    assert monitor.estimate().steps == 30
    assert len(diagnose(optimizer).rows) == mine
    assert f"This rank's {mine} of 4 tensors" in str(diagnose(optimizer))
    # What the controller wrote into the inner group outlives the step, in which torch carries the groups across.
    assert controller.readings
    assert optimizer.param_groups[0]["softness"] == inner.param_groups[0]["softness"] < 1
    count = torch.tensor(float(inner.get_mask_stats()["parameter_count"]))
    torch.distributed.all_reduce(count)
    assert count == sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(TORCH < (2, 1), reason="the ranks' helper needs a later torch")
def test_zero_redundancy_on_two_ranks(tmp_path):
    run_ranks(tmp_path, 2, _zero)
