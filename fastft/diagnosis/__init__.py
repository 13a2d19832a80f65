"""``doctor``: before training, whether the weights can move at all, and what fits into memory."""

from fastft.diagnosis.examine import doctor
from fastft.diagnosis.report import DoctorReport

__all__ = ["DoctorReport", "doctor"]
