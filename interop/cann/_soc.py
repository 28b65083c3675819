"""Which quantized operators run on which generation of Ascend: the project's own table, because no schema or Meta function says it.

A2 is the 910B, A3 the 910C (910_93), A5 the 950. Integer formats are documented for A2 and A3 (op-plugin's operator pages and its tables
of data types); microscaled and fp8 formats for A5 alone. Integers on A5 are "TBD" in SGLang's table and refused here until someone has
seen them run. Sources: op-plugin, `docs/zh/custom_APIs/torch_npu`; SGLang, "Quantization on Ascend".
"""

from __future__ import annotations

from dataclasses import dataclass

SOCS = ("A2", "A3", "A5")
INTEGER, MICROSCALED, EVERYWHERE = ("A2", "A3"), ("A5",), SOCS
_TO_MX = "on A5 quantize to mxfp8, mxfp4_a8 or mxfp4, or pass dequantize=True"
_TO_INT = "on A2 and A3 quantize to w8a8_dynamic, w4a8_dynamic or w4a16_g128, or pass dequantize=True"


@dataclass(frozen=True)
class Row:
    """One way to run a weight.

    Fields:
        operator: what multiplies. linear, moe: the generations on which single matrices and stacks of experts run; empty where there
        is no operator at all. instead: what to do where it does not run.
    """

    operator: str
    linear: tuple[str, ...]
    moe: tuple[str, ...]
    instead: str


ROWS: dict[str, Row] = {
    "w8a8_static": Row("npu_quantize + npu_quant_matmul", INTEGER, INTEGER, _TO_MX),
    "w8a8": Row("npu_dynamic_quant + npu_quant_matmul", INTEGER, INTEGER, _TO_MX),
    "w4a4": Row("npu_dynamic_quant (int4) + npu_quant_matmul", INTEGER, INTEGER, _TO_MX),
    "w4a8": Row("npu_dynamic_quant + npu_quant_matmul (int8 x int4)", INTEGER, INTEGER, _TO_MX),
    "a16": Row("npu_weight_quant_batchmatmul", INTEGER, INTEGER, _TO_MX),
    "codes16": Row("npu_dynamic_quant + npu_weight_quant_batchmatmul", INTEGER, INTEGER, _TO_MX),
    "fp8": Row("npu_dynamic_quant (fp8) + npu_quant_matmul", MICROSCALED, MICROSCALED, _TO_INT),
    "mxfp8": Row("npu_dynamic_mx_quant + npu_quant_matmul", MICROSCALED, MICROSCALED, _TO_INT),
    "mxfp4_a8": Row("npu_dynamic_mx_quant + npu_quant_matmul", MICROSCALED, MICROSCALED, _TO_INT),
    "mxfp4": Row("npu_dynamic_mx_quant + npu_quant_matmul", MICROSCALED, MICROSCALED, _TO_INT),
    "mxfp4_dual": Row("npu_dynamic_dual_level_mx_quant + npu_dual_level_quant_matmul", MICROSCALED, (),
                      "use mxfp4 for experts; " + _TO_INT),
    "w8a8_block": Row("npu_quant_matmul (blocks of 128 x 128)", INTEGER, (), "quantize to w8a8_dynamic; " + _TO_MX),
    "fp8_block": Row("npu_quant_matmul (blocks of 128 x 128)", MICROSCALED, MICROSCALED, "quantize to mxfp8; " + _TO_INT),
    "float": Row("matmul of the dequantized weight", EVERYWHERE, EVERYWHERE, ""),
}


def check_soc(soc: str) -> str:
    """`soc` itself; ValueError where it is not a generation of this table."""
    if soc not in SOCS:
        raise ValueError(f"soc: expected one of {', '.join(SOCS)}, found {soc!r}")
    return soc


def refusal(kind: str, soc: str, experts: bool) -> str | None:
    """Why a kind of weight does not run on a generation, with what does instead; None where it runs."""
    row = ROWS[kind]
    where = row.moe if experts else row.linear
    if soc in where:
        return None
    what = "a stack of experts" if experts else "a linear layer"
    runs = f"runs on {' and '.join(where)} alone" if where else "has no operator"
    return f"{row.operator} for {what} {runs}, found {soc}: {row.instead}"
