"""The compiled library: found beside this package, loaded once, its handlers registered with XLA."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax

FILE = "_qfunc_cpu.so"
FOLDER = "QFUNC_CPU_LIBRARY_DIR"
"""The variable that names another folder to load it from."""
HANDLERS = ("qfunc_matmul", "qfunc_quantize", "qfunc_take")


def _find() -> Path | None:
    # In an editable install the sources and the compiled file are two folders of one package.
    asked = os.environ.get(FOLDER)
    folders = [asked] if asked else __import__(__package__, fromlist=["*"]).__path__
    return next((path for folder in folders if (path := Path(folder) / FILE).is_file()), None)


@functools.cache
def load() -> tuple[str | None, str | None]:
    """(instruction set that runs, None), or (None, why there is no native kernel)."""
    path = _find()
    if path is None and (asked := os.environ.get(FOLDER)):
        return None, f"{FOLDER} names {asked}, where there is no {FILE}"
    if path is None:
        return None, "qfunc was installed without its native kernels (no C++ compiler at install); install it again with one"
    try:
        library = ctypes.CDLL(str(path))
        library.qfunc_isa.restype = ctypes.c_char_p
        error = ctypes.c_char_p()
        isa = library.qfunc_isa(ctypes.byref(error))
        if isa is None:
            return None, error.value.decode()
        for name in HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # a library of another machine or of another jaxlib must not break the reference
        return None, f"the native library does not load ({type(error).__name__}: {error}); install qfunc again"
    return isa.decode(), None


def isa() -> str | None:
    """The instruction set of the native kernels, as `QFUNC_CPU_ISA` names it, or None where there are none."""
    return load()[0]
