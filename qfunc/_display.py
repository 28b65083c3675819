"""How a packed weight shows itself: one line at the prompt, a small card in a notebook, a constructor in treescope.

Bytes of codes are never printed. Everything works on whatever JAX puts into the leaves (tracers, shapes, shardings, `object()`):
what cannot be known is left out.
"""

from __future__ import annotations

import html
import math
from typing import Any


def bits_per_weight(q) -> float | None:
    """Bits stored per logical weight, scales counted: 8 q.nbytes / prod(q.shape); None where it cannot be known or q is empty."""
    shape, nbytes = _get(q, "shape"), _get(q, "nbytes")
    if not isinstance(shape, tuple) or nbytes is None:
        return None
    count = math.prod(shape)
    return 8 * nbytes / count if count else None


def size_text(nbytes: int | float) -> str:
    """Bytes for people, in powers of 1000: `512 B`, `29.7 kB`, `1.05 GB`."""
    for unit, exponent in (("GB", 9), ("MB", 6), ("kB", 3)):
        value = nbytes / 10**exponent
        if value >= 1:
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} B"


def facts(q) -> dict[str, Any]:
    """What there is to say about a QTensor, in order of interest: scheme, shape, dtype, bits per weight, bytes, layout."""
    bits, nbytes, layout = bits_per_weight(q), _get(q, "nbytes"), _get(q, "layout")
    found = {
        "scheme": getattr(_get(q, "scheme"), "name", None),
        "shape": _get(q, "shape"),
        "dtype": _get(q, "dtype"),
        "bits_per_weight": None if bits is None else round(bits, 2),
        "nbytes": nbytes,
        "layout": None if layout == "canonical" else layout,
    }
    return {name: str(value) if name == "dtype" else value for name, value in found.items() if value is not None}


def describe(q) -> str:
    """One line: `QTensor(w4a16_g128, (4096, 14336), bfloat16, 4.25 bits, 31.2 MB)`."""
    known = facts(q)
    parts = [str(known[n]) for n in ("scheme", "shape", "dtype") if n in known]
    if "bits_per_weight" in known:
        parts.append(f"{known['bits_per_weight']:.2f} bits")
    if "nbytes" in known:
        parts.append(size_text(known["nbytes"]))
    if "layout" in known:
        parts.append(f"layout={known['layout']}")
    return f"QTensor({', '.join(parts)})"


def describe_html(q) -> str:
    """A card for notebooks: scheme, logical shape, bits per weight with a bar against the logical dtype, bytes."""
    known = facts(q)
    title = html.escape(str(known.get("scheme", "?")))
    shape = " &times; ".join(map(str, known["shape"])) if isinstance(known.get("shape"), tuple) else "?"
    bits = known.get("bits_per_weight")
    full = _width(known.get("dtype"))
    bar = ""
    if bits is not None and full:
        share = min(100, 100 * bits / full)
        bar = ("<span style='display:inline-block;width:8em;height:.6em;border-radius:.3em;background:#8884;vertical-align:middle'>"
               f"<span style='display:block;width:{share:.0f}%;height:100%;border-radius:.3em;background:#2a78d6'></span></span> ")
    rows = [("shape", f"{shape} <span style='opacity:.65'>{html.escape(known.get('dtype', ''))}</span>"),
            ("bits per weight", f"{bar}{bits:.2f}" + (f" of {full}" if full else "") if bits is not None else None),
            ("stored", size_text(known["nbytes"]) if "nbytes" in known else None),
            ("layout", html.escape(str(known["layout"])) if "layout" in known else None)]
    body = "".join(f"<tr><td style='text-align:left;opacity:.65;padding-right:1em'>{name}</td><td style='text-align:left'>{value}</td></tr>"
                   for name, value in rows if value)
    return (f"<div style='font-family:system-ui,sans-serif;line-height:1.5'><b>QTensor</b> <code>{title}</code>"
            f"<table style='margin:.2em 0;border-collapse:collapse'>{body}</table></div>")


def describe_treescope(q, path, subtree_renderer):
    """The rendering that `__treescope_repr__` returns: a constructor of the facts, never of the leaves."""
    from treescope import repr_lib
    return repr_lib.render_object_constructor(type(q), facts(q), path, subtree_renderer)


def _get(q, name: str):
    # Placeholders of tree transformations (None, object(), a PartitionSpec) have neither shape nor size; a repr must not raise for them.
    try:
        return getattr(q, name)
    except Exception:
        return None


def _width(dtype: str | None) -> int | None:
    import jax.numpy as jnp
    try:
        return 8 * jnp.dtype(dtype).itemsize if dtype else None
    except TypeError:
        return None


WORDS = {
    "fp8_e4m3": "float8 (e4m3)", "fp8_e5m2": "float8 (e5m2)", "fp6_e2m3": "float6 (e2m3)", "fp6_e3m2": "float6 (e3m2)",
    "fp4_e2m1": "float4 (e2m1)", "nf4": "nf4", "fp4_bnb": "bitsandbytes fp4",
}
CELLS = {"tensor": "one scale", "channel": "a scale per channel", "token": "per token"}


def describe_scheme(scheme) -> str:
    """A scheme in words: `int4 weights, a scale per 128; int8 activations, dynamic, per token`."""
    weight, activation = scheme.weight, scheme.activation
    zero = {None: "", "int": ", zero points", "float": ", float zero points"}[weight.zero]
    scales = {"e8m0": ", powers of two"}.get(weight.scale_dtype, "")
    if weight.scale2_dtype:
        scales = ", two levels of scales"
    order = ", act-order" if weight.actorder else ""
    text = f"{_code_words(weight.code)} weights, {_cell_words(weight.granularity)}{zero}{scales}{order}"
    if activation is None:
        return text
    cell = {"token": "per token", "tensor": "per tensor"}.get(activation.granularity.kind, f"per {activation.granularity.size}")
    if activation.outer:
        cell += f" under one per {activation.outer}"
    extra = ", outlier columns in float" if activation.outlier_threshold else ", zero point" if activation.zero else ""
    mode = "calibrated" if activation.mode == "static" else "dynamic"
    return f"{text}; {_code_words(activation.code)} activations, {mode}, {cell}{extra}"


def _code_words(code: str) -> str:
    return WORDS.get(code, code.removeprefix("u") if code.startswith("uint") else code)


def _cell_words(granularity) -> str:
    if granularity.kind == "block":
        return f"a scale per {granularity.out} x {granularity.size}"
    return CELLS.get(granularity.kind) or f"a scale per {granularity.size}"


SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "fp8_e4m3": 8, "e8m0": 8, "uint8": 8}


def nominal_bits(scheme, rows: int = 4096, columns: int = 4096) -> float:
    """Stored bits per weight of a scheme on a matrix of `rows` inputs and `columns` outputs, scales and zero points counted."""
    from ._qtensor import CODECS
    from ._scales import scale_shape
    from ._spec import bits_of
    weight = scheme.weight
    if weight.code in CODECS.blocks:
        elements, size = CODECS.blocks[weight.code]
        return 8 * size / elements
    cells = math.prod(scale_shape(weight.granularity, columns, rows))
    each = SCALE_BITS[weight.scale_dtype] + {None: 0, "int": 8, "float": SCALE_BITS[weight.scale_dtype]}[weight.zero]
    if weight.scale_rule == "double":
        each += 32 / 256
    extra = 32 * rows if weight.actorder else 0
    return bits_of(weight.code.removeprefix("u")) + (cells * each + extra) / (rows * columns)
