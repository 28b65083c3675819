"""The GPU lowering executed on a CPU: every launch that it makes runs in Triton's interpreter, under the transformations of JAX.

Run in a process of its own with TRITON_INTERPRET=1. Prints one line of JSON for each case: its name, and the relative distance from the
reference. Only the custom call is replaced; what XLA does in front of and behind each kernel is what a GPU would be given.
"""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "gpu_offline"), str(HERE.parent / "support")]

import interpreter  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import qfunc  # noqa: E402
from qfunc.kernels._dispatch import TARGETS, Implementation, register  # noqa: E402
from qfunc.kernels.triton import _lowering  # noqa: E402

rng = np.random.default_rng(7)
# XLA's threads flush subnormal numbers to zero, which GPUs do not: the interpreter runs on a thread that was there before.
elsewhere = ThreadPoolExecutor(1)
elsewhere.submit(int).result()


def execute(launch, arrays, target):
    """The launch in the interpreter, as a callback from compiled code."""
    def interpret(*values):
        return elsewhere.submit(lambda: [np.asarray(y) for y in interpreter.launch(launch, [np.asarray(v) for v in values])]).result()
    return jax.pure_callback(interpret, [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in launch.outputs], *arrays)


def interpreted(run):
    def one(call, *operands):
        return run(dataclasses.replace(call, target="sm_90"), *operands)
    return one


_lowering.execute = execute
for primitive, run in _lowering.RUN.items():
    register(primitive, Implementation("interpreted", ("cpu",), lambda call, platform: None, interpreted(run), gathers=True))
assert "cpu" not in TARGETS


def weight(scheme, *shape):
    return qfunc.quantize({"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}, scheme)["kernel"]


def floats(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def matmuls(x, q):
    codes = qfunc.quantize_activation(x, q)
    return qfunc.matmul(codes, q, out_dtype=jnp.float32) + qfunc.matmul(x, q, out_dtype=jnp.float32)


def layers(x, qs):
    return jax.lax.scan(lambda x, q: (qfunc.matmul(x, q), None), x, qs)[0]


def outlying(*shape):
    x = np.array(rng.standard_normal(shape), np.float32)
    x[..., 5] *= 30
    return jnp.asarray(x)


BIAS, SIZES = floats(48, dtype=jnp.float32), jnp.asarray([3, 0, 2], jnp.int32)
ROWS = jnp.asarray([3, 0, 1, 1, 3, 2, 0], jnp.int32)
CASES = {
    "bias": (lambda x, q: qfunc.matmul(x, q, bias=BIAS), floats(3, 256), weight("w4a16_g128", 256, 48)),
    "three axes": (qfunc.matmul, floats(2, 2, 256), weight("w8a8_dynamic", 256, 48)),
    "one row": (qfunc.matmul, floats(256), weight("w4a8_dynamic", 256, 48)),
    "split": (qfunc.matmul, floats(2, 2048, dtype=jnp.float32), weight("w4a16_g128_asym", 2048, 16)),
    "codes shared": (matmuls, floats(3, 128), weight("w8a8_dynamic", 128, 32)),
    "per tensor": (qfunc.matmul, floats(3, 128), weight("fp8", 128, 32)),
    "two levels": (qfunc.matmul, floats(3, 128), weight("nvfp4", 128, 32)),
    "outliers": (qfunc.matmul, outlying(3, 128), weight("llm_int8", 128, 32)),
    "vmap of x": (jax.vmap(qfunc.matmul, (0, None)), floats(2, 3, 128), weight("fp8", 128, 32)),
    "vmap of both": (jax.vmap(qfunc.matmul), floats(2, 3, 128), weight("w4a8_dynamic", 2, 128, 32)),
    "vmap of w": (jax.vmap(qfunc.matmul, (None, 0)), floats(3, 128), weight("mxfp4", 2, 128, 32)),
    "vmap of outliers": (jax.vmap(qfunc.matmul), outlying(2, 3, 128), weight("llm_int8", 2, 128, 32)),
    "scan": (layers, floats(3, 128), weight("w4a16_g32", 2, 128, 128)),
    "gradient": (jax.grad(lambda x, q: jnp.sum(qfunc.matmul(x, q) ** 2)), floats(3, 128, dtype=jnp.float32), weight("w8a16", 128, 32)),
    "experts": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES), floats(7, 128), weight("w4a16_g128", 3, 128, 32)),
    "experts per tensor": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES), floats(7, 128), weight("fp8", 3, 128, 32)),
    "experts with outliers": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES), outlying(7, 128), weight("llm_int8", 3, 128, 32)),
    "experts that gather": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES, rows=ROWS), floats(4, 128), weight("w4a16_g32", 3, 128, 32)),
    "codes that are gathered": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES, rows=ROWS), floats(4, 128),
                                weight("w4a8_dynamic", 3, 128, 32)),
    "rows per tensor": (lambda x, q: qfunc.grouped_matmul(x, q, SIZES, rows=ROWS), floats(4, 128), weight("fp8", 3, 128, 32)),
    "embedding": (lambda ids, q: qfunc.take(q, ids), jnp.asarray([[0, 31, -1], [7, 99, 2]], jnp.int32), weight("w4a16_g32_asym", 128, 32)),
}


def main():
    """All cases."""
    for name, (fn, *operands) in CASES.items():
        got = jax.jit(fn)(*operands)
        with qfunc.use("reference"):
            want = jax.jit(fn)(*operands)
        told = {choice.implementation for choice in qfunc.explain(fn, *operands, platform="cpu")}
        a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
        same = np.array_equal(np.isnan(a), np.isnan(b))
        error = np.linalg.norm(np.nan_to_num(a - b)) / np.linalg.norm(np.nan_to_num(b))
        print(json.dumps({"name": name, "error": float(error), "alike": bool(same and got.dtype == want.dtype and got.shape == want.shape),
                          "ran": sorted(told)}), flush=True)


if __name__ == "__main__":
    main()
