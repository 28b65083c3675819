"""The bridge to Ascend NPUs: JAX functions run by torch, packed weights by torch_npu's operators.

    from qfunc.interop import cann
    params = cann.place(model.params, device="npu", soc="A2")
    apply = cann.to_torch(qfunc.layers.decoder.apply)
    logits, cache = apply(params, ids, None, model.config)

torch is imported when one of these names is first used, torch_npu when an operator is.
"""

from qfunc._lazy import attach as _attach

_PUBLIC = {
    "Collective": "_parallel", "Experts": "_moe", "Placed": "_placed", "PlacementError": "_place", "callback": "_callback",
    "explain": "_explain",
    "grouped_matmul": "_grouped", "linear": "_linear", "moe": "_moe", "place": "_place", "place_experts": "_moe",
    "rank_config": "_parallel", "rank_params": "_parallel", "read_cache": "_cache", "restore": "_place", "to_array": "_arrays",
    "to_tensor": "_arrays", "to_torch": "_trace", "write_cache": "_cache",
}

__all__ = [*_PUBLIC]
__getattr__, __dir__ = _attach(__name__, _PUBLIC)
