"""Kill a run anywhere, go on with --resume auto, and compare with a run that nobody disturbed.

    python scripts/kill_anywhere.py                      every file operation, and 20 moments
    python scripts/kill_anywhere.py --every 7 --random 3 a sample of them

The points are all file operations (open for writing, fsync, rename, remove, mkdir, rmdir) that the
first process makes in its output directory, each by its number and name, and random moments; the
signals SIGKILL and SIGTERM; on 1 and 2 processes. A point passes when after one resume metrics,
evaluations and the final model are those of the undisturbed run, to the bit, and nothing half done
is left in the directory. Exit code 1 if one does not.

Processes are forked from here, so that each need not import torch anew, and this script plays
torchrun: when one process dies, it ends the others.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for variable in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(variable, "1")

# What a run imports only when it comes to it; here once for all of them.
import matplotlib.pyplot  # noqa: F401
from transformers import (  # noqa: F401
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2ForCausalLM,
)

import train
from runtime import distributed
from runtime.config import parse
from tasks import arithmetic

# Step 0 to 4 with a checkpoint after steps 1, 2 and 4: one is deleted, one replaced by nothing.
FLAGS = (
    "--steps 4 --save-every 2 --keep-checkpoints 1 --questions-per-step 4 --num-rollouts 4 "
    "--num-summaries 2 --eval-questions 4 --eval-samples 1 --eval-budgets 12 48 "
    "--max-tokens-per-row 600 --eval-every 2"
).split()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(directory: Path, log: Path | None, kill_at: int, number: int):
    """Log every file operation below `directory`; before the one numbered `kill_at`, the signal."""
    count = 0

    def seen(name: str, path):
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        path = path.decode() if isinstance(path, bytes) else path
        if path.startswith(str(directory)):
            count += 1
            if log:
                with open(log, "a") as f:
                    f.write(f"{name} {path.removeprefix(str(directory)) or '/'}\n")
            if count == kill_at:
                os.kill(os.getpid(), number)

    def hook(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITES:
            seen("open", args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            # rmtree removes by names relative to open directories
            inside = args[-1] if event in ("os.remove", "os.rmdir") and args[-1] != -1 else None
            seen(event, args[0] if inside is None else inside)

    fsync = os.fsync
    os.fsync = lambda descriptor: (seen("fsync", descriptor), fsync(descriptor))[1]
    sys.addaudithook(hook)


def launch(
    args: list[str], processes: int, out: Path, log=None, kill_at=0, number=0, after: float = 0.0
) -> list[int]:
    """Run train.py's main on so many forked processes; returns their exit codes (minus signal)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 1
        try:
            quiet = os.open(out.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
            }
            if rank == 0:
                watch(out, log, kill_at, number)
            distributed.main(lambda: train.train(parse(args)))
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            os._exit(code)
    codes, due = {}, time.monotonic() + after
    while len(codes) < processes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] not in (0, distributed.STOPPED):
                for other in set(children) - set(codes):
                    os.kill(other, signal.SIGKILL)
        elif after and time.monotonic() > due:
            after = 0.0
            for child in set(children) - set(codes):
                os.kill(child, number)
        time.sleep(0.01)
    return [codes[child] for child in children]


def result(out: Path) -> dict:
    """What must repeat."""

    def lines(name):
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "verifier/"))}
            for line in (out / name).read_text().splitlines()
        ]

    odd = [p.name for p in out.rglob("*") if p.suffix in (".partial", ".old", ".removed")]
    return {
        "metrics": lines("metrics.jsonl"),
        "evaluations": lines("evals.jsonl"),
        "eval.json": json.loads((out / "eval.json").read_text()),
        "left over": odd,
        "model": (out / "model" / "model.safetensors").read_bytes(),
        "checkpoints": sorted(p.name for p in (out / "checkpoints").iterdir()),
        "rollouts": sorted(p.name for p in (out / "rollouts").iterdir()),
    }


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--every", type=int, default=1, help="of the file operations, each n-th")
    a.add_argument("--random", type=int, default=20, help="random moments per signal")
    a.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    a = a.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-anywhere-"))
    arithmetic.WARM_START |= {"steps": 100, "batch": 32}
    if (child := os.fork()) == 0:  # torch's threads would not survive a later fork
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        arithmetic._write_base(work / "base", 0)
        os._exit(0)
    os.waitpid(child, 0)
    rng, failed, tried, begin = random.Random(0), 0, 0, time.time()
    for processes in a.processes:
        whole, log = work / f"whole-{processes}", work / f"operations-{processes}.txt"
        args = ["--model", str(work / "base"), *FLAGS]
        start = time.monotonic()
        codes = launch([*args, "--output-dir", str(whole)], processes, whole, log)
        seconds = time.monotonic() - start
        assert codes == [0] * processes, (work / "output.txt").read_text()[-3000:]
        wanted, operations = result(whole), log.read_text().splitlines()
        print(
            f"{processes} process(es): {len(operations)} file operations, {seconds:.0f} s",
            flush=True,
        )
        points = [
            (f"before {i}: {operations[i - 1]}", {"kill_at": i})
            for i in range(1, len(operations) + 1, a.every)
        ]
        points += [
            (f"after {t:.2f} s", {"after": t})
            for t in (rng.uniform(0.1, seconds) for _ in range(a.random))
        ]
        for number in (signal.SIGKILL, signal.SIGTERM):
            for name, where in points:
                out = work / "broken"
                shutil.rmtree(out, ignore_errors=True)
                there = [*args, "--output-dir", str(out)]
                first = launch(there, processes, out, number=number, **where)
                then = launch([*there, "--resume", "auto"], processes, out)
                got = result(out) if then == [0] * processes else {}
                different = [k for k in wanted if got.get(k) != wanted[k]]
                tried, failed = tried + 1, failed + bool(different)
                if different:
                    print(
                        f"FAILED {number.name} {name}: exit codes {first}, then {then}; "
                        f"different: {different}",
                        flush=True,
                    )
    print(
        f"{tried - failed} of {tried} points resumed to the undisturbed run, to the bit "
        f"({time.time() - begin:.0f} s; {work})"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
