"""The native implementation on CPUs: C++ kernels behind XLA's FFI, on XLA's own threads.

Importing this registers it in the table of lowerings; the library itself is loaded when a call first asks for it. Where the package was
installed without a C++ compiler every call is refused with that reason, and the reference runs.
"""

from .. import _activation as _activation  # the references must be in the table first: what is registered later is preferred
from .. import _grouped as _grouped
from .. import _matmul as _matmul
from .. import _take as _take
from .._dispatch import Implementation, register
from .._export import CUSTOM_CALLS
from . import _library, _lowering

PLATFORMS = ("cpu",)
for _primitive, _run in _lowering.RUN.items():
    register(_primitive, Implementation("native", PLATFORMS, _lowering.supports, _run))
CUSTOM_CALLS.extend(_library.HANDLERS)
