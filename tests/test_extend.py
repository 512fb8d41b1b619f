"""What the page "Your own mask or optimizer" says, from end to end: a mask and an arm by their paths."""

import pathlib
import sys

import numpy as np
import pytest
import tiny

from popriskmin import cli
from popriskmin.compare import compare
from popriskmin.tasks.digits import Digits

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.usefixtures("no_pictures")
def test_the_command_with_two_jobs(tmp_path, monkeypatch, capsys):
    """Every process finds the mask and the arm in the folder of the command."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = [
        "compare", tiny.__file__, "--seeds", "1", "--jobs", "2", "--lr", "0.01", "--out", str(tmp_path),
        "--prm", "mask=own_mask:steep", "softness=0.5", "--arm", "masked=own_mask:MaskedSGD", "softness=0.5",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "prm mask=own_mask:steep" in said
    assert "masked" in said


@pytest.mark.usefixtures("no_pictures")
def test_a_function_is_an_option_of_an_arm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_mask

    results = compare(
        Digits(epochs=1), lr=[1e-2], weight_decay=[0.0], seeds=1, prm=[{"mask": own_mask.steep}],
        arms={"masked": (own_mask.MaskedSGD, {})}, out=tmp_path, progress=False,
    )  # fmt: skip
    frame = results.frame.set_index("arm")
    assert np.isfinite(frame.loc["prm mask=own_mask:steep", "test final loss"])
    assert frame.loc["prm mask=own_mask:steep", "test final loss"] != frame.loc["prm", "test final loss"]
    assert np.isfinite(frame.loc["masked", "test final loss"])


def test_a_mask_without_a_path_is_refused(tmp_path):
    def local(signal, noise, hyper):
        return signal / (signal + noise + 1)

    with pytest.raises(ValueError, match=r"local.* must be in a module that other processes can import"):
        compare(Digits(epochs=1), prm=[{"mask": local}], out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="own_mask has no stee|cannot be imported"):
        compare(Digits(epochs=1), prm=[{"mask": "own_mask:stee"}], out=tmp_path, progress=False)
