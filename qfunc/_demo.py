"""The main job on a real model: a sentence encoder, quantized with every scheme that makes sense for it, measured against float32.

`measure` does the work and returns plain records; `qfunc._demo_page` draws them, `qfunc.cli` prints them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._calibrate import Collector
from ._paths import leaf_path
from ._qtensor import QTensor
from ._quantize import quantize
from ._schemes import scheme, schemes
from ._spec import Scheme, bits_of
from ._tracked import Tracked
from ._trees import split
from .kernels import matmul

FLOAT = "float32"
TABLE = "+table"
"""Appended to the name of a scheme: the table of word embeddings is quantized, too."""
WITH_TABLE = ("w8a16", "w4a16_g32", "nf4_dq")
CALIBRATION_SHARE = 8
"""Every eighth sentence calibrates static schemes and is not measured."""
LAYER_TOKENS = 256
"""Tokens on which the error of each matmul is measured."""

NEAR_DOUBLES = (
    "*_g64", "w[5678]a*_g32", "w[567]a*_g*", "w8a16*_asym", "w4a16_asym", "w4a8_*_asym", "w8a8_dynamic_tensor", "int4wo_g32",
    "fp8_*_g128", "fp8_w8a16_tensor", "fp8_e5m2", "fp8_e5m2_[sbw]*", "mxfp8_e5m2", "mxfp6_e3m2", "fp4_bnb_dq",
)
"""Patterns of rows that would stand right beside another one in the figure."""

FAMILIES = {
    "int": "integer weights, float activations",
    "int-int": "integer weights and activations",
    "fp8": "8-bit floats",
    "micro": "microscaling: MX and NVFP4",
    "table": "4-bit codebooks",
}


@dataclasses.dataclass
class Result:
    """One row: a scheme on the model.

    Fields: `bits` per quantized weight, all scales counted; `nbytes` of the whole model; `cosines` to the float embeddings, one per
    sentence; `agreement`, share of sentences whose nearest other sentence is the same; `milliseconds` by batch size; `layers`, relative
    error of the output of each matmul by path.
    """

    name: str
    scheme: Scheme | None
    bits: float
    nbytes: int
    cosines: np.ndarray
    agreement: float
    milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)
    layers: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> float:
        """1 - mean cosine."""
        return float(1 - self.cosines.mean())

    @property
    def worst(self) -> float:
        """1 - smallest cosine."""
        return float(1 - self.cosines.min())

    @property
    def family(self) -> str:
        """A key of `FAMILIES`."""
        return family(self.scheme)


@dataclasses.dataclass
class Demo:
    """Everything measured: the model's name and sizes, the float row, and a row for each scheme."""

    model: str
    parameters: int
    quantized: int
    sentences: int
    tokens: int
    batches: tuple[int, ...]
    machine: str
    float_row: Result
    rows: list[Result]
    refused: dict[str, str]
    seconds: float


def family(s: Scheme) -> str:
    """The key of `FAMILIES` that a scheme belongs to, from its fields."""
    if s.weight.scale_dtype == "e8m0" or s.weight.scale_rule == "two_level":
        return "micro"
    if s.weight.code in ("nf4", "fp4_bnb"):
        return "table"
    if "int" in s.weight.code and (s.activation is None or s.activation.code.startswith("int")):
        return "int" if s.activation is None else "int-int"
    return "fp8"


def fits(s: Scheme, contracted: Iterable[int]) -> bool:
    """True where groups divide every contracted size; False for act-order, whose order comes from a checkpoint."""
    groups = [spec.granularity.size for spec in (s.weight, s.activation) if spec is not None and spec.granularity.kind == "group"]
    return not s.weight.actorder and all(size % group == 0 for size in contracted for group in groups)


def makes_sense(s: Scheme) -> bool:
    """False for near doubles of other rows, and for integer weights with activations that no kernel anywhere multiplies them by."""
    if any(fnmatchcase(s.name, pattern) for pattern in NEAR_DOUBLES):
        return False
    if s.activation is None or "int" not in s.weight.code:
        return True
    pair = (bits_of(s.weight.code.removeprefix("u")), s.activation.code)
    return pair in {(8, "int8"), (4, "int8"), (4, "int4"), (4, "fp8_e4m3")} and (pair[0] == 8 or s.activation.mode == "dynamic")


def default_schemes(contracted: Iterable[int], everything: bool = False) -> list[str]:
    """The rows of the table that make sense on a model whose matmuls contract these sizes, and three that quantize the word embeddings too.

    `everything`: all rows that fit, near doubles and all.
    """
    contracted = set(contracted)
    rows = [name for name in schemes if fits(schemes[name], contracted) and (everything or makes_sense(schemes[name]))]
    return rows + [name + TABLE for name in WITH_TABLE]


def read_sentences(path: str | Path | None = None) -> list[str]:
    """One sentence a line; empty lines and lines that begin with `#` are skipped. None: the sentences that come with qfunc."""
    source = Path(path) if path else resources.files("qfunc").joinpath("data/sentences.txt")
    lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if len(found) < 4:
        raise ValueError(f"{source}: expected at least 4 sentences, found {len(found)}")
    return found


def measure(
    encoder, names: Sequence[str] | None = None, sentences: Sequence[str] | None = None, *,
    batches: Sequence[int] = (1, 16), rounds: int = 15, progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Demo:
    """Run the demonstration.

    Arguments:
        encoder: `qfunc.interop.encoder.Encoder`.
        names: schemes, by default those that make sense, ["all"] for all that fit; `<name>+table` quantizes the word embeddings as well.
        sentences: by default those of `read_sentences()`; every eighth calibrates, the others are measured.
        batches: batch sizes to time; the embeddings are computed in the largest, and those runs are what is timed.
        rounds: timings of each scheme at the other sizes, interleaved with all others as the runs of the largest are; the median counts.
        progress: wraps an iterable with a description, such as `tqdm`.
    Raises: ValueError for an unknown scheme; a scheme that refuses the model is kept in `refused` with the reason.
    """
    started = time.perf_counter()
    wrap = progress or (lambda items, what: items)
    kept, calibration = _split(list(sentences if sentences is not None else read_sentences()))
    weights = {path: w for path, w in _leaves(encoder.params) if path.endswith("/kernel")}
    if not names or list(names) == ["all"]:
        names = default_schemes((w.shape[-2] for w in weights.values()), everything=bool(names))
    for name in names:
        scheme(name.removesuffix(TABLE))
    width = -(-max(map(len, (e.ids for e in encoder.tokenizer.encode_batch(kept + calibration)))) // 8) * 8
    data = _batched(encoder, kept, max(batches), width)
    inputs = capture(encoder, calibration)
    made = _parallel(lambda name: _quantized(encoder.params, name, inputs), names, "quantize", wrap)
    models = {name: packed for name, packed in made.items() if not isinstance(packed, ValueError)}
    refused = {name: _short(error) for name, error in made.items() if isinstance(error, ValueError)}
    everyone = {FLOAT: encoder.params, **models}
    runs = _compiled(encoder, everyone, data[0], batches, wrap)
    embeddings, milliseconds = _run(runs, everyone, data, batches, rounds, wrap)
    zero = Result(FLOAT, None, 32.0, _nbytes(encoder.params), np.ones(len(kept)), 1.0, milliseconds[FLOAT])
    rows = [_row(name, models[name], embeddings[name][:len(kept)], embeddings[FLOAT][:len(kept)], milliseconds[name]) for name in models]
    plain = dict(_leaves(encoder.params))

    def layers(name):
        packed = dict(_leaves(models[name]))
        return {path: float(_output_error(x[:LAYER_TOKENS], plain[path], packed[path])) for path, x in inputs.items()}

    errors = _parallel(layers, models, "layers", wrap)
    for row in rows:
        row.layers = errors[row.name]
    return Demo(encoder.name, sum(a.size for a in jax.tree.leaves(encoder.params)), sum(w.size for w in weights.values()), len(kept), width,
                tuple(batches), _machine(), zero, rows, refused, time.perf_counter() - started)


class _Taps(Collector):
    """A walker that keeps the input of each matmul, as rows [tokens, in]."""

    def __init__(self):
        super().__init__()
        self.inputs: dict[str, jax.Array] = {}

    def contract(self, eqn, values):
        left, right = values[:2]
        if isinstance(right, Tracked) and not isinstance(left, Tracked):
            self.inputs[right.leaf.path] = left.reshape(-1, left.shape[-1])
        return super().contract(eqn, values)


def capture(encoder, sentences: Sequence[str]) -> dict[str, jax.Array]:
    """The input of every matmul of the encoder by path, [tokens, in], over the real tokens of some sentences."""
    ids, mask = encoder.tokenize(sentences)
    taps = _Taps()
    arrays, static = split((encoder.params, (jnp.asarray(ids), jnp.asarray(mask))))
    taps.trace(encoder, static, arrays)
    real = mask.reshape(-1) == 1
    return {path: x[real] for path, x in taps.inputs.items() if path.endswith("/kernel")}


def _split(sentences: list[str]) -> tuple[list[str], list[str]]:
    if len(sentences) < CALIBRATION_SHARE:
        return sentences, sentences
    return [s for i, s in enumerate(sentences) if (i + 1) % CALIBRATION_SHARE], sentences[CALIBRATION_SHARE - 1::CALIBRATION_SHARE]


def _short(error: ValueError) -> str:
    """The first leaf that an error names, and how many more there are."""
    first, *rest = str(error).splitlines()
    return f"{rest[0]} (and {len(rest) - 1} more)" if len(rest) > 1 else first


def _parallel(function: Callable, items: Iterable, what: str, wrap) -> dict:
    """The function of every item, two at a time: the time goes into XLA's compiler, which works outside of Python's lock."""
    items = list(items)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(function, item) for item in items]
        return {item: future.result() for item, future in zip(items, wrap(futures, what), strict=True)}


def _quantized(params, name: str, inputs: dict[str, Any]):
    """The parameters under a scheme, or the ValueError with which it refuses the model."""
    base = name.removesuffix(TABLE)
    static = scheme(base).activation is not None and scheme(base).activation.mode == "static"
    try:
        packed = quantize(params, base, calibration=inputs if static else None, progress=False)
        if name == base:
            return packed
        # A packed table is stored as its lm_head: (hidden, vocab).
        table = quantize({"kernel": params["embeddings"]["word_embeddings"]["weight"].T}, base, progress=False)
    except ValueError as error:
        return error
    return {**packed, "embeddings": {**packed["embeddings"], "word_embeddings": table}}


def _batched(encoder, sentences, size: int, width: int) -> list[tuple[jax.Array, jax.Array]]:
    """Batches of `size` sentences, the last one filled up with the first sentences."""
    filled = sentences + [sentences[i % len(sentences)] for i in range(-len(sentences) % size)]
    return [tuple(map(jnp.asarray, encoder.tokenize(filled[i:i + size], width))) for i in range(0, len(filled), size)]


def _compiled(encoder, models: dict[str, Any], batch, batches, wrap) -> dict[str, dict[int, Callable]]:
    """Executables by scheme and batch size."""
    def compile_one(job):
        name, size = job
        ids, mask = (a[:size] for a in batch)
        return jax.jit(encoder.__call__).lower(models[name], ids, mask).compile()

    made = _parallel(compile_one, [(name, size) for name in models for size in batches], "compile", wrap)
    return {name: {size: made[name, size] for size in batches} for name in models}


def _run(runs, models, data, batches, rounds: int, wrap) -> tuple[dict[str, np.ndarray], dict[str, dict[int, float]]]:
    """(embeddings of all sentences, median milliseconds by batch size), by scheme; schemes take turns, so that a slow moment hits all."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in models}
    taken: dict[tuple[str, int], list[float]] = {}
    largest = max(batches)
    small = [(data[0], size) for size in batches if size != largest for _ in range(rounds + 1)]
    for batch, size in wrap([(batch, largest) for batch in data] + small, "measure"):
        ids, mask = (a[:size] for a in batch)
        for name, params in models.items():
            start = time.perf_counter()
            result = runs[name][size](params, ids, mask).block_until_ready()
            taken.setdefault((name, size), []).append(1000 * (time.perf_counter() - start))
            if size == largest:
                found[name].append(np.asarray(result, np.float64))
    # The first call of an executable pays for its buffers.
    times = {name: {size: float(np.median(taken[name, size][1:] or taken[name, size])) for size in batches} for name in models}
    return {name: np.concatenate(parts) for name, parts in found.items()}, times


def _row(name: str, params, found: np.ndarray, reference: np.ndarray, milliseconds: dict[int, float]) -> Result:
    packed = [q for _, q in _leaves(params) if isinstance(q, QTensor)]
    bits = 8 * sum(q.nbytes for q in packed) / max(sum(q.size for q in packed), 1)
    cosines = (found * reference).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1))
    agreement = float(np.mean(nearest_neighbour(found) == nearest_neighbour(reference)))
    return Result(name, scheme(name.removesuffix(TABLE)), bits, _nbytes(params), np.nan_to_num(cosines, nan=-1.0), agreement, milliseconds)


def nearest_neighbour(embeddings: np.ndarray) -> np.ndarray:
    """The index of the most similar other row, for each row of normalised embeddings [n, d]."""
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(1)


@jax.jit
def _output_error(x, w, q: QTensor):
    """Relative error of the output of one matmul; compiled once for each shape and scheme."""
    y = matmul(x, w)
    return jnp.linalg.norm(matmul(x, q) - y) / jnp.linalg.norm(y)


def _leaves(params):
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))[0]
    return [(leaf_path(path), leaf) for path, leaf in flat]


def _nbytes(params) -> int:
    return sum(leaf.nbytes for _, leaf in _leaves(params))


def _machine() -> str:
    device = jax.devices()[0]
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    where = f"{name}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{where}; jax {jax.__version__}"
