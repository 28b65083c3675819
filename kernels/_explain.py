"""Which implementation each quantized operation of a function gets, and why not another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.extend import backend

from ._dispatch import DESCRIBE, IMPLEMENTATIONS, PLATFORMS, choose, shape_struct, targeted


@dataclass(frozen=True)
class Choice:
    """One operation of a function: what it is, what runs it, what was refused.

    Fields: `primitive`, `scheme`, `x` (shape), `weight` ((..., in, out) or None), `implementation`, `refused` ((name, reason), ...),
    `count` (how often an equal operation occurs; the body of a scan or loop counts once).
    """

    primitive: str
    scheme: str
    x: tuple[int, ...]
    weight: tuple[int, ...] | None
    implementation: str
    refused: tuple[tuple[str, str], ...]
    count: int = 1


class Explanation(tuple):
    """A tuple of `Choice`, printed as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no quantized operation"
        head = ("count", "operation", "scheme", "x", "weight (in, out)", "runs on", "refused")
        rows = [head, *((str(c.count), c.primitive, c.scheme, str(c.x), str(c.weight or ""), c.implementation,
                         "; ".join(f"{n}: {r}" for n, r in c.refused)) for c in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        from html import escape
        return f"<pre>{escape(repr(self))}</pre>"


def explain(fn, *args, platform: str | None = None, **kwargs) -> Explanation:
    """The lowering of every quantized operation in `fn(*args, **kwargs)`, without running or compiling it.

    `platform` is `cpu`, `cuda`, `rocm`, `gpu` (the one of these two that is here, else `cuda`) or `tpu`; by default that of JAX's default
    backend. Equal operations are listed once, with their count. Raises ValueError for another name.
    """
    platform = platform_of(platform)
    traced = jax.make_jaxpr(lambda args, kwargs: fn(*args, **kwargs))(args, kwargs)
    found: dict[Choice, int] = {}
    for equation in _equations(traced.jaxpr):
        choice = _choice(equation, platform)
        found[choice] = found.get(choice, 0) + 1
    return Explanation(Choice(**{**vars(choice), "count": count}) for choice, count in found.items())


def platform_of(asked: str | None, *others: str) -> str:
    """A platform as lowerings know it: that of JAX's default backend where None is asked for. ValueError for an unknown name."""
    own = jax.default_backend()
    name = own if asked is None else asked
    if name == "gpu":
        found = backend.backends()
        return "rocm" if "rocm" in found or "rocm" in getattr(found.get("gpu"), "platform_version", "").lower() else "cuda"
    # No kernels are made for TPUs: everything runs on the reference there.
    known = (*PLATFORMS, "gpu", "tpu", *others)
    if name not in known and name != own:
        raise ValueError(f"platform: expected one of {', '.join(known)}, found {name!r}")
    return name


def _choice(equation, platform: str) -> Choice:
    name = equation.primitive.name
    avals = [shape_struct(v.aval) for v in equation.invars]
    call = targeted(DESCRIBE[name](avals, equation.params), platform)
    asked = equation.params["implementation"]
    try:
        row, refused = choose(call, platform, asked)
        runs = row.name
    except NotImplementedError as error:
        runs, refused = "none", [(asked, str(error))]
    weight = None if call.packed is None else call.w.matrix_shape
    scheme = call.packed.scheme.name if call.packed else f"{call.spec.code} per {call.spec.granularity}"
    return Choice(name, scheme, call.x[0].shape, weight, runs, tuple(refused))


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        if equation.primitive.name in IMPLEMENTATIONS:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
