"""What both processes of a comparison share: a reading of memory, and the order of fresh inputs."""

from pathlib import Path

import numpy as np


def peak_bytes() -> int:
    """The high-water mark of this process's resident set, imports included, as the kernel keeps it.

    Not `getrusage`'s `ru_maxrss`: a child process inherits its parent's there.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def shuffles(round: int, *lengths: int) -> list[np.ndarray]:
    """Orders of data sets of these lengths: as they are in round 0, new ones in every other."""
    rng = np.random.default_rng(round)
    return [rng.permutation(n) if round else np.arange(n) for n in lengths]
