"""Settings of every test: strict promotion, two CPU devices, fresh random numbers with a printed seed."""

import secrets
from fnmatch import fnmatchcase

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A busy machine is no fault of a test.
settings.register_profile("qfunc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qfunc")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
    """Thousands of programs kept to the end cost gigabytes, and time in every collection."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng(request):
    """A generator with a fresh seed, which a failing test prints."""
    seed = secrets.randbits(32)
    print(f"rng seed of {request.node.name}: {seed}")
    return np.random.default_rng(seed)


# Large tables of which the usual run takes a sample, by test function; the other rows are marked slow (`make test-slow`).
SAMPLED = {
    "tests/kernels/test_cpu_schemes.py::test_equals_the_reference":
        "w2a16_g32 w3a16_g128 w4a16_g128_asym w5a16_g64 w8a16 w8a8_dynamic w8a8_static_asym w8a8_block w4a8_dynamic_g128_asym w4afp8_g128 "
        "llm_int8 int4wo_g32 fp8 fp8_block mxfp6 mxfp4 mxfp4_dual nvfp4 nf4_dq w4a16_g128_actorder",
    "tests/kernels/test_cpu_schemes.py::test_small_float_codes_bit_for_bit": "w8a8_block w4a4_dynamic fp8 fp8_dynamic mxfp4 nvfp4 mx_even",
    "tests/kernels/test_cpu_schemes.py::test_activation_codes_are_shared": "float32-w8a8_dynamic bfloat16-nvfp4",
    "tests/kernels/test_cpu_schemes.py::test_types_and_bias": "bfloat16-w8a8_dynamic float16-w4a16_g128",
    "tests/kernels/test_cpu_schemes.py::test_experts": "w8a8_dynamic w4a16_g32 nvfp4 llm_int8",
    "tests/kernels/test_cpu_schemes.py::test_stacks_and_batches": "w8a8_dynamic w4a16_g128 fp8",
    "tests/kernels/test_cpu_schemes.py::test_int32_sums_bit_for_bit": "w8a8_dynamic w3a8_dynamic",
    "tests/kernels/test_cpu_schemes.py::test_nan_and_infinity_stay_in_their_row": "w8a8_dynamic w4a16_g128",
    "tests/kernels/test_cpu_schemes.py::test_blocks_of_ggml": "q4_0 q8_0 q4_k q6_k",
    "tests/kernels/test_take.py::test_rows_are_those_of_dequantize": "w4a16_g128_asym-* int4wo_g32-* nf4_dq-*",
    "tests/kernels/test_matmul_oracle.py::test_experts_and_leading_axes_are_their_own_matmuls":
        "w4a8_dynamic_g32_asym nvfp4",
    "tests/interop/test_cann_rules.py::test_integer_sums_are_exact":
        "w8a8_dynamic-*-bfloat16 w5a8_dynamic-*-bfloat16 w8a8_static_asym-*-bfloat16 w8a8_static_asym-*-float16 "
        "w4a8_dynamic-*-w8a8-*-bfloat16 w4a8_dynamic_g256-*-bfloat16 w4a8_dynamic_g64_asym-*-float16 w4a4_dynamic-*-bfloat16",
    "tests/interop/test_cann_rules.py::test_within_one_step_of_the_float32_sum":
        "w8a8_static_asym-*-float16 w4a16_g32_asym-*-bfloat16 w4a16_g64_asym_actorder-*-bfloat16 w8a16_g64_asym-*-float16 "
        "mxfp8-*-bfloat16 mxfp4_a8-*-bfloat16 mxfp4_dual-*-bfloat16 fp8_static-*-bfloat16 w8a8_block-*-bfloat16",
    "tests/interop/test_cann_rules.py::test_a_note_says_which_activations_are_composed":
        "w4a4_dynamic-* w8a8_static_asym-* mxfp4-* fp8-*",
    "tests/interop/test_cann_rules.py::test_experts_equal_the_reference":
        "w8a8_dynamic-* w4a8_dynamic_g32-* w4a4_dynamic-* w8a16_g32_asym-* mxfp4-*",
    "tests/interop/test_cann_rules.py::test_placement_can_be_undone":
        "w8a8_dynamic-3 w8a8_static_asym-0 w4a8_dynamic-0 w4a4_dynamic-3 w4a16_g32_asym-0 w5a16_g32-3 w4a16_g32_actorder-0 mxfp8-0 mxfp4-3 "
        "mxfp4_a8-0 gguf*-0",
    "tests/interop/test_cann_moe.py::test_the_flow_equals_the_layer":
        "w8a8_dynamic-* w4a4_dynamic-* ocp8-* w8a8_static_asym-*",
    "tests/interop/test_cann_quantize.py::test_composed_codes_and_scales_equal_the_specification":
        "w8a8_static_asym mxfp4 w8a8_block mxfp4_dual",
    "tests/interop/test_cann_quantize.py::test_several_weights_share_one_quantization": "w8a8_dynamic-* mxfp8-*",
    "tests/interop/test_cann_quantize.py::test_batch_axes_of_a_weight_run_one_by_one": "w4a16_g32_asym-*",
    "tests/interop/test_cann_quantize.py::test_microscaled_rows_equal_the_specification_natively_or_composed":
        "mx_floor-fp8_e4m3-rne mx_floor-fp8_e4m3-rha mx_rceil-fp8_e4m3-rne mx_rceil-fp4_e2m1-rne mx_even1-fp4_e2m1-rha "
        "mx_floor-fp4_e2m1-rne",
    "tests/interop/test_cann_quantize.py::test_an_int8_cache_is_that_of_the_layers":
        "True-channel",
    "tests/interop/test_gguf.py::test_ggmls_own_floats": "q4_0 q8_0 q4_k q6_k iq2_xs iq4_nl mxfp4",
    "tests/kernels/test_triton_lowering.py::test_xla_products_equal_the_reference": "w8a8_dynamic w4a16_g128 fp8 nvfp4",
    "tests/kernels/test_triton_lowering.py::test_outlier_columns_are_a_product_of_their_own": "True-*",
    "tests/kernels/test_triton_tables.py::test_shipped_tables_are_whole_and_legal": "nvidia_h200 amd_instinct_mi300x",
    "tests/test_dual.py::test_weights_and_activations_by_the_formula": "96",
    "tests/layers/test_flax_linen.py::*": "scan* *-scan* scan",
    "tests/layers/test_flax_nnx.py::*": "unrolled*",
    "tests/layers/test_linear.py::test_sharing_changes_neither_values_nor_derivatives": "w8a8_dynamic w4a16_g32",
    "tests/interop/test_cann_parallel.py::test_slices_are_those_of_the_decoded_matrix": "fp8_block w4a16*",
    "tests/layers/test_parallel.py::test_float_logits": "dense-tp",
    "tests/layers/test_parallel.py::test_quantized_logits": "dense-tp-w8a8_dynamic moe-ep-w4a16_g128_asym",
    "tests/layers/test_parallel.py::test_packed_weights_are_never_gathered": "w4a16_g128",
    "tests/layers/test_families.py::test_whole_texts_equal_transformers": "deepseek_v3",
    "tests/layers/test_families.py::test_steps_equal_transformers":
        "llama mistral qwen2 qwen3 qwen2_moe qwen3_moe mixtral gemma gemma2 gemma3_text gpt_oss deepseek_v2 deepseek_v3",
    "tests/layers/test_families.py::test_families_over_two_devices": "qwen2_moe-ep",
    "tests/layers/test_model.py::test_quantized_while_loading_is_quantized_after": "moe-w4a16_g128*",
    "tests/layers/test_model.py::test_quantized_caches": "int8 fp8_e4m3_token",
    "tests/layers/test_model.py::test_prompts_of_different_lengths_do_not_see_their_padding": "dense",
    "tests/layers/test_model.py::test_stacked_layers_give_the_numbers_of_unrolled_ones": "dense*",
    "tests/layers/test_model.py::test_logits_of_recorded_checkpoints": "modelslim-quarot-online-w4a4 gguf-q4_k_m",
    "tests/test_weights.py::*":
        "*w2a16* *w3a16_g32* *w4a16_g32_asym* *w8a8_dynamic* *w8a16_asym* *int4wo* *fp8_block* fp8 *-fp8 *mxfp4* *mxfp6* *nvfp4* *nf4_dq* "
        "*bits* *shape*",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name, bracket, row = item.nodeid.partition("[")
        sample = next((rows.split() for pattern, rows in SAMPLED.items() if fnmatchcase(name, pattern)), None)
        if bracket and sample is not None and not any(fnmatchcase(row.removesuffix("]"), pattern) for pattern in sample):
            item.add_marker(pytest.mark.slow)
