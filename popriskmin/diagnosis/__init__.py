"""Which layers the mask holds shut and why, and a controller that opens it."""

from popriskmin.diagnosis.controller import Reading, SoftnessController
from popriskmin.diagnosis.diagnosis import Diagnosis, diagnose
from popriskmin.diagnosis.rows import Row

__all__ = ["Diagnosis", "Reading", "Row", "SoftnessController", "diagnose"]
