"""The kind of device that is lowered for, which need not be here."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

from jax.experimental.xla_metadata import set_xla_metadata

_SETTING = {"cuda": "QFUNC_CUDA_CAPABILITY", "rocm": "QFUNC_ROCM_ARCH"}
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("qfunc_triton_target", default=None)


@contextlib.contextmanager
def lowering_for(target: str) -> Iterator[None]:
    """Lower for a device that need not be here: `sm_90` (also `90` and `9.0`) or `gfx942`. Functions traced before are traced again."""
    name = target_name(target)
    token = _asked.set(name)
    try:
        with set_xla_metadata(qfunc_target=name):
            yield
    finally:
        _asked.reset(token)


def target_name(value: str) -> str:
    """`9.0`, `90`, `sm_90a` and `gfx942:sramecc+` as `sm_90` and `gfx942`; ValueError for anything else."""
    text = str(value).strip().lower().split(":")[0]
    if text.startswith("gfx") and text[3:].isalnum():
        return text
    digits = text.removeprefix("sm_").removeprefix("sm").rstrip("af").replace(".", "")
    if not (digits.isdigit() and 2 <= len(digits) <= 3):
        raise ValueError(f"expected a compute capability such as 9.0 or sm_90, or an architecture such as gfx942, found {value!r}")
    return f"sm_{digits}"


def target_of(platform: str) -> str | None:
    """What a platform's kernels are compiled for: asked for by `lowering_for`, the device that is here, or `QFUNC_CUDA_CAPABILITY`.

    None where there is neither a device nor a setting. Raises ValueError where the devices of this process differ.
    """
    fits = str.startswith
    prefix = {"cuda": "sm_", "rocm": "gfx"}[platform]
    asked = _asked.get()
    if asked is not None and fits(asked, prefix):
        return asked
    found = _devices(platform)
    if len(found) > 1:
        raise ValueError(f"the {platform} devices of this process differ ({', '.join(sorted(found))}): name one with lowering_for(...)")
    if found:
        return next(iter(found))
    setting = os.environ.get(_SETTING[platform])
    return target_name(setting) if setting else None


def missing_target(platform: str) -> str:
    """The reason to give where `target_of` finds nothing."""
    return f"no {platform} device is here and {_SETTING[platform]} is not set, so it is not known what to compile for"


def _devices(platform: str) -> set[str]:
    from jax.extend import backend
    backends = backend.backends()
    client = backends.get(platform)
    if client is None:
        client = backends.get("gpu")
        if client is None or (platform == "rocm") != ("rocm" in getattr(client, "platform_version", "").lower()):
            return set()
    return {target_name(device.compute_capability) for device in client.local_devices()}
