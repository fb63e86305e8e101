# Types of the C++ extension csrc/normal.cpp.
import numpy as np
from numpy.typing import NDArray

def fill(out: NDArray[np.float32], key: int, std: float, first: int, row: int, stride: int) -> None: ...
