"""What a multiprocessor of each CUDA target has, and how many blocks of a kernel fit it.

From the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (up to 9.0 also in CCCL's
``arch_traits.cuh``); that registers are given out by 256 a warp, to four warps at a time, is the CUDA Occupancy
Calculator's.
"""

from __future__ import annotations

from typing import NamedTuple


class GpuLimits(NamedTuple):
    blocks: int  # resident on a multiprocessor
    warps: int
    shared: int  # bytes
    shared_of_block: int  # bytes that one block may ask for
    registers: int = 65536
    shared_reserved: int = 1024  # bytes of every block


LIMITS_OF = {
    "80": GpuLimits(32, 64, 164 << 10, 163 << 10),
    "86": GpuLimits(16, 48, 100 << 10, 99 << 10),
    "89": GpuLimits(24, 48, 100 << 10, 99 << 10),
    "90": GpuLimits(32, 64, 228 << 10, 227 << 10),
    "100": GpuLimits(32, 64, 228 << 10, 227 << 10),
    "120": GpuLimits(24, 48, 100 << 10, 99 << 10),
}
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT = 256, 4, 128


def blocks_per_processor(limits: GpuLimits, threads: int, registers: int, shared: int) -> int:
    """How many blocks of ``threads`` with ``registers`` each and ``shared`` bytes are resident at once."""
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = limits.registers // registers_of_warp // WARP_UNIT * WARP_UNIT
    shared_of_block = -(-shared // SHARED_UNIT) * SHARED_UNIT + limits.shared_reserved
    return min(limits.blocks, limits.warps // warps, warps_by_registers // warps, limits.shared // shared_of_block)
