"""Ranks without a launcher: forked from a parent that has imported everything already.

torchrun imports torch anew in every process, which takes seconds; a fork takes milliseconds. Also
what two runs are compared by.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

GRACE = 2.0  # seconds that the other ranks have to end by themselves once one has failed


def run_ranks(
    function: Callable[[int], None], world: int, output: Path, timeout: float = 120.0
) -> list[int]:
    """Run function(rank) on `world` forked ranks; returns their exit codes (minus a signal).

    What they print is appended to `output`. When one fails, the others are killed, as under
    torchrun. TimeoutError when none has failed and some still run after `timeout` seconds. The
    caller must have no process group open, and must not have run torch on several threads: neither
    survives a fork.
    """
    port = free_port()
    running = {_fork(function, rank, world, port, output): rank for rank in range(world)}
    codes, deadline, failed = [0] * world, time.monotonic() + timeout, False
    while running and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = True, time.monotonic() + GRACE
        time.sleep(0.005)
    for pid, rank in running.items():
        os.kill(pid, signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if running and not failed:
        raise TimeoutError(f"ranks {list(running.values())} still ran after {timeout} s: {output}")
    return codes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fork(function, rank: int, world: int, port: int, output: Path) -> int:
    """The process id of a rank that runs the function and ends."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = output.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            "TORCHELASTIC_RUN_ID": "forked",  # die with the parent (distributed.main)
        }
        function(rank)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without the parent's exit handlers


def lines_that_repeat(path: Path) -> list[dict]:
    """A run's log without the clock, and without how often the verifier's cache was hit."""
    varying = re.compile(r"time/|verifier/|.*_per_second$|mfu$")
    return [
        {k: v for k, v in json.loads(line).items() if not varying.match(k)}
        for line in path.read_text().splitlines()
    ]
