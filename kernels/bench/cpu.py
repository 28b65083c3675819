"""Speed of the native CPU kernels against their peers: python kernels/bench/cpu.py [--rows 1,16] [--shapes 4096x4096] [--repeats 15].

For every shape (in x out) and number of rows the candidates take turns, so that a crowded machine slows all of them alike; what is
printed is the median over the turns of (time of XLA float32) / (time of the candidate), and of (time of the best peer of the same
scheme) / (time of ours). Peers that are not installed are named and left out: onnxruntime + onnx, torch, torchao, qwix, llama_cpp.
The bandwidth of one thread's copy is printed with it: packed bytes over it bound what any kernel can do for one row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import qfunc
from qfunc.kernels.cpu import _library

SCHEMES = ("w8a8_dynamic", "w8a16", "w4a16_g128", "w4a8_dynamic", "mxfp4_a16", "nvfp4_a16", "nf4")
SHAPES = {"4096x4096": (4096, 4096), "qwen3-8b qkv": (4096, 6144), "qwen3-8b o": (4096, 4096), "qwen3-8b gate_up": (4096, 24576),
          "qwen3-8b down": (12288, 4096), "qwen3-30b-a3b expert": (2048, 1536)}
ROWS = (1, 4, 16, 64, 256, 1024)
PEERS = {"torch f32": None, "torch bf16": None, "torch int_mm": "int8", "ort int8": "int8", "ort nbits4 f32": "int4",
         "ort nbits4 int8": "int4a8", "torchao w8a8": "int8", "qwix w8a8": "int8", "qwix w4a16": "int4"}
"""Peer to the kind of scheme that it is compared with; None: only against float32."""
KINDS = {"w8a8_dynamic": "int8", "w4a16_g128": "int4", "w4a8_dynamic": "int4a8"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def ours(w, x):
    """XLA's float32 matmul and every scheme, as functions without arguments."""
    jitted = {"XLA f32": (jax.jit(jnp.matmul), w)}
    for name in SCHEMES:
        jitted[name] = (jax.jit(qfunc.matmul), qfunc.quantize({"kernel": w}, name)["kernel"])
    return {name: (lambda f=f, q=q: f(x, q).block_until_ready()) for name, (f, q) in jitted.items()}


def torch_peers(w, x):
    import torch
    tw, tx = torch.from_numpy(np.array(w)), torch.from_numpy(np.array(x))
    half = tw.to(torch.bfloat16), tx.to(torch.bfloat16)
    codes, rows = torch.randint(-127, 127, tw.shape, dtype=torch.int8), torch.randint(-127, 127, tx.shape, dtype=torch.int8)
    found = {"torch f32": lambda: tx @ tw, "torch bf16": lambda: half[1] @ half[0], "torch int_mm": lambda: torch._int_mm(rows, codes)}
    if installed("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        layer = torch.nn.Linear(*w.shape, bias=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        found["torchao w8a8"] = lambda: layer(tx)
    return found


def ort_peers(w, x):
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper
    columns, outs = w.shape
    rng = np.random.default_rng(0)

    def session(nodes, constants):
        graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
                                  [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, outs])],
                                  [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = os.cpu_count()
        run = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"x": np.asarray(x)}
        return lambda: run.run(None, feed)

    packed = rng.integers(0, 256, (outs, columns // 128, 64), np.uint8)
    scale = rng.random((outs * columns // 128,), np.float32) * 0.01
    found = {}
    for name, level in (("ort nbits4 f32", 1), ("ort nbits4 int8", 4)):
        node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=columns, N=outs, bits=4, block_size=128,
                                accuracy_level=level)
        found[name] = session([node], {"b": packed, "s": scale})
    dynamic = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "sx", "zx"]),
               helper.make_node("MatMulIntegerToFloat", ["q", "b", "sx", "sb", "zx"], ["y"], domain="com.microsoft")]
    codes = rng.integers(-127, 127, (columns, outs), np.int8)
    found["ort int8"] = session(dynamic, {"b": codes, "sb": np.full(outs, 0.01, np.float32)})
    return found


def qwix_peers(w, x):
    import qwix
    dims = (((1,), (0,)), ((), ()))
    eight = qwix.quantize(w, "int8", channelwise_axes=(1,))
    four = qwix.quantize(w, "int4", channelwise_axes=(1,), tiled_axes={0: 128})

    @jax.jit
    def w8a8(x, w):
        return qwix.dot_general(qwix.quantize(x, "int8", channelwise_axes=(0,)), w, dims)

    w4a16 = jax.jit(lambda x, w: qwix.dot_general(x, w, dims))
    return {"qwix w8a8": lambda: jax.block_until_ready(w8a8(x, eight)), "qwix w4a16": lambda: jax.block_until_ready(w4a16(x, four))}


def candidates(w, x, missing: set):
    found = ours(w, x)
    for package, make in (("torch", torch_peers), ("onnxruntime", ort_peers), ("qwix", qwix_peers)):
        if not installed(package):
            missing.add(package)
            continue
        try:
            found.update(make(w, x))
        except Exception as error:  # a peer that does not run here is reported, not hidden
            missing.add(f"{package} ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    return found


def turns(functions, repeats: int):
    """Seconds of every candidate in every turn."""
    times = {name: [] for name in functions}
    broken = []
    for name, f in functions.items():
        try:
            f()
        except Exception as error:
            broken.append((name, str(error).splitlines()[0][:60]))
            print(f"  {name} does not run: {broken[-1][1]}")
    functions = {name: f for name, f in functions.items() if name not in dict(broken)}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: t for name, t in times.items() if t}


def copy_bandwidth() -> float:
    """Bytes read and written per second by one thread's copy."""
    big = np.ones(1 << 27, np.uint8)
    target = np.empty_like(big)
    best = min(_time(lambda: np.copyto(target, big)) for _ in range(5))
    return 2 * big.nbytes / best


def _time(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bandwidth = copy_bandwidth()
    print(f"{_library.isa()}, {os.cpu_count()} cores, copies {bandwidth / 1e9:.1f} GB/s (read and written, one thread)\n")
    missing: set[str] = set()
    for shape in options.shapes.split(","):
        columns, outs = SHAPES[shape]
        w = jnp.asarray(np.random.default_rng(0).standard_normal((columns, outs), np.float32) / np.sqrt(columns))
        for rows in map(int, options.rows.split(",")):
            x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, columns), np.float32))
            times = turns(candidates(w, x, missing), options.repeats)
            report(shape, rows, times)
    if missing:
        print("\nnot measured:", "; ".join(sorted(missing)))


def report(shape: str, rows: int, times: dict[str, list[float]]):
    base = times["XLA f32"]
    print(f"{shape}, {rows} rows: XLA f32 {statistics.median(base) * 1e3:.2f} ms")
    for name, own in times.items():
        if name == "XLA f32":
            continue
        ratio = statistics.median(b / t for b, t in zip(base, own, strict=True))
        line = f"  {name:18s} {statistics.median(own) * 1e3:9.2f} ms  {ratio:6.2f}x XLA f32"
        rivals = [p for p, kind in PEERS.items() if kind and kind == KINDS.get(name) and p in times]
        if rivals:
            best = min(rivals, key=lambda p: statistics.median(times[p]))
            line += f"  {statistics.median(b / t for b, t in zip(times[best], own, strict=True)):6.2f}x {best}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
