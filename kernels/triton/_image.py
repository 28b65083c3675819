"""Compiled kernels: what determines one, where it is kept, and how it is made.

An image is looked for in this process, in the cache on disk, and among those that the package ships, in this order; triton is imported
only where none is found. The name of an image on disk is a digest of all that it depends on, the sources of the kernels included.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._dispatch import KernelError as KernelError
from ._launch import SHARED_MEMORY

SHIPPED = Path(__file__).parent / "images"
"""Where images that come with the package lie; `python -m qfunc.kernels.triton.tune --ship` writes them."""


class SharedMemoryError(KernelError):
    """A kernel that needs more shared memory than a program may have."""


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

    Raises KernelError where Triton refuses it or there is no Triton, and SharedMemoryError where the kernel needs more shared memory than
    a program may have: such a launch would fail on the device, while the compilation succeeds.
    """
    image = find(program, target)
    if image is None:
        reason = missing(program, target)
        if reason is not None:
            raise KernelError(reason)
        image = _compile(program, target)
        with contextlib.suppress(OSError):      # a read-only home costs time, not correctness
            write(cache_dir() / f"{program.key(target)}.gz", image.to_bytes())
        _images[program, target] = image
    if not fits(image, target):
        raise SharedMemoryError(f"{program.name} for {target} needs {image.shared} bytes of shared memory, a program may have "
                                f"{SHARED_MEMORY[target]}: {program}")
    return image


def fits(image: Image, target: str) -> bool:
    """Whether a program may have the shared memory that an image needs."""
    return image.shared <= SHARED_MEMORY.get(target, image.shared)


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)         # a temporary file is its owner's alone
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
        raise KernelError(f"{program.kernel} is {type(kernel).__name__}, not a triton.jit function; TRITON_INTERPRET must not be set")
    names = [name for name, _ in program.signature]
    if names != list(kernel.arg_names):
        raise KernelError(f"{program.kernel} takes ({', '.join(kernel.arg_names)}), described are ({', '.join(names)})")
    source = ASTSource(fn=kernel, signature=dict(program.signature), constexprs=dict(program.constexprs),
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in program.divisible})
    amd = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": program.warps, "num_stages": program.stages, **dict(program.options)}
    try:
        built = triton.compile(source, target=machine, options=options)
    except Exception as error:
        raise KernelError(f"{program.name} does not compile for {target}: {type(error).__name__}: {error}; {program}") from error
    if getattr(built.metadata, "global_scratch_size", 0):
        raise KernelError(f"{program.name} needs global scratch memory (descriptors made on the device), which the custom call cannot give")
    code = built.asm["hsaco"] if amd else built.asm["ptx"].encode()
    if not amd and b"st.global" not in code:
        # Seen of Triton 3.6 on sm_100: what it cannot compile becomes a kernel that returns at once, and the result is whatever was there.
        raise KernelError(f"{program.name} for {target} came out of the compiler without a store to memory; {program}")
    return Image(built.metadata.name, built.metadata.shared, program.warps, target, triton.__version__, bytes(code))
