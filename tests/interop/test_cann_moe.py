"""Mixtures of experts in Ascend's own operators against the layers of qfunc."""

import jax.numpy as jnp
import npu_cpu
import npu_rules
import npu_weights
import numpy as np
import pytest

from qfunc.kernels import use

torch = pytest.importorskip("torch")
HIDDEN, INNER, EXPERTS, TOP = 256, 128, 4, 2


@pytest.fixture(autouse=True)
def calls():
    made = npu_cpu.install()
    made.clear()
    return made


def _layer(params, x, weights, choice):
    """The experts as `layers` runs them, in the JAX reference."""
    import jax

    from qfunc.layers.config import Names, Routing
    from qfunc.layers.moe import experts_of
    routing = Routing(experts=EXPERTS, top_k=TOP)
    with use("reference"):
        return experts_of(params, x, weights, choice, routing, Names(), lambda gate, up: jax.nn.silu(gate) * up)


def _case(rng, first, second, tokens):
    shapes = {"gate_proj": (HIDDEN, INNER, first), "up_proj": (HIDDEN, INNER, first), "down_proj": (INNER, HIDDEN, second)}
    params = {name: {"kernel": npu_weights.weight(rng, scheme, columns, rows, EXPERTS)} for name, (columns, rows, scheme) in shapes.items()}
    gate, up = (params[name]["kernel"] for name in ("gate_proj", "up_proj"))
    params["up_proj"]["kernel"] = up.replace(input_scale=gate.input_scale, input_zero=gate.input_zero)      # of one input
    x = npu_weights.activation(rng, tokens, HIDDEN)
    choice = np.stack([rng.permutation(EXPERTS)[:TOP] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (tokens, TOP)).astype(np.float32)
    return params, x, weights, choice


ROUTE, MULTIPLY, COMBINE = "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"
FUSED = {"int8": "npu_dequant_swiglu_quant", "mx": "npu_grouped_matmul_swiglu_quant_v2"}
INT8_FLOW = [ROUTE, MULTIPLY, FUSED["int8"], MULTIPLY, COMBINE]
FLOAT_FLOW = [ROUTE, MULTIPLY, "npu_swiglu", MULTIPLY, COMBINE]
MX = "npu_dynamic_mx_quant"
FLOWS = [
    ("w8a8_dynamic", "w8a8_dynamic", "A2", INT8_FLOW),
    ("w4a8_dynamic_g64", "w4a8_dynamic", "A3", INT8_FLOW),
    ("w4a4_dynamic", "w8a8_dynamic", "A2", [ROUTE, "npu_dynamic_quant", *INT8_FLOW[1:]]),
    ("w4a16_g32_asym", "w4a16_g32", "A2", FLOAT_FLOW),
    ("nf4", "nf4", "A5", FLOAT_FLOW),
    ("w8a8_static_asym", "w8a8_static_asym", "A2", FLOAT_FLOW),
    ("fp8_block", "fp8_block", "A5", FLOAT_FLOW),
    ("ocp8", "ocp8", "A5", [ROUTE, FUSED["mx"], MULTIPLY, COMBINE]),
    ("ocp48", "ocp48", "A5", [ROUTE, MX, FUSED["mx"], MULTIPLY, COMBINE]),
    ("mxfp4", "mxfp4", "A5", [ROUTE, MX, MULTIPLY, "npu_swiglu", MX, MULTIPLY, COMBINE]),
]


def _scheme(name):
    import qfunc
    floor = {"activation_scale_rule": "mx_floor"}
    return {"ocp8": qfunc.scheme("mxfp8").replace(name="ocp8", **floor),
            "ocp48": qfunc.scheme("mxfp4_a8").replace(name="ocp48", **floor)}.get(name) or qfunc.scheme(name)


@pytest.mark.parametrize("first, second, soc, expected", FLOWS, ids=[f"{a}-{b}" for a, b, *_ in FLOWS])
def test_the_flow_equals_the_layer(rng, calls, first, second, soc, expected):
    from qfunc.interop import cann
    params, x, weights, choice = _case(rng, _scheme(first), _scheme(second), 48)       # enough that the mean error is that of the scheme
    kernels = [params[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj")]
    experts = cann.place_experts(*kernels, device="cpu", soc=soc)
    calls.clear()
    with npu_rules.on(soc):
        y = cann.moe(experts, torch.from_numpy(x).to(torch.bfloat16), torch.from_numpy(weights), torch.from_numpy(choice))
    assert [name for name, *_ in calls] == expected
    ref = np.asarray(_layer(params, jnp.asarray(x).astype(jnp.bfloat16), jnp.asarray(weights), jnp.asarray(choice)).astype(jnp.float32))
    error = np.abs(y.to(torch.float32).numpy() - ref).mean() / np.abs(ref).mean()
    # Three roundings to bfloat16 in other places move the inner activation by up to d = 3 2^-9 of itself, which takes a share d / step of
    # its codes over a border, by a whole step: noise of sqrt(d step). Steps: up to 2^-5 of most int8, 2^-3 of e4m3, 2^-1 of e2m1.
    bound = {"ocp8": 0.05, "ocp48": 0.05, "fp8_block": 0.05, "mxfp4": 0.1}.get(first, 0.02)
    assert error < bound, error


def test_another_activation_runs_outside_the_fused_operators(rng, calls):
    import jax

    from qfunc.interop import cann
    from qfunc.layers.config import Names, Routing
    from qfunc.layers.moe import experts_of
    params, x, weights, choice = _case(rng, "w8a8_dynamic", "w8a8_dynamic", 5)
    experts = cann.place_experts(*(params[n]["kernel"] for n in ("gate_proj", "up_proj", "down_proj")), device="cpu", soc="A2")
    y = cann.moe(experts, torch.from_numpy(x).to(torch.bfloat16), torch.from_numpy(weights), torch.from_numpy(choice),
                 lambda gate, up: torch.clamp(gate, max=0.5) * up)
    with use("reference"):
        ref = experts_of(params, jnp.asarray(x).astype(jnp.bfloat16), jnp.asarray(weights), jnp.asarray(choice),
                         Routing(experts=EXPERTS, top_k=TOP), Names(), lambda gate, up: jnp.minimum(gate, jax.numpy.bfloat16(0.5)) * up)
    ref = np.asarray(ref.astype(jnp.float32))
    assert np.abs(y.to(torch.float32).numpy() - ref).mean() / np.abs(ref).mean() < 0.02
    assert not any("swiglu" in name for name, *_ in calls)


def test_no_tokens_and_what_is_refused(rng, calls):
    from qfunc.interop import cann
    gate, up = (npu_weights.weight(rng, "w8a8_dynamic", HIDDEN, INNER, EXPERTS) for _ in range(2))
    down = npu_weights.weight(rng, "w8a8_dynamic", INNER, HIDDEN, EXPERTS)
    experts = cann.place_experts(gate, up, down, device="cpu", soc="A2")
    calls.clear()
    nothing = torch.zeros((0, HIDDEN), dtype=torch.bfloat16), torch.zeros((0, TOP)), torch.zeros((0, TOP), dtype=torch.int32)
    none = cann.moe(experts, *nothing)
    assert none.shape == (0, HIDDEN) and not calls
    with pytest.raises(ValueError, match="placed for torch.bfloat16, found x of torch.float16"):
        cann.moe(experts, torch.zeros((1, HIDDEN), dtype=torch.float16), torch.zeros((1, TOP)), torch.zeros((1, TOP), dtype=torch.int32))
    with pytest.raises(ValueError, match="no one stack"):
        cann.place_experts(gate, npu_weights.weight(rng, "w4a8_dynamic", HIDDEN, INNER, EXPERTS), down, device="cpu", soc="A2")
    static = [npu_weights.weight(rng, "w8a8_static_asym", *shape, EXPERTS) for shape in ((HIDDEN, INNER), (INNER, HIDDEN))]
    one = static[0].replace(input_scale=static[0].input_scale * 3)
    with pytest.raises(ValueError, match="their input_scale differ"):
        cann.place_experts(static[0], one, static[1], device="cpu", soc="A2")
    stack = cann.place({"experts": static[0]}, "cpu", "A2")["experts"]
    from qfunc._activation import quantize_rows
    from qfunc.interop.cann._quantize import Rows
    spec = static[0].scheme.activation
    plain = quantize_rows(jnp.ones((2, HIDDEN)), spec, static[0].input_scale[0], static[0].input_zero[0])
    rows = Rows(None, spec, plain=[torch.from_numpy(np.array(part)) for part in plain])
    with pytest.raises(ValueError, match="other zero points"):
        cann.grouped_matmul(stack, rows, torch.tensor([2, 0, 0, 0]))
    with pytest.raises(cann.PlacementError, match="runs on A2 and A3 alone, found A5"):
        cann.place_experts(gate, up, down, device="cpu", soc="A5")
    with pytest.raises(cann.PlacementError, match="N % 64 == 0, found N = 40"):
        narrow = [npu_weights.weight(rng, "w4a4_dynamic", a, b, EXPERTS) for a, b in ((40, 64), (40, 64), (64, 40))]
        cann.place_experts(*narrow, device="cpu", soc="A2")
