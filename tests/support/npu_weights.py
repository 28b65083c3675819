"""Random packed weights of any scheme, straight from codes and scales: no quantizer stands between a test and the numbers it wants."""

from __future__ import annotations

import numpy as np


def weight(rng, scheme, columns: int, rows: int, experts: int = 0, dtype: str = "bfloat16", powers: bool = False, smooth: bool = False):
    """A QTensor (columns, rows), or a stack of them, with random codes over their whole range.

    `powers` makes every scale a power of two, with which integer sums stay exact through all scaling.
    """
    import jax.numpy as jnp
    import ml_dtypes

    import qfunc
    from qfunc._codes import code
    from qfunc._pack import pack
    from qfunc._qtensor import CODECS, QTensor
    from qfunc._scales import scale_shape
    scheme = qfunc.scheme(scheme)
    spec, lead = scheme.weight, (experts,) * bool(experts)
    if spec.code in CODECS.decoders:
        elements, size = CODECS.blocks[spec.code]
        blocks = rng.integers(0, 256, (*lead, rows, columns // elements, size)).astype(np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)           # a finite scale, where the type has it first
        return QTensor(jnp.asarray(blocks.reshape(*lead, rows, -1)), scheme=scheme, dtype=dtype)
    element = code(spec.code)
    packed = element.packed
    if packed:
        values = rng.integers(0, 2**element.bits, (*lead, rows, columns)).astype(np.uint8)
        codes = pack(values, element.bits, element.offset)
    elif element.integer:
        low = -127 if spec.code == "int8" else 0
        codes = rng.integers(low, low + 255, (*lead, rows, columns)).astype(element.dtype)
    else:
        codes = rng.standard_normal((*lead, rows, columns)).astype(np.float32).astype(element.dtype)
    shape = (*lead, *scale_shape(spec.granularity, rows, columns))
    leaves = {"scale": _scales(rng, spec, shape, powers)}
    if spec.zero == "int":
        leaves["zero"] = rng.integers(0, 2**element.bits, shape).astype(np.uint8)
    elif spec.zero == "float":
        leaves["zero"] = rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)
    if spec.scale2_dtype is not None:
        leaves["scale2"] = np.full((*lead, *((rows, -(-columns // 512)) if spec.scale_dtype == "e8m0" else (1, 1))), 0.5, np.float32)
    if spec.actorder:
        leaves["perm"] = rng.permuted(np.broadcast_to(np.arange(columns, dtype=np.int32), (*lead, columns)), axis=-1)
    if scheme.activation is not None and scheme.activation.mode == "static":
        leaves["input_scale"] = np.exp2(rng.integers(-1, 2, (*lead, 1, 1))).astype(np.float32) * np.float32(2.0**-5 if powers else 0.0311)
        if scheme.activation.zero is not None:
            leaves["input_zero"] = rng.integers(-9, 9, (*lead, 1, 1)).astype(np.int32)
    if smooth:
        leaves["smooth"] = np.exp2(rng.integers(-1, 2, (*lead, columns))).astype(np.float32)
    return QTensor(jnp.asarray(codes), **{name: jnp.asarray(leaf) for name, leaf in leaves.items()}, scheme=scheme, dtype=dtype,
                   pad=-columns % 128 if packed else 0)


def _scales(rng, spec, shape, powers: bool):
    import ml_dtypes
    if spec.scale_dtype == "e8m0":
        return rng.integers(118, 124, shape).astype(np.uint8)
    if spec.scale_rule == "double":
        raise ValueError("doubly quantized scales are no random numbers")
    scale = np.exp2(rng.integers(-9, -5, shape)) if powers else rng.uniform(0.004, 0.02, shape)
    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "fp8_e4m3": ml_dtypes.float8_e4m3fn}
    return scale.astype(np.float32).astype(kinds.get(spec.scale_dtype, np.float32))


def activation(rng, *shape: int, top: float = 0.0):
    """float32 numbers that bfloat16 and float16 hold exactly; with `top` the largest of every row is top times a power of two.

    A row of zeros is among them where there are rows enough.
    """
    import ml_dtypes
    x = rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    x = np.where(np.abs(x) < 2.0**-10, 0, x)
    if top:
        peak = top * 2.0 ** -np.ceil(np.log2(top / 4))
        x = np.clip(x, -peak, peak)
        x[..., 0] = peak
    if x.ndim > 1 and x.shape[-2] > 2:
        x[..., 1, :] = 0
    return x
