"""The types of arrays by their elements, for annotations; docstrings give the shapes."""

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Booleans = npt.NDArray[np.bool]
Numbers = float | npt.NDArray[Any]
"""A number, or an array of them that broadcasts with others."""
