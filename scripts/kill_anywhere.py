"""Kill a run anywhere, go on with --resume auto, and compare with a run that nobody disturbed.

    python scripts/kill_anywhere.py                       every file operation, and 20 moments
    python scripts/kill_anywhere.py --every 7 --random 3  a sample of them

The points are all file operations (open for writing, fsync, rename, remove, mkdir, rmdir) that the
first process makes in its output directory, and random moments; the signals SIGKILL and SIGTERM; on
1 and 2 processes. They are tried in random order, so that a systematic failure shows early. A point
passes when after one resume metrics, evaluations, checkpoints and the final model are those of the
undisturbed run, to the bit, and nothing temporary is left in the directory. Exit code 1 if one does
not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
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
from scripts.ranks import lines_that_repeat, run_ranks
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


def launch(args: list[str], processes: int, out: Path, log=None, kill_at=0, number=0, after=0.0):
    """Run train.py's main on forked processes; returns their exit codes (minus a signal).

    Signal `number` goes to the first before file operation `kill_at`, or to all `after` seconds.
    """

    def run(rank: int):
        if after:
            threading.Timer(after, os.kill, (os.getpid(), number)).start()
        if rank == 0:
            watch(out, log, kill_at, number)
        distributed.main(lambda: train.train(parse(args)))

    return run_ranks(run, processes, out.parent / "output.txt")


def result(out: Path) -> dict:
    """What must repeat."""

    return {
        "metrics": lines_that_repeat(out / "metrics.jsonl"),
        "evaluations": lines_that_repeat(out / "evals.jsonl"),
        "eval.json": json.loads((out / "eval.json").read_text()),
        "left over": [p.name for p in out.rglob("*.tmp")],
        "model": (out / "model" / "model.safetensors").read_bytes(),
        "checkpoints": sorted(p.name for p in (out / "checkpoints").iterdir()),
    }


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--every", type=int, default=1, help="of the file operations, each n-th")
    a.add_argument("--random", type=int, default=20, help="random moments per signal")
    a.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    a = a.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-anywhere-"))
    arithmetic.WARM_START |= {"steps": 100, "batch": 32}
    # In a fork, because torch's threads would not survive a later one.
    codes = run_ranks(lambda _: arithmetic._write_base(work / "base", 0), 1, work / "output.txt")
    assert codes == [0], (work / "output.txt").read_text()[-3000:]
    rng, failed, tried, begin = random.Random(0), 0, 0, time.time()
    for processes in a.processes:
        whole, broken, log = work / f"whole-{processes}", work / "broken", work / "operations.txt"
        args = ["--model", str(work / "base"), *FLAGS]
        log.unlink(missing_ok=True)
        start = time.monotonic()
        codes = launch([*args, "--output-dir", str(whole)], processes, whole, log)
        seconds = time.monotonic() - start
        assert codes == [0] * processes, (work / "output.txt").read_text()[-3000:]
        wanted, operations = result(whole), log.read_text().splitlines()
        counts = f"{len(operations)} file operations, {seconds:.0f} s"
        print(f"{processes} process(es): {counts}", flush=True)
        moments = [rng.uniform(0.1, seconds) for _ in range(a.random)]
        points = [(f"after {t:.2f} s", {"after": t}) for t in moments]
        for i in range(1, len(operations) + 1, a.every):
            points.append((f"before {i}: {operations[i - 1]}", {"kill_at": i}))
        signals = (signal.SIGKILL, signal.SIGTERM)
        points = [(name, where | {"number": n}) for name, where in points for n in signals]
        rng.shuffle(points)
        for name, where in points:
            shutil.rmtree(broken, ignore_errors=True)
            args_broken = [*args, "--output-dir", str(broken)]
            first = launch(args_broken, processes, broken, **where)
            then = launch([*args_broken, "--resume", "auto"], processes, broken)
            got = result(broken) if then == [0] * processes else {}
            different = [k for k in wanted if got.get(k) != wanted[k]]
            tried, failed = tried + 1, failed + bool(different)
            if different:
                codes = f"exit codes {first}, then {then}; different: {different}"
                print(f"FAILED {where['number'].name} {name}: {codes}", flush=True)
    print(
        f"{tried - failed} of {tried} points resumed to the undisturbed run, to the bit "
        f"({time.time() - begin:.0f} s; {work})"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
