"""The processes of a run, and the model sharded over them.

torchrun starts the processes and FSDP2 shards the model; this file only calls them. The same calls
run on one CPU process and on many GPUs, so that the loop in train.py need not know which.
"""

import ctypes
import errno
import faulthandler
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed import fsdp

from packing import token_logprobs
from runtime.models import load_model, read_config, without_weights

STOPPED = 143  # exit code after SIGTERM, as shells report it
COLLECTIVE_MINUTES = 30  # how long processes wait for one another before they give up
STANDSTILL_MINUTES = 20  # shorter, so that the process that the others wait for reports first
FEW_PARAMETERS = 1_000_000  # below this, one CPU thread (scripts/bench_training.py threads)

# What may befall a long run through no fault of its own, and what to do.
OUTPUT_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and go on with --resume auto",
    errno.EDQUOT: "the disk quota is used up: free some space and go on with --resume auto",
    errno.EPIPE: "what read the output is gone: write it to a file, and go on with --resume auto",
}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all
MOST_TOKENS_ON_CPUS = 300_000  # thinking tokens a step: the preset small, 16 × 8 × 2000, is below

barrier = dist.barrier


def main(run: Callable):
    """Run a script as one of several processes: if one fails, it ends at once and loudly."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # Die with the torchrun agent, even on SIGKILL; orphaned workers would keep training next to
        # a restarted job. 1: PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):  # whatever the shell's language: we print Greek letters
        stream.reconfigure(encoding="utf-8")
    expect_progress()
    try:
        run()
        sys.stdout.flush()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        say("interrupted: train.py goes on with --resume auto, evaluate.py by the same command")
        os._exit(130)  # as shells report Ctrl-C
    except BaseException as e:  # torch's CheckpointException is not an Exception
        if isinstance(e, OSError) and e.errno in OUTPUT_ERRORS:
            print(f"error: {e}: {OUTPUT_ERRORS[e.errno]}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        os._exit(1)  # a normal exit may first wait for the others, who wait for this one


def expect_progress():
    """Print every thread's stack if this is not called again within STANDSTILL_MINUTES.

    faulthandler's watchdog needs no GIL, so it also reports a process stuck inside a collective.
    """
    faulthandler.dump_traceback_later(STANDSTILL_MINUTES * 60, repeat=True, file=2)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def exit_on_bad_input():
    """Turn a ValueError inside into one line from each machine's first process, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if getattr(e, "errno", None) in OUTPUT_ERRORS:
            raise  # it is no bad input: see main
        if os.environ.get("LOCAL_RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def together():
    """Raise one process's ValueError on all of them, so that nobody is left waiting."""
    problem = None
    try:
        yield
    except ValueError as e:
        problem = str(e)
    if problems := [p for p in gather([problem]) if p]:
        raise ValueError(problems[0])


_asked_to_stop: list[float] = []  # when SIGTERM came


def note_sigterm():
    """From now on SIGTERM (a scheduler's warning) is only noted; a second one ends the process.

    Within 5 s it does not count as a second one: torchrun forwards a SIGTERM that its whole process
    group has already received.
    """

    def note(*_):
        if _asked_to_stop and time.monotonic() - _asked_to_stop[0] > 5:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        _asked_to_stop.append(time.monotonic())

    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, note)


def asked_to_stop() -> bool:
    """Has any process received SIGTERM? Collective: the same answer on all of them."""
    return any_process(bool(_asked_to_stop))


def exit_stopped(step: int):
    """End a run that was asked to stop, after its checkpoint."""
    say(f"stopped by SIGTERM before step {step}: go on with --resume auto")
    stop()
    sys.exit(STOPPED)


def check_machine(step_tokens: int = 0):
    """ValueError where processes and machine do not fit the run; `step_tokens`: thinking a step."""
    missing = [name for name in LAUNCHER if name not in os.environ]
    if 0 < len(missing) < len(LAUNCHER):
        given = ", ".join(name for name in LAUNCHER if name in os.environ)
        fix = "start with torchrun, which sets them all, or unset these"
        raise ValueError(f"{given} in the environment, without {', '.join(missing)}: {fix}")
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and here > gpus:
        raise ValueError(f"{here} processes for {gpus} GPU(s): start with --nproc_per_node {gpus}")
    if not gpus and step_tokens > MOST_TOKENS_ON_CPUS:
        fix = "lower --questions-per-step, --num-rollouts or --max-budget, or use GPUs"
        problem = f"a step samples up to {step_tokens:,} thinking tokens, and no GPU is visible"
        raise ValueError(f"{problem} (check CUDA_VISIBLE_DEVICES and the driver): {fix}")


def start() -> torch.device:
    """Join the other processes (torchrun's variables, or a world of one); returns the device.

    Call it before building a vLLM engine, which joins the group that exists and ends it when it is
    closed; call it again afterwards if anything collective follows. Calling it twice is harmless.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": "0"}.items():  # port 0: any free one
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # A prefix for each start: torchrun's store outlives a group, and still holds the addresses
        # of its members.
        starts = store.add(f"starts-{rank()}", 1)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore(f"start-{starts}", store),
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(minutes=COLLECTIVE_MINUTES),  # sampling times differ, but not so much
        )
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def stop():
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str):
    """Print one line from the first process."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def share(items: list, group_size: int = 1) -> list:
    """This process's part of `items`; the same for all processes of a tensor-parallel group."""
    return items[rank() // group_size :: world_size() // group_size]


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


def broadcast(value):
    """The first process's value, on every process."""
    return gather([value if rank() == 0 else None])[0]


def any_process(flag: bool) -> bool:
    """Is the flag set on any process? The same answer on all."""
    return any(gather([flag]))


def all_finite(grad_norm: float, stats: list[dict]) -> bool:
    """Are all numbers of an update finite, on every process?"""
    numbers = [grad_norm, *(x for of_row in stats for x in of_row.values())]
    return not any_process(not all(math.isfinite(float(x)) for x in numbers))


def limit_threads(model_path: str):
    """One CPU thread for a tiny model: a second brings little, and on a busy machine costs much.

    To be called before the sampler is made: once vLLM runs, it has no effect.
    """
    if without_weights(read_config(model_path)).num_parameters() < FEW_PARAMETERS:
        torch.set_num_threads(1)


def load_policy(model_path: str, device: torch.device):
    """The trainable model: float32 weights, bfloat16 compute on GPUs, sharded with FSDP2.

    `model.token_logprobs(row, temperature)` is the one forward that training needs. It is
    registered with FSDP: calling a part of a sharded model directly would find it still sharded.
    """
    gpu = device.type == "cuda"
    attention = "flex_attention" if gpu else "sdpa_by_tree"
    model = load_model(model_path, torch.float32, attention).to(device)
    model.dtype_on_disk = read_config(model_path).dtype or torch.float32
    return make_trainable(model, gpu)


def make_trainable(model, gpu: bool, mesh=None):
    """Recomputation, the forward of training, and shards over `mesh` (None: over all processes)."""
    if gpu:
        # Recompute activations in backward: a tree of 10k tokens keeps only its layer inputs.
        # Hugging Face's checkpointing leaves the parameter names alone; a wrapper would not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.token_logprobs = MethodType(token_logprobs, model)
    if world_size() > 1 or gpu:  # on one GPU for the mixed precision
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        precision = fsdp.MixedPrecisionPolicy(**(half if gpu else {}))
        for layer in model.get_decoder().layers:
            fsdp.fully_shard(layer, mesh=mesh, mp_policy=precision)
        # Casting the inputs would copy the Row, without the masks that it has built and keeps.
        whole = replace(precision, cast_forward_inputs=False)
        fsdp.fully_shard(model, mesh=mesh, mp_policy=whole)
        fsdp.register_fsdp_forward_method(model, "token_logprobs")
    return model


def accumulate(model, last: bool):
    """Reduce gradients over processes only in the last micro-batch of an update."""
    if isinstance(model, fsdp.FSDPModule):
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
