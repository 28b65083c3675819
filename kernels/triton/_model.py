"""What a launch costs at least, from bytes, operations and programs: it seeds the tables and prunes the search of the tuner.

None of it was measured on a GPU. Figures of devices are the makers' datasheets, derated to what large copies and large products of
random numbers are known to reach; the H200's are those of published measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qfunc._codes import code

from .._dispatch import Call
from . import _tables
from ._launch import Config, Launch, Target


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Fields: `name` as JAX gives it, `target`, `processors`, `bandwidth` (bytes/s, memory), `cache` (bytes/s, level two), `half` and
    `byte` (operations/s of bf16 and of 8-bit products), `lanes` (32-bit operations/s outside the tensor cores).
    """

    name: str
    target: str
    processors: int
    bandwidth: float
    cache: float
    half: float
    byte: float
    lanes: float


DEVICES = {device.name: device for device in (
    Device("NVIDIA H200", "sm_90", 132, 4.3e12, 10e12, 790e12, 1580e12, 30e12),
    Device("NVIDIA H100 80GB HBM3", "sm_90", 132, 3.0e12, 10e12, 790e12, 1580e12, 30e12),
    Device("NVIDIA A100-SXM4-80GB", "sm_80", 108, 1.8e12, 5e12, 250e12, 500e12, 19e12),
    Device("NVIDIA L40S", "sm_89", 142, 0.78e12, 4e12, 290e12, 580e12, 45e12),
    Device("NVIDIA B200", "sm_100", 148, 7.2e12, 16e12, 1800e12, 3600e12, 38e12),
    Device("AMD Instinct MI300X", "gfx942", 304, 4.2e12, 12e12, 800e12, 1600e12, 80e12),
)}
START = 2.5e-6
"""Seconds of an empty launch and its ramp."""
LATENCY = 0.8e-6
"""Seconds between asking memory for a byte and having it, under load."""


def floor(call: Call, device: Device) -> float:
    """Seconds that no kernel can beat: all bytes once over the bandwidth, or all products over the peak."""
    return max(_bytes(call) / device.bandwidth, _operations(call) / _peak(call, device))


def predict(call: Call, config: Config, launch: Launch, device: Device) -> float:
    """Seconds that a launch may take: the floor, made worse by tiles that are not full, programs too few to fill the device,
    re-reading through the cache, and the work of decoding. An ordering of configs, not a promise."""
    m, n, k = _tables.shape_of(call)
    programs = math.prod(launch.grid)
    down, across = -(-m // config.block_m), -(-n // config.block_n)
    if call.sizes is not None:
        down *= call.sizes.shape[0]
    resident = device.processors * max(8 // config.num_warps, 1)
    bits = code(call.packed.scheme.weight.code).bits
    weight, activation = _weight_bytes(call), m * k * _x_bytes(call)
    slabs = 2 * 4 * config.split_k * m * n if config.split_k > 1 else 0
    in_flight = min(programs, resident) * config.num_stages * config.block_n * min(config.block_k, 128) * bits / 8
    filled = min(1.0, in_flight / (device.bandwidth * LATENCY))
    memory = (_bytes(call) + slabs) / device.bandwidth / max(filled, 1e-3)
    again = (weight * max(down // max(_experts(call), 1), 1) + activation * across) / device.cache
    waves = -(-programs // resident)
    full = programs / (waves * resident)
    padded = 2.0 * down * config.block_m * across * config.block_n * k
    tile = min(1.0, (config.block_m * config.block_n) / (128 * 128)) ** 0.25
    arithmetic = padded / (_peak(call, device) * tile) / full
    decoding = (across * config.block_n * k * down * 1.5 / device.lanes / full) if bits < 8 else 0.0
    return START + max(memory, again, arithmetic, decoding) + (START if config.split_k > 1 else 0)


def _experts(call: Call) -> int:
    return call.sizes.shape[0] if call.sizes is not None else 1


def _operations(call: Call) -> float:
    m, n, k = _tables.shape_of(call)
    return 2.0 * m * n * k * _experts(call)


def _weight_bytes(call: Call) -> float:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in call.leaves)


def _x_bytes(call: Call) -> float:
    return call.x[0].dtype.itemsize if call.spec is None or call.quantized else 1


def _bytes(call: Call) -> float:
    m, n, k = _tables.shape_of(call)
    rows = math.prod(call.x[0].shape[:-1])
    return _weight_bytes(call) + rows * k * _x_bytes(call) + rows * n * call.out_dtype.itemsize


def _peak(call: Call, device: Device) -> float:
    from ._plan_matmul import arithmetic, coded
    dot = arithmetic(coded(call), Target.parse(device.target))
    return device.byte if dot in ("s8", "e4m3", "e5m2") else device.half / (8 if dot == "f32" else 1)


FUSED, LIBRARY = 0.65, 0.80
"""Fractions of the peak that a fused Triton kernel and the vendor's library are expected to reach where arithmetic decides."""


def unpack_from(device: Device) -> int:
    """The number of tokens from which unpacking the weight once (2.5 bytes for each) and the vendor's 16-bit product cost less than
    decoding inside the kernel; a multiple of 256."""
    saved = (1 / FUSED - 1 / LIBRARY) * 2 / device.half
    return -(-int(2.5 / device.bandwidth / saved) // 256) * 256
