"""One call of an operator, as the rules of `npu_rules` see it: arguments by name, the generation it is made for, and short questions."""

from __future__ import annotations

import contextlib
import contextvars

from npu_host import HANDLES

E8M0, FP4 = HANDLES["float8_e8m0fnu"], HANDLES["float4_e2m1fn_x2"]
LAST = 65535
_soc: contextvars.ContextVar[str | None] = contextvars.ContextVar("npu_rules_soc", default=None)


class Refused(ValueError):
    """A call that the device's software would refuse, or that the bridge has no reason to make."""


@contextlib.contextmanager
def on(soc: str):
    """Judge calls as they would be made on one generation."""
    token = _soc.set(soc)
    try:
        yield
    finally:
        _soc.reset(token)


def need(holds, name: str, rule: str) -> None:
    if not holds:
        raise Refused(f"{name}: {rule}")


class Call:
    """Arguments as attributes, the first of a list of tensors as `<name>_`, and short forms of the questions that rules ask."""

    def __init__(self, name, arguments):
        self.__dict__.update(arguments, op=name)
        for key, value in arguments.items():
            if isinstance(value, (list, tuple)) and value and hasattr(value[0], "dim"):
                need(len(value) == 1, name, f"{key}: a list of one tensor")
                setattr(self, key + "_", value[0])

    def need(self, holds, rule: str):
        need(holds, self.op, rule)

    def first(self, key: str):
        """The one tensor of a list argument, or None."""
        return getattr(self, key + "_", None)

    def tensor(self, key: str, shape, dtypes, value=None):
        """A tensor, where it is given, has this shape and one of these types."""
        value = getattr(self, key) if value is None else value
        if value is not None:
            self.need(value.dtype in dtypes, f"{key}: {' or '.join(map(str, dtypes))}, found {value.dtype}")
            self.need(tuple(value.shape) == tuple(shape), f"{key}: shape {tuple(shape)}, found {tuple(value.shape)}")

    def a5(self):
        self.need(_soc.get() in (None, "A5"), f"runs on A5, found {_soc.get()}")

    def not_a5(self):
        self.need(_soc.get() != "A5", "not shown to run on A5")


def types():
    """torch: its types, imported when a call is judged."""
    import torch
    return torch


def sixteen():
    """The 16-bit floating types."""
    return (types().float16, types().bfloat16)


def output(c: Call):
    """The type that output_dtype names."""
    t = types()
    return {5: t.float16, 15: t.bfloat16, 6: t.float32, 3: t.int32, None: None}.get(number(c.output_dtype), "other")


def number(dtype):
    """The number by which a schema knows a torch type; numbers as they are."""
    t = types()
    return {t.float16: 5, t.bfloat16: 15, t.float32: 6, t.int32: 3, t.int8: 1, t.qint8: 12, t.quint4x2: 16, t.float8_e4m3fn: 24}.get(
        dtype, dtype)
