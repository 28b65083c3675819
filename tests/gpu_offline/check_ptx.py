"""The PTX programs of `_ptx.py` on every byte and digit (and every zero point), against the values of the codes."""

import ml_dtypes
import numpy as np
import oracle
import ptx

from qfunc.kernels.triton import _ptx

E2M1 = np.concatenate([magnitudes := np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]), -magnitudes])
NAMES = {"int": "", "nf4": "NF4_", "fp4_bnb": "BNB_", "fp4_e2m1": "FP4_"}
TYPES = {"s8": np.int8, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def every_byte(case, rng):
    """How many results differ."""
    byte, different = np.arange(256, dtype=np.uint8), 0
    if case.scheme == "fp8_e4m3":
        made = ptx.elementwise(_ptx.E4M3.value, "=r,=r,r", [byte], 2, 4).view(ml_dtypes.bfloat16).astype(np.float64) * 2.0**120
        return dict(different=int(np.sum(~np.equal(made, byte.view(ml_dtypes.float8_e4m3fn).astype(np.float64)) & (byte & 0x7F != 0x7F)))
                    + int(np.sum(~np.isnan(made[[0x7F, 0xFF]]))))
    for digit in (0, 1):
        text = getattr(_ptx, f"{NAMES[case.scheme]}{case.dtype.upper()}_{('LOW', 'HIGH')[digit]}").value
        code = (byte >> (4 * digit)) & 15
        if case.dtype == "s8":
            for offset in range(16):
                made = ptx.elementwise(text, "=r,r,r", [byte, np.full(256, offset, np.uint8)], 1, 4).view(np.int8)
                different += int(np.sum(made != code.astype(np.int64) - offset))
            continue
        made = ptx.elementwise(text, "=r,=r,r", [byte], 2, 4).view(TYPES[case.dtype])
        table = {"int": np.arange(16.0) + {"bf16": 128, "f16": 1024}[case.dtype], "fp4_e2m1": E2M1, **oracle.TABLES}[case.scheme]
        wanted = table.astype(np.float32).astype(TYPES[case.dtype])[code]
        # Minus zero is made as one: it multiplies like zero.
        different += int(np.sum(made.astype(np.float64) != wanted.astype(np.float64)))
    return dict(different=different)
