"""Reads the original's npy files, which are pickles of numbers and dicts, without running what a pickle may name."""

import pickle
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
KNOWN = {("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")}
KNOWN |= {(core, name) for core in CORES for name in ("_reconstruct", "scalar")}


class _Named:
    """Stands for all that a pickle names: it keeps the arguments and the state, and does nothing with them."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """A pickle is a program that calls what it names. Here it names nothing but `_Named`."""

    def find_class(self, module: str, name: str) -> type[_Named]:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!a}, and result files hold only numbers")
        return _Named


def _plain(value):
    """The value, where numpy's scalars have become Python numbers."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if not isinstance(value, _Named):
        return value
    dtype, data = value.arguments
    if isinstance(data, _Named):  # pickles of protocol 2 write bytes as text
        data = data.arguments[0].encode("latin1")
    return np.frombuffer(data, np.dtype(dtype.arguments[0]).newbyteorder(dtype.state[1]), count=1).item()


def read_objects(path: Path) -> list:
    """The items of a one-dimensional npy array: of numbers, or of objects (numbers, None, and dicts of them).

    Raises ValueError, or any other exception that a damaged pickle causes.
    """
    with path.open("rb") as file:
        npy_format.read_magic(file)
        shape, _, dtype = npy_format.read_array_header_1_0(file)
        if dtype.hasobject:
            items = [_plain(item) for item in _Unpickler(file).load().state[4]]
        else:
            file.seek(0)
            items = npy_format.read_array(file, allow_pickle=False).tolist()
    if len(shape) != 1 or len(items) != shape[0]:
        raise ValueError("not a list")
    return items
