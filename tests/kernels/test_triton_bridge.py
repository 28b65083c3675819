"""The bridge: what a custom call carries, images on disk, and the two other writers of the same call."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import lowered
import pytest

from qfunc.kernels.triton import _bridge, _image, _target
from qfunc.kernels.triton._bridge import Operand, Result, Scalar
from qfunc.kernels.triton._image import Image, KernelError, Program

HERE = Path(__file__).parent
PROGRAM = Program("toykernel:scale_rows", (("x", "*bf16"), ("s", "*fp32"), ("y", "*bf16"), ("total", "*fp32"), ("n", "i32"),
                                           ("factor", "fp32"), ("BLOCK", "constexpr")), (("BLOCK", 128),), ("x", "s", "y", "total"), 4, 2)
ARGUMENTS = (Operand(), Operand(), Result(0), Result(1, zero=True), Scalar(100, "i32"), Scalar(-1.5, "fp32"))
ARRAYS = jax.ShapeDtypeStruct((8, 100), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.float32)
RESULTS = jax.ShapeDtypeStruct((8, 100), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QFUNC_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QFUNC_TRITON_BRIDGE", raising=False)
    monkeypatch.setattr(_image, "_images", {})
    return tmp_path / "cache"


def toy(target, program=PROGRAM, arguments=ARGUMENTS, grid=(8,), results=RESULTS):
    return lambda *arrays: _bridge.call(program, arguments, grid, arrays, results, target=target)


def opaque(text: str, start: str = 'opaque = "') -> bytes:
    """The payload of the one custom call of a lowered text."""
    (value,) = re.findall(re.escape(start) + r'((?:[^"\\]|\\.)+)"', text)
    raw = re.sub(rb"\\([0-9A-Fa-f]{2}|.)", lambda m: bytes([int(m[1], 16)]) if len(m[1]) == 2 else
                 {b"n": b"\n", b"t": b"\t"}.get(m[1], m[1]), value.encode("latin-1"))
    return zlib.decompress(raw)


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_calls_for_every_target(target, cache):
    platform = "rocm" if target.startswith("gfx") else "cuda"
    text = lowered.lower(toy(target), *ARRAYS, platform=platform)
    assert lowered.reached(text)["scale_rows"] == 1
    (file,) = cache.rglob("*.gz")
    image = Image.from_bytes(file.read_bytes())
    assert image.target == target and image.warps == 4 and image.name == "scale_rows"
    assert (b".target sm_" in image.code) if platform == "cuda" else image.code.startswith(b"\x7fELF")
    if platform == "rocm":                      # the runtime deletes the file that it has read
        paths = [_bridge._code_or_path(PROGRAM, image) for _ in range(2)]
        assert len(set(paths)) == 2 and all(Path(path).read_bytes() == image.code for path in paths)
        for path in paths:
            Path(path).unlink()


def test_both_writers_of_the_payload_agree(monkeypatch):
    if _bridge._plugin() is None:
        pytest.skip("the CUDA plugin of jaxlib is not installed")
    aligned, sizes = [name in PROGRAM.divisible for name, kind in PROGRAM.signature if kind != "constexpr"], [1600, 4]
    numbers = [(100, "i32"), (-1.5, "fp32"), (-7, "i64"), (2**31, "u32"), (2**63, "u64"), (0.1, "fp64"), (0, "i32"), (True, "i1")]
    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        arguments = (*ARGUMENTS[:4], Scalar(*first), Scalar(*second))
        for grid in ((8, 1, 1), (300, 2, 70000)):
            for made in (image(b"// " + b"long " * 5000, 65536), image(shared=0)):
                theirs = _bridge._payload(PROGRAM, made, arguments, aligned, sizes, grid)
                with monkeypatch.context() as m:
                    m.setattr(_bridge, "_plugin", lambda: None)
                    assert _bridge._payload(PROGRAM, made, arguments, aligned, sizes, grid) == theirs


@needs_triton
def test_lowers_without_a_plugin_to_the_same_text(monkeypatch):
    if _bridge._plugin() is None:
        pytest.skip("the CUDA plugin of jaxlib is not installed")
    with_plugin = lowered.lower(toy("sm_90"), *ARRAYS)
    monkeypatch.setattr(_bridge, "_plugin", lambda: None)
    assert lowered.lower(toy("sm_90"), *ARRAYS) == with_plugin
    payload = opaque(with_plugin)
    assert b"scale_rows" in payload and b".visible .entry" in payload


@needs_triton
def test_jax_triton_makes_the_same_code(monkeypatch):
    pytest.importorskip("jax_triton", exc_type=ImportError)
    monkeypatch.setenv("QFUNC_TRITON_BRIDGE", "jax-triton")
    theirs = lowered.lower(toy("sm_90"), *ARRAYS)
    assert "custom_call @triton_kernel_call(" in theirs and "triton_kernel_call_ffi" not in theirs
    monkeypatch.delenv("QFUNC_TRITON_BRIDGE")
    ours = opaque(lowered.lower(toy("sm_90"), *ARRAYS))
    assert instructions(opaque(theirs, 'backend_config = "')) == instructions(ours)


@needs_triton
def test_an_image_is_compiled_once_between_processes(cache, monkeypatch):
    image = _image.compiled(PROGRAM, "sm_90")
    monkeypatch.setattr(_image, "_images", {})
    monkeypatch.setattr(_image, "_compile", lambda program, target: pytest.fail("compiled again"))
    assert _image.compiled(PROGRAM, "sm_90") == image
    other = dataclasses.replace(PROGRAM, constexprs=(("BLOCK", 256),))
    assert len({PROGRAM.key("sm_90"), PROGRAM.key("sm_80"), other.key("sm_90")}) == 3
    code = ("from qfunc.kernels.triton import _image; import sys; from test_triton_bridge import PROGRAM;"
            "i = _image.compiled(PROGRAM, 'sm_90'); assert 'triton' not in sys.modules; print(i.shared)")
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent / 'support'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=HERE.parent.parent)
    assert done.returncode == 0 and done.stdout.strip() == str(image.shared), done.stderr


@needs_triton
def test_a_damaged_image_is_compiled_again(cache, monkeypatch):
    image = _image.compiled(PROGRAM, "sm_90")
    (file,) = cache.rglob("*.gz")
    good = file.read_bytes()
    for bad in (b"", good[:100], good[:-20], b"\x00" * 50, good.replace(good[40:44], b"abcd")):
        file.write_bytes(bad)
        monkeypatch.setattr(_image, "_images", {})
        assert _image.compiled(PROGRAM, "sm_90") == image
        assert file.read_bytes() == good and [p.name for p in file.parent.iterdir()] == [file.name]


def test_images_are_written_whole_by_many_writers(tmp_path):
    path, data = tmp_path / "a" / "image.gz", [bytes([i]) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=_image.write, args=(path, d)) for d in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in data and [p.name for p in path.parent.iterdir()] == ["image.gz"]


def instructions(payload: bytes) -> list[bytes]:
    """The operations of the PTX in a payload, in order, without registers and addresses (the order of arguments differs)."""
    return re.findall(rb"^\s+(?:@%p\d+ )?((?:ld\.global|st\.global|mul|add|fma|atom|cvt|shfl|bra)[.\w]*)", payload, re.M)


def image(code=b"// code", shared=0, target="sm_90"):
    return Image("scale_rows", shared, 4, target, "3.6.0", code)


def test_a_shipped_image_needs_no_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(_image, "triton_version", lambda: None)
    monkeypatch.setattr(_image, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(_image, "fingerprint", lambda module: "sources")
    assert "comes with the package" in _image.missing(PROGRAM, "sm_90")
    with pytest.raises(KernelError, match="triton is not installed"):
        _image.compiled(PROGRAM, "sm_90")
    _image.write(tmp_path / "shipped" / f"{PROGRAM.key('sm_90')}.gz", image().to_bytes())
    assert _image.missing(PROGRAM, "sm_90") is None
    found = lowered.reached(lowered.lower(toy("sm_90"), *ARRAYS))
    assert found["scale_rows"] == 1


def test_sources_decide_the_name_of_an_image(monkeypatch):
    before = PROGRAM.key("sm_90")
    monkeypatch.setattr(_image, "fingerprint", lambda module: "changed")
    assert PROGRAM.key("sm_90") != before


def test_too_much_shared_memory_is_refused_before_a_launch(monkeypatch):
    monkeypatch.setattr(_image, "find", lambda program, target: image(shared=120_000))
    assert _image.compiled(PROGRAM, "sm_90").shared == 120_000
    with pytest.raises(KernelError, match="120000 bytes of shared memory, a program may have 101376"):
        _image.compiled(PROGRAM, "sm_89")


@needs_triton
def test_a_kernel_that_does_not_compile_says_so():
    wrong = dataclasses.replace(PROGRAM, constexprs=(("BLOCK", 100),))
    with pytest.raises(KernelError, match="(?s)scale_rows does not compile for sm_90.*power of 2"):
        _image.compiled(wrong, "sm_90")
    fewer = dataclasses.replace(PROGRAM, signature=PROGRAM.signature[1:])
    with pytest.raises(KernelError, match=r"takes \(x, s, .*described are \(s, y"):
        _image.compiled(fewer, "sm_90")


@needs_triton
def test_a_kernel_without_a_store_is_an_error(monkeypatch, cache):
    import triton
    compile = triton.compile

    def emptied(*args, **options):
        made = compile(*args, **options)
        made.asm["ptx"] = re.sub(r"^.*st\.global.*$", "", made.asm["ptx"], flags=re.M)
        return made

    monkeypatch.setattr(triton, "compile", emptied)
    with pytest.raises(KernelError, match="scale_rows for sm_90 came out of the compiler without a store"):
        lowered.lower(toy("sm_90"), *ARRAYS)
    assert not list(cache.rglob("*.gz"))


def test_nothing_is_launched_of_nothing(monkeypatch):
    monkeypatch.setattr(_image, "_compile", lambda program, target: pytest.fail("compiled"))
    empty = jax.ShapeDtypeStruct((0, 100), jnp.bfloat16),
    text = lowered.lower(toy("sm_90", results=empty, arguments=ARGUMENTS), *ARRAYS)
    assert "custom_call" not in text
    text = lowered.lower(toy("sm_90", grid=(0, 1, 1)), *ARRAYS)
    assert "custom_call" not in text and "dense<0.0" in text


def test_descriptions_that_do_not_fit_are_refused():
    for arguments, grid, message in ((ARGUMENTS[1:], (8,), "6 run-time arguments"), (ARGUMENTS, (1, 70000), "at most")):
        with pytest.raises(KernelError, match=message):
            lowered.lower(toy("sm_90", arguments=arguments, grid=grid), *ARRAYS)


NAMED = [("90", "sm_90"), ("9.0", "sm_90"), ("sm_90a", "sm_90"), ("10.0", "sm_100"), ("sm_120", "sm_120"), ("gfx942", "gfx942"),
         ("gfx942:sramecc+:xnack-", "gfx942"), ("GFX950", "gfx950")]


@pytest.mark.parametrize(("given", "name"), NAMED)
def test_names_of_targets(given, name):
    assert _target.target_name(given) == name


@pytest.mark.parametrize("given", ["", "hopper", "sm_", "9", "gfx", "1.2.3.4"])
def test_other_names_are_refused(given):
    with pytest.raises(ValueError, match="compute capability"):
        _target.target_name(given)


def test_the_device_decides_before_the_setting(monkeypatch):
    monkeypatch.setenv("QFUNC_CUDA_CAPABILITY", "8.0")
    assert _target.target_of("cuda") == "sm_80" and _target.target_of("rocm") is None
    monkeypatch.setattr(_target, "_devices", lambda platform: {"sm_90"} if platform == "cuda" else set())
    assert _target.target_of("cuda") == "sm_90"
    with _target.lowering_for("10.0"):
        assert _target.target_of("cuda") == "sm_100" and _target.target_of("rocm") is None
    monkeypatch.setattr(_target, "_devices", lambda platform: {"sm_90", "sm_80"})
    with pytest.raises(ValueError, match="sm_80, sm_90"):
        _target.target_of("cuda")
