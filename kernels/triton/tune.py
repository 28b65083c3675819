"""Measure the kernels on the GPU that is here and write what is fastest: python -m qfunc.kernels.triton.tune

    --schemes w4a16_g128,w8a8_dynamic   formats to tune, by schemes that have them
    --shapes 6144x4096,4096x12288       output by contracted size; ExNxK for experts
    --tokens 1,16,64,256                numbers of tokens (rows of all experts together)
    --budget 300                        seconds for all of it; what is not reached keeps the rows that there are
    --out DIR                           folder of the table, by default the user's (`_tables.user_dir`)
    --seed "NVIDIA H200"                write a table from the physical model instead, for a device that need not be here
    --ship sm_90 --out DIR              compile what the tables of these targets ask for, as images to install with the package
    --dry-run                           with a made-up timer instead of a GPU

The search: configs that are legal and fit, those that the model thinks hopeless left out, all timed briefly, the best quarter for long.
Every candidate's result is compared with the reference before its time counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reference
from .._dispatch import Call
from . import _fit, _image, _launch, _lowering, _model, _tables, _target
from ._launch import Config, Target
from ._plan_matmul import arithmetic, coded
from ._tables import Row, Table

SCHEMES = ("w4a16_g128", "w4a16_g32", "w4a8_dynamic", "w4a8_dynamic_g128", "w8a16", "w8a8_dynamic", "w8a8_block", "fp8_dynamic",
           "fp8_block", "fp8_w8a16", "mxfp4_a16", "nvfp4_a16", "nf4")
SHAPES = ("6144x4096", "4096x4096", "24576x4096", "4096x12288", "51200x5120")
EXPERTS = ("128x1536x2048", "128x2048x768")
TOKENS = (1, 16, 64, 256, 1024, 4096)
SPACE = {"block_m": (16, 32, 64, 128, 256), "block_n": (32, 64, 128, 256), "block_k": (64, 128), "split_k": (1, 2, 4, 8, 16),
         "num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "swapped": (True, False)}
HOPELESS = 3.0
"""Configs that the model puts this many times behind its best are not measured."""
TOLERANCE = 0.02
Timer = Callable[[Call, Config, int], float]
"""(call, config, repeats) -> seconds of one launch; raises where the config does not run or gives a wrong result."""


def call_of(scheme: str, shape: str, tokens: int, target: str, dtype=jnp.bfloat16) -> Call:
    """The matmul of a scheme, NxK or ExNxK and a number of tokens, its activation quantized already."""
    import qfunc

    from .._grouped import grouped_matmul
    from .._matmul import describe, matmul
    *experts, rows, columns = (int(part) for part in shape.split("x"))
    w = jax.ShapeDtypeStruct((*experts, columns, rows), jnp.float32)
    weight = qfunc.scheme(scheme).replace(activation=None)
    q = jax.eval_shape(lambda w: qfunc.quantize({"kernel": w}, weight)["kernel"], w).replace(scheme=qfunc.scheme(scheme))
    x = jax.ShapeDtypeStruct((tokens, columns), dtype)
    sizes = [jax.ShapeDtypeStruct((experts[0],), jnp.int32)] if experts else []
    jaxpr = jax.make_jaxpr(grouped_matmul if experts else matmul)(x, q, *sizes)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name in _lowering.MATMULS]
    call = describe([jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars], equation.params)
    return dataclasses.replace(coded(call), target=target)


def candidates(call: Call, device: _model.Device, limit: int = 48) -> list[Config]:
    """Configs worth measuring, the most promising first; the formula's own is always among them."""
    target = Target.parse(device.target)
    tokens = _tables.shape_of(call)[0]
    own = _launch.adapt(call, target, _launch.default_config(call, target))
    found: dict[Config, float] = {}
    for values in itertools.product(*SPACE.values()):
        config = Config(**dict(zip(SPACE, values, strict=True)))
        if not _sensible(call, config, target, tokens) or (config := _launch.adapt(call, target, config)) in found:
            continue
        found[config] = _model.predict(call, config, _launch.describe(call, target, config), device)
    found.setdefault(own, _model.predict(call, own, _launch.describe(call, target, own), device))
    best = min(found.values())
    hopeful = sorted((seconds, dataclasses.astuple(c), c) for c, seconds in found.items() if seconds <= HOPELESS * best or c == own)
    kept = [config for *_, config in hopeful[:limit]]
    return kept if own in kept else [*kept[:-1], own]


def _sensible(call: Call, config: Config, target: Target, tokens: int) -> bool:
    """Tiles no larger than the product asks for, accumulators that fit the registers, operands that fit shared memory."""
    eight = call.packed.scheme.weight.code in ("int8", "uint8", "fp8_e4m3", "fp8_e5m2")
    accumulator = config.block_m * config.block_n / (32 * config.num_warps)
    width = 1 if arithmetic(call, target) in ("s8", "e4m3", "e5m2") else 2 if arithmetic(call, target) != "f32" else 4
    shared = config.num_stages * config.block_k * (config.block_m * width + config.block_n * (1 if eight else 0.5))
    return (config.block_m <= max(16, 2 * tokens) and accumulator <= 128 and shared <= target.shared_memory
            and (config.swapped or (eight and tokens >= 64)) and (not config.swapped or config.block_m <= 128)
            and (config.split_k == 1 or tokens <= 256))


def search(call: Call, configs: Sequence[Config], timer: Timer, deadline: float = float("inf"), now: Callable[[], float] = time.monotonic,
           report: Callable[[str], None] = lambda line: None) -> tuple[Config, float] | None:
    """The fastest config and its seconds, or None where none ran before the deadline.

    All are timed briefly, the best quarter (at least three) for long; of those within 2% of each other the model's favourite wins.
    """
    brief: list[tuple[float, int]] = []
    for index, config in enumerate(configs):
        if now() > deadline and brief:
            break
        try:
            brief.append((timer(call, config, 5), index))
        except Exception as error:                              # a config that does not compile or is wrong is no candidate
            report(f"{config}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    final = []
    for seconds, index in sorted(brief)[:max(3, len(brief) // 4)]:
        final.append((timer(call, configs[index], 50) if now() <= deadline else seconds, index))
    if not final:
        return None
    fastest = min(final)[0]
    index = min(i for seconds, i in final if seconds <= fastest * (1 + TOLERANCE))
    return configs[index], next(seconds for seconds, i in final if i == index)


def merged(table: Table, rows: Iterable[tuple[str, Row]]) -> Table:
    """A table with these rows in the place of those of the same format and shape; in order of shape, then tokens."""
    formats = {name: {(r.n, r.k, r.m): r for r in own} for name, own in table.formats.items()}
    for name, row in rows:
        formats.setdefault(name, {})[row.n, row.k, row.m] = row
    return dataclasses.replace(table, formats={name: tuple(own[key] for key in sorted(own)) for name, own in sorted(formats.items())})


def file_of(folder: Path, device: str) -> Path:
    """Where a device's table lies."""
    return folder / (device.lower().replace(" ", "_").replace("/", "_") + ".json")


def write(table: Table, folder: Path) -> Path:
    """Write a table whole or not at all; it is used from then on."""
    path = file_of(folder, table.device)
    _image.write(path, table.dumps().encode())
    _tables.reload()
    return path


def _seed(call: Call, device: _model.Device) -> Config:
    """The model's favourite among the tiles of published tables, with the formula's warps and stages, which the model does not judge."""
    target, tokens = Target.parse(device.target), _tables.shape_of(call)[0]
    own = _launch.adapt(call, target, _launch.default_config(call, target))
    if not own.swapped:
        return own
    found = []
    for block_n, split in itertools.product((64, 128), SPACE["split_k"]):
        warps = 8 if own.block_m * block_n >= 64 * 128 else 4
        config = dataclasses.replace(own, block_n=block_n, split_k=split, num_warps=warps)
        if _sensible(call, config, target, tokens):
            config = _launch.adapt(call, target, config)
            found.append((_model.predict(call, config, _launch.describe(call, target, config), device), split, block_n, config))
    return min(found, key=lambda entry: entry[:3])[-1] if found else own


def seeded(device: _model.Device, triton: str, schemes=SCHEMES, shapes=(*SHAPES, *EXPERTS), tokens=TOKENS) -> Table:
    """A table from the physical model alone."""
    rows = []
    for scheme, shape, count in itertools.product(schemes, shapes, tokens):
        call = call_of(scheme, shape, count * (8 if shape.count("x") == 2 else 1), device.target)
        if _launch.refusal(call, Target.parse(device.target)) is not None:
            continue
        m, n, k = _tables.shape_of(call)
        rows.append((_tables.format_of(call), Row(m, n, k, _seed(call, device), None)))
    routes = {}
    for scheme in schemes:
        name = _tables.format_of(call_of(scheme, shapes[0], 1, device.target), group=False)
        if name.endswith(("/bfloat16", "/float16")):
            routes[name] = routes[name.replace("/bfloat16", "/float16")] = _model.unpack_from(device)
        elif device.target.startswith("sm_") and name in ("dense/int8/int8", "dense/fp8_e4m3/fp8_e4m3"):
            routes[name] = 4096
    text = ("seeded from the physical model (kernels/triton/_model.py: bytes, operations, programs; datasheets, derated) within tiles that "
            "published tables use; nothing in it was measured")
    empty = Table(device.name, device.target, triton, None, text, {}, routes)
    return merged(empty, rows)


class DeviceTimer:
    """Times launches on the GPU that is here: many of them in one executable, on buffers that rotate through more than its caches hold."""

    def __init__(self, seed: int = 0, bytes_in_turn: int = 200 << 20):
        self.rng, self.bytes, self.last = np.random.default_rng(seed), bytes_in_turn, (None, None, None)

    def __call__(self, call: Call, config: Config, repeats: int) -> float:
        operands, want = self._operands(call)
        count = max(2, min(16, -(-self.bytes // _weight_bytes(call))))
        weights = range(len(call.x), len(call.x) + len(call.leaves))
        one = jax.jit(lambda *o: _lowering.matmul(call, *o, config=config))
        got = np.asarray(one(*operands), np.float64)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
        if not error < 0.02:
            raise ArithmeticError(f"relative error {error:.3g} against the reference")
        stacked = [[jnp.array(o, copy=True) if j in weights else o for j, o in enumerate(operands)] for _ in range(count)]
        run = jax.jit(lambda sets: [_lowering.matmul(call, *o, config=config) for o in sets])
        jax.block_until_ready(run(stacked))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(stacked))
            times.append((time.perf_counter() - start) / count)
        return statistics.median(times)

    def _operands(self, call: Call):
        if self.last[0] != call:
            shapes = [*call.x, *call.leaves, *(part for part in (call.sizes, call.bias) if part is not None)]
            operands = [self._random(call, i, s) for i, s in enumerate(shapes)]
            reference = _reference.grouped_matmul if call.sizes is not None else _reference.matmul
            self.last = call, operands, np.asarray(jax.jit(lambda *o: reference(call, *o))(*operands), np.float64)
        return self.last[1:]

    def _random(self, call: Call, index: int, shape):
        dtype, size = np.dtype(shape.dtype), shape.shape
        names = (*(f"x{i}" for i in range(len(call.x))), *call.packed.fields)
        name = names[index] if index < len(names) else "sizes" if call.sizes is not None and index == len(names) else "bias"
        if name == "sizes":
            return jnp.asarray(np.bincount(self.rng.integers(0, size[0], call.x[0].shape[0]), minlength=size[0]), jnp.int32)
        if name == "scale" and dtype == np.uint8:
            return jnp.asarray(self.rng.integers(118, 124, size), dtype)
        if dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2) and name == "codes":
            # Bytes that are numbers: a hundred million normal ones take seconds to draw and to round.
            raw = self.rng.integers(0, 256, size, np.uint8)
            return jnp.asarray(np.where((raw & 0x7F) > 0x77, raw & 0x87, raw).view(dtype))
        if dtype in (np.uint8, np.int8):
            low, high = (-127, 128) if dtype == np.int8 else (0, 16 if name == "zero" else 256)
            return jnp.asarray(self.rng.integers(low, high, size), dtype)
        positive = name in ("scale", "scale2", "x1")
        values = self.rng.uniform(0.01, 0.03, size) if positive else self.rng.standard_normal(size)
        return jnp.asarray(values.astype(np.float32)).astype(dtype)


def _weight_bytes(call: Call) -> int:
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in call.leaves)


def fake_timer(device: _model.Device) -> Timer:
    """The model in the place of a GPU, with a scatter that depends on the config alone."""
    def timer(call: Call, config: Config, repeats: int) -> float:
        seconds = _model.predict(call, config, _launch.describe(call, Target.parse(device.target), config), device)
        return seconds * (1 + 0.1 * (hash(dataclasses.astuple(config)) % 97) / 97)
    return timer


def tune(table: Table, device: _model.Device, timer: Timer, schemes, shapes, tokens, budget: float, report=print) -> Table:
    """A table with the measured rows of every scheme, shape and number of tokens that the budget (seconds) reaches."""
    rows, start = [], time.monotonic()
    work = list(itertools.product(schemes, shapes, tokens))
    for done, (scheme, shape, count) in enumerate(work):
        left = budget - (time.monotonic() - start)
        if left <= 0:
            report(f"the budget of {budget:.0f} s is spent: {len(work) - done} of {len(work)} are as they were")
            break
        call = call_of(scheme, shape, count, device.target)
        if (reason := _launch.refusal(call, Target.parse(device.target))) is not None:
            report(f"{scheme} {shape} {count}: {reason}")
            continue
        found = search(call, candidates(call, device), timer, time.monotonic() + left / (len(work) - done), report=report)
        if found is None:
            report(f"{scheme} {shape} {count}: nothing ran")
            continue
        config, seconds = found
        m, n, k = _tables.shape_of(call)
        rows.append((_tables.format_of(call), Row(m, n, k, config, round(seconds * 1e6, 2))))
        report(f"{scheme} {shape} {count}: {seconds * 1e6:.1f} us, {_model.floor(call, device) / seconds:.0%} of the bound, {config}")
    text = f"rows with a time were measured by qfunc.kernels.triton.tune on {device.name}; the others: "
    return merged(dataclasses.replace(table, sources=_image.fingerprint("qfunc.kernels.triton._dense"),
                                      triton=_image.triton_version() or "none",
                                      provenance=text + table.provenance.rpartition("; the others: ")[2]), rows)


def ship(targets: Sequence[str], folder: Path, report=print) -> int:
    """Compile every launch of the tables of some targets into a folder of images; returns how many there are."""
    written = 0
    for target in targets:
        for scheme, shape, count in itertools.product(SCHEMES, (*SHAPES, *EXPERTS), TOKENS):
            call = call_of(scheme, shape, count, target)
            if _launch.refusal(call, Target.parse(target)) is not None:
                continue
            program = _lowering.program_of(_fit.fitted(call))
            path = folder / f"{program.key(target)}.gz"
            if not path.exists():
                _image.write(path, _image.compiled(program, target).to_bytes())
                written += 1
        report(f"{target}: {written} images in {folder}")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qfunc.kernels.triton.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--shapes", default=",".join((*SHAPES, *EXPERTS)))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", metavar="DEVICE")
    parser.add_argument("--ship", metavar="TARGETS")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    schemes, shapes, tokens = given.schemes.split(","), given.shapes.split(","), [int(t) for t in given.tokens.split(",")]
    if given.ship:
        ship(given.ship.split(","), given.out or _image.SHIPPED)
        return 0
    if given.seed:
        if given.seed not in _model.DEVICES:
            parser.error(f"no figures of {given.seed!r}; there are {', '.join(_model.DEVICES)}")
        table = seeded(_model.DEVICES[given.seed], _image.triton_version() or "none", schemes, shapes, tokens)
        print(write(table, given.out or _tables.PACKAGE))
        return 0
    target = "sm_90" if given.dry_run else _target.target_of("cuda") or _target.target_of("rocm")
    name = "NVIDIA H200" if given.dry_run else target and _tables.device_name(target)
    if name is None:
        print("no GPU is here; --dry-run goes through all steps without one", file=sys.stderr)
        return 1
    same = [d for d in _model.DEVICES.values() if d.target == target]
    device = _model.DEVICES.get(name) or (dataclasses.replace(same[0], name=name) if same else None)
    if device is None:
        print(f"no figures of a device of {target}: add it to qfunc.kernels.triton._model.DEVICES", file=sys.stderr)
        return 1
    found = [t for t in _tables.tables(target, name, _tables.user_dir()) if t.device == name]
    table = found[0] if found else Table(name, target, "none", None, "none", {}, {})
    timer = fake_timer(device) if given.dry_run else DeviceTimer()
    tuned = tune(table, device, timer, schemes, shapes, tokens, given.budget)
    folder = given.out or _tables.user_dir()
    if given.dry_run and given.out is None:
        print("dry run: nothing is written")
    else:
        print(write(tuned, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
