"""What a reader of one family produces: for every quantized layer a record of its scheme, its shape and how to build its leaves.

A plan is made from headers (and a few tiny tensors) alone. `Parts` hands out the tensors of one layer, checks dtype and shape of each
against what the format defines, and refuses a layer that has tensors nobody asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from qfunc._codes import CODES
from qfunc._pack import packed_size
from qfunc._scales import scale_shape
from qfunc._spec import Granularity, Scheme, bits_of

from ._refuse import refuse
from .safetensors import FLOATS, Tensor

SCALES = ("F32", "F16", "BF16")
KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "fp8_e4m3", "U8": "e8m0", "F8_E8M0": "e8m0", "F64": "float32"}


@dataclass
class Layer:
    """One quantized weight.

    Fields: `module`, its name in the checkpoint; `scheme`; `shape` (..., in, out); `build`, a function that reads and repacks: leaves
    of a QTensor by name, as numpy arrays; `extras`, other leaves of the module by name (bias, rotations), as functions, which give None
    where a look at the numbers says that there is none; `tensors`, all that it is made of; `dtype`, the logical dtype where the tensor
    itself knows it.
    """

    module: str
    scheme: Scheme
    shape: tuple[int, ...]
    build: Callable[[], dict[str, np.ndarray]]
    extras: dict[str, Callable[[], np.ndarray | None]] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    dtype: str | None = None

    @property
    def pad(self) -> int:
        """Codes added to fill the last packed block."""
        code = self.scheme.weight.code
        return 0 if code.startswith("gguf:") or bits_of(code) == 8 else -self.shape[-2] % 128

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(t.nbytes for t in self.tensors)


class Parts:
    """The tensors of one module by parameter name, each to be taken once."""

    def __init__(self, module: str, tensors: dict[str, Tensor]):
        self.module, self.tensors = module, tensors
        self.left = dict(tensors)

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Every tensor of the module."""
        return tuple(self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def fail(self, name: str, expected: str, found):
        """The error for a parameter of this module."""
        where = next(iter(self.tensors.values())).file.path
        return refuse(where, f"{self.module}.{name}" if name else self.module, expected, found)

    def take(self, name: str, dtypes: tuple[str, ...] | str, shape=None, ndim: int | None = None) -> Tensor:
        """A parameter; `shape` may be one tuple or a list of the ones that the format allows."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise self.fail(name, "the tensor", "none; the layer has " + ", ".join(self.tensors))
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        if tensor.dtype not in dtypes:
            raise self.fail(name, " or ".join(dtypes), tensor.dtype)
        shapes = [shape] if isinstance(shape, tuple) else shape
        if shapes is not None and tensor.shape not in shapes:
            raise self.fail(name, "shape " + " or ".join(str(list(s)) for s in shapes), list(tensor.shape))
        if ndim is not None and (len(tensor.shape) != ndim or 0 in tensor.shape):
            raise self.fail(name, f"{ndim} non-empty axes", list(tensor.shape))
        return tensor

    def drop(self, *names: str) -> None:
        """Parameters that are known and hold nothing that the weight needs."""
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        """Refuse parameters that nothing has read."""
        if self.left:
            name = next(iter(self.left))
            raise self.fail(name, "no such tensor on a layer of this scheme", f"{self.left[name].dtype} {list(self.left[name].shape)}")

    def bias(self, outs: int) -> dict[str, Callable[[], np.ndarray]]:
        """The float bias, if there is one, as extras."""
        if "bias" not in self.left:
            return {}
        return {"bias": self.take("bias", tuple(FLOATS), (outs,)).read}


def value(parts: Parts, name: str, tensor: Tensor) -> np.ndarray:
    """The numbers of a small tensor, refused where one is not finite."""
    array = tensor.read()
    if array.dtype.kind in "fV" and not np.isfinite(array.astype(np.float32)).all():
        raise parts.fail(name, "finite numbers", "NaN or infinity")
    return array


def scale_reader(parts: Parts, name: str, grain: Granularity, outs: int, ins: int, dtypes=SCALES, transposed: bool = False):
    """Check a scale tensor and return (canonical scale type, function that reads it as [outs, groups]).

    A scale of one number may be a scalar or [1]; a scale per channel may lack its last axis, one per block have empty ones between;
    `transposed` is [groups, outs].
    """
    want = scale_shape(grain, outs, ins)
    allowed = [want[::-1] if transposed else want]
    if want[1] == 1:
        allowed += [want[:1], want]
    if math.prod(want) == 1:
        allowed += [(), (1,), (1, 1)]
    if grain.kind == "block":
        allowed += [(want[0], 1, want[1], 1)]
    tensor = parts.take(name, dtypes, allowed)

    def read() -> np.ndarray:
        array = value(parts, name, tensor)
        if KINDS[tensor.dtype] == "e8m0":
            array = array.view(np.uint8)
            if (array == 255).any():
                raise parts.fail(name, "exponents below 255", "255, which is NaN")
        array = array.reshape(want[::-1]).T if transposed and array.ndim == 2 else array.reshape(want)
        return array.astype(np.float32) if tensor.dtype == "F64" else array
    return KINDS[tensor.dtype], read


def number(parts: Parts, name: str, dtypes=(*SCALES, "F64"), integer: bool = False):
    """Check a tensor of one number and return a function that reads it as float32 (or int32) [1, 1]."""
    tensor = parts.take(name, dtypes, [(), (1,), (1, 1)])

    def read() -> np.ndarray:
        array = value(parts, name, tensor).reshape(1, 1)
        if not integer:
            return array.astype(np.float32)
        found = float(array[0, 0])
        if not found.is_integer() or abs(found) >= 2**31:
            raise parts.fail(name, "a whole number", found)
        return array.astype(np.int32)
    return read


def fill_of(code: str) -> int:
    """The stored code that pads the last block: the one that decodes to 0."""
    return CODES[code].offset


def code_bytes(scheme: Scheme, outs: int, ins: int) -> int:
    """Bytes of the canonical codes of a matrix."""
    bits = bits_of(scheme.weight.code)
    return outs * (ins if bits == 8 else packed_size(ins, bits))


def widened(array: np.ndarray) -> np.ndarray:
    """float64 and integer parameters as float32; 16-bit floats stay."""
    return array if array.dtype in (np.float32, np.float16, ml_dtypes.bfloat16) else array.astype(np.float32)
