"""The bridge from a Triton kernel to a jitted JAX function: one compiled image, one custom call.

A `Program` says what to compile, an `Image` is the compiled code, `call` puts it into a function that is being traced. Nothing here
asks a device for anything until something is lowered, and nothing imports triton unless no compiled image is found: first in this
process, then in the cache on disk, then among the images that the package ships.

The custom call is jaxlib's own `triton_kernel_call_ffi`. Its payload is a protocol buffer that the constructors of `jaxlib.gpu_triton`
write; where no GPU plugin is installed (lowering for a machine elsewhere) `_encode` writes the same bytes. These are private names of
jaxlib, so a test holds both writers equal, and jax-triton is the way out (`QFUNC_TRITON_BRIDGE=jax-triton`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from ._launch import SHARED_MEMORY

TARGET = "triton_kernel_call_ffi"
"""The custom call of XLA that runs an image."""
JAX_TRITON_TARGET = "triton_kernel_call"
SHIPPED = Path(__file__).parent / "images"
"""Where images that come with the package lie; `python -m qfunc.kernels.triton.tune --ship` writes them."""
GRID_LIMIT = (2**31 - 1, 65535, 65535)
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
         "float8_e4m3fnuz": "fp8e4b8", "float8_e5m2fnuz": "fp8e5b16", "int8": "i8", "uint8": "u8", "int16": "i16", "uint16": "u16",
         "int32": "i32", "uint32": "u32", "int64": "i64", "uint64": "u64"}
"""numpy types to Triton's names of them."""


class BridgeError(RuntimeError):
    """A kernel that cannot be compiled or called for the target that is being lowered for."""


# ---- the device that is lowered for ------------------------------------------------------------------------------------------------

_SETTING = {"cuda": "QFUNC_CUDA_CAPABILITY", "rocm": "QFUNC_ROCM_ARCH"}
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("qfunc_triton_target", default=None)


@contextlib.contextmanager
def lowering_for(target: str) -> Iterator[None]:
    """Lower for a device that need not be here: `sm_90` (also `90` and `9.0`) or `gfx942`. Functions traced before are traced again."""
    name = target_name(target)
    token = _asked.set(name)
    try:
        with set_xla_metadata(qfunc_target=name):
            yield
    finally:
        _asked.reset(token)


def target_name(value: str) -> str:
    """`9.0`, `90`, `sm_90a` and `gfx942:sramecc+` as `sm_90` and `gfx942`; ValueError for anything else."""
    text = str(value).strip().lower().split(":")[0]
    if text.startswith("gfx") and text[3:].isalnum():
        return text
    digits = text.removeprefix("sm_").removeprefix("sm").rstrip("af").replace(".", "")
    if not (digits.isdigit() and 2 <= len(digits) <= 3):
        raise ValueError(f"expected a compute capability such as 9.0 or sm_90, or an architecture such as gfx942, found {value!r}")
    return f"sm_{digits}"


def target_of(platform: str) -> str | None:
    """What a platform's kernels are compiled for: asked for by `lowering_for`, the device that is here, or `QFUNC_CUDA_CAPABILITY`.

    None where there is neither a device nor a setting. Raises ValueError where the devices of this process differ.
    """
    fits = str.startswith
    prefix = {"cuda": "sm_", "rocm": "gfx"}[platform]
    asked = _asked.get()
    if asked is not None and fits(asked, prefix):
        return asked
    found = _devices(platform)
    if len(found) > 1:
        raise ValueError(f"the {platform} devices of this process differ ({', '.join(sorted(found))}): name one with lowering_for(...)")
    if found:
        return next(iter(found))
    setting = os.environ.get(_SETTING[platform])
    return target_name(setting) if setting else None


def missing_target(platform: str) -> str:
    """The reason to give where `target_of` finds nothing."""
    return f"no {platform} device is here and {_SETTING[platform]} is not set, so it is not known what to compile for"


def _devices(platform: str) -> set[str]:
    from jax.extend import backend
    backends = backend.backends()
    client = backends.get(platform)
    if client is None:
        client = backends.get("gpu")
        if client is None or (platform == "rocm") != ("rocm" in getattr(client, "platform_version", "").lower()):
            return set()
    return {target_name(device.compute_capability) for device in client.local_devices()}


# ---- what is compiled --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Program:
    """A kernel with everything that its machine code depends on.

    Fields:
        kernel: `module:function` of a `triton.jit` function.
        signature: (argument, type) in the kernel's order; types as Triton names them (`*bf16`, `i32`), `constexpr` for compile-time ones.
        constexprs: (argument, value) of the compile-time arguments.
        divisible: arguments that are multiples of 16 (pointers by their address), without which loads come out scalar.
        warps, stages: launch width and depth of the software pipeline.
        options: other compiler options, (name, value).
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return self.kernel.partition(":")[2]

    def key(self, target: str) -> str:
        """A digest of the sources, this record and the target: the name of the image on disk."""
        record = [self.kernel, self.signature, self.constexprs, self.divisible, self.warps, self.stages, self.options, target]
        return hashlib.sha256((fingerprint(self.kernel.partition(":")[0]) + json.dumps(record)).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Image:
    """Compiled code: PTX text, or the bytes of an HSACO.

    Fields: `name` of its entry, `shared` memory in bytes, `warps`, `target`, `triton` (the version that compiled it), `code`.
    """

    name: str
    shared: int
    warps: int
    target: str
    triton: str
    code: bytes

    def to_bytes(self) -> bytes:
        """The file's content: a line of JSON, with a digest of the code, then the code."""
        head = {"name": self.name, "shared": self.shared, "warps": self.warps, "target": self.target, "triton": self.triton,
                "sha256": hashlib.sha256(self.code).hexdigest()}
        return gzip.compress(json.dumps(head).encode() + b"\n" + self.code, mtime=0)

    @classmethod
    def from_bytes(cls, data: bytes) -> Image:
        """The inverse of `to_bytes`; ValueError where the content is damaged."""
        try:
            head, _, code = gzip.decompress(data).partition(b"\n")
            fields = json.loads(head)
            digest = fields.pop("sha256")
        except (OSError, EOFError, zlib.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a compiled kernel: {error}") from None
        if hashlib.sha256(code).hexdigest() != digest:
            raise ValueError("the code does not have the digest that it was written with")
        return cls(**fields, code=code)


@functools.cache
def fingerprint(module: str) -> str:
    """A digest of the source of a kernel's module and of every module of this package that holds device code."""
    here = Path(__file__).parent
    files = [p for p in sorted(here.glob("*.py")) if b"triton.jit" in (text := p.read_bytes()) and b"import triton" in text]
    spec = importlib.util.find_spec(module)
    own = Path(spec.origin) if spec is not None and spec.origin else None
    if own is not None and own not in files:
        files.append(own)
    return hashlib.sha256(b"\0".join(p.name.encode() + b"\0" + p.read_bytes() for p in files)).hexdigest()


@functools.cache
def triton_version() -> str | None:
    """The version of the installed triton, without importing it; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return importlib.import_module("triton").__version__


def cache_dir() -> Path:
    """Where images are kept between processes: `$QFUNC_TRITON_CACHE`, or `qfunc/triton` of the user's cache folder."""
    own = os.environ.get("QFUNC_TRITON_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qfunc" / "triton"
    return base / f"triton-{triton_version() or 'none'}"


_images: dict[tuple[Program, str], Image] = {}


def find(program: Program, target: str) -> Image | None:
    """The image of a program from this process, the cache on disk or the package; None where it would have to be compiled."""
    if (program, target) in _images:
        return _images[program, target]
    name = f"{program.key(target)}.gz"
    for folder in (cache_dir(), SHIPPED):
        try:
            image = Image.from_bytes((folder / name).read_bytes())
        except (OSError, ValueError):           # absent, or damaged: compiled again
            continue
        return _images.setdefault((program, target), image)
    return None


def missing(program: Program, target: str) -> str | None:
    """None, or why a program cannot be had for a target. Compiles nothing."""
    if triton_version() is not None or find(program, target) is not None:
        return None
    return f"triton is not installed and no compiled {program.name} for {target} comes with the package"


def compiled(program: Program, target: str) -> Image:
    """The image of a program, compiled and kept where it is new.

    Raises BridgeError where Triton refuses it, where there is no Triton, or where the kernel needs more shared memory than a program may
    have: such a launch would fail on the device, while the compilation succeeds.
    """
    image = find(program, target)
    if image is None:
        reason = missing(program, target)
        if reason is not None:
            raise BridgeError(reason)
        image = _compile(program, target)
        with contextlib.suppress(OSError):      # a read-only home costs time, not correctness
            write(cache_dir() / f"{program.key(target)}.gz", image.to_bytes())
        _images[program, target] = image
    limit = SHARED_MEMORY.get(target)
    if limit is not None and image.shared > limit:
        raise BridgeError(f"{program.name} for {target} needs {image.shared} bytes of shared memory, a program may have {limit}: {program}")
    return image


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def function(program: Program):
    """The `triton.jit` function of a program."""
    module, _, name = program.kernel.partition(":")
    return getattr(importlib.import_module(module), name)


def _compile(program: Program, target: str) -> Image:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = function(program)
    if not isinstance(kernel, triton.JITFunction):
        raise BridgeError(f"{program.kernel} is {type(kernel).__name__}, not a triton.jit function; TRITON_INTERPRET must not be set")
    names = [name for name, _ in program.signature]
    if names != list(kernel.arg_names):
        raise BridgeError(f"{program.kernel} takes ({', '.join(kernel.arg_names)}), described are ({', '.join(names)})")
    source = ASTSource(fn=kernel, signature=dict(program.signature), constexprs=dict(program.constexprs),
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in program.divisible})
    amd = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": program.warps, "num_stages": program.stages, **dict(program.options)}
    try:
        built = triton.compile(source, target=machine, options=options)
    except Exception as error:
        raise BridgeError(f"{program.name} does not compile for {target}: {type(error).__name__}: {error}; {program}") from error
    if getattr(built.metadata, "global_scratch_size", 0):
        raise BridgeError(f"{program.name} needs global scratch memory (descriptors made on the device), which the custom call cannot give")
    code = built.asm["hsaco"] if amd else built.asm["ptx"].encode()
    return Image(built.metadata.name, built.metadata.shared, program.warps, target, triton.__version__, bytes(code))


# ---- the custom call ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Operand:
    """The next array of the call."""


@dataclass(frozen=True)
class Result:
    """Result `index`; `zero` clears it before the kernel starts."""

    index: int
    zero: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number known when the call is lowered; `kind` as Triton names it (`i32`, `i64`, `fp32`, ...)."""

    value: int | float | bool
    kind: str


def call(program: Program, arguments: Sequence[Operand | Result | Scalar], grid: Sequence[int], arrays: Sequence[Any],
         results: Sequence[jax.ShapeDtypeStruct], *, target: str, label: str | None = None) -> list[jax.Array]:
    """Run a program in the function that is being traced.

    Arguments:
        arguments: what each run-time argument of the kernel is, in its order; as many `Operand` as there are `arrays`.
        grid: up to three counts of programs.
        arrays, results: what the kernel reads, and the shapes and types of what it writes (uninitialised unless `Result.zero`).
        target: as `target_of` gives it.
        label: the name that the custom call bears in the lowered text; by default the kernel's.

    Returns the results; without a launch, zeros, where every result is empty or the grid is. Raises BridgeError.
    """
    grid = (*grid, 1, 1)[:3]
    if not all(grid) or all(math.prod(r.shape) == 0 for r in results):
        return [jnp.zeros(r.shape, r.dtype) for r in results]
    if any(count > limit for count, limit in zip(grid, GRID_LIMIT, strict=True)):
        raise BridgeError(f"{program.name}: a grid of {grid} programs, the device takes at most {GRID_LIMIT}")
    count = sum(isinstance(a, Operand) for a in arguments)
    run_time = [name for name, kind in program.signature if kind != "constexpr"]
    if count != len(arrays) or len(arguments) != len(run_time):
        raise BridgeError(f"{program.name} has {len(run_time)} run-time arguments; described are {len(arguments)}, "
                          f"{count} of them arrays, given are {len(arrays)} arrays")
    if os.environ.get("QFUNC_TRITON_BRIDGE") == "jax-triton":
        return _call_jax_triton(program, arguments, grid, arrays, results, target)
    image = compiled(program, target)
    aligned = [name in program.divisible for name in run_time]
    sizes = [math.prod(r.shape) * np.dtype(r.dtype).itemsize for r in results]
    opaque = zlib.compress(_payload(program, image, arguments, aligned, sizes, grid))
    return list(jax.ffi.ffi_call(TARGET, list(results))(*arrays, name=label or program.name, opaque=opaque))


def _code_or_path(program: Program, image: Image) -> str:
    if not image.target.startswith("gfx"):
        return image.code.decode()
    # jaxlib reads an HSACO from the path that stands in the place of the PTX.
    path = cache_dir() / f"{program.key(image.target)}.hsaco"
    if not path.exists():
        write(path, image.code)
    return str(path)


def _payload(program: Program, image: Image, arguments, aligned, sizes, grid) -> bytes:
    code = _code_or_path(program, image)
    capability = int(image.target.removeprefix("sm_")) if image.target.startswith("sm_") else 0
    kernel = (image.name, image.warps, 1, image.shared, code, "", capability)
    # One entry per argument: (bytes to clear, alignment) of an array, or a number and its type.
    parameters = [(a.value, a.kind) if isinstance(a, Scalar) else (sizes[a.index] if isinstance(a, Result) and a.zero else 0,
                                                                   16 if whole else 0)
                  for a, whole in zip(arguments, aligned, strict=True)]
    plugin = _plugin()
    if plugin is None:
        return _encode(kernel, grid, parameters, program.name)
    make = [plugin.create_scalar_parameter if isinstance(kind, str) else plugin.create_array_parameter for _, kind in parameters]
    built = [m(*p) for m, p in zip(make, parameters, strict=True)]
    return plugin.TritonKernelCall(plugin.TritonKernel(*kernel), *grid, built).to_proto(program.name, b"")


@functools.cache
def _plugin():
    module = importlib.import_module("jaxlib.gpu_triton")
    return module if hasattr(module, "TritonKernelCall") else None


_SCALARS = {"i1": (2, "varint"), "i32": (3, "varint"), "u32": (4, "varint"), "i64": (5, "varint"), "u64": (6, "varint"),
            "fp32": (7, "<f"), "fp64": (8, "<d")}


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _encode(kernel, grid, parameters, label: str) -> bytes:
    """jaxlib's `TritonAnyKernelCall` (jaxlib/gpu/triton.proto); fields that are zero are left out, as proto3 does."""
    name, warps, ctas, shared, code, _, capability = kernel
    image = _field(1, name.encode()) + _field(2, warps) + (_field(3, shared) if shared else b"") + _field(4, code.encode())
    image += (_field(6, capability) if capability else b"") + _field(10, ctas)
    body = _field(1, image) + b"".join(_field(2 + i, count) for i, count in enumerate(grid))
    for value, kind in parameters:
        if not isinstance(kind, str):
            inner = (_field(1, value) if value else b"") + (_field(2, kind) if kind else b"")
            body += _field(5, _field(1, inner))
            continue
        number, how = _SCALARS[kind]
        wire = _varint(number << 3) + _varint(int(value)) if how == "varint" else (
            _varint(number << 3 | (5 if how == "<f" else 1)) + struct.pack(how, value))
        body += _field(5, wire)
    return _field(1, body) + _field(3, b"")[:0] + _field(4, label.encode())


def _call_jax_triton(program: Program, arguments, grid, arrays, results, target: str) -> list[jax.Array]:
    """The same call made by jax-triton, which wants every result behind everything else."""
    kinds = [type(a) for a in arguments]
    first = kinds.index(Result)
    if any(kind is not Result for kind in kinds[first:]) or [a.index for a in arguments[first:]] != list(range(len(results))):
        raise BridgeError(f"{program.name}: jax-triton takes results only behind all other run-time arguments")
    kept = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton                            # clears TRITON_CACHE_DIR
    os.environ.pop("TRITON_CACHE_DIR", None) if kept is None else os.environ.__setitem__("TRITON_CACHE_DIR", kept)
    given = iter(arrays)
    values = [a.value if isinstance(a, Scalar) else next(given) for a in arguments[:first]]
    capability = {"compute_capability": int(target.removeprefix("sm_"))} if target.startswith("sm_") else {}
    return list(jax_triton.triton_call(
        *values, kernel=function(program), out_shape=list(results), grid=grid, name=program.name, num_warps=program.warps,
        num_stages=program.stages, zeroed_outputs=[a.index for a in arguments[first:] if a.zero], **capability,
        **dict(program.constexprs)))
