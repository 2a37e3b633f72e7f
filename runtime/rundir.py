"""The directory of a run: one run at a time, and logs that a crash at any point leaves readable."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.distributed import broadcast, rank, say, together

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("budgets.py", "rewards.py", "brpo.py", "packing.py", "rollout.py", "train.py")
METHOD += ("tasks/verifier.py",)
STEP = "step-" + 8 * "[0-9]"  # the name of a checkpoint


def sync(path: Path):
    """Force a file's content, or a directory's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, text: str):
    """Replace a file's content atomically: a crash leaves the old content or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)  # before the rename, which a power cut can let overtake the data
    os.replace(temporary, path)
    sync(path.parent)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*values) -> str:
    """SHA-256 of plain values as JSON; dataclasses and bytes count by their repr."""
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()


def enter(output_dir: Path, resume: str) -> FileLock | None:
    """Lock the directory for this run; returns the first process's lock, None elsewhere.

    The kernel releases it when the first process ends, however it ends. ValueError where another
    run has the directory, where it cannot be written, and where a process sees another one.
    """
    owner = output_dir / "owner"
    token = broadcast(f"{socket.gethostname()} pid {os.getpid()} {secrets.token_hex(4)}")
    with together():
        lock = _lock(output_dir, owner, resume, token) if rank() == 0 else None
    with together():
        if not owner.is_file() or owner.read_text() != token:
            raise ValueError(
                f"--output-dir {output_dir} on {socket.gethostname()} is not the one of the first "
                "process: choose one on a file system that all processes share"
            )
    return lock


def _lock(output_dir: Path, owner: Path, resume: str, token: str) -> FileLock:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / "lock", timeout=0)
        lock.acquire()
        write(owner, token)
        if resume or not (output_dir / "config.json").exists():
            return lock
        problem = "holds another run: continue it with --resume auto, or"
    except Timeout:
        name = owner.read_text() if owner.is_file() else "not known"
        problem = f"is in use by another run ({name}):"
    except (OSError, NotImplementedError) as e:  # the latter: a file system without locks
        problem = f"cannot be written or locked ({getattr(e, 'strerror', None) or e}):"
    raise ValueError(f"--output-dir {output_dir} {problem} choose another directory")


def checkpoints(output_dir: Path) -> list[Path]:
    """Completely written checkpoints (they have a run.json), oldest first."""
    return sorted(p.parent for p in (output_dir / "checkpoints").glob(f"{STEP}/run.json"))


def remove(checkpoint: Path):
    """Delete run.json first, so that no half of a checkpoint passes for a whole one."""
    (checkpoint / "run.json").unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)


def prune(output_dir: Path, step: int, keep: int):
    """Delete incomplete checkpoints, and all but the newest `keep` complete ones up to `step`.

    A later one is there only if it is damaged and was skipped: it must not push out a good one.
    """
    complete = checkpoints(output_dir)
    stale = [path for path in complete if int(path.name[-8:]) <= step][:-keep]
    for path in (output_dir / "checkpoints").glob(STEP):
        if path in stale or path not in complete:
            remove(path)


def begin(output_dir: Path, checkpoint: Path | None, first_step: int, keep: int) -> list[dict]:
    """Make the directory ready for a start at `first_step`; returns the evaluations before it.

    The logs are cut there, since the rest is computed again. A checkpoint from another run's
    directory brings that run's logs along.
    """
    prune(output_dir, first_step, keep)  # what a kill left
    source = output_dir
    if checkpoint and not (output_dir / "evals.jsonl").exists():  # written last, below
        source = checkpoint.resolve().parents[1]
    first_evaluation = first_step + 1 if checkpoint else 0  # its own step's came before it
    firsts = {"metrics": first_step, "samples": first_step, "evals": first_evaluation}
    for name, first in firsts.items():
        lines = [x for x in read_lines(source / f"{name}.jsonl") if x["step"] < first]
        write(output_dir / f"{name}.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    return lines


def write_settings(output_dir: Path, settings: dict):
    """config.json: the settings, and a digest of each file of the method that the run used.

    A resumed run says which of these files have changed: its later steps follow another formula.
    """
    path, sources = output_dir / "config.json", {f: file_digest(ROOT / f) for f in METHOD}
    if path.exists():
        with contextlib.suppress(ValueError):  # damaged by hand: it is written anew
            before = json.loads(path.read_text()).get("sources", {})
            for name in METHOD:
                if before.get(name, sources[name]) != sources[name]:
                    say(f"WARNING {name} has changed since this run wrote {path}")
    write(path, json.dumps(settings | {"sources": sources}, indent=1))


def read_lines(path: Path) -> list[dict]:
    """The lines of a log; those that a crash or a disk spoiled are dropped with a count."""
    good, lines = [], path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            value = json.loads(line)
            if isinstance(value["step"], int):
                good.append(value)
    if len(good) < len(lines):
        say(f"WARNING {path}: dropped {len(lines) - len(good)} line(s) that cannot be read")
    return good


def without_nan(value):
    """nan and infinity as null, all the way down: JSON has neither, and strict readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return [without_nan(v) for v in value] if isinstance(value, list) else value
