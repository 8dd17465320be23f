"""A tiny process that stands between whoever starts an engine and the engine, and leaves nothing behind.

vLLM is a family of processes; when its first one is killed the others may live on. The keeper leads their
process group: when its own parent dies (even by SIGKILL) or it gets SIGTERM, the engine is asked to stop;
when the engine is gone or does not go, the whole group is killed. Runs on the standard library alone, as a
script (`python -S keeper.py GRACE_S -- COMMAND …`), so that it costs 10 MB and 20 ms. Knows no vLLM.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str]) -> int:
    """Run the command in this process's group; return its exit status (128 + signal when it was killed)."""
    grace_s, command = float(argv[1]), argv[argv.index("--") + 1 :]
    parent = os.getppid()
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # what is left of our group is killed at the end, so it must be ours alone
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the engine become ours, so none stays a zombie
    asked: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one in front; it sends SIGTERM
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        return 1
    engine = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    status = _watch(engine, asked, grace_s)
    _kill_rest()
    return status if status >= 0 else 128 - status


def _watch(engine: "subprocess.Popen[bytes]", asked: list[float], grace_s: float) -> int:
    told = False
    while True:
        try:
            return engine.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
        _reap(engine.pid)
        if asked and not told:
            engine.terminate()
            told = True
        if asked and time.monotonic() - asked[0] > grace_s:
            engine.kill()


def _reap(engine_pid: int) -> None:
    """Collect adopted orphans without taking the engine's own exit status away from Popen."""
    try:
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (info := os.waitid(os.P_ALL, 0, look)) and info.si_pid != engine_pid:
            os.waitpid(info.si_pid, 0)
    except ChildProcessError:
        pass


def _kill_rest() -> None:
    """Kill what is left of the family: every other process of our group."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        rest = _group_members()
        if not rest:
            return
        for pid in rest:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        _reap(0)
        time.sleep(0.02)


def _group_members() -> list[int]:
    """Other processes of this process's group, zombies left out (somebody else's to reap)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat") as stat:
                state, _ppid, group = stat.read().rpartition(")")[2].split()[:3]
        except OSError:  # it ended while we looked
            continue
        if int(group) == os.getpgrp() and state != "Z":
            found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv))
