"""Which layers the mask holds shut and why, and controllers: one opens it, one bounds the pull of shrinkage."""

from popriskmin.diagnosis.controller import Reading, SoftnessController
from popriskmin.diagnosis.diagnosis import Diagnosis, diagnose
from popriskmin.diagnosis.rows import Row
from popriskmin.diagnosis.shrinkage_controller import ShrinkageController, ShrinkageReading

__all__ = ["Diagnosis", "Reading", "Row", "ShrinkageController", "ShrinkageReading", "SoftnessController", "diagnose"]
