"""Arrays of numpy and tensors of PyTorch by the same lines, so that exported models run where there is no PyTorch.

Most functions have one name in both, and those of PyTorch take numpy's `axis` and `keepdims`. What differs is here.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = Union[np.ndarray, "Tensor"]


def functions_of(array: Array) -> ModuleType:
    """The module with the functions for this array: numpy or torch."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def to_numpy(array: Array) -> np.ndarray:
    """An array of numpy with these values. Waits for the device of a tensor."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype == functions_of(array).bfloat16 else array).numpy()  # numpy has no bfloat16


def without_gradient(array: Array) -> Array:
    """The same values, of which no gradient is computed."""
    return array if isinstance(array, np.ndarray) else array.detach()


def like(array: np.ndarray, other: Array) -> Array:
    """A numpy array in the form of `other`: a tensor on its device, or unchanged if that is a numpy array, too."""
    if isinstance(other, np.ndarray):
        return array
    return functions_of(other).from_numpy(array).to(other.device)


def at_least_float32(array: Array) -> Array:
    """The values in float32, or in float64 if the array has it."""
    xp = functions_of(array)
    dtype = xp.promote_types(array.dtype, xp.float32)
    return array.astype(dtype, copy=False) if xp is np else array.to(dtype)


def two_largest(array: Array) -> tuple[Array, Array]:
    """The largest and the second largest value along the last axis."""
    if isinstance(array, np.ndarray):
        ascending = np.sort(array, axis=-1)
        return ascending[..., -1], ascending[..., -2]
    return array.topk(2, dim=-1).values.unbind(dim=-1)
