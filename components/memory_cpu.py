"""How the process holds its memory on a CPU."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt's parameters


def hold_freed_memory() -> bool:
    """Keeps freed memory in the process; returns whether this system's allocator can.

    A training step frees and asks for the same activations again and again. By default glibc
    gives large blocks back to the system, which hands them out anew page by page: about a tenth
    of a small model's step on one thread. The peak is the same. Call once, before training.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
