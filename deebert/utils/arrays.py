"""Arrays of numpy and tensors of PyTorch by the same lines, so that exported models run where there is no PyTorch.

Most functions have one name in both, and those of PyTorch take numpy's `axis` and `keepdims`. What differs is here.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1.2e-38  # above the smallest normal float32
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


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, in float32 or better. Finite for any finite logits."""
    logits = at_least_float32(logits)
    if not isinstance(logits, np.ndarray):
        return logits.softmax(dim=-1)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def shares(logits: np.ndarray, several: bool) -> np.ndarray:
    """Probabilities (B, C): each label's own where a text may have several, else softmax."""
    logits = logits.astype(np.float64)
    return 0.5 * (1 + np.tanh(0.5 * logits)) if several else softmax(logits)  # the sigmoid, without overflow


def confidence(probabilities: np.ndarray, several: bool) -> np.ndarray:
    """Of predictions (...), from `shares` (..., C): the label's probability; of several, the least sure one's."""
    return np.maximum(probabilities, 1 - probabilities).min(axis=-1) if several else probabilities.max(axis=-1)


def entr(probabilities: Array) -> Array:
    """-p ln p of each probability, which is 0 at 0: the terms of an entropy in nats."""
    xp = functions_of(probabilities)
    if xp is not np and not xp.compiler.is_compiling():  # one kernel, of which an exporter makes ten operators
        return xp.special.entr(probabilities)
    return -probabilities * xp.log(xp.clip(probabilities, SMALLEST, None))


def token_lengths(attention_mask: Array | None) -> np.ndarray | None:
    """(B, T) mask -> (B,): the position of each sample's last token + 1. None for other masks."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return (to_numpy(attention_mask != 0) * np.arange(1, attention_mask.shape[1] + 1)).max(axis=1)
