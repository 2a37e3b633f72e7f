"""What is in a run's directory, and who may write there?

One run at a time: a lock says whose it is. Files and directories are written beside their place,
synced to disk and renamed, so a kill at any point leaves the old or the new; `begin` clears away
what it left half done.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from runtime.distributed import broadcast, rank, say, together


def sync(path: Path):
    """Onto the disk before it gets its name: a rename can outrun the data through a power cut."""
    for p in (*path.rglob("*"), path) if path.is_dir() else (path,):
        descriptor = os.open(p, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write(path: Path, text: str):
    """A file's new content. A kill at any point leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.rename(path)


def fresh(path: Path) -> Path:
    """An empty directory at `path`, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def replace(partial: Path, path: Path):
    """Give a completely written directory its final name. A kill at any point leaves the old one
    (perhaps as *.old, which `sweep` names back) or the new one."""
    sync(partial)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path):
    """Renamed first: killed in the middle, no half directory stays under a good name."""
    removed = path.rename(path.with_name(path.name + ".removed"))
    shutil.rmtree(removed)


def sweep(output_dir: Path):
    """Clear away what a kill left of `write`, `replace` and `remove`; no other file is touched."""
    for path in [
        p
        for pattern in ("model.*", "*.json*.partial", "*/step-????????*.*")
        for p in output_dir.glob(pattern)
    ]:
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        elif path.suffix in (".partial", ".removed", ".old"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*values) -> str:
    """Of plain values; dataclasses and bytes count by their repr."""
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()


def enter(output_dir: Path, resume: str):
    """Take the run's directory; it is this run's for as long as the returned file is open.

    The kernel lets go of the lock when the first process ends, however it ends.
    """
    file, token = None, f"{socket.gethostname()} pid {os.getpid()} {secrets.token_hex(4)}"
    token = broadcast(token)
    with together():
        if rank() == 0:
            file = _lock(output_dir, token)
            if not resume and (output_dir / "config.json").exists():
                raise ValueError(
                    f"--output-dir {output_dir} holds another run: choose a new one, "
                    "or continue it with --resume auto"
                )
            if resume not in ("", "auto") and not Path(resume).is_dir():
                raise ValueError(
                    f"--resume {resume} is no complete checkpoint (no directory): "
                    "pass --resume auto, or a directory named step-*"
                )
    with together():
        seen = output_dir / "lock"
        if not seen.is_file() or seen.read_text() != token:
            raise ValueError(
                f"--output-dir {output_dir} on {socket.gethostname()} is not the one "
                "of the first process: choose one on a file system that all share"
            )
    return file


def _lock(output_dir: Path, token: str):
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / "lock").open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = (output_dir / "lock").read_text() or "?"
        raise ValueError(
            f"--output-dir {output_dir} is in use by another run ({owner}): wait for "
            "it, end it, or choose a new one"
        ) from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise ValueError(
                f"--output-dir {output_dir} cannot be written ({e.strerror}): choose "
                "a directory that can"
            ) from None
        say(f"WARNING {output_dir} has no locks ({e.strerror}): never start a second run in it")
    file.truncate(0)
    file.write(token)
    file.flush()
    os.fsync(file.fileno())
    return file


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, complete but perhaps damaged since, oldest first."""
    paths = (output_dir / "checkpoints").glob("step-*")
    return sorted(p for p in paths if re.fullmatch(r"step-\d{8}", p.name))


def begin(output_dir: Path, checkpoint: Path | None, first_step: int) -> list[dict]:
    """Ready the directory for a start there; returns the evaluations so far.

    The logs keep what lies before the first step: the rest is done again. Of a checkpoint from
    another directory, the history comes along.
    """
    sweep(output_dir)
    for path in checkpoints(output_dir):
        if int(path.name[-8:]) > first_step:  # or it would pass for the newest of this run
            path.rename(fresh(path.with_name(path.name + ".abandoned")))
            say(f"renamed {path} to {path.name}.abandoned: this run starts before it")
    source = output_dir
    if checkpoint and not (output_dir / "evals.jsonl").exists():  # written last, below
        source = checkpoint.resolve().parents[1]
    first_evaluation = first_step + 1 if checkpoint else 0  # the checkpoint's own step has one
    for name, first in (
        ("metrics.jsonl", first_step),
        ("samples.jsonl", first_step),
        ("evals.jsonl", first_evaluation),
    ):
        kept = [line for line in read_lines(source / name) if line["step"] < first]
        write(output_dir / name, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_lines(path: Path) -> list[dict]:
    """The lines of a log, those that a crash or a disk spoiled dropped with a count."""

    def parsed(line: bytes) -> dict | None:
        try:
            value = json.loads(line)
            return value if isinstance(value["step"], int) else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    lines = path.read_bytes().splitlines() if path.exists() else []
    good = [value for line in lines if (value := parsed(line))]
    if len(good) < len(lines):
        say(f"WARNING {path}: dropped {len(lines) - len(good)} line(s) that cannot be read")
    return good


def drop_covered(output_dir: Path, keep: int):
    """Delete all checkpoints but the newest `keep`. For the first process alone."""
    for stale in checkpoints(output_dir)[:-keep]:
        remove(stale)


def without_nan(value):
    """nan as null, all the way down: JSON has no nan, and strict readers refuse it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return [without_nan(v) for v in value] if isinstance(value, list) else value
