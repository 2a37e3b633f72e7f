"""Checkpoints of model and optimizer, and the final model.

A checkpoint, checkpoints/step-XXXXXXXX/, holds safetensors shards that torch.distributed.checkpoint
writes and loads on any number of processes, and a run.json with the run's identity and a digest of
every shard. run.json is written last: a directory without it is no checkpoint. Nothing in it is a
pickle, so loading executes no code. The data position and all randomness are functions of the step.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from runtime.distributed import (
    any_process,
    barrier,
    broadcast,
    full_weights,
    gather,
    rank,
    say,
    together,
)
from runtime.rundir import checkpoints, file_digest, prune, remove, sync, write


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """{name: tensor} of weights and AdamW's moments: the tensors in use, sharded as they are.

    Moments that AdamW has yet to create are created here, as the zeros that it would start from.
    Learning rate, betas and weight decay are not state: they come from the config.
    """
    weights = model.state_dict()  # under FSDP2 this frees what a forward has left gathered
    tensors = {}
    for name, p in model.named_parameters():  # a tied weight once
        moments = optimizer.state[p]
        if not moments:
            moments["step"] = torch.tensor(0.0)
            moments |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        tensors[f"model.{name}"] = weights[name]
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    return tensors


def save_checkpoint(output_dir: Path, step: int, identity: dict, model, optimizer, keep: int):
    """Write the checkpoint of this step, then delete all but the newest `keep`."""
    path = output_dir / "checkpoints" / f"step-{step:08d}"
    if rank() == 0:
        remove(path)  # damaged or incomplete
        sync(output_dir / "metrics.jsonl")  # the steps before this one are not logged again
        sync(output_dir / "evals.jsonl")
    tensors = training_state(model, optimizer)
    refuse_non_finite(tensors.values(), output_dir)  # collective, so `path` is gone for all
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))
    own = path.glob(f"shard-{rank() + 1:05d}-*")  # each process reads back what it has written
    files = dict(gather([(p.name, file_digest(p)) for p in own]))
    if rank() == 0:
        sync(path)
        write(path / "run.json", json.dumps({"step": step, "files": files, **identity}, indent=1))
        sync(path.parent)
        prune(output_dir, step, keep)
    barrier()


def load_checkpoint(path: Path, model, optimizer):
    """Fill model and optimizer in place, on any number of processes."""
    dcp.load(training_state(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path))


def save_model(model, tokenizer, path: Path):
    """Write the model in Hugging Face layout, in the dtype that it came in."""
    weights, temporary = {}, path.with_name(path.name + ".tmp")
    for name, weight in full_weights(model):
        if rank() == 0:
            weights[name] = weight.to("cpu", model.dtype_on_disk)
    refuse_non_finite(weights.values(), path.parent)
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        for p in (*temporary.rglob("*"), temporary):
            sync(p)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    barrier()


def refuse_non_finite(tensors, output_dir: Path):
    """FloatingPointError on all processes if one of them holds a nan or an infinity."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    if any_process(not all(t.isfinite().all() for t in local)):
        problem = "weights or optimizer hold nan or infinity, so nothing was saved"
        raise FloatingPointError(f"{problem}. {last_good(output_dir)}")


def last_good(output_dir: Path) -> str:
    newest = (checkpoints(output_dir) or ["none"])[-1]
    return (
        f"The last good checkpoint: {newest}. Go on from it with a lower --lr, in a new "
        "--output-dir, or find out what is wrong with the questions named above"
    )


def find(output_dir: Path, resume: str, identity: dict) -> tuple[Path | None, int]:
    """(checkpoint, step) to start from, by the flag --resume; (None, 0) for the beginning.

    `identity`: every setting, and the digest of every file, that changes the run's numbers.
    ValueError where the checkpoint is damaged, of another run, or older than others beside it.
    """
    with together():
        start = _find(output_dir, resume, identity) if rank() == 0 and resume else (None, 0)
    return broadcast(start)


def _find(output_dir: Path, resume: str, identity: dict) -> tuple[Path | None, int]:
    candidates, problems = checkpoints(output_dir)[::-1], []
    if resume != "auto":
        refuse_other_runs(output_dir, Path(resume), candidates)
        candidates = [Path(resume)]
    for path in candidates:
        saved, problem = read(path)
        if problem:
            problems.append(f"{path}: {problem}")
            continue
        if problems:
            say(f"WARNING skipping {'; '.join(problems)}")
        different = [k for k, value in identity.items() if saved.get(k) != value]
        both = "; ".join(f"{k} {saved.get(k)!r} there, {identity[k]!r} here" for k in different)
        if different:
            fix = "match the flags, or choose a new --output-dir"
            raise ValueError(f"checkpoint {path} is of another run: {both}: {fix}")
        return path, saved["step"]
    if problems:
        fix = "name another one, or start again in a new --output-dir"
        raise ValueError(f"--resume finds no complete checkpoint ({'; '.join(problems)}): {fix}")
    return None, 0


def refuse_other_runs(output_dir: Path, checkpoint: Path, existing: list[Path]):
    """ValueError where a start from this checkpoint would mix with what the directory holds."""
    beside = checkpoint.resolve().parent == (output_dir / "checkpoints").resolve()
    newer = ", ".join(p.name for p in existing if p.name > checkpoint.resolve().name)
    problem, fix = f"another run than --resume {checkpoint}", "choose a new one"
    if beside and newer:
        problem, fix = f"checkpoints newer than --resume {checkpoint}", f"delete {newer}, or {fix}"
    if newer or not beside and (output_dir / "config.json").exists():
        raise ValueError(f"--output-dir {output_dir} holds {problem}: {fix}")


def read(checkpoint: Path) -> tuple[dict, str]:
    """(run.json, what is wrong with the checkpoint: "" where every shard is as it was written)."""
    try:
        saved = json.loads((checkpoint / "run.json").read_bytes())
        files, _ = dict(saved["files"]), saved["step"] + 0
        found = {p.name: file_digest(p) for p in checkpoint.glob("*.safetensors")}
    except OSError as e:
        return {}, f"{Path(e.filename or checkpoint).name} cannot be read ({e.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, "its run.json is not a checkpoint's"
    wrong = [k for k in sorted(found.keys() | files.keys()) if found.get(k) != files.get(k)]
    names = ", ".join(wrong)
    return saved, names and f"missing, added or changed since it was written: {names}"
