"""Processes that do not outlive their parent, however that one ends.

A rank whose launcher was killed, or a loader process whose rank was, would go on holding its GPU or its memory, and nobody would look for it. The kernel
ends such a process itself when it is asked to (prctl(2), PR_SET_PDEATHSIG); it counts from then on, so a parent that is gone already is looked for once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process by SIGKILL when its parent is gone; does nothing but on Linux.

    Args:
        parent: process id of the parent, as the caller knew it before it could have died.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def birth(process: int) -> int | None:
    """When a process of this host began, in the kernel's clock ticks; None when there is no such process, or only what is left of one.

    A process id is used again; together with this number it is not.
    """
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The name, in parentheses, may hold anything; what follows it are plain fields: the state is the third, the birth the twenty-second.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
