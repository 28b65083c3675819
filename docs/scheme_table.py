"""Print the README's table of schemes: stored bits per weight and round-trip error on Gaussian weights, both measured.

    python docs/scheme_table.py
"""

import jax
import jax.numpy as jnp

import qfunc

SHAPE = (2048, 2048)
ROWS = {
    "w8a16": "int8 weights, a scale per output channel",
    "w8a8_dynamic": "the same, int8 activations per token",
    "w8a8_static": "the same, calibrated int8 activations per tensor",
    "w8a8_block": "int8 in blocks of 128 x 128, int8 activations in groups of 128",
    "llm_int8": "int8, outlier columns of the activation in floating point",
    "w6a16_g128": "int6 groups of 128",
    "w4a16_g128": "int4 groups of 128 (`gptq`)",
    "w4a16_g128_asym": "the same with zero points (`awq`)",
    "w4a16_g32": "int4 groups of 32",
    "w4a8_dynamic": "int4 per channel, int8 activations per token",
    "w4a4_dynamic": "int4 per channel, int4 activations per token",
    "w4afp8_g128": "int4 groups of 128, fp8 activations per token",
    "w3a16_g128": "int3 groups of 128",
    "w2a16_g64": "int2 groups of 64",
    "fp8": "e4m3, one scale; e4m3 activations, one scale",
    "fp8_dynamic": "e4m3 per channel, e4m3 activations per token",
    "fp8_block": "e4m3 in blocks of 128 x 128, e4m3 activations in groups of 128",
    "mxfp8": "OCP MX: e4m3 with a power of two for every 32, both sides",
    "mxfp6": "OCP MX: e2m3 weights, e4m3 activations",
    "mxfp4": "OCP MX: e2m1 on both sides; `mxfp4_a16` keeps activations",
    "nvfp4": "e2m1 with e4m3 scales for every 16 and an outer scale, both sides",
    "nf4": "bitsandbytes' normal float, groups of 64; `nf4_dq` quantizes the scales too",
    "fp4_bnb": "bitsandbytes' fp4, groups of 64",
}


def main():
    w = jax.random.normal(jax.random.key(0), SHAPE, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (64, SHAPE[0]), jnp.float32)
    print("| scheme | what it is | bits per weight | error |\n|---|---|---|---|")
    for name, what in ROWS.items():
        q = qfunc.quantize({"kernel": w}, name, calibration={"kernel": x})["kernel"]
        error = jnp.linalg.norm(q.dequantize() - w) / jnp.linalg.norm(w)
        print(f"| `{name}` | {what} | {q.bits_per_weight:.2f} | {float(error):.2%} |")


if __name__ == "__main__":
    main()
