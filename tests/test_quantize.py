"""The driver: nothing is lost, nothing is compiled twice, nothing is held longer than it must be."""

import gc
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc import _quantize


def test_a_single_array_is_a_pytree(rng):
    w = rng.standard_normal((64, 8)).astype(np.float32)
    q = qfunc.quantize(w, "w8a16")
    assert isinstance(q, qfunc.QTensor) and q.shape == (64, 8)
    np.testing.assert_array_equal(qfunc.dequantize(q), q.dequantize())
    assert qfunc.dequantize(q, "bfloat16").dtype == jnp.bfloat16


def test_structure_and_float_leaves_survive(rng):
    dense = {"kernel": jnp.asarray(rng.standard_normal((64, 8)), jnp.bfloat16), "bias": jnp.ones(8)}
    params = {"a": dense, "n": None, "t": (jnp.arange(3),)}
    q = qfunc.quantize(params, "w8a16")
    back = qfunc.dequantize(q)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert back["a"]["kernel"].dtype == jnp.bfloat16 and q["a"]["bias"] is params["a"]["bias"]


class Lazy:
    """A leaf that is read when it is asked for, as a checkpoint's tensor is."""

    reads = 0

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def __array__(self, dtype=None, copy=None):
        Lazy.reads += 1
        return np.asarray(self.value, dtype)


def test_lazy_leaves_are_read_one_by_one(rng):
    w = rng.standard_normal((64, 8)).astype(np.float32)
    Lazy.reads = 0
    q = qfunc.quantize({"kernel": Lazy(w)}, "w8a16", check=False)["kernel"]
    assert Lazy.reads == 1
    np.testing.assert_array_equal(q.dequantize(), qfunc.quantize(w, "w8a16").dequantize())
    bad = w.copy()
    bad[3, 3] = np.inf
    with pytest.raises(ValueError, match="kernel"):
        qfunc.quantize({"kernel": Lazy(bad)}, "w8a16")


def test_compiles_once_per_distinct_shape(rng):
    params = {str(i): {"kernel": jnp.asarray(rng.standard_normal((96, 24)), jnp.float32)} for i in range(7)}
    before = _quantize._encode._cache_size()
    qfunc.quantize(params, "w5a16_g32")
    assert _quantize._encode._cache_size() == before + 1


def test_donate_deletes_what_was_quantized_and_nothing_unasked(rng):
    def params():
        return {"kernel": jnp.asarray(rng.standard_normal((64, 8)), jnp.float32), "bias": jnp.ones(8)}
    kept = params()
    qfunc.quantize(kept, "w8a16")
    assert not kept["kernel"].is_deleted()
    given = params()
    q = qfunc.quantize(given, "w8a16", donate=True)
    assert given["kernel"].is_deleted() and not given["bias"].is_deleted()
    assert np.isfinite(q["kernel"].dequantize()).all()


def test_a_non_finite_weight_changes_nothing_even_with_donate(rng):
    good, bad = (jnp.asarray(rng.standard_normal((64, 8)), jnp.float32) for _ in range(2))
    params = {"a": {"kernel": good}, "b": {"kernel": bad.at[1, 1].set(jnp.nan)}, "c": {"kernel": bad.at[0, 0].set(-jnp.inf)}}
    with pytest.raises(ValueError, match="b/kernel, c/kernel"):
        qfunc.quantize(params, "w8a16", donate=True)
    assert not good.is_deleted()


# One scheme for each way of making scales.
SCALERS = ("w8a8_dynamic", "w3a16_g32", "w4a16_asym", "int4wo_g32", "fp8", "fp8_block", "mxfp4", "mxfp8", "nvfp4", "nf4", "nf4_dq")


@pytest.mark.parametrize("name", SCALERS)
def test_under_jit_a_poisoned_weight_gives_nan_never_garbage(name):
    w = jnp.ones((128, 4), jnp.float32).at[5, 2].set(jnp.nan).at[9, 1].set(jnp.inf)
    back = np.asarray(jax.jit(lambda w: qfunc.quantize({"kernel": w}, name)["kernel"].dequantize())(w))
    assert np.isnan(back[5, 2]) and np.isnan(back[9, 1])


def test_quantize_under_vmap_equals_a_stack(rng):
    w = jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32)
    mapped = jax.vmap(lambda w: qfunc.quantize({"kernel": w}, "w4a16_g32")["kernel"])(w)
    stacked = qfunc.quantize({"kernel": w}, "w4a16_g32")["kernel"]
    jax.tree.map(np.testing.assert_array_equal, mapped, stacked)


def test_memory_stays_near_the_packed_result_and_one_leaf():
    """In a process of its own: 24 leaves of 16 MiB quantized to 4 bits while lazily made; the floats would take 384 MiB."""
    code = """
import resource, numpy as np, jax, qfunc
class Lazy:
    shape, dtype = (2048, 2048), np.dtype(np.float32)
    def __init__(self, seed): self.seed = seed
    def __array__(self, dtype=None, copy=None): return np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
jax.block_until_ready(qfunc.quantize({"kernel": Lazy(0)}, "w4a16_g128"))
before = peak()
q = qfunc.quantize({str(i): {"kernel": Lazy(i)} for i in range(24)}, "w4a16_g128")
jax.block_until_ready(q)
packed = sum(leaf.nbytes for leaf in jax.tree.leaves(q)) / 2**20
print(peak() - before, packed)
"""
    # glibc keeps freed blocks as large as those that it has seen freed, in a heap for each thread: what is counted here is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    grown, packed = map(float, out.split())
    assert packed < 60 and grown < packed + 32, (grown, packed)


def test_progress_needs_no_tqdm_unless_asked(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    w = {"kernel": jnp.ones((64, 8))}
    qfunc.quantize(w, "w8a16")
    with pytest.raises(ImportError):
        qfunc.quantize(w, "w8a16", progress=True)


def test_importing_is_quick_and_touches_no_device():
    code = """
import jax, sys, time
start = time.process_time()         # of processor time: a busy machine is not the package's fault
import qfunc
qfunc.quantize, qfunc.matmul, qfunc.schemes, qfunc.QTensor
print(time.process_time() - start)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
heavy = {"torch", "torch_npu", "flax", "matplotlib", "triton", "transformers", "typer", "tqdm", "gguf"} & set(sys.modules)
assert not heavy, heavy
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 1
    gc.collect()


def test_public_names_resolve_and_reserved_ones_say_what_exists():
    for name in qfunc.__all__:
        assert getattr(qfunc, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        getattr(qfunc, "quantise")  # noqa: B009 - the name is the point
    with pytest.raises(NotImplementedError, match="qfunc.load"):
        qfunc.save("out", {}, format="awq")
