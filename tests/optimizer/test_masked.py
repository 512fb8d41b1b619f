import copy
import pickle

import pytest
import torch
from conftest import TORCH
from frameworks import framework
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import through_a_file
from strategies import options
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from popriskmin import PRM, Masked, RiskMonitor, SoftnessController, diagnose, unwrap
from popriskmin.integrations import log
from popriskmin.optimizer.checkpoint_probe import made_state_alone

# What Masked has of PRM's options, and what of AdamW's the two must be given alike.
MASK = (
    "rho",
    "softness",
    "mask",
    "reduction",
    "warmup_steps",
    "debias",
    "min_q",
    "boundary",
    "batch_size",
    "n_dataset",
)
STEP = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


def params(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 3, 2), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(lists, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists):
        grad = torch.randn(same[0].shape, generator=generator, dtype=torch.float64) + 0.5
        for p in same:
            p.grad = (scale * grad).to(p.dtype)


@given(options(), st.sampled_from([1e-4, 1.0]))
@settings(max_examples=40)
def test_around_adamw_it_is_prm(drawn, scale):
    drawn = {**drawn, "bias_correction": True, "decoupled_weight_decay": True, "variance": "streaming", "shrinkage": 0}
    kept = {name: drawn[name] for name in (*MASK, "mask_decay") if name in drawn}
    mask_eps = drawn["eps"] ** 2 if drawn["mask_eps"] is None else drawn["mask_eps"]
    ours, theirs = params(), params()
    prm = PRM(ours, **drawn)
    masked = Masked(
        torch.optim.AdamW(theirs, **{name: drawn[name] for name in STEP}),
        beta1=drawn["betas"][0],
        mask_eps=mask_eps,
        **kept,
    )
    for step in range(5):
        give_gradients([ours, theirs], step, scale)
        prm.step()
        masked.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, value in prm.get_mask_stats().items():
        assert masked.get_mask_stats()[name] == pytest.approx(value, rel=1e-9)
    assert masked.get_mask_stats(by="parameter").keys() == prm.get_mask_stats(by="parameter").keys()


def test_a_step_keeps_q_of_the_change_of_any_optimizer():
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    masked = Masked(torch.optim.SGD([w], lr=0.1), beta1=0.5, rho=0.5)
    w.grad = torch.tensor([1.0, 2.0])
    masked.step()  # signal and noise are the same number: half the step
    torch.testing.assert_close(w.detach(), torch.tensor([0.95, 0.9]))
    w.grad = torch.tensor([1.0, -2.0])
    masked.step()
    # m^ is 1 and (0.5 * 1 - 1) / 0.75; s is 0.5 * 0.5 + 0.5 * 0.25 and 0.5 * 2 + 0.5 * 9, over 0.75.
    signal = torch.tensor([1.0, (0.5 * 1 - 1) / 0.75]).square()
    noise = torch.tensor([0.375, 5.5]) / 0.75
    expected = torch.tensor([0.95, 0.9]) - 0.1 * signal / (signal + noise) * w.grad
    torch.testing.assert_close(w.detach(), expected)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, rho=0.8),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    **({"muon": lambda p: torch.optim.Muon(p, lr=0.1)} if hasattr(torch.optim, "Muon") else {}),
    **({"adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.2)} if TORCH >= (2, 5) else {}),
    "lion": lambda p: framework("pytorch_optimizer").Lion(p, lr=0.1, weight_decay=0.3),
    "lion-pytorch": lambda p: framework("lion_pytorch").Lion(p, lr=0.1, weight_decay=0.3),
    "lion-pytorch of its schedule": lambda p: framework("lion_pytorch").Lion(
        p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "schedule-free": lambda p: framework("pytorch_optimizer").ScheduleFreeAdamW(p, lr=0.1, warmup_steps=2),
    "schedulefree": lambda p: in_training(framework("schedulefree").AdamWScheduleFree(p, lr=0.1, warmup_steps=2)),
    "schedulefree's SGD": lambda p: in_training(framework("schedulefree").SGDScheduleFree(p, lr=0.1)),
}


def in_training(optimizer):
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_an_open_mask_the_inner_optimizer_is_left_alone(name):
    ends = []
    for wrap in (
        lambda o: o,
        lambda o: Masked(o, mask="none"),
        lambda o: Masked(o, min_q=1.0),
        lambda o: Masked(o, warmup_steps=9),
    ):
        w = nn.Parameter(params(torch.float32)[0].detach().clone())
        optimizer = wrap(OPTIMIZERS[name]([w]))
        for step in range(4):
            give_gradients([[w]], step)
            optimizer.step()
        ends.append(w.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[3])
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shut_mask_leaves_the_decoupled_decay_alone(name):
    w = nn.Parameter(torch.ones(2, 2))
    masked = Masked(OPTIMIZERS[name]([w]), mask="hard", softness=1.0)
    for step in range(6):
        w.grad = torch.full((2, 2), 3.0 * (-1) ** step)
        masked.step()
    assert masked.get_mask_stats()["mean_q"] == 0
    # Of Adam it is part of the gradient.
    decay = {"muon": 0.1, "adafactor": 0.2, "lion-pytorch of its schedule": 3.0}.get(name, 0.3 if "lion" in name else 0)
    first = 1.0  # the first step's signal equals its noise
    torch.testing.assert_close(w.detach(), torch.full((2, 2), first * (1 - 0.1 * decay) ** 6))


def test_the_decay_is_masked_where_it_is_asked_for_or_cannot_be_told_apart():
    for inner in (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5),
    ):
        w = nn.Parameter(torch.ones(2))
        masked = Masked(inner([w]), mask="hard", mask_decay=True)
        for step in range(4):
            w.grad = torch.full((2,), 3.0 * (-1) ** step)
            masked.step()
        assert torch.equal(w.detach(), torch.ones(2))


def test_a_group_may_say_that_it_decays_decoupled():
    class Own(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad)

    w = nn.Parameter(torch.ones(2))
    own = Own([{"params": [w], "decoupled_weight_decay": True}], lr=0.1, weight_decay=0.5)
    masked = Masked(own, mask="hard")
    w.grad = torch.ones(2)
    masked.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.95))


@pytest.mark.parametrize(
    ("package", "name"), [("pytorch_optimizer", "ScheduleFreeSGD"), ("schedulefree", "SGDScheduleFree")]
)
def test_schedule_free_moves_both_of_its_sequences_alike(package, name):
    def schedule_free(*args, **options):
        return in_training(getattr(framework(package), name)(*args, **options))

    w, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    masked = Masked(schedule_free([w], lr=0.1), min_q=0.25, mask="hard")  # q is 0.25 throughout
    inner = schedule_free([plain], lr=0.1)
    for step in range(3):
        for p in (w, plain):
            p.grad = torch.full((3,), 3.0 * (-1) ** step)
        before, z = plain.detach().clone(), inner.state[plain].get("z", plain).detach().clone()
        inner.step()
        with torch.no_grad():
            plain.copy_(before + 0.25 * (plain - before))
            inner.state[plain]["z"].copy_(z + 0.25 * (inner.state[plain]["z"] - z))
        masked.step()
        torch.testing.assert_close(w, plain)
    masked.eval()
    inner.eval()
    torch.testing.assert_close(w, plain)
    assert masked.param_groups[0]["train_mode"] is False
    masked.train()
    inner.train()
    torch.testing.assert_close(w, plain)


def test_groups_are_shared_and_options_are_per_group():
    a, b, c = params()[:3]
    inner = torch.optim.SGD([{"params": [a], "softness": 5.0}, {"params": [b], "mask": "none"}], lr=0.1)
    masked = Masked(inner, softness=2.0)
    assert masked.param_groups is inner.param_groups
    assert [group["softness"] for group in masked.param_groups] == [5.0, 2.0]
    masked.add_param_group({"params": [c], "min_q": 0.5})
    with pytest.raises(ValueError, match=r"softness must be a finite number >= 0, got -1"):
        masked.add_param_group({"params": [nn.Parameter(torch.ones(1))], "softness": -1})
    assert len(inner.param_groups) == 3
    give_gradients([[a, b, c]], 0)
    masked.step()
    rows = masked.get_mask_stats(by="group")
    assert rows[0]["mean_q"] == pytest.approx(1 / 6)
    assert rows[1]["mean_q"] == 1
    assert rows[2]["mean_q"] == pytest.approx(0.5)
    inner.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # behind its back
    masked.param_groups[-1]["params"][0].grad = torch.ones(2)
    masked.step()
    assert masked.get_mask_stats(by="group")[3]["mean_q"] == pytest.approx(1 / 3)


def test_an_option_of_the_same_name_is_the_inner_ones():
    w = params()[0]
    masked = Masked(torch.optim.Adadelta([w], rho=0.8), rho=0.95)
    assert masked.param_groups[0]["rho"] == 0.8
    assert masked.param_groups[0]["mask_rho"] == 0.95
    give_gradients([[w]], 0)
    masked.step()
    assert masked._applied[0].rho == 0.95


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_goes_on_as_if_nothing_had_been(name):
    def run(w, masked, steps):
        for step in steps:
            give_gradients([[w]], step)
            masked.step()

    w = nn.Parameter(params(torch.float32)[0].detach().clone())
    masked = Masked(OPTIMIZERS[name]([w]), softness=0.5)
    run(w, masked, range(3))
    saved = through_a_file({"w": w.detach(), "optimizer": masked.state_dict()})
    run(w, masked, range(3, 6))
    again = nn.Parameter(saved["w"].clone())
    other = Masked(OPTIMIZERS[name]([again]), softness=3.0)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["softness"] == 0.5
    run(again, other, range(3, 6))
    assert torch.equal(w, again)
    if "lion" in name or name == "schedule-free":  # which cannot be copied themselves
        return
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):  # as torch, with parameters of their own
        (theirs,) = copied.param_groups[0]["params"]
        give_gradients([[theirs], [again]], 6)
        copied.step()
        with torch.no_grad():
            expected = copy.deepcopy(other)
        (same,) = expected.param_groups[0]["params"]
        same.grad = again.grad.clone()
        expected.step()
        assert torch.equal(theirs, same)


def test_state_of_half_precision_parameters_stays_in_float32():
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masked = Masked(torch.optim.SGD([w], lr=0.5))
    w.grad = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.bfloat16)
    masked.step()
    saved = copy.deepcopy(masked.state_dict())
    assert saved["state"][0]["mask_exp_avg_var"].dtype == torch.float32
    other = Masked(torch.optim.SGD([w], lr=0.5))
    other.load_state_dict(saved)
    assert torch.equal(other.state[w]["mask_exp_avg_var"], masked.state[w]["mask_exp_avg_var"])
    assert other.state[w]["mask_exp_avg_var"].dtype == torch.float32


def test_a_checkpoint_of_the_inner_optimizer_is_taken_over():
    w, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([plain], lr=0.1)
    for step in range(3):
        give_gradients([[plain]], step)
        adamw.step()
    masked = Masked(torch.optim.AdamW([w], lr=0.1), softness=4.0)
    masked.load_state_dict(adamw.state_dict())
    assert masked.get_mask_stats() is None
    give_gradients([[w]], 3)
    masked.step()
    assert masked.param_groups[0]["softness"] == 4.0
    assert masked.get_mask_stats()["mean_q"] == pytest.approx(1 / 5)
    assert masked.state[w]["step"] == 4


def test_a_bad_checkpoint_changes_nothing():
    w = nn.Parameter(torch.ones(3))
    masked = Masked(torch.optim.SGD([w], lr=0.1, momentum=0.9))
    give_gradients([[w]], 0)
    masked.step()
    before = copy.deepcopy(masked.state_dict())
    for spoil, message in (
        (lambda d: d["state"][0].update(mask_exp_avg=torch.zeros(2)), "mask_exp_avg of parameter 0 has shape"),
        (lambda d: d["param_groups"][0].update(softness=-1.0), "softness must be"),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
    ):
        bad = copy.deepcopy(before)
        spoil(bad)
        with pytest.raises(ValueError, match=message):
            masked.load_state_dict(bad)
        assert masked.state_dict()["param_groups"] == before["param_groups"]
        assert all(torch.equal(masked.state[w][k], v) for k, v in before["state"][0].items())


def test_hooks_schedules_scalers_and_clipping_work():
    model = nn.Linear(3, 2)
    masked = Masked(torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(masked, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(masked, max_lr=1.0, total_steps=8, cycle_momentum=False)
    seen = []
    masked.register_step_pre_hook(lambda *_: seen.append("before"))
    masked.register_step_post_hook(lambda *_: seen.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if TORCH >= (2, 3) else None
    for overflow in (False, True, False):
        masked.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        before = model.weight.detach().clone()
        if scaler is None:
            loss.backward()
            masked.step()
        else:
            scaler.scale(loss).backward()
            if overflow:
                model.weight.grad[0, 0] = torch.inf
            scaler.unscale_(masked)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
            scaler.step(masked)
            scaler.update()
            assert torch.equal(before, model.weight) == overflow
        schedule.step()
    assert seen == ["before", "after"] * (2 if scaler else 3)
    if scaler:
        assert masked.state[model.weight]["mask_step"] == 2
    assert masked.param_groups[0]["lr"] != 0.1


def test_a_fused_inner_optimizer_is_handed_gradients_that_are_unscaled():
    ends = []
    for fused in (False, True):
        w = nn.Parameter(torch.ones(3))
        masked = Masked(torch.optim.AdamW([w], lr=0.1, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            masked.zero_grad()
            scaler.scale((w - 3).square().sum()).backward()
            scaler.step(masked)
            scaler.update()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_a_closure_is_evaluated_once():
    w = nn.Parameter(torch.ones(2))
    masked = Masked(torch.optim.SGD([w], lr=0.1))
    calls = []

    def closure():
        calls.append(1)
        masked.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert masked.step(closure) == 2
    assert calls == [1]
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_a_compiled_step_and_a_plain_one_agree(reduction):
    ends = []
    for compiled in (False, True):
        w = nn.Parameter(params(torch.float32)[0].detach().clone())
        masked = Masked(torch.optim.AdamW([w], lr=torch.tensor(0.1)), reduction=reduction, debias=True)
        step = torch.compile(masked.step, backend="eager") if compiled else masked.step
        for number in range(4):
            give_gradients([[w]], number)
            step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-5)


class _Reading(TorchDispatchMode):
    """Notes the tensors whose value is handed to Python, which on a GPU means to wait for it."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        assert function not in (torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"reduction": "per_tensor", "debias": True, "warmup_steps": 1}])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_reads_no_tensor_but_the_step_counts_of_the_cpu(options, capturable):
    ours = params(torch.float32)
    masked = Masked(torch.optim.SGD([{"params": ours, "capturable": capturable}], lr=0.1, momentum=0.9), **options)
    for step in range(3):
        give_gradients([ours], step)
        with _Reading() as reading:
            masked.step()
        counts = {masked.state[p]["mask_step"].data_ptr() for p in ours}
        assert all(not capturable and tensor.data_ptr() in counts for tensor in reading.read)
        assert capturable or step == 0 or reading.read  # that it notices them


def test_complex_parameters_count_as_two_reals():
    real, whole = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, dtype=torch.complex64) * (1 + 1j))
    masked = [Masked(torch.optim.SGD([p], lr=0.1)) for p in (real, whole)]
    for step in range(3):
        give_gradients([[real]], step)
        whole.grad = torch.view_as_complex(real.grad.clone())
        for optimizer in masked:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), real.detach())
    assert masked[0].get_mask_stats() == pytest.approx(masked[1].get_mask_stats())


def test_what_reads_prm_reads_masked():
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    masked = Masked(torch.optim.SGD(model.named_parameters() if TORCH >= (2, 6) else model.parameters(), lr=0.1))
    assert log(masked) == {}
    controller = SoftnessController(masked, mean_q=0.5, every=5, rate=0.1)
    for _ in range(150):
        for p in model.parameters():
            p.grad = torch.randn(p.shape) + 0.5
        masked.step()
    figures = log(masked, diagnosis=True)
    assert figures["prm/lr"] == 0.1
    assert figures["prm/mean_q"] == masked.get_mask_stats()["mean_q"]
    assert 0.4 < figures["prm/mean_q"] < 0.6
    assert masked.param_groups[0]["softness"] != 1
    controller.remove()
    assert {row.cause for row in diagnose(masked).rows} == {"open"}
    masked.param_groups[0]["mask_eps"] = 1e3
    masked.step()
    assert {row.cause for row in diagnose(masked).rows} == {"epsilon"}

    class Around:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups, self.step = optimizer.param_groups, optimizer.step

    assert unwrap(masked) is masked
    assert unwrap(Around(masked)) is masked


def test_the_monitor_judges_it_by_held_out_losses_alone():
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    y = x.sum(1, keepdim=True) + torch.randn(400, 1)
    model = nn.Linear(5, 1)
    masked = Masked(torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(TypeError, match="give it held_out, got Masked"):
        RiskMonitor(masked)

    def losses():
        return (model(x[-100:]) - y[-100:]).square()[:, 0]

    with pytest.raises(ValueError, match="every and by are of the estimate"):
        RiskMonitor(masked, held_out=losses, every=3)
    monitor = RiskMonitor(masked, held_out=losses, held_out_every=5)
    for rows in torch.arange(300).split(10):
        masked.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        masked.step()
    assert monitor.verdict == "improving"
    assert monitor.best_step == 30
    with pytest.raises(RuntimeError, match="no estimate for Masked"):
        monitor.estimate()


def test_distributed_checkpoints_make_its_state_without_a_step():
    w = nn.Parameter(torch.ones(3))
    masked = Masked(torch.optim.AdamW([w], lr=0.0))
    w.grad = torch.zeros(3)
    masked.step()
    assert masked.state[w]["mask_step"] == 0
    assert made_state_alone(masked, counted=0)


@pytest.mark.skipif(TORCH < (2, 6), reason="flattened optimizer states are of torch 2.6")
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_goes_on(flatten):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, Masked(torch.optim.AdamW(model.parameters(), lr=0.1))

    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    (model, masked), (again, other) = made(), made()
    for step in range(2):
        give_gradients([list(model.parameters())], step)
        masked.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, masked, options=how))
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, saved, options=how)
    for optimizer, one in ((masked, model), (other, again)):
        give_gradients([list(one.parameters())], 2)
        optimizer.step()
    assert torch.equal(model.weight, again.weight)
    assert other.state[again.weight]["mask_step"] == 3


def test_an_optimizer_with_weights_of_its_own_for_evaluation_is_no_schedule_free_one():
    w = nn.Parameter(torch.ones(3, 3))
    masked = Masked(framework("pytorch_optimizer").SPlus([w], lr=0.1))
    w.grad = torch.ones(3, 3)
    masked.step()
    assert masked.get_mask_stats()["mean_q"] == pytest.approx(0.5)
    assert torch.all(w != 1)


def around_a_base(p):
    return framework("schedulefree").ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1))


class _Twice(torch.optim.SGD):
    def step(self, closure):
        return closure()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "takes a torch optimizer that is built"),
        (lambda p: PRM(p), "PRM masks its steps already"),
        (lambda p: Masked(torch.optim.SGD(p, lr=0.1)), "Masked masks its steps already"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss several times"),
        (lambda p: _Twice(p, lr=0.1), "_Twice evaluates the loss several times"),
        (lambda p: framework("pytorch_optimizer").SAM(p, torch.optim.SGD, lr=0.1), "SAM evaluates the loss several"),
        (lambda p: framework("schedulefree").SGDScheduleFreeClosure(p), "Closure evaluates the loss several times"),
        (around_a_base, "ScheduleFreeWrapper is a wrapper around an optimizer: put Masked inside"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam takes no others"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        Masked(make([nn.Parameter(torch.ones(2, 2))]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "snrr"}, "mask must be one of snr"),
        ({"beta1": 1.0}, r"beta1 must be a number in \[0, 1\), got 1.0"),
        ({"rho": -0.1}, r"rho must be a number in \[0, 1\), got -0.1"),
        ({"mask_eps": None}, "mask_eps must be a finite number >= 0, got None"),
        ({"boundary": "empirical"}, "needs batch_size and n_dataset"),
        ({"min_q": 2}, "min_q must be"),
        ({"mask_decay": 1}, "mask_decay must be True or False"),
    ],
)
def test_a_bad_option_is_named(options, message):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        Masked(torch.optim.SGD([w], lr=0.1), **options)


def test_inside_a_wrapper_it_masks_what_the_wrapper_takes_from_it():
    w = nn.Parameter(torch.ones(2))
    wrapper = framework("schedulefree").ScheduleFreeWrapper(Masked(torch.optim.SGD([w], lr=0.1)), momentum=0.9)
    wrapper.train()
    w.grad = torch.ones(2)
    wrapper.step()
    torch.testing.assert_close(wrapper.state[w]["z"], torch.full((2,), 0.95))


def test_a_sparse_gradient_or_a_differentiable_step_is_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    masked = Masked(torch.optim.SGD(embedding.parameters(), lr=0.1))
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Masked does not support sparse gradients"):
        masked.step()
    assert torch.equal(before, embedding.weight)
    with pytest.raises(ValueError, match="differentiable=True cannot be masked"):
        Masked(torch.optim.AdamW([nn.Parameter(torch.ones(2))], differentiable=True))
