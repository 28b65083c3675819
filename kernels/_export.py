"""What `jax.export` must be told about the custom calls of the native implementations."""

from __future__ import annotations

CUSTOM_CALLS: list[str] = []
"""Names of the custom calls that implementations emit; they keep their meaning between versions of qfunc."""


def export_checks() -> list:
    """The safety checks to disable: `jax.export.export(jitted, disabled_checks=qfunc.kernels.export_checks())`."""
    import jax.export
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
