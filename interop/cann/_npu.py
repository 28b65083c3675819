"""torch_npu's operators by name, and the numbers by which they know data types that torch has not.

The bridge calls `torch.ops.npu.<name>`, which a real torch_npu registers when it is imported; any other host that registers the same
schemas serves as well.
"""

from __future__ import annotations

import functools

import torch

# torch_npu's handles: 256 + the number of the ACL data type. A torch dtype in their place is refused (it becomes torch's own number).
E8M0, FP4 = 293, 296
NZ, ND = 29, 2
TILES = {torch.float16: 16, torch.bfloat16: 16, torch.uint8: 64, torch.int32: 64}


@functools.cache
def operator(name: str):
    """`torch.ops.npu.<name>`, importing torch_npu if nothing has registered it.

    Raises RuntimeError where there is no such operator.
    """
    if not hasattr(torch.ops.npu, name):
        try:
            import torch_npu  # noqa: F401
        except ImportError as error:
            raise RuntimeError(f"npu::{name} is not registered and torch_npu cannot be imported ({error}): install the torch_npu that "
                               "belongs to this torch, with CANN") from error
    return getattr(torch.ops.npu, name)


def format_cast(w: torch.Tensor, **named) -> torch.Tensor:
    """`w` in FRACTAL_NZ, which holds the same values in tiles that the matrix units read without rearranging.

    The last two axes must be whole tiles: 16 rows of 16 16-bit numbers, of 32 int8 or fp8, of 64 uint8 or int32; others stay as they are.
    """
    rows, columns = w.shape[-2:]
    if rows % 16 or columns % TILES.get(w.dtype, 32):
        return w
    return operator("npu_format_cast")(w, NZ, **named)


def to_host(w: torch.Tensor) -> torch.Tensor:
    """`w` on the host in ordinary order."""
    if w.device.type == "npu":
        w = operator("npu_format_cast")(w, ND)
    return w if w.is_meta else w.cpu()
