"""Processes: who am I, and how is the model shared out over them?

FSDP2 shards and torchrun starts; this file only calls them. The same calls run on one CPU process
and on many GPUs, so the loop in train.py knows neither.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from packing import token_logprobs


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


def check_machine(preset: str):
    """ValueError where this machine cannot run the preset as it was started."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and here > gpus:
        raise ValueError(f"{here} processes on a machine with {gpus} GPU(s): start with "
                         f"--nproc_per_node {gpus}")
    if not gpus and preset != "miniature":
        raise ValueError(f"--preset {preset} needs GPUs and none is visible: check "
                         "CUDA_VISIBLE_DEVICES and the driver, or run the miniature")


def start() -> torch.device:
    """Join the other processes (torchrun's variables, or a world of one); pick this one's device.

    Must run before a vLLM engine is built: the engine joins the group that exists. And again after
    one is closed, if anything collective is to follow: vLLM ends the group with itself. Calling it
    twice does no harm.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:     # a world of one: any free port
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # A prefix of its own for each start: torchrun's store outlives a group that has ended, and
        # still holds the addresses of its members.
        starts = store.add(f"starts-{rank()}", 1)
        store = dist.PrefixStore(f"start-{starts}", store)
        # Two hours: one process may verify or evaluate long while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank(),
                                world_size=world_size(), timeout=timedelta(hours=2))
    return torch.device("cuda", local_rank()) if gpu else torch.device("cpu")


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    dist.barrier()


def share(items: list, group_size: int = 1) -> list:
    """This process's part of `items`; the same for all processes of a tensor-parallel group."""
    return items[rank() // group_size::world_size() // group_size]


def gather(items: list, group_size: int = 1) -> list:
    """Every process's list, joined in rank order, on every process.

    Of a tensor-parallel group, whose processes hold the same, the first one's. Objects travel
    pickled, over the CPU group.
    """
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items if rank() % group_size == 0 else [])
    return [item for part in parts for item in part]


def load_policy(model_path: str, device: torch.device):
    """The trainable model: float32 weights, bfloat16 compute on GPUs, sharded with FSDP2.

    `model.token_logprobs(row, temperature)` is the one forward that training needs. It is
    registered with FSDP: calling a part of a sharded model directly would find it still sharded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    gpu = device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="flex_attention" if gpu else "sdpa")
    model.to(device)
    model.dtype_on_disk = AutoConfig.from_pretrained(model_path).dtype or torch.float32
    return make_trainable(model, gpu)


def make_trainable(model, gpu: bool, mesh=None):
    """Recomputation, the forward of training, and shards over `mesh` (None: over all processes)."""
    if gpu:
        # Recompute activations in backward: a tree of 10k tokens keeps only its layer inputs. HF's
        # own checkpointing leaves the parameter names alone, a wrapper would not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.token_logprobs = MethodType(token_logprobs, model)
    if world_size() > 1 or gpu:     # on one GPU for the mixed precision
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        precision = MixedPrecisionPolicy(**(half if gpu else {}))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        register_fsdp_forward_method(model, "token_logprobs")
    return model


def accumulate(model, last: bool):
    """Reduce gradients over processes only in the last micro-batch of an update."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def clip_gradients(model, max_norm: float) -> float:
    """Clip the global gradient norm (over all shards); returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor), one gathered at a time. Collective: all processes must exhaust it.

    state_dict names, not named_parameters: the latter omit the second name of a tied weight, which
    an engine needs.
    """
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
