"""What an optimizer's state says: which layers the mask holds shut, and why; and a softness that holds it open."""

from popriskmin.diagnosis.controller import Reading, SoftnessController
from popriskmin.diagnosis.diagnosis import Diagnosis, diagnose
from popriskmin.diagnosis.row import Row

__all__ = ["Diagnosis", "Reading", "Row", "SoftnessController", "diagnose"]
