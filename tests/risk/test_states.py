"""What may be loaded into a risk monitor."""

import pytest
import torch

from popriskmin.risk.states import FIELDS, check_state

GOOD = {
    "format": 1,
    "steps": 4,
    "every": 2,
    "pace": False,
    "samples": torch.ones(2, 3),
    "rows": [],
    "kept": None,
    "held_out": None,
}


def test_a_good_one():
    assert set(GOOD) == set(FIELDS)
    check_state(GOOD, None, held_out=False)
    check_state({**GOOD, "rows": [torch.ones(4, 2)] * 2}, "parameter", held_out=False)
    check_state({**GOOD, "held_out": {}}, None, held_out=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"steps": "4"}, "steps is '4'"),
        ({"samples": torch.ones(3)}, "samples is no table of three columns"),
        ({"format": None}, "format None"),
        ({"format": 99}, r"format 99.*formats up to 1"),
        ({"rows": [torch.ones(4, 2)] * 2}, "other parts than this one, which has by=None"),
        ({"held_out": {}}, "has held-out losses, and this one no held_out"),
    ],
)
def test_bad_ones_are_named(part, message):
    with pytest.raises(ValueError, match=message):
        check_state({**GOOD, **part}, None, held_out=False)


def test_what_this_monitor_needs_has_to_be_there():
    with pytest.raises(ValueError, match="has by='group'"):
        check_state(GOOD, "group", held_out=False)
    with pytest.raises(ValueError, match="has no held-out losses, and this one held_out"):
        check_state(GOOD, None, held_out=True)
    with pytest.raises(ValueError, match="it lacks every, format, held_out, kept, pace, rows, samples, steps"):
        check_state({}, None, held_out=False)
