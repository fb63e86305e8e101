# Types of the C++ extension csrc/index_builder.cpp.
import numpy as np
from numpy.typing import NDArray

def sample_index_int32(
    lengths: NDArray[np.int32], document_index: NDArray[np.int32], seq_len: int, n_samples: int
) -> NDArray[np.int32]: ...
def sample_index_int64(
    lengths: NDArray[np.int32], document_index: NDArray[np.int32], seq_len: int, n_samples: int
) -> NDArray[np.int64]: ...
def blending_indices(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
