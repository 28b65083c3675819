"""The hot matmuls as JAX primitives, with one table of lowerings for all platforms.

`matmul`, `grouped_matmul`, `take` and `quantize_activation` are what layers call; `use` and `explain` force and show the choice of
implementation; `lowering_for` names the GPU to compile for where none is here; `prepare` lays packed weights out for a backend;
`export_checks` lists what `jax.export` must be told.
"""

from . import cpu as cpu
from ._activation import quantize_activation as quantize_activation
from ._dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from ._dispatch import FallbackWarning as FallbackWarning
from ._dispatch import Implementation as Implementation
from ._dispatch import use as use
from ._explain import explain as explain
from ._export import export_checks as export_checks
from ._grouped import grouped_matmul as grouped_matmul
from ._matmul import matmul as matmul
from ._prepare import prepare as prepare
from ._take import take as take
from .triton import _lowering as _lowering
from .triton._target import lowering_for as lowering_for
