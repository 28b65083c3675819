"""The table of lowerings: which implementation of a primitive runs, and why not another.

An implementation says in Python, from shapes, types and static metadata alone, whether it supports a call; XLA's lowering of each
platform takes the first that does. One jaxpr serves all platforms, because the choice is made when it is lowered.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import mlir

from qfunc._qtensor import QTensor, View
from qfunc._spec import ActivationSpec, Scheme

PLATFORMS = ("cpu", "cuda", "rocm")


class FallbackWarning(UserWarning):
    """A preferred implementation refused a call, and a slower one runs instead. Given once for each reason."""


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or called for the target that is being lowered for."""


@dataclass(frozen=True)
class Packed:
    """The static side of a packed weight among the parameters of an equation, and which leaves follow as operands."""

    scheme: Scheme
    dtype: str
    layout: str
    pad: int
    fields: tuple[str, ...]

    @classmethod
    def of(cls, w: QTensor) -> Packed:
        """The record of w. Its view is left out: a matmul sees the matrix (in, out)."""
        return cls(w.scheme, w.dtype, w.layout, w.pad, tuple(w.leaves))

    def build(self, leaves) -> QTensor:
        """The QTensor of these leaves (arrays or shapes)."""
        return QTensor(**dict(zip(self.fields, leaves, strict=True)), scheme=self.scheme, dtype=self.dtype,
                       layout=self.layout, pad=self.pad, view=View())

    def __repr__(self) -> str:
        return self.scheme.name + ("" if self.layout == "canonical" else f"@{self.layout}")


@dataclass(frozen=True)
class Call:
    """One equation as implementations see it: abstract operands and static parameters.

    Fields:
        primitive: its name.
        x: the activation, (ShapeDtypeStruct,) when float, (codes, scale[, zero]) when already quantized; (ids,) of `quantized_take`.
        packed, leaves: the weight, as its static record and the shapes of its leaves; `w` is the QTensor of both.
        sizes, bias: ShapeDtypeStruct or None; `sizes` are the rows of each expert (`quantized_grouped_matmul`).
        spec: the ActivationSpec by which x is (or was) quantized, or None.
        extra: input_scale and input_zero of `quantize_activation`.
        out_dtype: numpy dtype of the result.
        batch: how many leading axes x shares with w.
        scope: how many leading axes of x are separate tensors to a per-tensor scale; the others are rows.
        target: the kind of device that is lowered for, such as `sm_90`, on platforms where code is made for one; else None.
        rows: int32 [R] or None; where it is there, row r of a grouped product takes row `rows[r]` of x.
    """

    primitive: str
    x: tuple[Any, ...]
    packed: Packed | None = None
    leaves: tuple[Any, ...] = ()
    sizes: Any = None
    bias: Any = None
    spec: ActivationSpec | None = None
    extra: tuple[Any, ...] = ()
    out_dtype: Any = None
    batch: int = 0
    scope: int = 0
    target: str | None = None
    rows: Any = None

    @property
    def w(self) -> QTensor:
        """The weight as a QTensor of ShapeDtypeStructs."""
        return self.packed.build(self.leaves)

    @property
    def quantized(self) -> bool:
        """True when x comes from `quantize_activation`."""
        return len(self.x) > 1

    def split(self, operands) -> tuple[tuple, QTensor, Any, Any]:
        """The operands of a matmul as (parts of x, w, sizes, bias); what is absent is None."""
        operands = list(operands)
        x = tuple(operands[:len(self.x)])
        w = self.packed.build(operands[len(x):len(x) + len(self.leaves)])
        rest = operands[len(x) + len(self.leaves):]
        sizes = rest.pop(0) if self.sizes is not None else None
        return x, w, sizes, rest.pop(0) if self.bias is not None else None

    @property
    def direct(self) -> Call:
        """The call on rows that were gathered in front of it; the call itself where none are gathered."""
        if self.rows is None:
            return self
        x = tuple(jax.ShapeDtypeStruct((*self.rows.shape, *part.shape[1:]), part.dtype) for part in self.x)
        return dataclasses.replace(self, x=x, rows=None)

    def gather(self, operands) -> tuple:
        """The operands of `direct` from those of the call."""
        if self.rows is None:
            return tuple(operands)
        *rest, rows = operands
        return tuple(jnp.take(part, rows, axis=0, mode="clip") for part in rest[:len(self.x)]) + tuple(rest[len(self.x):])


class Declined(str):
    """A refusal out of preference: the call could be run, but what comes next in the table is faster. Worth no warning."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute a primitive.

    Fields:
        name: `reference`, `native`, `triton`, ...
        platforms: where it can be lowered; None for everywhere.
        supports: (call, platform) -> None, or the reason why it cannot run this call.
        run: (call, *operands) -> result; traceable, same operands and result as the reference.
        gathers: whether `run` takes `Call.rows`; others, and `supports` of all, see the call behind the gather (`Call.direct`).
    """

    name: str
    platforms: tuple[str, ...] | None
    supports: Callable[[Call, str], str | None]
    run: Callable
    gathers: bool = False

    def apply(self, call: Call, *operands):
        """The result of a call, rows of x gathered in front of `run` where it does not gather them itself."""
        return self.run(call, *operands) if self.gathers else self.run(call.direct, *call.gather(operands))


IMPLEMENTATIONS: dict[str, list[Implementation]] = {}
"""Primitive name to implementations, the preferred first; the reference is always the last."""

DESCRIBE: dict[str, Callable[..., Call]] = {}
"""Primitive name to `(avals, params) -> Call`, which `define` fills."""

SLOW = ("quantized_matmul", "quantized_grouped_matmul")
"""Where the reference is worth a warning: elsewhere it is one elementwise loop of XLA's."""


def register(primitive: str, implementation: Implementation) -> None:
    """Put an implementation in front of those there are."""
    IMPLEMENTATIONS.setdefault(primitive, []).insert(0, implementation)


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("qfunc_implementation", default=None)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run every quantized operation in this context with one implementation: `reference`, `native` or `triton`.

    Functions jitted before are traced and compiled again inside, since the choice is part of jit's cache key. Raises ValueError for an
    unknown name and, when a call is lowered that the implementation cannot run, NotImplementedError with its reason.
    """
    names = implementation_names()
    if name not in names:
        raise ValueError(f"no implementation {name!r}; there are {', '.join(names)}")
    token = _forced.set(name)
    try:
        with set_xla_metadata(qfunc=name):
            yield
    finally:
        _forced.reset(token)


def implementation_names() -> list[str]:
    """Every implementation that can be asked for."""
    return list(dict.fromkeys(["reference", "native", "triton", *(i.name for rows in IMPLEMENTATIONS.values() for i in rows)]))


def forced() -> str | None:
    """The implementation that `use` asks for, or None. Becomes a parameter of each equation that is traced."""
    return _forced.get()


TARGETS: dict[str, Callable[[], str | None]] = {}
"""Platform to a function that tells the kind of device, where the code depends on it."""


def targeted(call: Call, platform: str) -> Call:
    """The call with the kind of device that a platform has."""
    return dataclasses.replace(call, target=TARGETS[platform]()) if platform in TARGETS else call


_failed: dict[tuple[Call, str], str] = {}
"""(call, implementation) to why its kernel could not be made, once that has been tried: nothing else knows before."""


def choose(call: Call, platform: str, name: str | None) -> tuple[Implementation, list[tuple[str, str]]]:
    """The implementation of a call on a platform, and those refused before it, each with the reason."""
    refused = []
    for row in IMPLEMENTATIONS[call.primitive]:
        if name is not None and row.name != name:
            continue
        if row.platforms is not None and platform not in row.platforms:
            if name is None:
                continue                        # made for another platform: nothing was refused
            refused.append((row.name, f"runs on {', '.join(row.platforms)}, not on {platform}"))
            continue
        reason = row.supports(call.direct, platform)
        if reason is None and name is None:
            reason = _failed.get((call, row.name))
        if reason is None:
            return row, refused
        refused.append((row.name, reason))
    reasons = "; ".join(f"{n}: {r}" for n, r in refused) or "there is no such implementation of this primitive"
    raise NotImplementedError(f"{call.primitive} on {platform}: implementation {name!r} refused ({reasons})")


@functools.lru_cache(maxsize=4096)
def _runner(call: Call, row: Implementation) -> Callable:
    # One jitted function per distinct call: layers of equal shape share one traced and lowered computation.
    def run(*operands):
        return row.apply(call, *operands)
    run.__name__ = f"{call.primitive}_{row.name}"
    return jax.jit(run)


_EAGER: list[Callable] = []
"""The cached functions of eager calls, one for each primitive."""


def forget() -> None:
    """Choose and trace anew from now on, after what choices depend on has changed. What a caller has jitted stays as it was compiled."""
    _runner.cache_clear()
    _failed.clear()
    for compiled in _EAGER:
        compiled.cache_clear()


@functools.lru_cache(maxsize=1024)
def _warn(chosen: str, name: str, reason: str) -> None:
    warnings.warn(f"a quantized operation runs on {chosen!r}: {name!r} refused, {reason}", FallbackWarning, stacklevel=2)


def define(primitive, describe: Callable[..., Call]) -> None:
    """Give a primitive its eager rule and its lowerings; `describe(avals, params)` makes the `Call` of an equation."""
    DESCRIBE[primitive.name] = describe

    def lower(ctx, *operands, platform: str, **params):
        call = targeted(describe([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_in], params), platform)
        asked = params["implementation"]
        while True:
            row, refused = choose(call, platform, asked)
            try:
                lowered = mlir.lower_fun(_runner(call, row), multiple_results=primitive.multiple_results)(ctx, *operands)
            except KernelError as error:
                if asked is not None:
                    raise
                _failed[call, row.name] = str(error).splitlines()[0][:300]
                continue
            for name, reason in refused:
                if asked is None and not isinstance(reason, Declined) and (call.primitive in SLOW or (call, name) in _failed):
                    _warn(row.name, name, reason)
            return lowered

    for platform in PLATFORMS:
        mlir.register_lowering(primitive, functools.partial(lower, platform=platform), platform=platform)
    mlir.register_lowering(primitive, functools.partial(lower, platform="other"))

    @functools.lru_cache(maxsize=4096)
    def compiled(params: tuple):
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    _EAGER.append(compiled)
    primitive.def_impl(lambda *operands, **params: compiled(tuple(sorted(params.items())))(*operands))


def shape_struct(tree):
    """Every array of a pytree as a hashable ShapeDtypeStruct."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.dtype(a.dtype)), tree)


def insert_axis(leaf, dim, size: int, at: int):
    """A batched operand with its mapped axis moved to `at`; broadcast along it where it is not mapped."""
    if dim is None:
        leaf = jnp.expand_dims(leaf, at)
        return jnp.broadcast_to(leaf, (*leaf.shape[:at], size, *leaf.shape[at + 1:]))
    return jnp.moveaxis(leaf, dim, at)
