"""How every virtual machine of the tests that runs a system is emulated.

The processor is one of 2008 with a source of random numbers: a kernel and a C library that find
AVX, SMAP and what else QEMU can emulate use them, and emulated they are slow.  The environment of
a deployment is up in 8.0 s with this one, in 10.7 s with `-cpu max`.
"""

from __future__ import annotations

EMULATOR = (
    "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "Nehalem,+rdrand",
    "-display", "none", "-no-reboot", "-monitor", "none",
)  # fmt: skip
