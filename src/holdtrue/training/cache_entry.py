"""One entry of the reference cache: a tensor, what it is, and a checksum over both and the key."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_MAGIC = b"HTRC"
_HEAD = struct.Struct("<4sBBBx")  # magic, version, dtype, number of dimensions
_START = _HEAD.size + 8  # the checksum follows the head, then the shape as uint64, then the numbers
_DTYPES = {1: "float32", 2: "bfloat16", 3: "float16", 4: "float64"}
_CODES = {name: code for code, name in _DTYPES.items()}


def pack(key: bytes, tensor: Tensor) -> bytearray:
    """Return the entry for a tensor of any shape and device.

    Raises:
        TypeError: its dtype is not float32, bfloat16, float16 or float64.
    """
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _CODES:
        raise TypeError(f"the reference cache keeps {', '.join(_CODES)}, not {name}; convert the tensor first")
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    shape = struct.pack(f"<{tensor.ndim}Q", *tensor.shape)
    head = _HEAD.pack(_MAGIC, VERSION, _CODES[name], tensor.ndim)
    entry = bytearray(_START + len(shape) + numbers.nbytes)
    entry[: _HEAD.size] = head
    entry[_START : _START + len(shape)] = shape
    np.frombuffer(entry, np.uint8, offset=_START + len(shape))[:] = numbers
    entry[_HEAD.size : _START] = _checksum(key, head, memoryview(entry)[_START:])
    return entry


def unpack(key: bytes, entry: memoryview | bytes | bytearray) -> Tensor | None:
    """Return the tensor, in memory of its own; ``None`` for an entry that is damaged, cut short or of another kind."""
    import torch

    if len(entry) < _START:
        return None
    magic, version, code, dimensions = _HEAD.unpack_from(entry)
    start = _START + 8 * dimensions
    if magic != _MAGIC or version != VERSION or code not in _DTYPES or len(entry) < start:
        return None
    # The copy is what gets checked, so that what was checked is what is used.
    own = torch.empty(len(entry) - _START, dtype=torch.uint8)
    content = own.numpy()
    content[:] = np.frombuffer(entry, np.uint8, offset=_START)
    if _checksum(key, bytes(entry[: _HEAD.size]), content.data) != bytes(entry[_HEAD.size : _START]):
        return None
    shape = struct.unpack_from(f"<{dimensions}Q", content.data)
    dtype = getattr(torch, _DTYPES[code])
    if math.prod(shape) * dtype.itemsize != len(entry) - start:
        return None
    return own[8 * dimensions :].view(dtype).reshape(shape)


def _checksum(key: bytes, head: bytes, content: memoryview) -> bytes:
    """Return xxh3-64 over all but itself: it finds damage and swapped entries, not forgery."""
    import xxhash

    digest = xxhash.xxh3_64(key + head)
    digest.update(content)
    return digest.digest()
