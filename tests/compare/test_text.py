"""Numbers and errors in a line."""

import json
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.compare.text import brief, exact, place_of


@given(st.floats(allow_nan=False))
def test_numbers_read_back_as_the_same(value):
    assert float(exact(value)) == value


def test_of_a_traceback_what_was_raised():
    try:
        raise ArithmeticError("broken\n  in two lines\nof text")
    except ArithmeticError:
        assert brief(traceback.format_exc()) == "ArithmeticError: broken"
    assert brief("") == ""


def test_an_error_is_placed_in_the_users_code():
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("{")
    assert place_of(raised.value, "mine.py") == "test_text.py, line 28"
    assert place_of(ValueError("never raised"), "mine.py") == "mine.py"
