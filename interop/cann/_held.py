"""Equations that hand a held value on, or take one step along its first axis, and leave it held: `leaf[i]` is slice and squeeze."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Step:
    """One step along the first axis of a part, which a `squeeze` will drop."""

    def __init__(self, part, index: int):
        self.part, self.index = part, index

    def tensor(self) -> torch.Tensor:
        return self.part.tensor()[self.index:self.index + 1]


class Taken:
    """One step along the first axis of a part that is no stack of weights: a row."""

    def __init__(self, step: Step):
        self.step = step

    def tensor(self) -> torch.Tensor:
        return self.step.tensor().squeeze(0)


def _held_slice(eqn):
    start, limit, shape = eqn.params["start_indices"], eqn.params["limit_indices"], eqn.invars[0].aval.shape
    whole = all(a == 0 and b == size for a, b, size in zip(start[1:], limit[1:], shape[1:], strict=True))
    if not whole or len(shape) < 2 or limit[0] - start[0] != 1:
        return None
    return lambda part: Step(part, start[0])


def _held_squeeze(eqn):
    if tuple(eqn.params["dimensions"]) != (0,):
        return None

    def squeeze(value):
        if not isinstance(value, Step):
            return Taken(Step(value, 0))
        stacked = len(getattr(getattr(value.part, "owner", None), "shape", ())) > 2
        return value.part[value.index] if stacked else Taken(value)
    return squeeze


HELD: dict[str, Callable] = {"slice": _held_slice, "squeeze": _held_squeeze, "copy": lambda eqn: lambda part: part,
                             "stop_gradient": lambda eqn: lambda part: part}
"""Equations after which a held value is still held."""
