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
    """How many results differ; `case.columns` bytes to a block, in all places of one."""
    byte, pack, kind = np.arange(256, dtype=np.uint8), case.columns, TYPES[case.dtype]
    byte = np.concatenate([np.roll(byte, i) for i in range(pack)])
    suffix = "_PAIR" if pack == 2 else ""

    def made(name, *more, width=2):
        text = getattr(_ptx, name + suffix).value
        registers = ",".join(["=r"] * (pack * width // 4) + ["h" if pack == 2 else "r"] * (1 + len(more)))
        return ptx.elementwise(text, registers, [byte, *more], width, pack).view(kind)

    if case.scheme == "fp8_e4m3":
        got = made("E4M3").astype(np.float64) * (1 if pack == 2 else 2.0**120)
        wanted = byte.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return dict(different=int(np.sum(~((got == wanted) & (np.signbit(got) == np.signbit(wanted)) | np.isnan(got) & np.isnan(wanted)))))
    if case.scheme == "int8":
        return dict(different=int(np.sum(made(f"INT8_{case.dtype.upper()}").astype(np.float64) != byte.view(np.int8))))
    different = 0
    for digit in (0, 1):
        name = f"{NAMES[case.scheme]}{case.dtype.upper()}_{('LOW', 'HIGH')[digit]}"
        code = (byte >> (4 * digit)) & 15
        if case.dtype == "s8":
            for offset in range(16):
                different += int(np.sum(made(name, np.full(byte.size, offset, np.uint8), width=1) != code.astype(np.int64) - offset))
            continue
        table = {"int": np.arange(16.0) + {"bf16": 128, "f16": 1024}[case.dtype], "fp4_e2m1": E2M1, **oracle.TABLES}[case.scheme]
        wanted = table.astype(np.float32).astype(kind)[code]
        # Minus zero may be made as one: it multiplies like zero.
        different += int(np.sum(made(name).astype(np.float64) != wanted.astype(np.float64)))
    return dict(different=different)
