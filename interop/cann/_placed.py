"""What stands for a packed weight on the device: its operands as the operator wants them, and a way back to the leaves JAX knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import torch

from qfunc._qtensor import CODECS, QTensor, View
from qfunc.kernels._dispatch import Packed

from ._leaves import to_numpy
from ._npu import to_host


class Part:
    """One array that JAX sees of something that lies otherwise on the device: a leaf of a `Placed`, codes or scales of `Rows`.

    An interpreter hands it through as it is, and asks for `tensor()` where an ordinary operation needs the numbers.
    """

    __slots__ = ("owner", "name")

    def __init__(self, owner, name: str):
        self.owner, self.name = owner, name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that JAX knows."""
        return self.owner.part_shape(self.name)

    def tensor(self) -> torch.Tensor:
        """The array in JAX's form, on the device; made on demand and kept."""
        return self.owner.part_tensor(self.name)

    def __getitem__(self, index: int) -> Part:
        return Part(self.owner[index], self.name)

    def __repr__(self) -> str:
        return f"Part({self.name} of {self.owner!r})"


@dataclass(eq=False)
class Placed:
    """A packed weight on a device, laid out for the operator of its `kind`.

    Fields:
        kind: a row of `qfunc.interop.cann._soc.ROWS`; experts: laid out as a stack for grouped matmuls.
        packed: static side of the QTensor; view: the owner's axes; shape: (..., in, out) of the matrix.
        soc, device, dtype: where it is to run, and the 16-bit type of activations it expects.
        operands: tensors on the device, by the names that `_linear` and `_grouped` use.
        kept: leaves that the operands do not hold exactly, on the host: what makes the placement invertible.
        codes: (operands) -> canonical codes; None where `kept` has them.
        note: what was done that a user should know (dequantized and why); empty otherwise.
        children: the slices of a stack of layers, each placed alone; then there are no operands.
        meta: small Python facts of the operands (group size, width).
    """

    kind: str
    packed: Packed
    shape: tuple[int, ...]
    leaf_specs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    soc: str
    device: torch.device
    dtype: torch.dtype
    operands: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    codes: Callable | None = None
    note: str = ""
    experts: bool = False
    view: View = View()
    children: list[Placed] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    forms: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def scheme(self):
        """The scheme of the weight."""
        return self.packed.scheme

    @property
    def nbytes(self) -> int:
        """Bytes of the operands on the device; views of one storage count once."""
        if self.children:
            return sum(child.nbytes for child in self.children)
        seen = {}
        for tensor in self.operands.values():
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
        return sum(seen.values())

    @property
    def parts(self) -> list[Part]:
        """The leaves, in the order of `jax.tree.leaves` of the QTensor."""
        return [Part(self, name) for name in self.packed.fields]

    @property
    def abstract(self) -> QTensor:
        """The QTensor of shapes alone: what a function of the weight is traced with."""
        leaves = [jax.ShapeDtypeStruct(shape, _jax_dtype(dtype)) for shape, dtype in (self.leaf_specs[f] for f in self.packed.fields)]
        return self.packed.build(leaves).replace(view=self.view)

    def restore(self) -> QTensor:
        """The QTensor as it was, as numpy arrays, bit for bit. Raises ValueError for a placement on the meta device."""
        if self.device.type == "meta":
            raise ValueError("restore: a placement on the meta device has no numbers")
        return self.packed.build([to_numpy(self.part_tensor(name)) for name in self.packed.fields]).replace(view=self.view)

    def part_shape(self, name: str) -> tuple[int, ...]:
        return self.leaf_specs[name][0]

    def part_tensor(self, name: str) -> torch.Tensor:
        found = self.forms.get(("part", name))
        if found is None:
            if self.children:
                found = torch.stack([child.part_tensor(name) for child in self.children])
            else:
                # Bits are turned back on the host, where every shift and mask exists.
                found = self.codes(self._stored()) if name == "codes" and self.codes is not None else self.kept[name]
            found = self.forms["part", name] = found.to(self.device)
        return found

    def _stored(self) -> dict[str, torch.Tensor]:
        name = "base" if "base" in self.operands else "weight"
        return {name: to_host(self.operands[name])}

    def __getitem__(self, index: int) -> Placed:
        """The slice `index` of the first leading axis. Raises IndexError where there is none."""
        if self.children:
            return self.children[index]
        if len(self.shape) < 3:
            raise IndexError(f"{self!r} has no leading axis")
        return self.form(False)[index]

    def form(self, experts: bool) -> Placed:
        """This weight laid out as a stack of experts, or as matrices one by one; made once, where it is not the layout it has."""
        if experts == self.experts and not (experts and self.children) or len(self.shape) < 3:
            return self
        if experts not in self.forms:
            from ._place import place_leaves
            leaves = {name: to_host(self.part_tensor(name)) for name in self.packed.fields}
            self.forms[experts] = place_leaves(self.packed, leaves, soc=self.soc, device=self.device, dtype=self.dtype,
                                               dequantize=self.kind == "float", experts=experts, view=self.view)
        return self.forms[experts]

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"Placed({self.packed.scheme.name} ({shape}) as {self.kind}{' experts' * self.experts} for {self.soc} on {self.device})"


def _jax_dtype(dtype: torch.dtype):
    import jax.numpy as jnp
    return jnp.dtype(str(dtype).removeprefix("torch."))


def matrix_shape(packed: Packed, codes_shape) -> tuple[int, ...]:
    """(..., in, out) of a weight from the shape of its codes."""
    *batch, rows, size = codes_shape
    return (*batch, CODECS.columns(packed.scheme.weight.code, size) - packed.pad, rows)
