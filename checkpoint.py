"""How does a run survive a crash?

Everything paid for is on disk, complete or not at all: checkpoints of model and optimizer
(torch.distributed.checkpoint), the rollouts sampled since the newest of them, and the final model.
The data position and all randomness are functions of the step, so there is no other state.
"""

import json
import pickle
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from distributed import barrier, rank


def fresh(path: Path) -> Path:
    """An empty directory at `path`, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def replace(partial: Path, path: Path):
    """Give a completely written directory its final name.

    A kill at any point leaves the old one (perhaps as *.old) or the new one.
    """
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model, tokenizer, path: Path):
    """Write the model in Hugging Face layout, in the dtype it came in."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank() == 0:
        partial = fresh(path.with_name(path.name + ".partial"))
        weights = {name: weight.to(model.dtype_on_disk) for name, weight in weights.items()}
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        replace(partial, path)
    barrier()


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-????????"))


def save_checkpoint(output_dir: Path, step: int, identity: dict, model, optimizer, keep: int):
    """Model and optimizer shards of every process, and `identity`: every setting of the run that
    changes its numbers. The newest `keep` checkpoints stay."""
    path = output_dir / "checkpoints" / f"step-{step:08d}"
    partial = path.with_suffix(".partial")
    if rank() == 0:
        fresh(partial)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(partial))
    barrier()
    if rank() == 0:
        (partial / "run.json").write_text(json.dumps({"step": step, **identity}, indent=1))
        replace(partial, path)
        for stale in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(stale)
    barrier()


def check_checkpoint(path: Path, identity: dict) -> int:
    """The step of a checkpoint that belongs to this run; else ValueError naming what differs."""
    try:
        saved = json.loads((path / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is no complete checkpoint ({e}): pass --resume auto, or a "
                         "directory named step-*") from None
    different = [f"{k} {saved.get(k)!r} there, {v!r} here" for k, v in identity.items()
                 if saved.get(k) != v]
    if different:
        raise ValueError(f"checkpoint {path} is of another run: {'; '.join(different)}. Match the "
                         "flags, or start in a new --output-dir")
    return saved["step"]


def find(output_dir: Path, resume: str, identity: dict) -> tuple[Path | None, int]:
    """(checkpoint to start from, or None; first step to do), by the flag --resume."""
    if not resume:
        if (output_dir / "config.json").exists():
            raise ValueError(f"--output-dir {output_dir} holds another run: choose a new one, or "
                             "continue it with --resume auto")
        return None, 0
    path = (checkpoints(output_dir) or [None])[-1] if resume == "auto" else Path(resume)
    return path, check_checkpoint(path, identity) if path else 0


def begin_files(output_dir: Path, config: dict, first_step: int, resumed: bool):
    """config.json, and the logs up to the first step: what lies behind it is done again."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(config, indent=1))
    first_evaluation = first_step + 1 if resumed else 0     # the checkpoint's own step has one
    for name, first in (("metrics.jsonl", first_step), ("samples.jsonl", first_step),
                        ("evals.jsonl", first_evaluation)):
        path = output_dir / name
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first]
        path.write_text("".join(line + "\n" for line in kept))


def load_checkpoint(path: Path, model, optimizer):
    """Fill model and optimizer in place, on any number of processes."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=str(path))
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])


def save_rollouts(path: Path, identity: dict, rollouts: list):
    """Keep a step's rollouts: most of a step's cost is in them."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((identity, rollouts)))
    partial.rename(path)


def load_rollouts(path: Path, identity: dict) -> list | None:
    """The rollouts that an interrupted run of the same identity kept at `path`, or None.

    Only read files of your own runs: unpickling executes what it reads.
    """
    if not path.exists():
        return None
    saved_by, rollouts = pickle.loads(path.read_bytes())
    return rollouts if saved_by == identity else None


def drop_rollouts(output_dir: Path, before: int):
    """Forget rollouts that a checkpoint covers: those of steps below `before`."""
    if rank() == 0:
        for path in (output_dir / "rollouts").glob("step-*.pkl"):
            if int(path.stem.removeprefix("step-")) < before:
                path.unlink()
