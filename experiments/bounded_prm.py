"""PRM whose shrinkage is bounded layer by layer, as an arm of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from popriskmin import PRM, ShrinkageController


class BoundedPRM(PRM):
    """PRM with a group for each tensor and a `ShrinkageController` at its defaults."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__([{"params": [param]} for param in params], **options)
        self.controller = ShrinkageController(self)
