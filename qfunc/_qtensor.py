"""`QTensor`: a quantized weight matrix as a pytree of packed arrays."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from . import _codec, _pack
from ._codes import code
from ._spec import Scheme

LEAVES = ("codes", "scale", "zero", "scale2", "scale_offset", "input_scale", "input_zero", "smooth", "perm")
STATIC = ("scheme", "dtype", "layout", "pad", "view")


@dataclasses.dataclass(frozen=True)
class View:
    """How the owner of the weights sees the matrix (in, out).

    Fields:
        transposed: the owner's array is (out, in).
        ins, outs: trailing sizes of axes that the owner keeps apart and that are folded into `in` and `out`; the first of them is
            inferred, so that a slice of it (a shard of heads) keeps its meaning: an attention query (d, heads, 64) has outs (64,).
    """

    transposed: bool = False
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The owner's shape of a matrix with `rows` inputs and `columns` outputs."""
        first, second = _unfold(rows, self.ins), _unfold(columns, self.outs)
        return (*second, *first) if self.transposed else (*first, *second)


def _unfold(size: int, trailing: tuple[int, ...]) -> tuple[int, ...]:
    return (size // math.prod(trailing), *trailing)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized matrix (..., in, out), packed.

    Array leaves (None where the scheme has none) lie as (..., out, in) and carry every leading axis (layers, experts), so that
    `jax.tree.map(lambda a: a[e], q)` is expert e and stacking two of them leaf by leaf is what `lax.scan` and `vmap` want:

    - `codes`: 8-bit codes [..., N, K] in their own type, narrower ones uint8 [..., N, ceil(K/128) 16 b] as `qfunc._pack` lays them.
    - `scale`: [..., 1, 1], [..., N, 1], [..., N, ceil(K/g)] or [..., ceil(N/n), ceil(K/m)] by granularity.
    - `zero`: shape of `scale`; `scale2`: the outer scale ([..., N, ceil(K/512)] in `mxfp4_dual`); `scale_offset`: mean of
      double-quantized scales.
    - `input_scale`, `input_zero`: [..., 1, 1], calibrated activation scale and zero point.
    - `smooth`: [..., K], multiplies the activation first; `perm`: int32 [..., K], order of the input channels.

    Static: `scheme`, `dtype` (logical), `layout`, `pad` (codes added to fill the last block) and `view` (the owner's axes).
    Nothing is checked here, since JAX rebuilds pytrees with placeholder leaves. `x @ q` is `qfunc.matmul(x, q)`; there is no
    implicit cast to a float array: call `dequantize`.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    scale2: Any = None
    scale_offset: Any = None
    input_scale: Any = None
    input_zero: Any = None
    smooth: Any = None
    perm: Any = None
    scheme: Scheme = None
    dtype: str = "float32"
    layout: str = "canonical"
    pad: int = 0
    view: View = View()

    __array_ufunc__ = None      # numpy_array @ q must reach __rmatmul__

    @property
    def leaves(self) -> dict[str, Any]:
        """The array leaves that are present, by name."""
        return {name: leaf for name in LEAVES if (leaf := getattr(self, name)) is not None}

    def replace(self, **changes) -> QTensor:
        """A copy with other leaves or static fields."""
        return dataclasses.replace(self, **changes)

    @property
    def canonical(self) -> QTensor:
        """The same weight in the canonical layout (itself, unless `kernels.prepare` has laid it out for a backend)."""
        return self if self.layout == "canonical" else LAYOUTS[self.layout].restore(self)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(..., in, out): leading axes, contracted size, output size; derived from the leaves."""
        if self.layout != "canonical":
            return LAYOUTS[self.layout].matrix_shape(self)
        *batch, rows, size = self.codes.shape
        return (*batch, CODECS.columns(self.scheme.weight.code, size) - self.pad, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape in the owner's orientation: (..., in, out), unless `view` says otherwise."""
        *batch, rows, columns = self.matrix_shape
        return (*batch, *self.view.shape(rows, columns))

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all leaves take in memory, scales included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in self.leaves.values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / size: stored bits per logical element, everything counted."""
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def T(self) -> QTensor:
        """The transposed view, where there are no leading axes: nothing moves, `x @ w.T` contracts what `w @ x` does."""
        if len(self.matrix_shape) != 2:
            raise ValueError(f"T: expected a matrix without leading axes, found shape {self.shape}")
        return self.replace(view=dataclasses.replace(self.view, transposed=not self.view.transposed))

    def dequantize(self, dtype=None) -> jax.Array:
        """The float array, in the owner's shape; computed in float32 and cast once to `dtype` (default: the logical dtype)."""
        matrix = dequantize_matrix(self)
        if not self.view.transposed:
            matrix = jnp.swapaxes(matrix, -1, -2)
        return matrix.reshape(self.shape).astype(jnp.dtype(dtype or self.dtype))

    def __getitem__(self, index) -> QTensor:
        """`q[...]` is q itself; an integer, slice or array indexes the leading axes; `table[ids]` of an embedding is `qfunc.take`."""
        batch = len(self.matrix_shape) - 2
        keys = index if isinstance(index, tuple) else (index,)
        if not batch and len(keys) == 1 and self.view == View(transposed=True) and _integers(index):
            from .kernels import take
            return take(self, index)
        if any(key is Ellipsis for key in keys):
            if len(keys) > 1:
                raise IndexError(f"{self!r} is packed: only leading axes can be indexed, found {index!r}")
            return self
        if len(keys) > batch:
            raise IndexError(f"{self!r} is packed: it has {batch} leading axes to index, found {index!r}")
        if not any(key is None for key in keys):
            for key, size in zip(keys, self.matrix_shape, strict=False):
                if isinstance(key, (int, np.integer)) and not -size <= key < size:         # JAX would clamp it
                    raise IndexError(f"{self!r}: index {key} is out of range for a leading axis of {size}")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __iter__(self):
        if len(self.matrix_shape) < 3:
            raise TypeError(f"{self!r} is packed and has no leading axis to iterate over")
        return (self[i] for i in range(self.matrix_shape[0]))

    def __rmatmul__(self, x):
        if self.view.transposed or self.view.ins or self.view.outs:
            raise ValueError(f"x @ w contracts the first axis of w, found {self!r} of {self.view}; qfunc.matmul(x, w) contracts `in`")
        from .kernels import matmul
        return matmul(x, self)

    def __matmul__(self, x):
        if not self.view.transposed or self.view.ins or self.view.outs:
            raise ValueError(f"w @ x needs a matrix stored as (out, in), found {self!r}; write x @ w")
        from .kernels import matmul
        x = jnp.asarray(x)
        return matmul(x, self) if x.ndim == 1 else jnp.swapaxes(matmul(jnp.swapaxes(x, -1, -2), self), -1, -2)

    def __repr__(self) -> str:
        from ._display import describe
        return describe(self)

    def _repr_html_(self) -> str:
        from ._display import describe_html
        return describe_html(self)

    def __treescope_repr__(self, path, subtree_renderer):
        from ._display import describe_treescope
        return describe_treescope(self, path, subtree_renderer)



class _Blocks(dict):
    """Block codecs by weight code; ggml's are found in `qfunc._ggml` when one is first asked for."""

    def __contains__(self, name) -> bool:
        if isinstance(name, str) and name.startswith("gguf:") and not super().__contains__(name):
            from . import _ggml
            kind = name.removeprefix("gguf:")
            if kind in _ggml.TYPES:
                record = _ggml.TYPES[kind]
                CODECS.register(name, record.elements, record.bytes, lambda raw, columns: _ggml.decode(raw, kind, columns))
        return super().__contains__(name)


def _integers(index) -> bool:
    return isinstance(index, int) and not isinstance(index, bool) or jnp.issubdtype(getattr(index, "dtype", bool), jnp.integer)


class _Codecs:
    """How many elements a stored row holds; irregular codecs (ggml blocks) have their own decoder and block size."""

    def __init__(self):
        self.blocks: dict[str, tuple[int, int]] = _Blocks()
        self.decoders: dict[str, Any] = _Blocks()

    def register(self, name: str, elements: int, size: int, decoder) -> None:
        """Make `name` a weight code in blocks of `elements` elements and `size` bytes.

        `decoder(raw uint8 [..., bytes], columns)` gives float32 [..., columns].
        """
        self.blocks[name], self.decoders[name] = (elements, size), decoder

    def columns(self, name: str, size: int) -> int:
        """Elements, padding included, in a stored row of `size` codes or bytes."""
        if name in self.blocks:
            elements, width = self.blocks[name]
            return size // width * elements
        element = code(name)
        return size // (16 * element.bits) * _pack.BLOCK if element.packed else size


CODECS = _Codecs()
LAYOUTS: dict[str, Any] = {}
"""Layouts of backends by name: objects with `restore(q) -> canonical q` and `matrix_shape(q)`; `qfunc.kernels.prepare` fills it."""


def dequantize_matrix(q: QTensor) -> jax.Array:
    """The float32 matrix as it is stored, [..., out, in]."""
    q = q.canonical
    name = q.scheme.weight.code
    columns = q.matrix_shape[-2]
    if name in CODECS.decoders:
        return CODECS.decoders[name](q.codes, columns)
    return _codec.decode(q.leaves, q.scheme.weight, columns)


def _flatten_with_keys(q: QTensor):
    return [(jax.tree_util.GetAttrKey(name), getattr(q, name)) for name in LEAVES], tuple(getattr(q, name) for name in STATIC)


def _flatten(q: QTensor):
    return tuple(getattr(q, name) for name in LEAVES), tuple(getattr(q, name) for name in STATIC)


def _unflatten(static, leaves) -> QTensor:
    q = object.__new__(QTensor)
    for name, value in zip(LEAVES + STATIC, (*leaves, *static), strict=True):
        object.__setattr__(q, name, value)
    return q


def static_to_json(static) -> dict:
    """The static fields of a QTensor as JSON types."""
    fields = dict(zip(STATIC, static, strict=True)) if isinstance(static, tuple) else {name: getattr(static, name) for name in STATIC}
    return {**fields, "scheme": fields["scheme"].to_json(), "view": dataclasses.asdict(fields["view"])}


def static_from_json(data: dict) -> dict:
    """The inverse of `static_to_json`, as keyword arguments of `QTensor`."""
    view = data["view"]
    return {**data, "scheme": Scheme.from_json(data["scheme"]), "view": View(view["transposed"], tuple(view["ins"]), tuple(view["outs"]))}


def _serialize(static) -> bytes:
    return json.dumps(static_to_json(static)).encode()


def _deserialize(data) -> tuple:
    fields = static_from_json(json.loads(bytes(data)))
    return tuple(fields[name] for name in STATIC)


jax.tree_util.register_pytree_with_keys(QTensor, _flatten_with_keys, _unflatten, _flatten)
jax.export.register_pytree_node_serialization(
    QTensor, serialized_name="qfunc.QTensor", serialize_auxdata=_serialize, deserialize_auxdata=_deserialize)
