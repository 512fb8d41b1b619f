import copy

import pytest
import torch
from conftest import HOW
from own_masks import twice
from steps import through_a_file
from torch import nn

from popriskmin import PRM, Masked, diagnose
from popriskmin.mask import found_mask, mask_name
from popriskmin.step.functional import prm
from popriskmin.step.kernels import cpu, describe

PATH = "own_masks:twice"


def params():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(30, 4), (5,), ()]]


def run(optimizer, own, steps=range(4)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator) + 0.5
        optimizer.step()
    return [p.detach().clone() for p in own]


FOREACH = [how for how in HOW if not how.get("fused")]


@pytest.mark.parametrize("how", [{}, *FOREACH])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "per_tensor"},
        {"debias": True, "min_q": 0.1},
        {"warmup_steps": 2, "mask_decay": True},
        {"shrinkage": 1.0, "batch_size": 3, "n_dataset": 30, "boundary": "empirical"},
    ],
)
def test_it_is_the_mask_that_it_computes(how, options, small_blocks):
    given = [3.0, 6.0]  # the softness of the one is half of the other's
    ends = []
    for mask, softness in zip((twice, "snr"), given):
        own = params()
        optimizer = PRM(own, lr=0.1, mask=mask, softness=softness, **options, **how)
        ends.append((run(optimizer, own), optimizer.get_mask_stats()))
    for one, other in zip(ends[0][0], ends[1][0]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_it_is_given_as_a_function_or_by_its_path_and_per_group():
    own = params()
    optimizer = PRM([{"params": own[:1], "mask": PATH}, {"params": own[1:]}], lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "mask": twice})
    assert [group["mask"] for group in optimizer.param_groups] == [twice, "snr", twice]
    run(optimizer, own, range(1))
    rows = optimizer.get_mask_stats(by="group")
    assert rows[0]["mean_q"] == pytest.approx(1 / 3)
    assert rows[1]["mean_q"] == pytest.approx(1 / 2)
    optimizer.param_groups[1]["mask"] = PATH  # a schedule's
    run(optimizer, own, range(1))
    assert "cause" in diagnose(optimizer).rows[0]._fields


def test_the_function_takes_the_functional_form():
    w, g = torch.ones(2), torch.tensor([1.0, -1.0])
    m, v, s, step = torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.tensor(0.0)
    prm(
        [w], [g], [m], [v], [s], [], [step], lr=0.3, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8, weight_decay=0.0,
        mask=PATH,
    )  # fmt: skip
    torch.testing.assert_close(w, torch.tensor([0.9, 1.1]))


def test_it_compiles():
    ends = []
    for compiled in (False, True):
        own = params()
        optimizer = PRM(own, lr=0.1, mask=twice)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        ends.append(run(optimizer, own))
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_it():
    w, g = torch.ones(2), torch.tensor([1.0, -2.0], requires_grad=True)
    m, v, s, step = torch.full((2,), 0.3), torch.ones(2), torch.ones(2), torch.tensor(1.0)
    prm(
        [w], [g], [m], [v], [s], [], [step], lr=0.3, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8, weight_decay=0.0,
        mask=twice, differentiable=True,
    )  # fmt: skip
    w.sum().backward()
    assert torch.all(g.grad != 0)


@pytest.mark.skipif(cpu.unusable() is not None, reason="no fused step here")
def test_the_kernels_step_aside_and_say_so():
    with pytest.raises(RuntimeError, match="kernels do not know the mask own_masks:twice: pass fused=None"):
        PRM(params(), mask=twice, fused=True)
    own = params()
    optimizer = PRM(own, fused=True)
    optimizer.param_groups[0]["mask"] = twice
    with pytest.raises(RuntimeError, match="know the masks none, snr, soft, hard, threshold, and not own_masks:twice"):
        run(optimizer, own)
    assert describe()["masks"].endswith("a mask of one's own steps by foreach")


@pytest.mark.parametrize("wrap", ["prm", "masked", "masked around a mask"])
def test_a_checkpoint_holds_its_path(wrap):
    class Other(torch.optim.SGD):
        """An optimizer with an option of its own that is called mask."""

        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.defaults["mask"] = None
            for group in self.param_groups:
                group["mask"] = None

    def made(own, mask):
        if wrap == "prm":
            return PRM(own, lr=0.1, mask=mask)
        return Masked(torch.optim.SGD(own, lr=0.1) if wrap == "masked" else Other(own), mask=mask)

    own = params()
    optimizer = made(own, twice)
    run(optimizer, own)
    saved, weights = through_a_file([optimizer.state_dict(), [p.detach() for p in own]])
    key = "mask_mask" if wrap == "masked around a mask" else "mask"
    assert saved["param_groups"][0][key] == PATH
    again = [nn.Parameter(w.clone()) for w in weights]
    other = made(again, "soft")
    other.load_state_dict(saved)
    assert other.param_groups[0][key] is twice
    for one, two in zip(run(optimizer, own, range(4, 6)), run(other, again, range(4, 6))):
        assert torch.equal(one, two)
    copied = copy.deepcopy(other)
    assert copied.param_groups[0][key] is twice


def test_a_mask_of_a_notebook_goes_on_where_it_is_given_again():
    def local(signal, noise, hyper):
        return twice(signal, noise, hyper)

    own = params()
    optimizer = PRM(own, mask=local)
    run(optimizer, own)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["mask"] is local
    other = PRM(params(), mask="soft")
    with pytest.raises(ValueError, match=r"local.* cannot be found.* written with it: make it importable.*'mask',"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["mask"] == "soft"
    other.load_state_dict(saved, keep=("mask",))
    assert other.param_groups[0]["mask"] == "soft"


def _not_elementwise(signal, noise, hyper):
    return signal / (signal + noise.mean() + 1)


def _in_place(signal, noise, hyper):
    return signal.div_(signal + noise + 1)


def _above(signal, noise, hyper):
    return signal


def _not_finite(signal, noise, hyper):
    return signal / noise.mul(0)


def _number(signal, noise, hyper):
    return 0.5


def _failing(signal, noise, hyper):
    return signal + hyper.nothing


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (_not_elementwise, "must return q of each scalar by itself"),
        (_in_place, "changes the signal or the noise"),
        (_above, r"must return q in \[0, 1\]"),
        (_not_finite, r"must return q in \[0, 1\]"),
        (_number, "must return q as a tensor of the signal's shape .*, got 0.5"),
        (_failing, "fails on signal=.*nothing"),
        (lambda signal, noise: signal, "fails on signal=.*positional argument"),
        ("own_masks:NO_FUNCTION", "is no function, but 3"),
        ("own_masks:twic", "own_masks has no twic: did you mean twice?"),
        ("no_masks:twice", "module 'no_masks' of the mask 'no_masks:twice' cannot be imported"),
        ("snrr", "mask must be one of snr, soft, hard, threshold, none"),
        (3, "mask must be one of .*, got 3"),
    ],
)
@pytest.mark.parametrize("wrap", [PRM, lambda p, mask: Masked(torch.optim.SGD(p, lr=0.1), mask=mask)])
def test_a_bad_mask_is_named(mask, message, wrap):
    with pytest.raises(ValueError, match=message):
        wrap(params(), mask=mask)


def test_paths():
    assert mask_name(twice) == PATH
    assert found_mask(PATH) is twice
