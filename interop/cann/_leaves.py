"""Leaves of a QTensor in torch and back, without a copy where both sides can share memory."""

from __future__ import annotations

import jax
import numpy as np
import torch

from qfunc._qtensor import QTensor
from qfunc.kernels._dispatch import Packed

# numpy knows these types only through ml_dtypes; their bytes travel as integers.
_CARRIED = {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
            "float8_e5m2": (np.uint8, torch.float8_e5m2)}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64, "int8": torch.int8, "uint8": torch.uint8,
          "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "uint16": torch.uint16, "uint32": torch.uint32,
          "uint64": torch.uint64, "bool": torch.bool,
          **{name: dtype for name, (_, dtype) in _CARRIED.items()}}


def torch_dtype(dtype) -> torch.dtype:
    """torch's dtype of a numpy or JAX one. Raises TypeError where torch has none."""
    name = np.dtype(dtype).name
    if name not in _TORCH:
        raise TypeError(f"no torch type for {name}")
    return _TORCH[name]


def to_torch(leaf) -> torch.Tensor:
    """A numpy or JAX array as a tensor on the host; a ShapeDtypeStruct as one on the meta device. Never write to the result."""
    dtype = torch_dtype(leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return torch.empty(leaf.shape, dtype=dtype, device="meta")
    array = np.asarray(leaf)
    if array.dtype.name in _CARRIED:
        array = array.view(_CARRIED[array.dtype.name][0])
    if not array.flags.writeable or not array.flags.c_contiguous:
        # torch warns of read-only memory; DLPack takes it as it is.
        if isinstance(leaf, jax.Array) and leaf.size and leaf.dtype != bool and len(leaf.devices()) == 1:
            return torch.from_dlpack(leaf)
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a numpy array of the same type, ml_dtypes where numpy has none of its own."""
    import ml_dtypes
    tensor = tensor.detach().cpu().contiguous()
    for name, (carrier, dtype) in _CARRIED.items():
        if tensor.dtype == dtype:
            plain = tensor.view(torch.int16 if carrier is np.uint16 else torch.uint8).numpy()
            return plain.view(carrier).view(getattr(ml_dtypes, name))
    return tensor.numpy()


def leaves_of(w: QTensor) -> tuple[Packed, dict[str, torch.Tensor]]:
    """The static record of a QTensor, canonical layout, and its leaves as tensors on the host or on meta."""
    w = w if w.layout == "canonical" else w.canonical
    return Packed.of(w), {name: to_torch(leaf) for name, leaf in w.leaves.items()}
