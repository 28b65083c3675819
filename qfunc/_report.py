"""What quantization did to each weight: bytes before and after, and how far the result is from the original.

With w the original matrix, v the dequantized one, e = v - w, norms over all elements:
relative error |e| / |w|, SQNR 20 log10(|w| / |e|) in dB, max abs error max |e|; given activations x of a matmul, its output error is
|q(x) v - x w| / |x w| with the activation quantized as the scheme says.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._display import size_text
from ._numerics import extreme
from ._paths import leaf_path, nearest
from ._qtensor import QTensor
from ._rules import default_reason

SHORT = 24
"""Rows of the table that `repr` shows."""

COLUMNS = (
    # name in `rows`, heading, text of a value
    ("path", "path", str),
    ("scheme", "scheme", str),
    ("shape", "shape", lambda s: " x ".join(map(str, s))),
    ("bits_per_weight", "bits", "{:.2f}".format),
    ("bytes_before", "before", size_text),
    ("bytes_after", "after", size_text),
    ("relative_error", "rel. error", "{:.4f}".format),
    ("sqnr_db", "SQNR dB", "{:.1f}".format),
    ("max_abs_error", "max error", "{:.2e}".format),
    ("output_error", "output error", "{:.4f}".format),
)


@dataclass(frozen=True, repr=False)
class Report:
    """The result of `qfunc.report`.

    Fields:
        rows: a dict for each quantized weight, in the order of the tree: path, scheme, shape, bits_per_weight, bytes_before, bytes_after,
            norm (of the original), relative_error, sqnr_db, max_abs_error and, where activations were given, output_error.
        kept: a dict for each array left as it is: path, shape, dtype, bytes, reason, notable (False where nobody would expect otherwise).
    """

    rows: list[dict[str, Any]]
    kept: list[dict[str, Any]] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the model: bytes of all leaves before and after, bits per weight and relative error over the quantized weights."""
        kept = sum(row["bytes"] for row in self.kept)
        before, after = (sum(row[f"bytes_{when}"] for row in self.rows) for when in ("before", "after"))
        weights = sum(math.prod(row["shape"]) for row in self.rows)
        norm = math.hypot(*(row["norm"] for row in self.rows))
        error = math.hypot(*(row["norm"] * row["relative_error"] for row in self.rows if row["norm"]))
        return {"quantized": len(self.rows), "kept": len(self.kept), "bytes_before": before + kept, "bytes_after": after + kept,
                "bytes_kept": kept, "bits_per_weight": 8 * after / weights if weights else 0.0, "relative_error": _ratio(error, norm)}

    def summary(self) -> str:
        """One line: how many weights, bits per weight, size before and after, relative error."""
        t = self.totals
        ratio = t["bytes_before"] / max(t["bytes_after"], 1)
        return (f"{t['quantized']} weights in {t['bits_per_weight']:.2f} bits each, relative error {t['relative_error']:.4f}; "
                f"{t['kept']} leaves kept ({size_text(t['bytes_kept'])}); "
                f"{size_text(t['bytes_before'])} -> {size_text(t['bytes_after'])} ({ratio:.1f}x smaller)")

    def __str__(self) -> str:
        return self._text(len(self.rows))

    def __repr__(self) -> str:
        return self._text(SHORT)

    def _text(self, most: int) -> str:
        names, cells = self._cells()
        shown = cells[:most]
        widths = [max(len(line[i]) for line in [names, *shown]) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                 for line in [names, *shown]]
        lines.insert(1, "-" * max(map(len, lines)))
        if len(cells) > most:
            lines.append(f"... {len(cells) - most} more: print(report), report.rows")
        lines += [f"kept: {row['path']} ({row['reason']})" for row in self.kept if row["notable"]]
        return "\n".join([*lines, self.summary()])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = [c for c in COLUMNS if any(c[0] in row for row in self.rows)] or COLUMNS[:4]
        return [c[1] for c in columns], [[text(row[name]) if name in row else "" for name, _, text in columns] for row in self.rows]

    def _repr_html_(self) -> str:
        names, cells = self._cells()
        worst = max((row["relative_error"] for row in self.rows if math.isfinite(row["relative_error"])), default=0) or 1
        where = names.index("rel. error") if "rel. error" in names else None
        head = "".join(f"<th style='text-align:{'left' if i < 2 else 'right'}'>{n}</th>" for i, n in enumerate(names))
        body = []
        for row, line in zip(self.rows, cells, strict=True):
            tds = []
            for i, cell in enumerate(line):
                share = 100 * min(row["relative_error"] / worst, 1) if i == where else 0
                bar = f"background:linear-gradient(to left,#2a78d640 {share:.0f}%,transparent 0);" if share else ""
                tds.append(f"<td style='{bar}text-align:{'left' if i < 2 else 'right'}'>{html.escape(cell)}</td>")
            body.append(f"<tr>{''.join(tds)}</tr>")
        kept = "".join(f"<li><code>{html.escape(row['path'])}</code>: {html.escape(row['reason'])}</li>"
                       for row in self.kept if row["notable"])
        table = f"<table style='font-variant-numeric:tabular-nums'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        return (f"<div style='font-family:system-ui,sans-serif'><p>{html.escape(self.summary())}</p>"
                f"<div style='max-height:28em;overflow:auto'>{table}</div>{kept and f'<p>kept in float:</p><ul>{kept}</ul>'}</div>")

    def plot(self, ax=None):
        """The error of each weight as a matplotlib figure; hollow marks are output errors. `ax`: axes to draw into."""
        import matplotlib.pyplot as plt
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 1 + 0.2 * max(len(self.rows), 4)), layout="constrained")
        places = np.arange(len(self.rows))
        for name in dict.fromkeys(row["scheme"] for row in self.rows):
            own = [i for i in places if self.rows[i]["scheme"] == name]
            dots = ax.plot([self.rows[i]["relative_error"] for i in own], own, "o", ms=5, label=name)[0]
            out = [i for i in own if "output_error" in self.rows[i]]
            if out:         # even an empty plot would take a colour of the cycle
                ax.plot([self.rows[i]["output_error"] for i in out], out, "o", ms=6, mfc="none", mec=dots.get_color())
        ax.set_yticks(places, [row["path"] for row in self.rows], fontsize=7)
        ax.set_ylim(len(self.rows) - 0.5, -0.5)
        if any(row["relative_error"] > 0 for row in self.rows):
            ax.set_xscale("log")
        ax.set_xlabel("relative error" + (" (hollow: of the output)" if any("output_error" in row for row in self.rows) else ""))
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if self.rows:
            ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return ax.figure


def report(params, qparams, *, batch: Mapping[str, Any] | None = None) -> Report:
    """Compare quantized parameters with the original ones.

    Arguments:
        params: the original pytree.
        qparams: what `qfunc.quantize` made of it; paths must be the same.
        batch: optional activations by path, each [..., in], the input of that matmul: adds the error of its output.
    Raises: ValueError where a path or a shape of one tree is not in the other, or `batch` names a path that is not quantized.
    """
    before = _leaves(params)
    after = _leaves(qparams)
    if before.keys() != after.keys():
        path = next(iter(before.keys() ^ after.keys()))
        other = before if path in after else after
        raise ValueError(f"{path}: only in one of the two trees; nearest in the other: {', '.join(nearest(path, other)) or 'none'}")
    batch = dict(batch or {})
    for path in batch:
        if not isinstance(after.get(path), QTensor):
            known = [p for p, leaf in after.items() if isinstance(leaf, QTensor)]
            raise ValueError(f"batch: {path} is no quantized weight; the nearest are {', '.join(nearest(path, known)) or 'none'}")
    rows, kept = [], []
    for path, leaf in after.items():
        if isinstance(leaf, QTensor):
            rows.append(_row(path, before[path], leaf, batch.get(path)))
        elif hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            # Models carry functions, numbers and random keys as leaves, too.
            kept.append(_kept(path, leaf))
    return Report(rows, kept)


def _leaves(tree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))[0]
    found: dict[str, Any] = {}
    for keys, leaf in flat:
        if (path := leaf_path(keys)) in found:
            raise ValueError(f"two leaves have the path {path!r}")
        found[path] = leaf
    return found


def _row(path: str, w, q: QTensor, x) -> dict[str, Any]:
    if isinstance(w, QTensor):
        w = w.dequantize()
    if tuple(w.shape) != q.shape:
        raise ValueError(f"{path}: expected the shape of the original, {tuple(w.shape)}, found {q.shape}")
    error, norm, largest = (float(a) for a in _distance(q, jnp.asarray(w)))
    relative = _ratio(error, norm)
    row = {"path": path, "scheme": q.scheme.name, "shape": q.shape, "bits_per_weight": 8 * q.nbytes / max(math.prod(q.shape), 1),
           "bytes_before": _nbytes(w), "bytes_after": q.nbytes, "norm": norm, "relative_error": relative,
           "sqnr_db": -20 * math.log10(relative) if relative else math.inf, "max_abs_error": largest}
    if x is not None:
        if x.shape[-1] != q.matrix_shape[-2]:
            raise ValueError(f"batch: {path}: expected activations of {q.matrix_shape[-2]} channels, found shape {tuple(x.shape)}")
        row["output_error"] = _ratio(*(float(a) for a in _output_distance(q, jnp.asarray(w), jnp.asarray(x))))
    return row


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0 if error == 0 else math.inf


@jax.jit
def _distance(q: QTensor, w):
    w = w.astype(jnp.float32)
    error = q.dequantize(jnp.float32) - w
    return _norm(error), _norm(w), extreme(jnp.max, jnp.abs(error), None, initial=0)


@jax.jit
def _output_distance(q: QTensor, w, x):
    from .kernels import matmul
    *batch, rows, columns = q.matrix_shape
    w = w.astype(jnp.float32)
    w = jnp.swapaxes(w.reshape(*batch, columns, rows), -1, -2) if q.view.transposed else w.reshape(*batch, rows, columns)
    x = x.astype(jnp.float32).reshape(-1, rows)
    x = jnp.broadcast_to(x, (*batch, *x.shape))
    want = jnp.matmul(x, w, precision="highest")
    return _norm(matmul(x, q, out_dtype=jnp.float32) - want), _norm(want)


def _norm(a):
    # Scaled by the largest element, so that tiny and huge weights keep their norm in float32.
    largest = jnp.max(jnp.abs(a), initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(a / scale)))


def _kept(path: str, leaf) -> dict[str, Any]:
    reason, notable = _reason(path, leaf)
    return {"path": path, "shape": tuple(leaf.shape), "dtype": str(leaf.dtype), "bytes": _nbytes(leaf), "reason": reason,
            "notable": notable}


def _nbytes(leaf) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _reason(path: str, leaf) -> tuple[str, bool]:
    """Why a leaf stayed, and whether a reader of the report should be told (a bias does not surprise anybody)."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "not floating point", False
    if len(leaf.shape) < 2:
        return "fewer than two axes", False
    return default_reason(path) or "a rule says so, or its axes have no known meaning", True
