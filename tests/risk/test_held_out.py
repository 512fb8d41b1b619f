"""Held-out examples: the judgement example by example, the best point, and what is refused."""

import copy
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import through_a_file
from torch import nn

from popriskmin.risk import samples
from popriskmin.risk.held_out import CONFIDENCE, HeldOut, copied, gathered, spread


def watch(table, **options):
    """Return a judge, and its verdict and best step after each row of the table, the losses of one step each."""
    rows = iter(torch.as_tensor(table, dtype=torch.float64))
    judge = HeldOut(lambda: next(rows), options.pop("confidence", CONFIDENCE), every=1, **options)
    judge.begin()
    said = [(judge.verdict, judge.best_step)]
    for step in range(1, len(table)):
        judge.look(step)
        said.append((judge.verdict, judge.best_step))
    return judge, said


def independent(table, confidence):
    """The rule once more, from its description, on all rows at once."""
    padded = [table[0], *table, table[-1]]
    smooth = [[(a + 2 * b + c) / 4 for a, b, c in zip(*padded[i : i + 3])] for i in range(len(table))]
    best, verdict, against = 0, None, 0
    for i in range(1, len(table) - 1):  # the last has no neighbour yet
        gains = [b - n for b, n in zip(smooth[best], smooth[i])]
        z = statistics.mean(gains) / (statistics.stdev(gains) / len(gains) ** 0.5 or math.inf)
        needed = statistics.NormalDist().inv_cdf(confidence)
        against = against + 1 if z < -needed else 0
        verdict = "improving" if z > needed else "overfitting" if against > 1 else "unclear"
        best = i if statistics.mean(gains) > 0 else best
    if statistics.mean(smooth[-1]) < statistics.mean(smooth[best]):
        best = len(table) - 1
    return verdict, best


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 12), st.sampled_from([0.6, 0.7, 0.95]))
def test_against_the_rule_written_down_once_more(seed, examples, looks, confidence):
    generator = torch.Generator().manual_seed(seed)
    curve = (torch.linspace(-1, 2, looks) ** 2)[:, None]
    table = (
        curve + torch.randn(1, examples, generator=generator) + 0.3 * torch.randn(looks, examples, generator=generator)
    )
    _, said = watch(table, confidence=confidence)
    verdict, best = independent(table.double().tolist(), confidence)
    assert said[-1][0] == verdict
    if looks > 2:
        assert said[-1][1] == best


def test_a_fall_and_a_rise():
    falls = [3.0, 2.0, 1.0, 1.5, 2.0, 2.5, 0.0, 0.0]
    table = [[loss, loss + 1.0 + 0.01 * i] for i, loss in enumerate(falls)]
    _, said = watch(table)
    verdicts = [None, None, "improving", "improving", "unclear", "overfitting", "overfitting", "improving"]
    assert [verdict for verdict, _ in said] == verdicts
    assert [best for _, best in said] == [0, 1, 2, 2, 2, 2, 6, 7]


def test_how_hard_an_example_is_does_not_matter():
    """A difference far below the scatter of the losses is seen, because it is there in every example."""
    hardness = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 100
    table = torch.stack(
        [hardness + shift + 0.001 * torch.sin(hardness) * shift for shift in (1.0, 0.0, 0.1, 0.2, 0.3, 0.4)]
    )
    _, said = watch(table, confidence=0.99)
    assert said[-1][0] == "overfitting"


def test_chance_is_not_taken_for_a_rise():
    """Losses that only scatter: one look speaks against the best with what the confidence leaves, or less."""
    generator = torch.Generator().manual_seed(0)
    alarms = []
    for _ in range(300):
        judge, _ = watch(torch.randn(3, 20, generator=generator), confidence=0.9)
        alarms.append(judge._against == 1)
    assert 0.02 < sum(alarms) / len(alarms) < 0.16


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_never_the_best(wrong):
    table = [[2.0, 3.0], [1.0, 2.1], [1.0, 2.2], [wrong, wrong], [wrong, wrong], [wrong, wrong]]
    judge, said = watch(table)
    assert judge.best_step in (1, 2)
    assert said[-1][0] in ("unclear", "overfitting")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.tensor(1.0), r"1-d, got \(\)"),
        (torch.ones(3, 2), r"1-d, got \(3, 2\)"),
        (torch.ones(1), r"two or more examples, 1-d, got \(1,\)"),
        (torch.ones(3, dtype=torch.long), r"1-d, got \(3,\)"),
        (0.5, "got float"),
    ],
)
def test_what_is_no_loss_per_example_is_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        HeldOut(lambda: losses, 0.7).look(0)


def test_the_examples_have_to_stay_the_same():
    sizes = iter((3, 4))
    judge = HeldOut(lambda: torch.ones(next(sizes)), 0.7)
    judge.look(0)
    with pytest.raises(ValueError, match="got 4, before 3"):
        judge.look(1)
    assert judge.curve == [(0, 1.0)]


def test_looks_come_further_and_further_apart():
    judge = HeldOut(lambda: torch.ones(2), 0.7, every=3)
    judge.begin()
    judge.begin()
    for step in range(1, 1001):
        judge.step_ended(step)
    steps = [step for step, _ in judge.curve]
    assert steps[:4] == [0, 3, 6, 9]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert all(gap == max(3, math.ceil(0.05 * step)) for gap, step in zip(gaps, steps))


def test_without_a_number_looks_take_a_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])

    def losses():
        now[0] += 0.5
        return torch.ones(2)

    judge = HeldOut(losses, 0.7)
    for step in range(1, 400):
        now[0] += 0.5
        judge.step_ended(step)
    assert judge.every == 32  # a look takes a step, and is to be 5%


def test_looks_are_not_so_close_that_they_err(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])
    judge = HeldOut(lambda: torch.ones(2), 0.7)
    for step in range(1, 400):
        now[0] += 1.0
        judge.step_ended(step)
    assert judge.every == 16


def test_losses_are_asked_for_without_a_graph_and_copied():
    w, seen = torch.ones(3, requires_grad=True), []

    def losses():
        seen.append((w * 2).requires_grad)
        return w

    judge = HeldOut(losses, 0.7)
    judge.look(0)
    with torch.no_grad():
        w.zero_()
    judge.look(1)
    assert seen == [] or not any(seen)
    assert [loss for _, loss in judge.curve] == [1.0, 0.0]


def test_the_weights_of_the_best_look():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    table = iter([[3.0, 3.0], [1.0, 1.0], [2.0, 2.5], [3.0, 3.1], [4.0, 4.0]])
    judge = HeldOut(lambda: torch.tensor(next(table)), 0.7, every=1, model=model)
    with pytest.raises(RuntimeError, match="not been looked at"):
        judge.restore()
    states = []
    for step in range(5):
        with torch.no_grad():
            model[0].weight.fill_(step)
            model[1].running_mean.fill_(step)
        judge.look(step)
        states.append(copy.deepcopy(model.state_dict()))
    assert judge.restore() == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[1][name])


def test_the_last_look_can_be_the_best():
    model = nn.Linear(1, 1)
    table = iter([[3.0, 3.0], [2.0, 2.0], [1.0, 1.5]])
    judge = HeldOut(lambda: torch.tensor(next(table)), 0.7, every=1, model=model)
    for step in range(3):
        with torch.no_grad():
            model.weight.fill_(step)
        judge.look(step)
    with torch.no_grad():
        model.weight.fill_(9)
    assert judge.restore() == judge.best_step == 2
    assert model.weight.item() == 2


def test_going_on_from_a_checkpoint():
    table = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(2, 2)
    for at in (0, 1, 2, 9):
        rows = iter(table)
        whole = HeldOut(lambda: next(rows), 0.7, every=1, model=model)  # noqa: B023
        for step in range(at):
            whole.look(step)
        rest = iter(table[at:])
        resumed = HeldOut(lambda: next(rest), 0.7, every=5, model=model)  # noqa: B023
        resumed.load_state_dict(through_a_file(whole.state_dict()))
        for step in range(at, 20):
            whole.look(step)
            resumed.look(step)
            assert (whole.verdict, whole.best_step) == (resumed.verdict, resumed.best_step)
        assert whole.curve == resumed.curve
        assert resumed.every == 1


def test_without_a_model_there_is_nothing_to_restore():
    judge = HeldOut(lambda: torch.ones(2), 0.7)
    judge.look(0)
    with pytest.raises(RuntimeError, match="keep_best=model"):
        judge.restore()


class WithMore(nn.Linear):
    def get_extra_state(self):
        return {"seen": [1, 2]}

    def set_extra_state(self, state):
        assert state == {"seen": [1, 2]}


def test_a_copy_is_not_reached_by_further_training():
    model = WithMore(2, 1)
    kept = copied(model.state_dict())
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    kept["_extra_state"]["seen"].append(3)
    assert torch.equal(kept["weight"], before)
    assert model.get_extra_state() == {"seen": [1, 2]}


def test_whole_weights_are_gathered_and_spread_as_they_are():
    model = WithMore(2, 1)
    kept = gathered(model.state_dict())
    for target in (model, None, WithMore(2, 1)):
        got = spread(kept, target)
        assert list(got) == list(kept)
        assert torch.equal(got["weight"], model.weight)
        assert got["weight"].data_ptr() != model.weight.data_ptr()
    model.load_state_dict(spread(kept, model))


def test_nothing_kept_is_nothing():
    assert copied(None) is gathered(None) is spread(None, nn.Linear(1, 1)) is None
