"""Becomes another program, which Linux kills when the one that started it dies, however that happens.

A script of the standard library (`python -S tied.py PARENT_PID PROGRAM ARGUMENTS…`), because setting this
between fork and exec would run Python in a copy of a process full of threads. The tie is to the *thread* that
started it. Unlike serve/engine/keeper.py nothing stays in between: for programs that have no family. Knows
nothing about what it becomes.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Returns only when the parent was gone before the tie."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(argv[1]):
        os.execv(argv[2], argv[2:])


if __name__ == "__main__":
    main(sys.argv)
    sys.exit(1)
