"""Launches that fit: shared memory is known only of compiled code, so a launch that takes too much gives way to a smaller one.

The order of what is tried depends on the call and the tables alone, and every image is kept, those that do not fit included: a call has
the same launch each time, and only the first lowering compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from .._dispatch import Call
from . import _image, _launch, _tables
from ._launch import Config, Launch, Target


def planned(call: Call, config: Config | None = None) -> Launch:
    """The launch of a call on its target, with the config of the tuning tables unless one is given."""
    return _launch.describe(call, Target.parse(call.target), config or _tables.config(call, call.target))


def program_of(launch: Launch) -> _image.Program:
    """What is compiled for a launch."""
    kernel, options = launch.kernel, launch.options
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    return _image.Program(f"{kernel.module}:{kernel.function}", tuple(launch.signature.items()), tuple(launch.constexprs.items()),
                          launch.divisible, warps, stages, tuple(options.items()))


def smaller(config: Config) -> Config | None:
    """The next config to try: a stage less while there are more than two, then half of the tile's longer side; None at the smallest."""
    if config.num_stages > 2:
        return dataclasses.replace(config, num_stages=config.num_stages - 1)
    m, n = config.block_m, config.block_n
    if max(m, n) <= 16:
        return None
    m, n = (m // 2, n) if m > n else (m, n // 2)
    # Half the sums are work for half the warps; `adapt` raises them where registers want more.
    return dataclasses.replace(config, block_m=m, block_n=n, num_warps=max(config.num_warps // 2, 4))


def launches(call: Call) -> Iterator[Launch]:
    """What is tried for a call, in order: the launch of the tables, then ever smaller ones."""
    config = _tables.config(call, call.target)
    while config is not None:
        yield planned(call, config)
        config = smaller(config)


def fitted(call: Call, complete: Callable[[Launch], Launch] = lambda launch: launch) -> Launch:
    """The first of `launches` whose compiled code fits the target's shared memory, after `complete`; KernelError where none does."""
    for launch in map(complete, launches(call)):
        try:
            _image.compiled(program_of(launch), call.target)
        except _image.SharedMemoryError:
            continue
        return launch
    raise _image.SharedMemoryError(_none_fits(call))


def refusal(call: Call) -> str | None:
    """None, or why no launch of a call can be had, as far as images that there are tell. Compiles nothing."""
    for launch in launches(call):
        program = program_of(launch)
        image = _image.find(program, call.target)
        if image is None:
            return _image.missing(program, call.target)
        if _image.fits(image, call.target):
            return None
    return _none_fits(call)


def _none_fits(call: Call) -> str:
    return f"no tile of the kernel fits the {_launch.SHARED_MEMORY[call.target]} bytes of shared memory of {call.target}"
