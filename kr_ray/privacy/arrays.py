"""Arrays by what they hold."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
LogitArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
