"""What this machine's processor can do: whether bf16 is fast here, or emulated.

Measured on an x86 core without bf16 instructions: products of 1.2 GFLOP/s in bf16 and 60 in fp32.
"""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, aarch64
BF16_IS_SLOW = ("this processor has no bf16 instructions (avx512_bf16, amx_bf16; bf16 on arm): bf16 is emulated, up to 50 "
                "times slower than train.precision=fp32")


def has_bf16(cpuinfo: Path = CPUINFO) -> bool | None:
    """Whether the processor multiplies bf16; None where the system does not say."""
    try:
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        return None
    return any(not BF16_FLAGS.isdisjoint(line.split()) for line in lines) if lines else None
