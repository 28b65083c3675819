"""From a jaxpr to a list of torch instructions: rules are looked up, and everything unknown is refused, before anything runs.

A rule is a factory: it sees an equation and gives the function of its operands. Operands are tensors; literals arrive as Python numbers
that the factory can see in the equation. Values may also be `held`: parts of a placed weight or of a quantized activation, which lie in
an operator's own form and know `.tensor()`, the array that JAX means. Rules of the quantized primitives take them as they are, other
rules get the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.extend.core import Literal

from ._arrays import torch_dtype
from ._held import HELD
from ._program import Instruction, Program, device, with_drops

LAX: dict[str, Callable] = {}
"""Primitive name to factory `(eqn, builder) -> function(*operands)`; filled by the `_lax_*` modules."""


def rule(*names: str):
    """Register a factory for primitives of these names."""
    def add(factory):
        for name in names:
            LAX[name] = factory
        return factory
    return add


class UnknownPrimitive(NotImplementedError):
    """An equation for which there is no torch rule; its text, and perhaps why."""

    def __init__(self, eqn, why: str = ""):
        # In a notebook JAX prints equations in colour.
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(eqn))
        super().__init__(f"{why}\n{text}" if why else text)


def is_literal(v) -> bool:
    return isinstance(v, Literal)


def number(v):
    """The Python number of a literal."""
    value = np.asarray(v.val)
    return value.astype(np.float32).item() if value.dtype.kind == "V" or value.dtype.name.startswith(("bfloat", "float8")) else value.item()


def tensor_of(v) -> torch.Tensor:
    """A literal as a tensor, filled on the device: nothing crosses from the host."""
    return torch.full(tuple(v.aval.shape), number(v), dtype=torch_dtype(v.aval.dtype), device=device())


class Builder:
    """Makes a `Program` of a jaxpr.

    Fields: `rules`, primitive name to function `(params, operands, soc=) -> results` of quantized primitives; `inlined`, primitive
    name to function `(eqn) -> ClosedJaxpr` of equations that another jaxpr stands for; `products`, `branches`, `soc` and `collective`
    as in `to_torch`.
    """

    def __init__(self, rules: dict[str, Callable], inlined: dict[str, Callable], products: str, branches: str, soc: str, collective):
        self.rules, self.inlined, self.products, self.branches, self.soc = rules, inlined, products, branches, soc
        self.collective = collective

    def program(self, jaxpr, consts: Sequence, held: Sequence[bool], keep: bool = False) -> Program:
        """The program of a jaxpr. `held`: which arguments are held values; `keep`: results may stay held."""
        scope = _Scope(self)
        inputs = [scope.new(v, h) for v, h in zip(jaxpr.invars, held, strict=True)]
        for v, value in zip(jaxpr.constvars, consts, strict=True):
            scope.constants[scope.new(v)] = value
        scope.equations(jaxpr)
        outputs = [scope.slot(v) if keep else scope.plain(v) for v in jaxpr.outvars]
        steps = with_drops(scope.steps, {*outputs, *scope.constants})
        return Program(steps, scope.size, scope.constants, tuple(inputs), tuple(outputs), tuple(slot in scope.held for slot in outputs))


class _Scope:
    """Slots and steps while a program is made."""

    def __init__(self, builder: Builder):
        self.builder, self.steps, self.size = builder, [], 0
        self.slots: dict[Any, int] = {}
        self.folded: dict[Any, Literal] = {}        # variables whose value is known
        self.held: set[int] = set()
        self.tensors: dict[int, int] = {}           # slot of a held value to that of its tensor
        self.constants: dict[int, Any] = {}
        self.frames: list[tuple[dict, Any]] = []    # per jaxpr that is walked: who reads each variable, and the equation it stands for

    def new(self, v=None, held: bool = False) -> int:
        slot, self.size = self.size, self.size + 1
        if v is not None:
            self.slots[v] = slot
        if held:
            self.held.add(slot)
        return slot

    def slot(self, v) -> int:
        """The slot of a value as it is."""
        v = v if is_literal(v) else self.folded.get(v, v)
        if not is_literal(v):
            return self.slots[v]
        slot = self.new()
        self.steps.append(Instruction("literal", lambda: tensor_of(v), (), (slot,), (v.aval,), False))
        return slot

    def plain(self, v) -> int:
        """The slot of a value as a tensor."""
        slot = self.slot(v)
        if slot not in self.held:
            return slot
        if slot not in self.tensors:
            self.tensors[slot] = made = self.new()
            self.steps.append(Instruction("tensor", lambda part: part.tensor(), (slot,), (made,), (v.aval,), False))
        return self.tensors[slot]

    def is_held(self, v) -> bool:
        """True for values that lie in an operator's own form."""
        return not is_literal(v) and self.slots.get(v) in self.held

    def program(self, jaxpr, consts, held, keep=False) -> Program:
        """A program of its own, for the body of a loop or a branch."""
        return self.builder.program(jaxpr, consts, held, keep)

    def equations(self, jaxpr, call=None) -> None:
        unknown, equations = [], live(jaxpr)
        readers: dict[Any, list] = {}
        for eqn in (*equations, jaxpr):
            for i, v in enumerate(eqn.outvars if eqn is jaxpr else eqn.invars):
                if not is_literal(v):
                    readers.setdefault(v, []).append((eqn, i))
        self.frames.append((readers, call))
        for eqn in equations:
            try:
                self.equation(eqn)
            except UnknownPrimitive as error:
                unknown.append(str(error))
                for v in eqn.outvars:
                    self.new(v)
        self.frames.pop()
        if unknown:
            raise UnknownPrimitive("\n".join(dict.fromkeys(unknown)))

    def rounded(self, v):
        """The torch type to which the only reader of a value casts it, whatever moves in between; None where there is no such reader."""
        depth = len(self.frames) - 1
        while True:
            readers, call = self.frames[depth]
            found = readers.get(v, [])
            if len(found) != 1:
                return None
            reader, place = found[0]
            name = getattr(getattr(reader, "primitive", None), "name", None)
            if name == "convert_element_type":
                return torch_dtype(reader.params["new_dtype"])
            if name in MOVES:
                v = reader.outvars[0]
            elif name is None and call is not None:
                v, depth = call.outvars[place], depth - 1
            else:
                return None

    def equation(self, eqn) -> None:
        if any(v in self.folded for v in eqn.invars if not is_literal(v)):
            eqn = eqn.replace(invars=[v if is_literal(v) else self.folded.get(v, v) for v in eqn.invars])
        name, rules = eqn.primitive.name, self.builder.rules
        if name in INLINED:
            return self.inline(eqn, *_closed(eqn))
        if name == "cond" and is_literal(eqn.invars[0]):
            branches = eqn.params["branches"]
            taken = branches[min(max(int(number(eqn.invars[0])), 0), len(branches) - 1)]
            return self.inline(eqn.replace(invars=eqn.invars[1:]), taken.jaxpr, taken.consts)
        if name in rules:
            return self.special(eqn, rules[name])
        if name in self.builder.inlined:
            closed = self.builder.inlined[name](eqn)
            return self.inline(eqn, closed.jaxpr, closed.consts)
        if self.fold(eqn) or self.view(eqn):
            return None
        if name not in LAX:
            raise UnknownPrimitive(eqn)
        try:
            function = LAX[name](eqn, self)
        except TypeError as error:                      # a type that torch has not
            raise UnknownPrimitive(eqn, str(error)) from None
        if getattr(function, "held", False):
            operands = [self.slot(v) for v in eqn.invars]
        else:
            operands = [self.plain(v) for v in eqn.invars if not is_literal(v)]
        return self.emit(eqn, function, operands)

    def emit(self, eqn, function, operands, held: bool = False, many: bool | None = None) -> None:
        outputs = tuple(self.new(v, held) for v in eqn.outvars)
        self.steps.append(Instruction(eqn.primitive.name, function, tuple(operands), outputs, tuple(v.aval for v in eqn.outvars),
                                      eqn.primitive.multiple_results if many is None else many))

    def special(self, eqn, function) -> None:
        """A quantized primitive: its rule sees the parameters of the equation and the operands as they are."""
        params, soc = dict(eqn.params), self.builder.soc
        self.emit(eqn, lambda *operands: function(params, operands, soc=soc), [self.slot(v) for v in eqn.invars],
                  held=eqn.primitive.name == "quantize_activation", many=True)

    def inline(self, eqn, jaxpr, consts) -> None:
        # One jaxpr may stand in many places: its variables mean nothing outside of it.
        actual = [(v, given, None if is_literal(given) else self.slots[given]) for v, given in zip(jaxpr.invars, eqn.invars, strict=True)]
        outer, self.slots = self.slots, {}
        known, self.folded = self.folded, {}
        try:
            for v, value in zip(jaxpr.constvars, consts, strict=True):
                self.constants[self.new(v)] = value
            for v, given, slot in actual:
                if is_literal(given):
                    self.folded[v] = given
                else:
                    self.slots[v] = slot
            self.equations(jaxpr, eqn)
            results = [v if is_literal(v) else self.folded.get(v) or self.slots[v] for v in jaxpr.outvars]
        finally:
            # What is unknown inside is one refusal among those that the equations outside may add.
            self.slots, self.folded = outer, known
        for v, found in zip(eqn.outvars, results, strict=True):
            (self.slots if isinstance(found, int) else self.folded)[v] = found

    def fold(self, eqn) -> bool:
        """A scalar made of literals alone is computed now; of branches for platforms, that for all others is taken."""
        if eqn.primitive.name == "platform_index" and None in eqn.params["platforms"]:
            self.folded[eqn.outvars[0]] = Literal(np.int32(eqn.params["platforms"].index(None)), eqn.outvars[0].aval)
            return True
        if not eqn.invars or not all(map(is_literal, eqn.invars)) or len(eqn.outvars) != 1 or eqn.effects:
            return False
        v = eqn.outvars[0]
        if v.aval.shape or v.aval.dtype.name not in FOLDED:
            return False
        with jax.ensure_compile_time_eval():
            value = eqn.primitive.bind(*[u.val for u in eqn.invars], **eqn.params)
        value = value[0] if eqn.primitive.multiple_results else value
        self.folded[v] = Literal(np.asarray(value), v.aval)
        return True

    def view(self, eqn) -> bool:
        """Handing a held value on, or one step along its first axis, keeps it held: `leaf[i]` is slice and squeeze."""
        if not eqn.invars or not self.is_held(eqn.invars[0]) or eqn.primitive.name not in HELD:
            return False
        function = HELD[eqn.primitive.name](eqn)
        if function is None:
            return False
        self.emit(eqn, function, [self.slots[eqn.invars[0]]], held=True)
        return True


MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy")
FOLDED = ("bool", "int8", "int16", "int32", "uint8", "float32", "float16", "bfloat16")


def _closed(eqn):
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            found = eqn.params[key]
            return (found.jaxpr, found.consts) if hasattr(found, "jaxpr") else (found, [])
    raise UnknownPrimitive(eqn)


INLINED = frozenset(("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat",
                     "remat2", "checkpoint", "composite"))
"""Equations that stand for another jaxpr, which takes their place: derivatives and recomputation are nothing to a forward run."""


def live(jaxpr) -> list:
    """The equations whose results are needed."""
    needed, kept = {v for v in jaxpr.outvars if not is_literal(v)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if not is_literal(v))
            kept.append(eqn)
    return kept[::-1]
