"""Reads the object arrays of `np.save`, which are pickles, without running anything that a pickle may name.

A pickle is a program: it names functions and calls them. Here every name that an object array of dicts and numbers
contains is mapped to a stand-in of this file, which only stores its arguments; every other name is refused. Nothing
of numpy's own unpickling runs, so files of numpy 1 (`numpy.core`) and numpy 2 (`numpy._core`) read alike.
"""

import io
import pickle
import re
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from deebert.utils.errors import InputError


class _StandIn:
    """Takes the place of a numpy name in a pickle."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("an object has a state that it should not have")


class _Dtype(_StandIn):
    """In place of `numpy.dtype`: called with a name such as 'f8'; the byte order follows in its state."""

    def __init__(self, name: str, align=False, copy=True):
        self.name, self.byte_order = name, "="

    def __setstate__(self, state):
        self.byte_order = state[1]


class _Array(_StandIn):
    """In place of `numpy.ndarray`: its state is (version, shape, dtype, Fortran order, items)."""

    shape, items = (), None

    def __setstate__(self, state):
        _, self.shape, _, _, self.items = state


class _Reconstruct(_StandIn):
    """In place of numpy's `_reconstruct`, which makes an empty array whose state follows."""

    def __new__(cls, array_type, shape, typecode):
        return _Array()


class _Scalar(_StandIn):
    """In place of numpy's `scalar`: a dtype and bytes make a Python number."""

    def __new__(cls, dtype: _Dtype, data: bytes):
        if not re.fullmatch("[<>=|][biuf][1248]", dtype.byte_order + dtype.name):
            raise pickle.UnpicklingError(f"a scalar of type {dtype.name!a} is not a number")
        return np.frombuffer(data, dtype.byte_order + dtype.name, count=1)[0].item()


class _Encode(_StandIn):
    """In place of `_codecs.encode`, by which pickles of protocol 2 make bytes of text."""

    def __new__(cls, text: str, encoding: str):
        return text.encode("latin1")


ADMITTED = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
}


class _NumberUnpickler(pickle.Unpickler):
    """Maps the admitted names to stand-ins and refuses all others."""

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!a}, and result files hold only numbers")
        return ADMITTED[module, name]


def _items(data: bytes) -> list:
    file = io.BytesIO(data)
    if npy_format.read_magic(file) != (1, 0):
        raise ValueError("another version of the npy format")
    shape, _, dtype = npy_format.read_array_header_1_0(file)
    if not dtype.hasobject or len(shape) != 1:
        raise ValueError("not a list of objects")
    array = _NumberUnpickler(file).load()
    if not isinstance(array, _Array) or not isinstance(array.items, list) or len(array.items) != shape[0]:
        raise ValueError("not a list of objects")
    return array.items


def read_object_array(path: Path, remedy: str) -> list:
    """The items of a one-dimensional object array: numbers, strings, None, and dicts, lists and tuples of them.

    Raises InputError, which ends with the remedy, for a file that is damaged or holds anything else.
    """
    try:
        return _items(path.read_bytes())
    except Exception as error:  # a damaged pickle can raise almost anything
        raise InputError(f"{path}: not a result file ({str(error) or type(error).__name__}); {remedy}") from None


def read_float_array(path: Path, remedy: str) -> list[float]:
    """The items of a one-dimensional array of numbers. Raises InputError, which ends with the remedy."""
    try:
        array = npy_format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError("not a list of numbers")
    except Exception as error:  # a damaged header, too
        raise InputError(f"{path}: not a result file ({str(error) or type(error).__name__}); {remedy}") from None
    return array.astype(float).tolist()
