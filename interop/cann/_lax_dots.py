"""Torch rules of lax contractions.

JAX says in which type a product is accumulated (`preferred_element_type`); torch's matmul of 16-bit tensors accumulates in float32 and
rounds once. A product whose float32 sum is only cast back to the operands' type is therefore one 16-bit matmul, bit for bit what was
asked for; any other float32 sum of 16-bit operands is computed in float32, or with `products="operands"` of `to_torch` in 16 bits and cast.
"""

from __future__ import annotations

import math

import torch

from ._arrays import torch_dtype
from ._build import UnknownPrimitive, rule
from ._lax_elementwise import UNSIGNED, cast, every, narrowed, widened
from ._lax_shapes import padded

HALF = (torch.bfloat16, torch.float16)


@rule("dot_general")
def _dot_general(eqn, scope):
    ((lc, rc), (lb, rb)), preferred = eqn.params["dimension_numbers"], eqn.params["preferred_element_type"]
    left, right = (v.aval for v in eqn.invars)
    out = torch_dtype(eqn.outvars[0].aval.dtype)
    compute = _compute(torch_dtype(left.dtype), torch_dtype(right.dtype), torch_dtype(preferred or eqn.outvars[0].aval.dtype),
                       scope.rounded(eqn.outvars[0]), scope.builder.products)
    return every(eqn, Contraction((lc, rc), (lb, rb), left.shape, right.shape, compute, out))


def _compute(left, right, wanted, rounded, products: str):
    """The type in which a product is computed."""
    if left == right and left in HALF and (wanted == left or rounded == left or products == "operands"):
        return left
    if wanted == torch.bool:
        return torch.float32
    if not wanted.is_floating_point:
        return torch.int64 if wanted in UNSIGNED else wanted
    return torch.float64 if torch.float64 in (left, right, wanted) else torch.float32


class Contraction:
    """lax's dot_general as a batched matmul. Operands are brought to (batch, free, contracted) by views where that is possible."""

    def __init__(self, contract, batch, left, right, compute, out):
        self.compute, self.out = compute, out
        (lc, rc), (lb, rb) = contract, batch
        lf = [d for d in range(len(left)) if d not in (*lc, *lb)]
        rf = [d for d in range(len(right)) if d not in (*rc, *rb)]
        self.left, self.right = (*lb, *lf, *lc), (*rb, *rc, *rf)
        size = math.prod
        batches = [left[d] for d in lb]
        m, n, k = size(left[d] for d in lf), size(right[d] for d in rf), size(left[d] for d in lc)
        self.shape = (*batches, *(left[d] for d in lf), *(right[d] for d in rf))
        lead = (size(batches),) if lb else ()
        self.matrices = (*lead, m, k), (*lead, k, n)

    def __call__(self, x, y):
        x = widened(x.permute(self.left).reshape(self.matrices[0])).to(self.compute)
        y = widened(y.permute(self.right).reshape(self.matrices[1])).to(self.compute)
        out = torch.matmul(x, y).reshape(self.shape)
        return narrowed(out, self.out) if self.out in UNSIGNED else cast(out, self.compute, self.out)


@rule("ragged_dot_general")
def _ragged(eqn, scope):
    """Rows of x, sorted by group, times the matrix of their group; rows beyond the last group are zero."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((xc, wc), (xb, wb)) = numbers.dot_dimension_numbers
    x, w, sizes = (v.aval for v in eqn.invars)
    if xb or wb or (x.ndim, w.ndim) != (2, 3) or tuple(numbers.lhs_ragged_dimensions) != (1 - xc[0],) \
            or len(numbers.rhs_group_dimensions) != 1 or sizes.ndim != 1:
        raise UnknownPrimitive(eqn)
    group = numbers.rhs_group_dimensions[0]
    free = 3 - group - wc[0]
    out = torch_dtype(eqn.outvars[0].aval.dtype)
    compute = _compute(torch_dtype(x.dtype), torch_dtype(w.dtype), out, scope.rounded(eqn.outvars[0]), scope.builder.products)

    def run(x, w, sizes):
        x = x if xc[0] == 1 else x.T
        return ragged(x.to(compute), w.permute(group, wc[0], free).to(compute), sizes).to(out)
    return every(eqn, run)


def ragged(x: torch.Tensor, w: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """x [T, K], w [E, K, N], sizes int [E] -> [T, N]. On an NPU one grouped matmul of 16-bit numbers; elsewhere one product per expert on
    all rows, which asks nobody how many rows each has."""
    ends = torch.cumsum(sizes.to(torch.int64), 0)
    rows = torch.arange(x.shape[0], device=x.device)
    if x.device.type == "npu" and x.dtype in HALF:
        y = grouped_operator(x, w, sizes)
        return torch.where((rows < ends[-1])[:, None], y, 0)
    y = x.new_zeros(x.shape[0], w.shape[-1])
    for expert in range(w.shape[0]):
        own = (rows < ends[expert]) & (rows >= ends[expert] - sizes[expert])
        y = torch.where(own[:, None], x @ w[expert], y)
    return y


def grouped_operator(x: torch.Tensor, w: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """torch_npu's grouped matmul of floats: group_list are the rows of each expert, the result is one tensor."""
    from ._npu import operator
    return operator("npu_grouped_matmul")([x], [w], split_item=2, group_type=0, group_list=sizes.to(torch.int64), group_list_type=1)[0]


@rule("conv_general_dilated")
def _convolution(eqn, scope):
    """Convolutions of images and videos in any order of axes; the input of a transposed one is spread out by zeros first."""
    p, (x, w) = eqn.params, (v.aval for v in eqn.invars)
    space = x.ndim - 2
    if p["batch_group_count"] != 1 or space not in (1, 2, 3):
        raise UnknownPrimitive(eqn)
    function = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[space]
    numbers, out = p["dimension_numbers"], torch_dtype(eqn.outvars[0].aval.dtype)
    edges = [(0, 0, 0)] * 2 + [(low, high, by - 1) for (low, high), by in zip(p["padding"], p["lhs_dilation"], strict=True)]
    back = [0] * x.ndim
    for i, d in enumerate(numbers.out_spec):
        back[d] = i
    compute = _compute(torch_dtype(x.dtype), torch_dtype(w.dtype), out, scope.rounded(eqn.outvars[0]), scope.builder.products)

    def run(x, w):
        x = padded(x.permute(numbers.lhs_spec).to(compute), 0, edges)
        y = function(x, w.permute(numbers.rhs_spec).to(compute), stride=tuple(p["window_strides"]), dilation=tuple(p["rhs_dilation"]),
                     groups=p["feature_group_count"])
        return y.permute(back).to(out)
    return every(eqn, run)
