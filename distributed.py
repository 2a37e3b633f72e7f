"""Processes: who am I, how is the model shared out, and how does the run survive a crash?

FSDP2 shards, torch.distributed.checkpoint saves, torchrun starts; this file only calls them. The same calls run on
one CPU process and on many GPUs, so the loop in train.py knows neither.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from tree import token_logprobs


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def exit_on_bad_input():
    """Turn a ValueError inside into one line from the first process, and exit code 2 on all.

    For checks that every process makes alike before it joins the others: nobody is left waiting.
    """
    try:
        yield
    except ValueError as e:
        if rank() == 0:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def start() -> torch.device:
    """Join the other processes (torchrun's variables, or a world of one) and pick this process's device.

    Must run before a vLLM engine is built: the engine joins the group that exists. And again after one is closed, if
    anything collective is to follow: vLLM ends the group with itself. Calling it twice does no harm.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:     # a world of one: any free port
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    # Two hours: one process may verify or evaluate long while the others wait at a collective.
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # A corner of the store for each time: torchrun's still holds the addresses of a group that has ended.
        place = dist.PrefixStore(f"start-{store.add(f'starts-{rank()}', 1)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=place, rank=rank(),
                                world_size=world_size(), timeout=timedelta(hours=2))
    return torch.device("cuda", local_rank()) if gpu else torch.device("cpu")


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    dist.barrier()


def share(items: list, group_size: int = 1) -> list:
    """This process's part of `items`. The `group_size` processes of a group (one tensor-parallel engine) get the same."""
    return items[rank() // group_size::world_size() // group_size]


def gather(items: list, group_size: int = 1) -> list:
    """Every process's list, joined in rank order, on every process; of a group, which holds the same, the first one's.

    Objects travel pickled, over the CPU group.
    """
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items if rank() % group_size == 0 else [])
    return [item for part in parts for item in part]


def load_policy(model_path: str, device: torch.device):
    """The trainable model: float32 master weights, bfloat16 compute on GPUs, sharded over all processes with FSDP2.

    `model.token_logprobs(row, temperature)` is the one forward that training needs. It is registered with FSDP because
    calling a part of a sharded model directly would find its weights still sharded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    gpu = device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="flex_attention" if gpu else "sdpa").to(device)
    if gpu:
        # Recompute activations in backward: one tree of 10k tokens keeps only its layer inputs. HF's own
        # checkpointing leaves the parameter names alone, a wrapper would not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.token_logprobs = MethodType(token_logprobs, model)
    model.dtype_on_disk = AutoConfig.from_pretrained(model_path).dtype or torch.float32
    if world_size() > 1 or gpu:     # on one GPU for the mixed precision; one CPU process has nothing to gain
        half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision = MixedPrecisionPolicy(**(half if gpu else {}))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mp_policy=precision)
        fully_shard(model, mp_policy=precision)
        register_fsdp_forward_method(model, "token_logprobs")
    return model


def accumulate(model, last: bool):
    """Reduce gradients over processes only in the last micro-batch of an update: one sync instead of one a row."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def clip_gradients(model, max_norm: float) -> float:
    """Clip the global gradient norm (over all shards); returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor), one gathered at a time. All processes must exhaust it in step, for gathering is collective.

    state_dict names, not named_parameters: the latter omit the second name of a tied weight, which an engine needs.
    """
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(model, tokenizer, path: Path):
    """Write the model in Hugging Face layout, in the dtype it came in; complete or not at all."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        partial = fresh(path.with_name(path.name + ".partial"))
        model.save_pretrained(partial, state_dict={name: w.to(model.dtype_on_disk) for name, w in weights.items()})
        tokenizer.save_pretrained(partial)
        replace(partial, path)
    barrier()


# ------------------------------------------------------------------------------------------------- checkpoints


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def replace(partial: Path, path: Path):
    """Give a completely written directory its final name; a kill leaves the old one (perhaps as *.old) or the new."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. The data position and all randomness are functions of the step."""
    return sorted((output_dir / "checkpoints").glob("step-????????"))


def save_checkpoint(output_dir: Path, step: int, identity: dict, model, optimizer, keep: int):
    """Model and optimizer shards of every process plus `identity` (what the run is), atomically; the newest `keep` stay."""
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
    """The step of a checkpoint, after checking that it belongs to this run; ValueError naming what differs."""
    try:
        saved = json.loads((path / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is no complete checkpoint ({e}): pass --resume auto, or a directory named "
                         "step-*") from None
    different = [f"{k} {saved.get(k)!r} there, {v!r} here" for k, v in identity.items() if saved.get(k) != v]
    if different:
        raise ValueError(f"checkpoint {path} is of another run: {'; '.join(different)}. Match the flags, or start in a "
                         "new --output-dir")
    return saved["step"]


def load_checkpoint(path: Path, model, optimizer):
    """Fill model and optimizer in place. Any number of processes may load what any other number saved."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=str(path))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
