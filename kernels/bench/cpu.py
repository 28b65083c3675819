"""Speed of the native CPU kernels against their peers: python kernels/bench/cpu.py [--rows 1,16] [--shapes 4096x4096] [--schemes a,b] ...

For every shape (in x out) and number of rows the candidates take turns, so that a crowded machine slows all of them alike; what is
printed is the median over the turns of (time of XLA float32) / (time of the candidate), of (time of the best peer of the same scheme) /
(time of ours), and of (floor) / (time of ours). The floor is the longer of packed bytes over the measured read bandwidth and of
multiply-adds over the measured peak of the instruction that the scheme needs. `--layers 4` sends x through four weights in one call, as a
model does: of a single product of a few rows, a third is the call. Every candidate finds the caches full of other candidates'
weights, as the layers of a model do, and the other threads asleep. Peers that are not installed are named and left out:
torch, torchao, bitsandbytes, onnxruntime + onnx, qwix. llama.cpp is compared in its own process, by its own `llama-bench`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import random
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import qfunc
from qfunc.kernels.cpu import _library

SCHEMES = ("w8a8_dynamic", "w8a16", "w4a16_g128", "w4a8_dynamic", "mxfp4_a16", "nvfp4_a16", "nf4", "fp8_dynamic", "mxfp8",
           "mxfp4", "nvfp4")
KINDS = ("float32", "int8", "bf16")
"""What is multiplied, as the library numbers it."""
SHAPES = {"4096x4096": (4096, 4096), "qwen3-8b qkv": (4096, 6144), "qwen3-8b o": (4096, 4096), "qwen3-8b gate_up": (4096, 24576),
          "qwen3-8b down": (12288, 4096), "qwen3-30b-a3b expert": (2048, 1536)}
ROWS = (1, 4, 16, 64, 256, 1024)
PAUSE = 0.02
"""Seconds before every call: threads of torch and onnxruntime go on spinning for up to ten milliseconds, on somebody else's core. The
caller waits without sleeping, since a processor that slept is slow for the next half millisecond."""
RIVALS = {
    "w8a8_dynamic": ("torch int_mm", "torchao w8a8", "ort int8", "qwix w8a8"),
    "w8a16": ("torchao w8a16", "ort nbits8 f32"),
    "w4a16_g128": ("ort nbits4 f32", "qwix w4a16"),
    "w4a8_dynamic": ("ort nbits4 int8",),
    "nf4": ("bnb nf4",),
}
"""Scheme to the peers that compute the same thing, or something close: integer dots of 4-bit weights have groups elsewhere."""


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def chained(f):
    """x through one weight after the other, in one program."""
    def run(x, weights):
        for w in weights:
            x = f(x, w)
        return x
    return jax.jit(run)


def ours(ws, schemes):
    """XLA's float32 matmul and every scheme: name to a function that binds x."""
    weights = {"XLA f32": (chained(jnp.matmul), ws)}
    for name in schemes:
        weights[name] = (chained(qfunc.matmul), [qfunc.quantize({"kernel": w}, name)["kernel"] for w in ws])

    def bound(f, q):
        return lambda x: lambda: f(x, q).block_until_ready()

    return {name: bound(f, q) for name, (f, q) in weights.items()}, {name: sum(q.nbytes for q in qs) for name, (_, qs) in weights.items()}


def torch_peers(w):
    import torch
    tw = torch.from_numpy(np.array(w))
    half, codes = tw.to(torch.bfloat16), torch.randint(-127, 127, tw.shape, dtype=torch.int8)

    def floats(x):
        tx = torch.from_numpy(np.array(x))
        return lambda: tx @ tw

    def halves(x):
        tx = torch.from_numpy(np.array(x)).to(torch.bfloat16)
        return lambda: tx @ half

    def integers(x):
        rows = torch.randint(-127, 127, x.shape, dtype=torch.int8)
        return lambda: torch._int_mm(rows, codes)

    return {"torch f32": floats, "torch bf16": halves, "torch int_mm": integers}


def torchao_peers(w):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    found = {}
    for name, config in (("torchao w8a8", Int8DynamicActivationInt8WeightConfig()), ("torchao w8a16", Int8WeightOnlyConfig())):
        layer = torch.nn.Linear(*w.shape, bias=False)
        quantize_(layer, config)

        def bind(x, layer=layer):
            tx = torch.from_numpy(np.array(x))
            return lambda: torch.no_grad()(layer)(tx)

        found[name] = bind
    return found


def bnb_peers(w):
    import bitsandbytes as bnb
    import torch
    layer = bnb.nn.Linear4bit(*w.shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu")

    def bind(x):
        tx = torch.from_numpy(np.array(x))
        return lambda: torch.no_grad()(layer)(tx)

    return {"bnb nf4": bind}


def ort_peers(ws):
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper
    columns, outs = ws[0].shape
    rng = np.random.default_rng(0)

    def session(layer):
        """`layer(x, y, i)` gives the nodes and constants that lead from x to y."""
        nodes, constants = [], {}
        for i in range(len(ws)):
            more, values = layer(f"x{i}", f"x{i + 1}", str(i))
            nodes += more
            constants.update(values)
        graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [None, columns])],
                                  [helper.make_tensor_value_info(f"x{len(ws)}", TensorProto.FLOAT, [None, outs])],
                                  [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = os.cpu_count()
        options.add_session_config_entry("session.force_spinning_stop", "1")    # or its threads take a core from whoever comes next
        run = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def bind(x):
            feed = {"x0": np.asarray(x)}
            return lambda: run.run(None, feed)

        return bind

    scale = rng.random((outs * columns // 128,), np.float32) * 0.01
    found = {}
    for name, bits, level in (("ort nbits4 f32", 4, 1), ("ort nbits4 int8", 4, 4), ("ort nbits8 f32", 8, 1)):
        def few_bits(x, y, i, bits=bits, level=level):
            node = helper.make_node("MatMulNBits", [x, "b" + i, "s"], [y], domain="com.microsoft", K=columns, N=outs, bits=bits,
                                    block_size=128, accuracy_level=level)
            return [node], {"b" + i: rng.integers(0, 256, (outs, columns // 128, 16 * bits), np.uint8), "s": scale}

        found[name] = session(few_bits)

    def dynamic(x, y, i):
        nodes = [helper.make_node("DynamicQuantizeLinear", [x], ["q" + i, "sx" + i, "zx" + i]),
                 helper.make_node("MatMulIntegerToFloat", ["q" + i, "b" + i, "sx" + i, "sb", "zx" + i], [y], domain="com.microsoft")]
        return nodes, {"b" + i: rng.integers(-127, 127, (columns, outs), np.int8), "sb": np.full(outs, 0.01, np.float32)}

    found["ort int8"] = session(dynamic)
    return found


def qwix_peers(ws):
    import qwix
    dims = (((1,), (0,)), ((), ()))
    eight = [qwix.quantize(w, "int8", channelwise_axes=(1,)) for w in ws]
    four = [qwix.quantize(w, "int4", channelwise_axes=(1,), tiled_axes={0: 128}) for w in ws]
    w8a8 = chained(lambda x, w: qwix.dot_general(qwix.quantize(x, "int8", channelwise_axes=(0,)), w, dims))
    w4a16 = chained(lambda x, w: qwix.dot_general(x, w, dims))
    return {"qwix w8a8": lambda x: lambda: jax.block_until_ready(w8a8(x, eight)),
            "qwix w4a16": lambda x: lambda: jax.block_until_ready(w4a16(x, four))}


def each(make):
    """Peers that are called for one weight after the other."""
    def several(ws):
        made = [make(w) for w in ws]

        def bind_all(name):
            def bind(x):
                calls = [one[name](x) for one in made]
                return lambda: [call() for call in calls]
            return bind

        return {name: bind_all(name) for name in made[0]}
    return several


PEERS = (("torch", each(torch_peers)), ("torchao", each(torchao_peers)), ("bitsandbytes", each(bnb_peers)),
         ("onnxruntime", ort_peers), ("qwix", qwix_peers))


def peers(ws, missing: set):
    found = {}
    for package, make in PEERS:
        if not installed(package):
            missing.add(package)
            continue
        try:
            found.update(make(ws))
        except Exception as error:  # a peer that does not run here is reported, not hidden
            missing.add(f"{package} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]})")
    return found


def turns(functions, repeats: int, missing: set):
    """Seconds of every candidate in every turn, in another order each time: who follows a product that fills the caches finds the code
    of its own call gone, too, which costs some 0.2 ms."""
    order = random.Random(0)
    times: dict[str, list[float]] = {}
    slowest = 0.5                       # seconds: what is slower once is measured in the first turn alone
    for name, f in functions.items():
        try:
            f()
            times[name] = []
        except Exception as error:
            missing.add(f"{name} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]})")
    for _ in range(repeats):
        for name, own in order.sample(list(times.items()), len(times)):
            if own and own[0] >= slowest:
                continue
            _wait(PAUSE)
            own.append(_time(functions[name]))
    return {name: own if len(own) == repeats else own * repeats for name, own in times.items()}


def read_bandwidth(library) -> float:
    """Bytes per second that all cores together read of a buffer far beyond the caches, allocated as XLA allocates weights."""
    count, size = os.cpu_count(), 1 << 28
    library.qfunc_read.restype = ctypes.c_uint64
    library.qfunc_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    parts = [np.asarray(jnp.full(size, i, jnp.uint8)) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        best = min(_time(lambda: list(pool.map(lambda part: library.qfunc_read(part.ctypes.data, size // 8), parts))) for _ in range(16))
    return count * size / best


def peaks(library) -> dict[str, float]:
    """Multiply-adds per second of all cores by what is multiplied: the instruction that the kernels use, from registers."""
    library.qfunc_peak.restype = ctypes.c_double
    library.qfunc_peak.argtypes = (ctypes.c_int, ctypes.c_int64)
    count, found = os.cpu_count(), {}
    for number, kind in enumerate(KINDS):
        rates = []
        with ThreadPoolExecutor(count) as pool:
            for _ in range(12):
                start = time.perf_counter()
                done = sum(pool.map(lambda _: library.qfunc_peak(number, 2_000_000), range(count)))  # noqa: B023
                rates.append(done / (time.perf_counter() - start))
        found[kind] = max(rates)
    found["bf16"] = found["bf16"] or found["float32"]      # without its own instruction they are multiplied as float32
    return found


def _wait(seconds: float):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _time(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=1, help="weights that x passes through in one call, as in a model")
    parser.add_argument("--inline", action="store_true", help="JAX computes in the calling thread, as the peers do")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_cpu_enable_async_dispatch", not options.inline)
    isa, reason = _library.load()
    if isa is None:
        parser.error(reason)
    library = ctypes.CDLL(str(_library._find()))
    bandwidth, peak = read_bandwidth(library), peaks(library)
    print(f"{isa}, {os.cpu_count()} cores, {bandwidth / 1e9:.1f} GB/s read, peak of products "
          f"{', '.join(f'{rate / 1e9:.0f} ({kind})' for kind, rate in peak.items())} GMAC/s\n")
    missing: set[str] = set()
    for shape in options.shapes.split(","):
        columns, outs = SHAPES[shape]
        if options.layers > 1 and columns != outs:
            parser.error("only square matrices follow each other")
        rng = np.random.default_rng(0)
        ws = [jnp.asarray(rng.standard_normal((columns, outs), np.float32) / np.sqrt(columns)) for _ in range(options.layers)]
        mine, sizes = ours(ws, options.schemes.split(","))
        candidates = {**mine, **peers(ws, missing)}
        for rows in map(int, options.rows.split(",")):
            x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, columns), np.float32))
            times = turns({name: bind(x) for name, bind in candidates.items()}, options.repeats, missing)
            work = options.layers * rows * columns * outs
            floors = {name: max(size / bandwidth, work / peak[_kind(name)]) for name, size in sizes.items()}
            report(shape, rows, times, floors)
    if missing:
        print("\nnot measured:", "; ".join(sorted(missing)))


def _kind(name: str) -> str:
    """What a scheme multiplies, one of `KINDS`."""
    made = qfunc.scheme(name) if name in qfunc.schemes else None
    if made is None or made.activation is None:
        return "float32"
    codes = {made.weight.code, made.activation.code}
    return "int8" if codes <= {"fp4_e2m1"} or codes <= {"fp6_e2m3"} or all("int" in code for code in codes) else "bf16"


def report(shape: str, rows: int, times: dict[str, list[float]], floors: dict[str, float]):
    base = times["XLA f32"]
    print(f"{shape}, {rows} rows: XLA f32 {statistics.median(base) * 1e3:.2f} ms")
    for name, own in times.items():
        if name == "XLA f32":
            continue
        line = f"  {name:18s} {statistics.median(own) * 1e3:9.2f} ms  {_ratio(base, own):6.2f}x XLA f32"
        if name in floors:
            line += f"  {floors[name] / statistics.median(own):5.2f} of the floor's speed"
        rivals = [p for p in RIVALS.get(name, ()) if p in times]
        if rivals:
            best = min(rivals, key=lambda p: statistics.median(times[p]))
            line += f"  {_ratio(times[best], own):6.2f}x {best}"
        print(line, flush=True)


def _ratio(theirs, own) -> float:
    return statistics.median(b / t for b, t in zip(theirs, own, strict=True))


if __name__ == "__main__":
    main()
