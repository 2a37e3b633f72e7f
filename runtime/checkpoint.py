"""How does a run survive a crash?

Everything paid for is on disk, complete or not at all: checkpoints of model and optimizer
(torch.distributed.checkpoint), the rollouts sampled since the newest of them, the logs, and the
final model. Each is written beside its place, synced to disk and renamed; what is read again has a
checksum, and reading it executes nothing. The data position and all randomness are functions of the
step, so there is no other state.
"""

import io
import json
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from runtime.distributed import any_process, barrier, broadcast, gather, rank, say, together
from runtime.rundir import checkpoints, drop_covered, fresh, replace, sha256, sync, write


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None
    step: int


def find(output_dir: Path, resume: str, identity: dict) -> Start:
    """Where to start, by the flag --resume: the first process decides and tells the others.

    `identity`: every setting, and the digest of every file, that changes the run's numbers.
    """
    start = None
    with together():
        if rank() == 0:
            start = Start(None, 0)
            if resume == "auto":
                start = _newest_intact(output_dir, identity) or start
            elif resume:
                start = check_checkpoint(Path(resume), identity)
                here = (output_dir / "checkpoints").resolve()
                if Path(resume).resolve().parent != here and (output_dir / "config.json").exists():
                    raise ValueError(
                        f"--output-dir {output_dir} holds another run than --resume "
                        f"{resume}: choose a new one"
                    )
    return broadcast(start)


def _newest_intact(output_dir: Path, identity: dict) -> Start | None:
    skipped = []
    for path in sorted((output_dir / "checkpoints").glob("*"), reverse=True):
        if path not in checkpoints(output_dir):
            if path.suffix not in (".partial", ".removed", ".abandoned"):
                say(f"ignoring {path}: not the name of a checkpoint")
        elif problem := damage(path):
            say(f"WARNING skipping checkpoint {path}: {problem}")
            skipped.append(path)
        else:
            return check_checkpoint(path, identity)
    if skipped:
        raise ValueError(
            f"none of the {len(skipped)} checkpoints in {output_dir} is intact: start "
            "again in a new --output-dir"
        )


def save_model(model, tokenizer, path: Path):
    """Write the model in Hugging Face layout, in the dtype it came in."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # of the first process; {} elsewhere
    weights = {name: weight.to(model.dtype_on_disk) for name, weight in weights.items()}
    refuse_non_finite(weights.values(), path.parent)
    if rank() == 0:
        partial = fresh(path.with_name(path.name + ".partial"))
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        replace(partial, path)
    barrier()


def refuse_non_finite(tensors, output_dir: Path):
    """FloatingPointError on all processes if one of them holds a nan or an infinity."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    if any_process(not all(t.isfinite().all() for t in local)):
        raise FloatingPointError(
            "weights or optimizer hold nan or infinity, so nothing was saved. "
            + last_good(output_dir)
        )


def last_good(output_dir: Path) -> str:
    newest = (checkpoints(output_dir) or ["none"])[-1]
    return (
        f"The last good checkpoint: {newest}. Go on from it with a lower --lr, in a new "
        "--output-dir, or find out what is wrong with the questions named above"
    )


def save_checkpoint(output_dir: Path, step: int, identity: dict, model, optimizer, keep: int):
    """Model and optimizer shards of every process, and a run.json with the run's identity and a
    checksum of every file. The newest `keep` checkpoints stay."""
    path = output_dir / "checkpoints" / f"step-{step:08d}"
    partial = path.with_suffix(".partial")
    if rank() == 0:
        fresh(partial)
        sync(output_dir / "metrics.jsonl")  # what it says of the steps before is not said again
        sync(output_dir / "evals.jsonl")
    weights, moments = get_state_dict(model, optimizer)
    # Collective: from here on, all processes know that the directory is there.
    refuse_non_finite(
        [*weights.values(), *(t for state in optimizer.state.values() for t in state.values())],
        output_dir,
    )
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(partial))
    mine = [*partial.glob(f"__{rank()}_*"), *([partial / ".metadata"] if rank() == 0 else [])]
    files = dict(gather([(p.name, sha256(p)) for p in mine]))  # each reads what it has written
    if rank() == 0:
        write(
            partial / "run.json",
            json.dumps({"step": step, "files": files, **identity}, indent=1),
        )
        replace(partial, path)
        drop_covered(output_dir, keep)
    barrier()


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; "" where nothing is."""
    try:
        saved = json.loads((path / "run.json").read_bytes())
        _ = saved["step"] + 0, saved["files"][".metadata"]
        wrong = [name for name, was in saved["files"].items() if sha256(path / name) != was]
        return f"changed since it was written: {', '.join(wrong)}" if wrong else ""
    except OSError as e:
        return f"{Path(e.filename or path).name} cannot be read ({e.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "run.json is not a checkpoint's"


def check_checkpoint(path: Path, identity: dict) -> Start:
    """The start from a checkpoint that is intact and of this run; else ValueError with what is
    wrong or different."""
    if problem := damage(path):
        raise ValueError(
            f"{path} is no complete checkpoint ({problem}): pass --resume auto, or a "
            "directory named step-*"
        )
    saved = json.loads((path / "run.json").read_bytes())
    different = [
        f"{k} {saved.get(k)!r} there, {v!r} here" for k, v in identity.items() if saved.get(k) != v
    ]
    if different:
        raise ValueError(
            f"checkpoint {path} is of another run: {'; '.join(different)}. Match the "
            "flags, or start in a new --output-dir"
        )
    return Start(path, saved["step"])


def load_checkpoint(path: Path, model, optimizer):
    """Fill model and optimizer in place, on any number of processes."""
    _Reader(path).read_metadata()  # torch would wrap its ValueError, not even in an Exception
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, storage_reader=_Reader(path), planner=_Planner())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


class _Unpickler(pickle.Unpickler):
    """A pickle can call any function by its name: allow the few classes that torch writes."""

    KNOWN = {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "PosixPath",
        "Size",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
        "_StorageInfo",
        "_get_layout",
    }

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module.split(".")[0] in ("torch", "pathlib") and (name in self.KNOWN or is_dtype):
            return super().find_class(module, name)
        raise ValueError(f"its .metadata asks for {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_, **__):
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        """Settings of the optimizer travel as pickles: read as plain values, written anew."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
