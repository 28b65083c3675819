"""Calls under several implementations of the primitives."""

import qfunc


def both(function, *args):
    """(native, reference) results of one call."""
    out = []
    for name in ("native", "reference"):
        with qfunc.use(name):
            out.append(function(*args))
    return out
