"""Lower instruction sets, threads and the standalone program of the native kernels."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc.kernels.cpu import _library

native = pytest.mark.skipif(_library.isa() is None, reason=f"no native kernels: {_library.load()[1]}")
CHECK = Path(__file__).resolve().parents[2] / "kernels" / "cpu" / "check"
X86 = ("avx512bf16", "avx512", "avx2", "generic")
ARM = ("i8mm", "neon", "generic")

PROGRAM = """
import sys, jax.numpy as jnp, numpy as np, qfunc
from qfunc.kernels.cpu import _library
isa, reason = _library.load()
if isa is None:
    print("SKIP", reason)
    sys.exit()
assert isa == sys.argv[1], isa
rng = np.random.default_rng(int(sys.argv[2]))
names = ("w8a8_dynamic", "w4a8_dynamic_g128", "w3a16_g32", "w8a16_asym", "nvfp4_a16", "mxfp6_a16", "fp8_w8a16", "nf4_dq",
             "w5a16", "w8a8_static_asym", "fp8_dynamic", "nvfp4", "mxfp8", "mxfp6_a6", "mxfp4")
for name in rng.choice(names, 5, replace=False).tolist():
    w = jnp.asarray(rng.standard_normal((384, 43)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((int(rng.choice([1, 3, 21])), 384)), jnp.float32)
    q = qfunc.quantize({"kernel": w}, name, calibration={"kernel": x})["kernel"]
    with qfunc.use("native"):
        got = np.asarray(qfunc.matmul(x, q), np.float64)
    with qfunc.use("reference"):
        want = np.asarray(qfunc.matmul(x, q), np.float64)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-5, (name, x.shape, error)
print("OK", isa)
"""


@native
@pytest.mark.parametrize("isa", ARM if _library.isa() in ("i8mm", "neon") else X86)
def test_forced_instruction_set(isa, rng):
    run = subprocess.run([sys.executable, "-c", PROGRAM, isa, str(rng.integers(1 << 30))], capture_output=True, text=True,
                         env={**os.environ, "QFUNC_CPU_ISA": isa, "JAX_PLATFORMS": "cpu"})
    assert run.returncode == 0, run.stderr
    if run.stdout.startswith("SKIP"):
        pytest.skip(run.stdout)
    assert run.stdout.strip() == f"OK {isa}"


@native
def test_unknown_instruction_set_says_so():
    code = "from qfunc.kernels.cpu import _library; print(_library.load())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "QFUNC_CPU_ISA": "mmx"})
    assert "QFUNC_CPU_ISA names no instruction set" in run.stdout


@native
def test_two_threads_at_once(rng):
    w = jnp.asarray(rng.standard_normal((512, 600)), jnp.float32)
    calls = []
    for name in ("w8a8_dynamic", "w4a16_g128"):
        q = qfunc.quantize({"kernel": w}, name)["kernel"]
        f = jax.jit(qfunc.matmul)
        for rows in (1, 33):
            x = jnp.asarray(rng.standard_normal((rows, 512)), jnp.float32)
            calls.append((f, x, q, np.asarray(f(x, q))))
    wrong = []

    def work():
        for _ in range(20):
            for f, x, q, want in calls:
                if not np.array_equal(f(x, q), want):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory):
    """(emulator, the standalone check built for Arm)."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = tmp_path_factory.mktemp("arm") / "standalone"
    subprocess.run([CHECK / "build.sh", program, compiler, "-static"], check=True)
    return emulator, program


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["i8mm", "neon"])
def test_arm_under_an_emulator(arm_program, isa):
    emulator, program = arm_program
    run = subprocess.run([emulator, "-cpu", "max", program], capture_output=True, text=True, env={**os.environ, "QFUNC_CPU_ISA": isa})
    assert run.returncode == 0 and run.stdout.startswith(f"{isa}:"), run.stdout


@native
def test_wrong_shapes_never_reach_a_pointer():
    """The handlers check again what Python has checked."""
    empty = jnp.zeros(0, jnp.float32)
    small = dict(code=0, bits=8, offset=0, scale_type=1, zero_kind=0, mode=2)
    attributes = {**{name: np.int32(value) for name, value in small.items()}, "group": np.int64(64), "share": np.int64(1),
                  "x_group": np.int64(64), "clip": np.float32(1), "lowest": np.float32(-127), "highest": np.float32(127),
                  "limit": np.int64(131071), "divisor": np.float32(1), "threshold": np.float32(0), "together": np.int64(0),
                  **{name: np.int32(0) for name in ("rule", "mantissa", "exponent", "sign", "bump", "emax")}}

    def call(codes, scale):
        absent = jnp.zeros((0, 1, 1), jnp.float32)
        return jax.ffi.ffi_call("qfunc_matmul", jax.ShapeDtypeStruct((1, 2, 5), jnp.float32))(
            jnp.ones((1, 2, 64)), empty, empty, codes, scale, absent, absent, empty, empty, empty, empty, empty, **attributes)

    for codes, scale in (((1, 5, 63), (1, 5, 1)), ((1, 4, 64), (1, 5, 1)), ((1, 5, 64), (1, 5, 2)), ((2, 5, 64), (2, 5, 1))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="qfunc native kernel"):
            call(jnp.zeros(codes, jnp.int8), jnp.ones(scale)).block_until_ready()
