"""Speed of the Triton kernels against their peers and against what physics allows: python kernels/bench/gpu.py [--dry-run]

    --shapes, --tokens, --schemes   what to measure; the default is the table of the design notes, dense and experts
    --budget 450                    seconds; what is not reached is listed as such, the most telling cells come first
    --out DIR                       where <device>-<time>.json and .md are written, by default kernels/bench/results
    --dry-run                       all steps on a machine without a GPU: small shapes, wall time, nothing kept unless --out is given

A kernel is held to the float64 product of its own codes first, on fresh random inputs, its output filled with NaN before and guarded
behind; then the median of its time is taken, CUDA events around graphs of launches on rotating copies of the weight. `kernel` is the
launch alone, on codes; `qfunc` is the jitted matmul, quantization of x included.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path

import gpu_peers
import gpu_timing
import jax
import jax.numpy as jnp
import numpy as np

import qfunc
from qfunc import _activation
from qfunc.kernels.triton import _image, _launch, _lowering, _model, _operands, _tables, _target, tune

SHAPES = {"8B qkv": "6144x4096", "8B o": "4096x4096", "8B gate_up": "24576x4096", "8B down": "4096x12288", "32B qkv": "10240x5120",
          "32B o": "5120x8192", "32B gate_up": "51200x5120", "32B down": "5120x25600",
          "30B-A3B gate_up": "128x1536x2048", "30B-A3B down": "128x2048x768"}
USUAL = ("8B gate_up", "8B down", "30B-A3B gate_up", "8B qkv", "8B o", "30B-A3B down")
TOKENS = (1, 16, 64, 256, 4096)
TOP_K = 8
SCHEMES = ("w4a16_g128", "w8a8_dynamic", "fp8_dynamic", "w4a8_dynamic", "mxfp4_a16")
EXPERT_SCHEMES = ("w4a16_g128", "mxfp4_a16")
DRY_SHAPES = {"dense": "256x512", "experts": "4x256x512"}
ROWS_CHECKED, GUARD = 64, 4096
TOLERANCE = 2.0**-7
"""Relative Frobenius error of a bfloat16 result: its own rounding is 1.7e-3, that of decoded bfloat16 operands comes on top."""


@dataclasses.dataclass
class Cell:
    """One measured number, or why there is none."""

    shape: str
    n: int
    k: int
    experts: int
    tokens: int
    scheme: str | None
    name: str
    us: float | None = None
    error: float | None = None
    floor_us: float | None = None
    note: str = ""


def operands_of(call, rng):
    """Random operands of a call, and the float64 result of a sample of its rows (dense: the first rows; experts: all)."""
    timer = tune.DeviceTimer(int(rng.integers(2**31)))
    values = [timer._random(call, i, s) for i, s in enumerate([*call.x, *call.leaves, *([call.sizes] if call.sizes is not None else [])])]
    x, w, sizes, _ = call.split(values)
    activation = np.asarray(x[0], np.float64) if len(x) == 1 else np.asarray(_dequantized(x, call), np.float64)
    count = min(activation.shape[0], ROWS_CHECKED)
    if sizes is None:
        return values, activation[:count] @ np.asarray(w.dequantize("float32"), np.float64)
    ends, matrix = np.cumsum(np.asarray(sizes)), None
    out, last = np.zeros((count, call.w.matrix_shape[-1])), -1
    for row in range(count):
        owner = int(np.searchsorted(ends, row, side="right"))
        if owner >= len(ends):
            continue
        if owner != last:
            matrix, last = np.asarray(jax.tree.map(lambda leaf, e=owner: leaf[e], w).dequantize("float32"), np.float64), owner
        out[row] = activation[row] @ matrix
    return values, out


def _dequantized(x, call):
    return _activation.dequantize_rows(_activation.QuantizedActivation(*x), call.spec)


def relative(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64)[:want.shape[0]] - want) / max(np.linalg.norm(want), 1e-30))


def as_torch(array, kind: str):
    """A JAX array as a torch tensor of the pointer type that the launch describes; fp8 goes as bytes."""
    import torch
    if array.dtype.itemsize == 1 and array.dtype not in (jnp.int8, jnp.uint8):
        array = jax.lax.bitcast_convert_type(array, jnp.uint8)
    tensor = torch.from_dlpack(array)
    return tensor.view({"*fp8e4nv": torch.float8_e4m3fn, "*fp8e5": torch.float8_e5m2}[kind]) if kind.startswith("*fp8") else tensor


def direct(launch, arrays, device: str = "cuda"):
    """(launch through Triton's own launcher on torch tensors, its output with a guard behind, all NaN, its size): no XLA in between."""
    import torch
    given = {name: as_torch(a, launch.types[name]) for (name, _), a in zip(launch.arrays, arrays, strict=True)}
    (name, struct), = launch.results
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[str(np.dtype(struct.dtype))]
    size = int(np.prod(struct.shape))
    given[name] = torch.full((size + GUARD,), float("nan"), dtype=dtype, device=device)
    function = _image.function(_lowering.program_of(launch))
    arguments = given | launch.scalars | launch.constexprs
    if list(function.arg_names) != list(launch.signature) or set(arguments) < set(function.arg_names):
        raise TypeError(f"{launch.kernel.name} takes {function.arg_names}, given are {sorted(arguments)}")
    kernel = function[launch.grid]
    return lambda: kernel(**{n: arguments[n] for n in function.arg_names}, **launch.options), given[name], size


def measure_own(cell: Cell, call, clock, rng, repeats: int, dry: bool) -> list[Cell]:
    """The kernel alone, and the jitted matmul, each correct before it is timed."""
    values, want = operands_of(call, rng)
    count = gpu_timing.copies(tune._weight_bytes(call)) if not dry else 2
    device = _model.DEVICES["NVIDIA H200"] if dry else device_of(call.target)
    floor_us = _model.floor(call, device) * 1e6 if device else None
    kernel, whole = (dataclasses.replace(cell, name=name, floor_us=floor_us) for name in ("kernel", "qfunc"))
    x, w, sizes, bias = call.split(values)
    launch = _lowering.planned(call)
    copies = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), w) for _ in range(count)]
    if dry:
        direct(launch, _operands.arrays(launch, x, w, sizes, bias), "cpu")
        kernel.note = f"dry run: not launched, grid {launch.grid}"
    else:
        try:
            made = [direct(launch, _operands.arrays(launch, x, c, sizes, bias)) for c in copies]
            made[0][0]()
            result, size = made[0][1], made[0][2]
            kernel.error = relative(_finished(launch, call, result[:size]), want)
            if not bool(result[size:].isnan().all()):
                kernel.note = "WROTE BEYOND ITS OUTPUT"
            elif kernel.error <= TOLERANCE:
                kernel.us = clock.torch([m[0] for m in made], repeats) * 1e6
                kernel.note = clock.note
            else:
                kernel.note = "WRONG"
        except Exception as error:
            kernel.note = _short(error)
    try:
        value = jnp.asarray(_dequantized(x, call), jnp.bfloat16) if len(x) > 1 else x[0]
        multiply = qfunc.matmul if sizes is None else lambda v, c: qfunc.grouped_matmul(v, c, sizes)
        poison = jnp.full((value.shape[0], call.w.matrix_shape[-1]), jnp.nan, jnp.bfloat16)      # memory that the result may be given
        del poison
        got = jax.jit(multiply)(value, w)
        whole.error = relative(got, _expected(value, w, sizes, want, call.spec))
        run = jax.jit(lambda v, cs: [multiply(v, c) for c in cs])
        if whole.error <= TOLERANCE:
            whole.us = clock.jax(lambda: run(value, copies), count, repeats) * 1e6
        else:
            whole.note = "WRONG"
    except Exception as error:
        whole.note = _short(error)
    return [kernel, whole]


def _expected(value, w, sizes, want, spec):
    """The float64 product of what the scheme makes of a float activation; of experts none is quantized here."""
    if sizes is not None:
        return want
    if spec is not None:
        with qfunc.use("reference"):
            value = _activation.dequantize_rows(qfunc.quantize_activation(value, spec), spec)
    return np.asarray(value[:want.shape[0]], np.float64) @ np.asarray(w.dequantize("float32"), np.float64)


def _finished(launch, call, flat):
    (_, struct), = launch.results
    return np.asarray(_operands.finish(launch, call, jnp.asarray(flat.float().cpu().numpy()).reshape(struct.shape)))


def _short(error) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def measure_peer(cell: Cell, peer, clock, problem, repeats: int) -> Cell:
    """One peer, or the reason why it has no number."""
    if not gpu_peers.installed(peer.package):
        return dataclasses.replace(cell, note=f"{peer.package} is not installed")
    try:
        if peer.jax:
            one, sets = peer.make(problem)
            run = jax.jit(lambda sets: [one(*s) for s in sets])
            seconds = clock.jax(lambda: run(sets), len(sets), repeats)
        else:
            seconds = clock.torch(peer.make(problem), repeats)
        return dataclasses.replace(cell, us=seconds * 1e6, note="" if peer.jax else clock.note)
    except Exception as error:                                # an operator that is absent or refuses the shape is reported, not hidden
        return dataclasses.replace(cell, note=_short(error))


def device_of(target: str):
    """The figures of the device that is here, or of its generation."""
    name = _tables.device_name(target)
    return _model.DEVICES.get(name) or next((d for d in _model.DEVICES.values() if d.target == target), None)


def _compile(job):
    program, target = job
    try:
        _image.compiled(program, target)
    except Exception as error:
        return _short(error)
    return None


def precompile(calls, workers: int = 12) -> list[str]:
    """Compile what the calls launch, in parallel, into the cache on disk; returns what failed."""
    jobs = list(dict.fromkeys((_lowering.program_of(_lowering.planned(call)), call.target) for call in calls))
    import multiprocessing
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [f"{job[0].name}: {found}" for job, found in zip(jobs, pool.map(_compile, jobs), strict=True) if found]


def markdown(cells: list[Cell], head: dict) -> str:
    """The table: microseconds, and in brackets the times faster than bfloat16 and the fraction of the bound."""
    lines = [f"# {head['device']}, {head['time']}", "", ", ".join(f"{k} {v}" for k, v in head.items() if k not in ("device", "time")), "",
             "Microseconds (x times the bf16 of the same run; percent of the bound of bytes and operations).", ""]
    tokens = sorted({c.tokens for c in cells})
    for shape in dict.fromkeys(c.shape for c in cells):
        own = [c for c in cells if c.shape == shape]
        base = {c.tokens: c.us for c in own if c.name in gpu_peers.DENOMINATOR.values() and c.us}
        lines += [f"## {shape} ({own[0].n} x {own[0].k}{f', {own[0].experts} experts' if own[0].experts else ''})", "",
                  "| | " + " | ".join(f"M = {t}" for t in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
        for label in dict.fromkeys((c.scheme or "", c.name) for c in own):
            row = {c.tokens: c for c in own if (c.scheme or "", c.name) == label}
            lines.append(f"| {' '.join(label).strip()} | " + " | ".join(_entry(row.get(t), base.get(t)) for t in tokens) + " |")
        for c in own:
            if c.note:
                lines.append(f"\n{c.scheme or ''} {c.name}, M = {c.tokens}: {c.note}".replace("|", "/"))
        lines.append("")
    return "\n".join(lines) + "\n"


def _entry(cell: Cell | None, base: float | None) -> str:
    if cell is None or cell.us is None:
        return "-"
    more = [f"{base / cell.us:.2f}x"] if base else []
    more += [f"{cell.floor_us / cell.us:.0%}"] if cell.floor_us else []
    return f"{cell.us:.1f}" + (f" ({', '.join(more)})" if more else "")


def main(arguments=None) -> int:
    """The command line; returns the exit status: 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--budget", type=float, default=450.0)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    start, rng, dry = time.monotonic(), np.random.default_rng(), given.dry_run
    target = "sm_90" if dry else _target.target_of("cuda") or _target.target_of("rocm")
    if target is None:
        print("no GPU is here; --dry-run goes through all steps without one", file=sys.stderr)
        return 1
    names = given.shapes.split(",") if given.shapes else [] if dry else USUAL
    shapes = {name: SHAPES.get(name, name) for name in names} or DRY_SHAPES
    tokens = [int(t) for t in given.tokens.split(",")]
    clock, where = (gpu_timing.Dry(), "cpu") if dry else (gpu_timing.Events(), "cuda")
    plan = [(name, shape, count) for name, shape in shapes.items() for count in (tokens[:2] if dry else tokens)]

    def call_of(scheme, shape, count):
        return tune.call_of(scheme, shape, count * TOP_K if shape.count("x") == 2 else count, target)

    def schemes_of(shape):
        return [s for s in given.schemes.split(",") if shape.count("x") == 1 or s in EXPERT_SCHEMES]

    def calls_of(shape, count):
        """(scheme, call or None, why there is none) of the schemes of a shape."""
        for scheme in schemes_of(shape):
            try:
                call = call_of(scheme, shape, count)
            except ValueError as error:                         # groups that do not divide the contracted size
                yield scheme, None, _short(error)
                continue
            yield scheme, call, _launch.refusal(call, _launch.Target.parse(target))

    faults = [] if dry else precompile([call for _, shape, count in plan for _, call, why in calls_of(shape, count) if why is None])
    cells: list[Cell] = []
    for name, shape, count in plan:
        *experts, n, k = (int(part) for part in shape.split("x"))
        many = experts[0] if experts else 0
        empty = Cell(name, n, k, many, count, None, "")
        if time.monotonic() - start > given.budget:
            cells.append(dataclasses.replace(empty, name="all", note="not reached within the budget"))
            continue
        rows = count * TOP_K if many else count
        problem = gpu_peers.Problem(rows, n, k, many, 2 if dry else gpu_timing.copies(2 * n * k * max(many, 1)), where)
        for label, peer in gpu_peers.PEERS.items():
            if peer.grouped == bool(many) and (not peer.kind or set(peer.kind) & set(given.schemes.split(","))):
                cells.append(measure_peer(dataclasses.replace(empty, name=label), peer, clock, problem, given.repeats))
        for scheme, call, reason in calls_of(shape, count):
            if reason is not None:
                cells.append(dataclasses.replace(empty, scheme=scheme, name="kernel", note=reason))
                continue
            cells += measure_own(dataclasses.replace(empty, scheme=scheme), call, clock, rng, given.repeats, dry)
            print(*(f"{c.shape} M={c.tokens} {c.scheme} {c.name}: {c.us and round(c.us, 1)} us, error {c.error} {c.note}"
                    for c in cells[-2:]), sep="\n", flush=True)
    device = "dry run" if dry else _tables.device_name(target) or target
    head = {"device": device, "time": datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ"), "clock": clock.name,
            "jax": jax.__version__, "triton": _image.triton_version(), "seconds": round(time.monotonic() - start),
            "sources": _image.fingerprint("qfunc.kernels.triton._dense")[:12], "failed to compile": faults}
    folder = given.out or (None if dry else Path(__file__).parent / "results")
    if folder is not None:
        stem = folder / f"{device.lower().replace(' ', '_')}-{head['time']}"
        _image.write(stem.with_suffix(".json"), json.dumps({**head, "cells": [dataclasses.asdict(c) for c in cells]}, indent=1).encode())
        _image.write(stem.with_suffix(".md"), markdown(cells, head).encode())
        print(stem.with_suffix(".md"))
    wrong = [c for c in cells if c.note.startswith("WR")]
    print(f"{len(cells)} cells, {len(wrong)} wrong, {sum(c.us is None for c in cells)} without a number, {head['seconds']} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
