"""The report of the demonstration: one HTML file that needs nothing else, drawn as inline SVG, light and dark.

`page(demo)` gives the text. Figures: error against size, a table with a row per scheme, a heat map of the error of every matmul.
"""

from __future__ import annotations

import html
import math
from importlib import resources
from string import Template

from ._demo import FAMILIES, TABLE, Demo, Result
from ._display import describe_scheme, size_text

WIDTH = 1000
STEPS = 9
"""Colours of the heat map; the page's style sheet defines them as --h0 ... --h8."""
LETTER = 7.1
"""Mean width of a letter of a label, in units of the figure."""


def page(demo: Demo) -> str:
    """The report as a self-contained HTML document."""
    rows = sorted(demo.rows, key=lambda r: (r.error, r.bits))
    template = Template(resources.files("qfunc").joinpath("data/demo.html").read_text(encoding="utf-8"))
    best = front(demo.rows)
    fields = {
        "model": html.escape(demo.model),
        "lead": _lead(demo, rows),
        "tiles": "".join(_tile(*tile) for tile in tiles(demo)),
        "legend": "".join(f"<span><i class='dot f-{key}'></i>{html.escape(name)}</span>" for key, name in FAMILIES.items()),
        "scatter": scatter(demo.rows, best),
        "head": _head(demo),
        "rows": "".join(_table_row(row, demo, row.name in best) for row in [demo.float_row, *rows]),
        "heat": heat_map(rows),
        "refused": _refused(demo),
        "machine": html.escape(demo.machine),
        "seconds": f"{demo.seconds:.0f}",
        "sentences": str(demo.sentences),
        "tokens": str(demo.tokens),
    }
    return template.substitute(fields)


def front(rows: list[Result]) -> set[str]:
    """The names of the schemes that no other beats in bits per weight and in error at once; `+table` rows do not take part."""
    best, least = set(), math.inf
    for row in sorted(rows, key=lambda r: (r.bits, r.error)):
        if row.error < least and not row.name.endswith(TABLE):
            best.add(row.name)
            least = row.error
    return best


def tiles(demo: Demo) -> list[tuple[str, str, str]]:
    """(what, number, remark) of the few numbers worth a headline."""
    plain = [row for row in demo.rows if not row.name.endswith(TABLE)]
    found = [("in float32", size_text(demo.float_row.nbytes), f"{demo.parameters / 1e6:.1f} million parameters")]
    for limit, words in ((0.001, "0.999"), (0.01, "0.99")):
        good = sorted((r for r in plain if r.error <= limit), key=lambda r: (r.bits, r.error))
        if good:
            found.append((f"cheapest with mean cosine over {words}", good[0].name,
                          f"{good[0].bits:.2f} bits per weight, {100 * good[0].agreement:.0f} % the same neighbours"))
    good = sorted((r for r in demo.rows if r.error <= 0.01), key=lambda r: r.nbytes)
    if good:
        ratio = demo.float_row.nbytes / good[0].nbytes
        found.append(("smallest whole model over 0.99", size_text(good[0].nbytes), f"{good[0].name}, {ratio:.1f} times smaller"))
    return found


def _lead(demo: Demo, rows: list[Result]) -> str:
    share = 100 * demo.quantized / demo.parameters
    return (f"{len(rows)} schemes on {demo.quantized / 1e6:.1f} million weights, {share:.0f} % of the model; the embedding table stays in "
            f"float32 except where a name ends in <code>{TABLE}</code>. Embeddings of {demo.sentences} sentences are compared with "
            "those of the float model.")


def tag(name: str, body: str = "", **attributes) -> str:
    """An element; `css` is its class, underscores in the names of attributes are dashes, numbers are rounded to tenths."""
    def text(value):
        return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else html.escape(str(value))
    named = {"class" if key == "css" else key.replace("_", "-"): text(value) for key, value in attributes.items() if value != ""}
    pairs = "".join(f" {key}='{value}'" for key, value in named.items())
    return f"<{name}{pairs}>{body}</{name}>"


def _tile(what: str, number: str, remark: str) -> str:
    return f"<div class='tile'><span>{html.escape(what)}</span><b>{html.escape(number)}</b><small>{html.escape(remark)}</small></div>"


# --- error against size -----------------------------------------------------------------------------------------------------------

def scatter(rows: list[Result], best: set[str], height: int = 640) -> str:
    """Bits per weight against 1 - mean cosine, as SVG; the line joins schemes that nothing beats in both."""
    rows = [row for row in rows if not row.name.endswith(TABLE) and row.error > 0]
    if not rows:
        return ""
    left, right, top, bottom = 64, WIDTH - 24, 16, height - 48
    low, high = math.floor(min(row.bits for row in rows)), math.ceil(max(row.bits for row in rows) + 0.2)
    lowest = math.floor(math.log10(min(row.error for row in rows)))
    highest = math.ceil(math.log10(max(row.error for row in rows)))

    def place(row: Result) -> tuple[float, float]:
        return (left + (row.bits - low) / (high - low) * (right - left),
                top + (highest - math.log10(row.error)) / (highest - lowest) * (bottom - top))

    parts = []
    for power in range(lowest, highest + 1):
        y = top + (highest - power) / (highest - lowest) * (bottom - top)
        parts += [tag("line", css="grid", x1=left, x2=right, y1=y, y2=y),
                  tag("text", _power(power), css="tick", x=left - 10, y=y + 4, text_anchor="end")]
    for bits in range(low, high + 1):
        x = left + (bits - low) / (high - low) * (right - left)
        parts.append(tag("text", str(bits), css="tick", x=x, y=bottom + 20, text_anchor="middle"))
    middle = (top + bottom) / 2
    words = "bits per quantized weight, scales counted"
    parts += [tag("text", words, css="axis", x=(left + right) / 2, y=height - 6, text_anchor="middle"),
              tag("text", "1 − mean cosine", css="axis", transform=f"translate(14 {middle}) rotate(-90)", text_anchor="middle")]
    places = {row.name: place(row) for row in rows}
    line = sorted(places[name] for name in best if name in places)
    parts.append(tag("polyline", css="front", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in line)))
    for row in rows:
        x, y = places[row.name]
        parts.append(tag("circle", tag("title", _tooltip(row)), css=f"mark f-{row.family}", cx=x, cy=y, r=5.5))
    ordered = sorted(rows, key=lambda row: (row.name not in best, row.error))
    points = [(row.name, *places[row.name], row.name in best) for row in ordered]
    for name, x, y, anchor, strong in labels(points, (left, right, top, bottom)):
        parts.append(tag("text", html.escape(name), css="label strong" if strong else "label", x=x, y=y, text_anchor=anchor))
    return tag("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label="error against bits per weight")


def labels(points: list[tuple[str, float, float, bool]], box) -> list[tuple[str, float, float, str, bool]]:
    """Places for as many labels as fit without covering marks, frame or each other: (name, x, y, anchor, strong), best points first."""
    left, right, top, bottom = box
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y, _ in points]
    found = []
    for name, x, y, strong in points:
        width = LETTER * len(name) * (1.06 if strong else 1)
        for dx, dy, anchor in ((10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"), (0, 20, "middle"),
                               (9, -8, "start"), (9, 16, "start"), (-9, -8, "end"), (-9, 16, "end")):
            start = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            area = (start, y + dy - 10, start + width, y + dy + 3)
            inside = area[0] >= left and area[2] <= right and area[1] >= top - 8 and area[3] <= bottom
            if inside and not any(_meet(area, other) for other in taken):
                taken.append(area)
                found.append((name, x + dx, y + dy, anchor, strong))
                break
    return found


def _meet(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _power(power: int) -> str:
    if power >= -3:
        return f"{10.0**power:g}"
    return f"10<tspan dy='-5' font-size='9'>−{-power}</tspan>"


def _tooltip(row: Result) -> str:
    about = describe_scheme(row.scheme) if row.scheme else "the original"
    return html.escape(f"{row.name}: {about}\n{row.bits:.2f} bits per weight, whole model {size_text(row.nbytes)}\n"
                       f"cosine {row.cosines.mean():.5f} on average, {row.cosines.min():.5f} at worst\n"
                       f"nearest neighbour the same for {100 * row.agreement:.1f} %")


# --- a row per scheme --------------------------------------------------------------------------------------------------------------

def _head(demo: Demo) -> str:
    columns = ["scheme", "bits", "model", "error: mean and worst", "mean cosine", "worst cosine", "neighbour",
               *(f"ms, batch {size}" for size in demo.batches)]
    return "".join(f"<th data-column='{i}'{' class=name' if i == 0 else ''}>{name}</th>" for i, name in enumerate(columns))


def _table_row(row: Result, demo: Demo, best: bool) -> str:
    base = demo.float_row
    name = f"<i class='dot f-{row.family}'></i>{html.escape(row.name)}" if row.scheme else html.escape(row.name)
    star = tag("em", "★", title="no other scheme is both smaller and more exact") if best else ""
    cells = [
        (row.name, f'<span title="{_tooltip(row)}">{name}</span>{star}', "name"),
        (row.bits, f"{row.bits:.2f}", ""),
        (row.nbytes, f"<span class='bar' style='--w:{100 * row.nbytes / base.nbytes:.0f}%'>{size_text(row.nbytes)}</span>", ""),
        (row.error, _range(row), "range"),
        (row.cosines.mean(), f"{row.cosines.mean():.5f}", ""),
        (row.cosines.min(), f"{row.cosines.min():.4f}", ""),
        (row.agreement, f"{100 * row.agreement:.1f} %", ""),
    ]
    for size in demo.batches:
        ratio = row.milliseconds[size] / base.milliseconds[size]
        remark = f" <small class='{'good' if ratio < 0.95 else ''}'>{ratio:.2f}×</small>" if row.scheme else ""
        cells.append((row.milliseconds[size], f"{row.milliseconds[size]:.1f}{remark}", ""))
    body = "".join(tag("td", text, css=kind, data_value=str(value)) for value, text, kind in cells)
    return tag("tr", body, css="" if row.scheme else "float")


def _range(row: Result, low: float = -6, high: float = 0.3, width: int = 150) -> str:
    """Mean and worst error on a logarithmic axis from 1e-6 to 2."""
    def place(error: float) -> float:
        return 6 + (max(math.log10(max(error, 1e-12)), low) - low) / (high - low) * (width - 12)
    if row.error <= 0 or row.scheme is None:
        return ""
    mean, worst, colour = place(row.error), place(row.worst), f"f-{row.family}"
    ticks = [tag("line", css="grid", x1=place(10.0**power), x2=place(10.0**power), y1=0, y2=18) for power in (-6, -4, -2, 0)]
    marks = [tag("line", css=f"span {colour}", x1=mean, x2=worst, y1=9, y2=9), tag("circle", css=f"mark {colour}", cx=mean, cy=9, r=4.5),
             tag("line", css=f"stop {colour}", x1=worst, x2=worst, y1=4, y2=14)]
    return tag("svg", "".join(ticks + marks), viewBox=f"0 0 {width} 18", width=width, height=18)


def _refused(demo: Demo) -> str:
    if not demo.refused:
        return ""
    items = [tag("li", f"<code>{html.escape(name)}</code>: {html.escape(reason)}") for name, reason in demo.refused.items()]
    return f"<section><h2>Not possible on this model</h2><ul>{''.join(items)}</ul></section>"


# --- the error of every matmul -------------------------------------------------------------------------------------------------------

SHORT = {"attention/self/query": "q", "attention/self/key": "k", "attention/self/value": "v", "attention/output/dense": "o",
         "intermediate/dense": "up", "output/dense": "dn"}
"""Columns within a layer, by the path of the matmul after `encoder/layer/<i>/`."""


def heat_map(rows: list[Result], cell: int = 18, left: int = 190) -> str:
    """Relative output error of each matmul (column) under each scheme (row), as SVG; darker is worse, on a logarithmic scale."""
    rows = [row for row in rows if row.layers and not row.name.endswith(TABLE)]
    if not rows:
        return ""
    paths = sorted(rows[0].layers, key=_order)
    layers = list(dict.fromkeys(_order(path)[0] for path in paths))
    gap = 8
    width = left + len(paths) * cell + len(layers) * gap
    top = 44
    values = [math.log10(max(e, 1e-6)) for row in rows for e in row.layers.values() if math.isfinite(e)]
    low, high = math.floor(2 * min(values)) / 2, min(math.ceil(2 * max(values)) / 2, 0.5)
    columns = {path: left + i * cell + layers.index(_order(path)[0]) * gap for i, path in enumerate(paths)}
    parts = []
    for layer in layers:
        own = [columns[p] for p in paths if _order(p)[0] == layer]
        parts.append(tag("text", f"layer {layer}", css="axis", x=(own[0] + own[-1] + cell) / 2, y=14, text_anchor="middle"))
    for path, x in columns.items():
        parts.append(tag("text", html.escape(_order(path)[2]), css="tick small", x=x + cell / 2, y=36, text_anchor="middle"))
    for j, row in enumerate(rows):
        y = top + j * cell
        parts.append(tag("text", html.escape(row.name), css="label", x=left - 10, y=y + cell / 2 + 4, text_anchor="end"))
        for path, x in columns.items():
            error = row.layers[path]
            share = (math.log10(max(error, 1e-6)) - low) / (high - low) if math.isfinite(error) else 1
            title = tag("title", html.escape(f"{row.name}, {path}: {error:.4f}"))
            colour = f"h{min(STEPS - 1, max(0, int(share * STEPS)))}"
            parts.append(tag("rect", title, css=colour, x=x, y=y, width=cell - 2, height=cell - 2, rx=3))
    svg = tag("svg", "".join(parts), css="heat", viewBox=f"0 0 {width} {top + len(rows) * cell + 8}",
              style=f"max-width:{1.15 * width:.0f}px", role="img", aria_label="error of each matmul")
    return svg + _scale(low, high)


def _scale(low: float, high: float) -> str:
    cells = "".join(f"<i style='background:var(--h{i})'></i>" for i in range(STEPS))
    return f"<p class='scale'><span>{10**low:.2g}</span>{cells}<span>{10**high:.2g}</span> relative error of the output</p>"


def _order(path: str) -> tuple[int, int, str]:
    """(layer, place within the layer, short name) of a path such as `encoder/layer/3/output/dense/kernel`."""
    parts = path.split("/")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    rest = "/".join(parts[index + 1:-1])
    return int(parts[index]) if index >= 0 else 0, list(SHORT).index(rest) if rest in SHORT else len(SHORT), SHORT.get(rest, rest[-4:])
