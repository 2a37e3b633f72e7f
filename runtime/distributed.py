"""Processes: who am I, and how is the model shared out over them?

FSDP2 shards and torchrun starts; this file only calls them. The same calls run on one CPU process
and on many GPUs, so the loop in train.py knows neither.
"""

import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
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
from runtime.models import load_model

STOPPED = 143  # exit code after SIGTERM, as shells report it
COLLECTIVE_MINUTES = 30  # how long processes wait for one another before they give up
FEW_PARAMETERS = 1_000_000  # below this, one CPU thread


def main(run: Callable):
    """Run a script as one process among others: all end together, and none waits in silence."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # End with torchrun's agent, also when it is killed: else its workers would train on beside
        # those of the next start. 1: PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    threading.Thread(target=report_standstill, daemon=True).start()
    try:
        run()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:  # torch's checkpoints raise one that is no Exception
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a normal exit may first wait for the others, who wait for this one


def report_standstill(minutes: float = 10.0):
    """Say where the main thread stands, whenever it has not moved for so long.

    A process that computes is elsewhere at each look; one that hangs, or waits for it, is not.
    """
    main_thread, still, before = threading.main_thread().ident, 0, None
    while True:
        time.sleep(minutes * 60 / 10)
        stack = list(traceback.walk_stack(sys._current_frames()[main_thread]))
        now = [(frame.f_code, frame.f_lasti) for frame, _ in stack]
        still, before = (still + 1 if now == before else 0), now
        if still and still % 10 == 0:
            here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            ours = [
                f"{f.f_code.co_name} ({os.path.basename(f.f_code.co_filename)}:{line})"
                for f, line in stack
                if f.f_code.co_filename.startswith(here)
            ]
            print(
                f"WARNING process {rank()} of {world_size()} on {socket.gethostname()} has stood "
                f"still for {still * minutes / 10:.3g} min in {' < '.join(ours)}",
                file=sys.stderr,
                flush=True,
            )
        del stack  # frames keep their tensors alive


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def exit_on_bad_input():
    """Turn a ValueError inside into one line from each machine's first process, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if local_rank() == 0:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def together():
    """Make a ValueError of one process one of all, so that nobody is left waiting."""
    problem = None
    try:
        yield
    except ValueError as e:
        problem = str(e)
    problems = [p for p in gather([problem]) if p]
    if problems:
        raise ValueError(problems[0])


_asked_to_stop: list[float] = []  # when SIGTERM came


def note_sigterm():
    """From now on SIGTERM (a scheduler's warning) is only noted; the second one ends at once.

    torchrun passes on the signal that its whole group got already: within 5 s it is the same one.
    """

    def note(*_):
        if _asked_to_stop and time.monotonic() - _asked_to_stop[0] > 5:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        _asked_to_stop.append(time.monotonic())

    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, note)


def asked_to_stop() -> bool:
    """Has any process got SIGTERM? The same answer on all, which must ask at the same point."""
    return any_process(bool(_asked_to_stop))


def exit_stopped(step: int):
    """End a run that was asked to stop, after its checkpoint."""
    say(f"stopped by SIGTERM before step {step}: go on with --resume auto")
    stop()
    sys.exit(STOPPED)


def check_machine(preset: str):
    """ValueError where this machine cannot run the preset as it was started."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and here > gpus:
        raise ValueError(
            f"{here} processes on a machine with {gpus} GPU(s): start with --nproc_per_node {gpus}"
        )
    if not gpus and preset != "miniature":
        raise ValueError(
            f"--preset {preset} needs GPUs and none is visible: check "
            "CUDA_VISIBLE_DEVICES and the driver, or run the miniature"
        )


def start() -> torch.device:
    """Join the other processes (torchrun's variables, or a world of one); pick this one's device.

    Must run before a vLLM engine is built: the engine joins the group that exists. And again after
    one is closed, if anything collective is to follow: vLLM ends the group with itself. Calling it
    twice does no harm.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # a world of one: any free port
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
        # One process may sample or verify longer than the others, but not by so much.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(minutes=COLLECTIVE_MINUTES),
        )
    return torch.device("cuda", local_rank()) if gpu else torch.device("cpu")


def stop():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str):
    """One line, from the first process."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def barrier():
    dist.barrier()


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
    if world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]
    return value


def any_process(flag: bool) -> bool:
    """Is the flag set on any process? The same answer on all."""
    if world_size() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total)
    return bool(total)


def all_finite(grad_norm: float, stats: list[dict]) -> bool:
    """Are all numbers of an update finite, on every process?"""
    numbers = [grad_norm, *(x for of_row in stats for x in of_row.values())]
    return not any_process(not all(math.isfinite(float(x)) for x in numbers))


def limit_threads(model_path: str):
    """One CPU thread for a tiny model: a second brings little on an idle machine, and on a busy one
    costs much. From 1M parameters on it pays (scripts/bench_training.py threads): then as many
    as torch takes, all cores or OMP_NUM_THREADS (which torchrun sets to 1 for several processes,
    unless it is set)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # counts without memory
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config)
    if model.num_parameters() < FEW_PARAMETERS:
        torch.set_num_threads(1)


def load_policy(model_path: str, device: torch.device):
    """The trainable model: float32 weights, bfloat16 compute on GPUs, sharded with FSDP2.

    `model.token_logprobs(row, temperature)` is the one forward that training needs. It is
    registered with FSDP: calling a part of a sharded model directly would find it still sharded.
    """
    from transformers import AutoConfig

    gpu = device.type == "cuda"
    model = load_model(model_path, torch.float32, "flex_attention" if gpu else "sdpa").to(device)
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    model.dtype_on_disk = config.dtype or torch.float32
    return make_trainable(model, gpu)


def make_trainable(model, gpu: bool, mesh=None):
    """Recomputation, the forward of training, and shards over `mesh` (None: over all processes)."""
    if gpu:
        # Recompute activations in backward: a tree of 10k tokens keeps only its layer inputs. HF's
        # own checkpointing leaves the parameter names alone, a wrapper would not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.token_logprobs = MethodType(token_logprobs, model)
    if world_size() > 1 or gpu:  # on one GPU for the mixed precision
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        precision = MixedPrecisionPolicy(**(half if gpu else {}))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        # A process whose rows hold no trained token does not use an untied head; the others do.
        model.set_reduce_scatter_unused_params(True)
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
