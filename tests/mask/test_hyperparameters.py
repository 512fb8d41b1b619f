"""The boundary's coefficient."""

import pytest

from popriskmin.mask import boundary_coefficient


def test_boundary_coefficient():
    assert boundary_coefficient("batch", 10, 5) == 1
    assert boundary_coefficient("empirical", 32, 1032) == 0.032
    with pytest.raises(ValueError, match=r"batch, empirical, got 'fresh'"):
        boundary_coefficient("fresh", None, None)
    with pytest.raises(ValueError, match="needs batch_size and n_dataset, got batch_size=4 and n_dataset=None"):
        boundary_coefficient("empirical", 4, None)
    with pytest.raises(ValueError, match="n_dataset=4 and batch_size=4"):
        boundary_coefficient("empirical", 4, 4)
