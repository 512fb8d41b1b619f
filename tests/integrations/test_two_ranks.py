"""Trainer, Accelerate and Lightning on two ranks that talk over gloo, each held against one process.

Two ranks with batches of four see the rows that one process sees in batches of eight.
"""

import pytest
import torch
from frameworks import framework
from ranks import exit_code, import_first, torchrun

import_first("transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate", "lightning.pytorch")


def of_ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(weights, expected):
    for got, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def figures(row, leave_out=()):
    return {name: value for name, value in row.items() if name.startswith("prm/") and not name.endswith(leave_out)}


def assert_logged_alike(rows, expected):
    assert len(rows) == len(expected) > 2
    for row, wanted in zip(rows, expected):
        assert {"prm/mean_q", "prm/snr", "prm/diagnosis/early"} <= set(row)
        # In the first steps the masks lie on the edge of being active, up to rounding.
        got, wanted = (figures(one, leave_out=("active_fraction",)) for one in (row, wanted))
        assert got == pytest.approx(wanted, rel=2e-2, abs=1e-4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    framework("transformers")
    framework("accelerate")
    from integrations import small_ranks

    folder = tmp_path_factory.mktemp("undisturbed")
    torchrun(small_ranks.run, folder)
    return of_ranks(folder)


def one_process(what, folder):
    from integrations import small_accelerate, small_ranks

    kind, accumulate = what.split()
    if kind == "trainer":
        return small_ranks.train(folder, int(accumulate), size=8)
    return small_accelerate.train(8, int(accumulate))


@pytest.mark.parametrize("what", ["trainer 1", "trainer 2", "accelerate 1", "accelerate 2"])
def test_two_ranks_do_what_one_process_does(undisturbed, what, tmp_path):
    (first, rows), (second, _) = (rank[what] for rank in undisturbed)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    weights, expected = one_process(what, tmp_path)
    assert_close(first, weights)
    assert_logged_alike(rows, expected)


def test_a_rank_of_a_trainer_is_killed_and_torchrun_starts_it_again(undisturbed, tmp_path):
    from integrations import small_ranks

    torchrun(small_ranks.run, tmp_path, 6, restarts=1)
    for rank, expected in zip(of_ranks(tmp_path), undisturbed):
        assert rank["attempt"] == 1
        weights, rows = rank["trainer 1"]
        assert all(torch.equal(p, q) for p, q in zip(weights, expected["trainer 1"][0], strict=True))
        assert list(map(figures, rows)) == list(map(figures, expected["trainer 1"][1]))


def test_lightning_starts_its_ranks_itself(tmp_path):
    framework("lightning.pytorch")
    from integrations import small_lightning

    folders = {accumulate: tmp_path / str(accumulate) for accumulate in (1, 2)}
    assert exit_code(small_lightning.write_of_two_ranks, folders) == 0
    for accumulate, folder in folders.items():
        (first, rows), (second, _) = of_ranks(folder)
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
        one = tmp_path / f"one process {accumulate}"
        small_lightning.write(one, accumulate, size=8)
        weights, expected = torch.load(one / "0.pt", weights_only=True)
        assert_close(first, weights)
        assert_logged_alike(rows, expected)
