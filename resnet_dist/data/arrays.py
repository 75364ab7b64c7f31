"""Names for the types of NumPy arrays, of any number of dimensions."""

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
"""for instance rows of the index, labels, sizes in pixels"""

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
"""of single or double precision; the docstring of each function says which"""

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
"""for instance which samples are mirrored"""

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]
"""encoded files, or pixels"""

StringArray = np.ndarray[Any, np.dtype[np.str_]]
"""for instance the name of a filter for each image"""
