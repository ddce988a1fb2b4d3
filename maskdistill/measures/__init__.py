"""All of a backbone's numbers under one name each: what `evaluate` and `compare` measure."""

from maskdistill.measures.catalogue import (
    DEFAULT_GROUPS,
    GROUPS,
    MEASURES,
    Measure,
    measures_named,
)
from maskdistill.measures.measuring import Measured, measure

__all__ = [
    "DEFAULT_GROUPS",
    "GROUPS",
    "MEASURES",
    "Measure",
    "Measured",
    "measure",
    "measures_named",
]
