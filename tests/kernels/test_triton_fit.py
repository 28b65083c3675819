"""Launches whose first tiles need more shared memory than the target has: they get smaller, or the next in the table runs."""

import dataclasses
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import lowered
import pytest

import qfunc
from qfunc.kernels import _dispatch
from qfunc.kernels.triton import _fit, _image, _launch, _tables, _target, tune
from qfunc.kernels.triton._launch import Config, Target

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LARGE = [("nf4", "4096x4096", 64, "gfx942", "float32"), ("w7a16", "128256x4096", 1, "sm_89", "bfloat16")]
"""Calls whose first launch needs more shared memory than there is."""
LARGE_OFFLINE = [
    *((scheme, "4096x4096", 4096, "gfx942", "float32") for scheme in ("w8a16", "fp8_w8a16", "nf4")),
    ("w7a16", "128256x4096", 1, "sm_89", "float16"), *(("w7a16", "128256x4096", 24, "sm_89", dtype) for dtype in ("bfloat16", "float16")),
    ("w8a16", "8x4096x4096", 32768, "gfx942", "float32"), ("nf4", "8x4096x4096", 512, "gfx942", "float32")]
FLOAT32 = [("w8a16", "4096x4096", 4096, "sm_100"), ("w6a16_g128", "4096x4096", 64, "sm_120")]
"""Products of three tf32 ones."""
FLOAT32_OFFLINE = [
    *((scheme, "4096x4096", 4096, target) for scheme in ("w8a16", "fp8_w8a16") for target in ("sm_80", "sm_89", "sm_100", "sm_120")
      if (scheme, target) != ("w8a16", "sm_100")),
    ("w6a16_g128", "4096x4096", 64, "sm_89"), ("w5a16_g64", "4096x4096", 40, "sm_86"), ("w3a16_g128", "50257x768", 300, "sm_120"),
    *(("w7a16", "512x72", 300, target) for target in ("sm_86", "sm_89", "sm_120")), ("w8a16_asym", "512x72", 5000, "sm_86"),
    *((scheme, "4096x4096", 5000, "sm_100") for scheme in ("nvfp4_a16", "w4a16_g16", "w2a16_g16")),
    ("w8a16", "8x4096x4096", 32768, "sm_89"), ("nf4", "50257x768", 5000, "sm_86")]


def offline(rows):
    return [pytest.param(*row, marks=pytest.mark.gpu_offline) for row in rows]


@pytest.fixture(autouse=True)
def forgetful(tmp_path, monkeypatch):
    """No image and no failure of before, none afterwards."""
    monkeypatch.setenv("QFUNC_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_image, "_images", {})
    monkeypatch.setattr(_dispatch, "_failed", {})
    _dispatch._runner.cache_clear()
    yield
    _dispatch._runner.cache_clear()


@needs_triton
@pytest.mark.parametrize(("scheme", "shape", "tokens", "target", "dtype"), [*LARGE, *offline(LARGE_OFFLINE)])
def test_what_is_launched_fits(scheme, shape, tokens, target, dtype):
    call = tune.call_of(scheme, shape, tokens, target, jnp.dtype(dtype))
    with pytest.raises(_image.SharedMemoryError, match="bytes of shared memory"):
        _image.compiled(_fit.program_of(_fit.planned(call)), target)
    launch = _fit.fitted(call)
    image = _image.find(_fit.program_of(launch), target)
    assert image is not None and image.shared <= _launch.SHARED_MEMORY[target] and _fit.refusal(call) is None


@needs_triton
@pytest.mark.parametrize(("scheme", "shape", "tokens", "target"), [*FLOAT32, *offline(FLOAT32_OFFLINE)])
def test_float32_fits_at_once_and_in_registers(scheme, shape, tokens, target):
    import ahead
    call = tune.call_of(scheme, shape, tokens, target, jnp.float32)
    launch = _fit.planned(call)
    image = _image.compiled(_fit.program_of(launch), target)
    assert image.shared <= _launch.SHARED_MEMORY[target]
    # Rows that end in a step that is not whole hold an address for every byte: a few registers do not fit, of seven bits up to 24.
    assert ahead.compile_launch(launch, Target.parse(target)).spills <= (0 if shape.endswith(("4096", "768")) else 96)


@pytest.fixture
def greedy(monkeypatch):
    """Images without code for sm_89 that take `unit` bytes for each stage and sum of a tile; yields the programs that are compiled."""
    made = []

    def settle(unit: int):
        def compiled(program, target):
            made.append(program)
            sizes = dict(program.constexprs)
            shared = unit * program.stages * sizes["BM"] * sizes["BN"] if "BM" in sizes else 0
            return dataclasses.replace(lowered.uncompiled(program, target), shared=shared)

        monkeypatch.setattr(_image, "_compile", compiled)
        return made

    with lowered.without_compiling(monkeypatch), _target.lowering_for("sm_89"):
        yield settle


def operands(scheme="w4a16_g128"):
    w = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    return jax.ShapeDtypeStruct((64, 512), jnp.bfloat16), jax.eval_shape(lambda w: qfunc.quantize({"k": w}, scheme)["k"], w)


def lower() -> str:
    """The lowered text of a matmul; JAX keeps what it lowered of a function, so each time it is a new one."""
    return lowered.lower(lambda x, q: qfunc.matmul(x, q), *operands())


def test_stages_go_before_tiles_and_nothing_is_compiled_twice(greedy):
    made = greedy(14)
    text = lower()
    assert lowered.operations(lowered.reached(text)) == {("quantized_matmul", "triton"): 1}
    tried = [(program.stages, dict(program.constexprs)["BM"] * dict(program.constexprs)["BN"]) for program in made]
    assert len(tried) > 2 and tried == sorted(tried, reverse=True) and len(set(tried)) == len(tried)
    stages, tile = tried[-1]
    assert stages == 2 and 14 * stages * tile <= _launch.SHARED_MEMORY["sm_89"] < 14 * tried[-2][0] * tried[-2][1]
    count = len(made)
    _dispatch._runner.cache_clear()
    assert lower() == text and len(made) == count
    assert {c.implementation for c in qfunc.explain(qfunc.matmul, *operands(), platform="cuda")} == {"triton"}


def test_what_never_fits_goes_to_the_next_and_explain_says_so(greedy):
    made = greedy(1 << 20)
    _dispatch._warn.cache_clear()
    with pytest.warns(qfunc.kernels.FallbackWarning, match="no tile of the kernel fits the 101376 bytes of shared memory of sm_89"):
        text = lower()
    (name,) = {name for _, name in lowered.operations(lowered.reached(text))}
    (choice,) = qfunc.explain(qfunc.matmul, *operands(), platform="cuda")
    assert name == choice.implementation != "triton" and "no tile" in dict(choice.refused)["triton"]
    count = len(made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lower()
    assert len(made) == count
    with qfunc.use("triton"), pytest.raises((NotImplementedError, _image.KernelError), match="no tile"):
        lower()


def test_a_kernel_that_cannot_be_made_goes_to_the_next(greedy, monkeypatch):
    greedy(0)

    def broken(program, target):
        raise _image.KernelError(f"{program.name} does not compile for {target}")

    monkeypatch.setattr(_image, "_compile", broken)
    _dispatch._warn.cache_clear()
    with pytest.warns(qfunc.kernels.FallbackWarning, match="dense does not compile for sm_89"):
        text = lower()
    assert "triton" not in {name for _, name in lowered.operations(lowered.reached(text))}
    (choice,) = qfunc.explain(qfunc.matmul, *operands(), platform="cuda")
    assert choice.implementation != "triton" and "does not compile" in dict(choice.refused)["triton"]
    with qfunc.use("triton"), pytest.raises(_image.KernelError, match="does not compile"):
        lower()


def test_without_triton_a_shipped_image_of_the_smaller_tile_is_enough(greedy, monkeypatch):
    made = greedy(14)
    lower()
    monkeypatch.setattr(_image, "triton_version", lambda: None)
    assert {c.implementation for c in qfunc.explain(qfunc.matmul, *operands(), platform="cuda")} == {"triton"}
    del _image._images[made[-1], "sm_89"]
    (choice,) = qfunc.explain(qfunc.matmul, *operands(), platform="cuda")
    assert choice.implementation != "triton" and "triton is not installed" in dict(choice.refused)["triton"]


def test_the_order_of_configs_ends_at_the_smallest_tile():
    config, seen = Config(128, 64, 128, 1, 8, 4), []
    while (config := _fit.smaller(config)) is not None:
        seen.append((config.block_m, config.block_n, config.num_warps, config.num_stages))
    assert seen == [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2)]


def test_a_config_that_is_given_is_taken_as_it_is_or_not_at_all(greedy):
    from qfunc.kernels.triton import _lowering
    made = greedy(1 << 20)
    call = tune.call_of("w4a16_g128", "256x512", 64, "sm_89")
    x, leaves = call.x, call.leaves
    with pytest.raises(_image.SharedMemoryError, match="dense for sm_89 needs"):
        jax.eval_shape(lambda *o: _lowering.matmul(call, *o, config=_tables.config(call, "sm_89")), *x, *leaves)
    assert len(made) == 1
