"""The functional form: what it takes and refuses, which implementation it chooses, and autograd through it."""

import pytest
import torch
from conftest import HOW

import popriskmin.step.functional as functional
from popriskmin import PRM

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mask": "soft"}, {"debias": True}, {"reduction": "per_tensor"}, {"amsgrad": True},
     {"decoupled_weight_decay": False}, {"mask_decay": True}, {"min_q": 0.2},
     {"variance": "given"}, {"variance": "given", "debias": True, "reduction": "per_tensor"}],
)  # fmt: skip
def test_autograd_through_several_steps(kwargs):
    """The derivative by a tensor learning rate and by the first weights, against finite differences."""

    def final(lr, start):
        w = start.clone()
        optimizer = PRM([w], lr=lr, differentiable=True, weight_decay=0.1, **kwargs)
        for factor in (1.0, 2.0, 1.5):
            w.grad = factor * (w - 1.0) ** 3
            if kwargs.get("variance") == "given":
                optimizer.set_variances({w: factor + (w - 1.0) ** 2})
            optimizer.step()
        return w

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, -0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (lr, start), atol=1e-5)


def test_autograd_and_other_implementations_do_not_go_together():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="foreach=True does not support differentiable=True"):
        PRM([w], foreach=True, differentiable=True)
    with pytest.raises(RuntimeError, match="fused=True does not support differentiable=True|no fused kernel"):
        PRM([w], fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        PRM([w], fused=True, foreach=True)


def test_subclasses_that_torch_does_not_list_take_the_loop():
    class Own(torch.Tensor):
        pass

    plain = torch.nn.Parameter(torch.ones(2))
    own = torch.ones(2).as_subclass(Own)
    assert functional.choose_implementation([plain], None, False, False) == "foreach"
    assert functional.choose_implementation([plain, own], None, False, False) == "single"
    assert functional.choose_implementation([plain], None, None, True) == "single"
    assert functional.choose_implementation([plain], None, None, False) == "fused"
    own = torch.nn.Parameter(own)
    own.grad = torch.ones(2).as_subclass(Own)
    PRM([own]).step()
    assert (own < 1).all()


def test_functional_form_counts_steps_and_works_in_place():
    w, g, m, v, s, step = (torch.ones(3), torch.ones(3), *(torch.zeros(3) for _ in range(3)), torch.tensor(0.0))
    functional.prm([w], [g], [m], [v], [s], [], [step], lr=0.1, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8,
                   weight_decay=0.0)  # fmt: skip
    assert step == 1
    torch.testing.assert_close(s, torch.full((3,), 0.01))
    torch.testing.assert_close(w, torch.full((3,), 0.95))


def test_functional_form_wants_as_many_maxima_as_parameters():
    def tensors():
        return [torch.ones(2)]

    common = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "rho": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="amsgrad=True needs one of max_exp_avg_sqs for each of 1 parameters, got 0"):
        functional.prm(tensors(), tensors(), *[tensors() for _ in range(3)], [], [torch.tensor(0.0)], amsgrad=True,
                       **common)  # fmt: skip
    results = []
    for maxima in ([], [torch.full((2,), 1e6)]):
        for foreach in (False, True):
            w = tensors()
            functional.prm(w, tensors(), *[[torch.zeros(2)] for _ in range(3)], maxima, [torch.tensor(0.0)],
                           foreach=foreach, **common)  # fmt: skip
            results.append(w[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "options",
    [{}, {"debias": True}, {"capturable": True}, {"debias": True, "capturable": True}, {"maximize": True},
     {"reduction": "per_tensor", "mask": "soft"}, {"state_dtype": torch.bfloat16}],
)  # fmt: skip
def test_gradients_whose_squares_overflow_leave_the_state_finite_as_in_adamw(how, options):
    """AdamW weights a gradient before it squares it, and holds out to 5.8e20; the square overflows from 1.8e19 on."""
    w, plain = torch.nn.Parameter(torch.ones(70)), torch.nn.Parameter(torch.ones(70))
    optimizer, adamw = PRM([w], **options, **how), torch.optim.AdamW([plain])
    for scale in (2e19, -1e19, 2e19):
        w.grad, plain.grad = torch.full((70,), scale), torch.full((70,), scale)
        optimizer.step()
        adamw.step()
    state = optimizer.state[w]
    assert state["exp_avg_var"].isfinite().all()
    rough = options.get("state_dtype") == torch.bfloat16
    torch.testing.assert_close(
        state["exp_avg_sq"].float(), adamw.state[plain]["exp_avg_sq"], rtol=0.02 if rough else 1e-5, atol=0
    )
    assert w.isfinite().all()


@pytest.mark.parametrize("how", HOW)
def test_functional_form_takes_variances(how):
    w, z = torch.ones(3), torch.tensor([1.0, 0.0, 3.0])
    state = [[torch.zeros(3)] for _ in range(3)]
    functional.prm([w], [torch.ones(3)], *state, [], [torch.tensor(0.0)], lr=0.1, beta1=0.9, beta2=0.999, rho=0.5,
                   eps=1e-8, weight_decay=0.0, grad_vars=[z], **how)  # fmt: skip
    torch.testing.assert_close(state[2][0], z / 2)
    torch.testing.assert_close(w, 1 - 0.1 / (1 + z))


@pytest.mark.parametrize(
    ("grad_vars", "message"),
    [([], r"grad_vars needs a variance for each of 1 parameters, got 0"),
     ([torch.ones(3)], r"grad_vars\[0\] must be as params\[0\], real of shape \(2,\), got torch.float32 of shape .3"),
     ([torch.ones(2, dtype=torch.cfloat)], "real of shape .2,., got torch.complex64 of shape")],
)  # fmt: skip
def test_functional_form_wants_variances_that_fit(grad_vars, message):
    w = torch.ones(2)
    state = [[torch.zeros(2)] for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        functional.prm([w], [torch.ones(2)], *state, [], [torch.tensor(0.0)], lr=0.1, beta1=0.9, beta2=0.999, rho=0.5,
                       eps=1e-8, weight_decay=0.0, grad_vars=grad_vars)  # fmt: skip
    assert torch.equal(w, torch.ones(2))


def test_functional_form_with_no_parameters():
    functional.prm([], [], [], [], [], [], [], lr=0.1, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8, weight_decay=0.0)
