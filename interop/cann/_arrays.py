"""Arrays between JAX and torch through DLPack, and the types that must not take that way.

| type | what happens |
|---|---|
| bool, (u)int 8 to 32, float 16 and 32, bfloat16, e4m3fn, e5m2, e8m0 | same memory on the host, nothing is copied |
| int64, uint64, float64 | JAX without x64 has no such arrays: a value that does not fit in 32 bits is refused, never cut |
| int4, uint4, int2, float4_e2m1fn, torch's sub-byte and quantized types | refused, DLPack has no form of them: carry them as uint8 |

A tensor made from a JAX array shares its memory and torch would let one write to it: nothing here ever writes to a tensor in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64",
     "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")}
"""numpy's (and ml_dtypes') name of a type to torch's."""

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CARRIERS = {torch.float8_e4m3fn: torch.int8, torch.float8_e5m2: torch.int8, torch.float8_e8m0fnu: torch.uint8,
            torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Types that torch stores but hardly computes with, and the integers of the same size that carry their bits through data movement."""


def torch_dtype(dtype) -> torch.dtype:
    """torch's type of a numpy or JAX one. Raises: TypeError where torch has none that DLPack carries."""
    name = np.dtype(dtype).name
    if name not in TORCH_DTYPES:
        raise TypeError(f"{name} has no form that torch and JAX share: carry it packed, as uint8")
    return TORCH_DTYPES[name]


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The numpy (or ml_dtypes) type of a torch one. Raises: TypeError where there is none."""
    if dtype not in NAMES:
        raise TypeError(f"{dtype} has no form that torch and JAX share: view it as torch.uint8")
    return jnp.dtype(NAMES[dtype])


def to_tensor(array, device=None) -> torch.Tensor:
    """A numpy or JAX array (or typed PRNG key, as its uint32 words) as a tensor.

    Arguments: `array`; `device`, where it is wanted, the host by default. On the host a JAX array shares its memory with the result.
    Raises: TypeError for types that DLPack cannot carry.
    """
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    dtype = torch_dtype(array.dtype)
    if isinstance(array, jax.Array) and len(array.devices()) > 1:
        raise ValueError(f"an array split over {len(array.devices())} devices is no tensor of one: take its shards")
    if isinstance(array, jax.Array) and array.size and next(iter(array.devices())).platform == "cpu":
        found = torch.from_dlpack(array)
    else:
        # numpy's own DLPack knows no ml_dtypes: their bytes travel as integers. A copy, as numpy arrays may be read-only or be written to.
        found = np.array(array, order="C")
        if dtype in CARRIERS or dtype == torch.bfloat16:
            found = found.view(f"u{found.dtype.itemsize}")
        found = torch.from_numpy(found).view(dtype) if found.ndim or found.dtype == array.dtype else _scalar(found, dtype)
    return found if device is None else found.to(device)


def _scalar(found: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(found.reshape(1)).view(dtype).reshape(())


def to_array(tensor: torch.Tensor) -> jax.Array:
    """A tensor as a JAX array on the host; tensors that lie there share their memory with it, others are copied.

    Raises: TypeError for types that DLPack cannot carry; OverflowError where 64-bit integers do not fit in JAX's 32.
    """
    tensor = tensor.detach()
    dtype = numpy_dtype(tensor.dtype)
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if narrow != dtype:
        tensor = narrowed(tensor, narrow)
    if not tensor.numel():
        return jnp.zeros(tuple(tensor.shape), narrow)
    return jnp.from_dlpack(tensor.contiguous())


def narrowed(tensor: torch.Tensor, dtype) -> torch.Tensor:
    """64-bit values in 32 bits. Raises: OverflowError where an integer on the host does not fit; on a device only the type changes,
    since looking at the values would stop it."""
    if not dtype.kind == "f" and tensor.device.type == "cpu" and tensor.numel() and not is_abstract(tensor):
        low, high = int(tensor.min()), int(tensor.max())
        bounds = np.iinfo(dtype)
        if low < bounds.min or high > bounds.max:
            raise OverflowError(f"{NAMES[tensor.dtype]} values from {low} to {high} do not fit in {dtype}, and JAX has no 64-bit arrays "
                                "unless jax_enable_x64 is set")
    return tensor.to(torch_dtype(dtype))


def is_abstract(tensor: torch.Tensor) -> bool:
    """True for tensors without numbers: of the meta device, fake ones, and those that `make_fx` follows."""
    return tensor.is_meta or type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter)
