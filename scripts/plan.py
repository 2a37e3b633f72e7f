"""The memory of one training process, planned without a GPU and without weights.

    python scripts/plan.py --preset paper-8k                      8 GPUs of 80 GiB
    python scripts/plan.py --preset paper-8k --gpus 1 4 8 --gpu-memory 48
    python scripts/plan.py --preset paper-8k --model DIRECTORY    one with a config.json will do

Takes every flag of train.py. The training peak is not a formula: the model of this run, sharded as
in training, goes through an update on fake tensors (shapes without numbers) in a fake group of that
many processes, and PyTorch's own tracker counts the bytes. Only attention is replaced, by a stub
that keeps what FlexAttention keeps. Against real processes on a CPU the peak is within 10 percent
(tests/end_to_end/test_plan.py). The sampler's memory is as configured; OTHER is an allowance.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
import packing
from runtime import distributed
from runtime.config import Config, check, parse
from tasks import arithmetic

OTHER = 5.0  # GiB, not measured: CUDA contexts, NCCL's buffers, vLLM's CUDA graphs, fragments
APPENDED = 10  # tokens before a summary, an allowance: 5 or 8 with R1-Distill's tokenizer
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    gpus: tuple[int, ...] = (8,)  # Numbers of GPUs to plan for.
    gpu_memory: float = 80.0  # GiB of each.


def plan(c: Config, config, gpus: int) -> dict[str, float]:
    """What each process holds when it holds most, name -> GiB. `config`: the model's."""
    peak = training_peak(config, gpus, row_tokens(c))
    copy = 2 * peak.pop("parameters") / c.tensor_parallel_size  # bfloat16
    return {
        **{name: size / GIB for name, size in peak.items()},
        "sampler: bfloat16 weights": copy / GIB,
        "sampler: KV cache, --kv-cache-gb": c.kv_cache_gb if c.engine == "vllm" else 0.0,
        "contexts, CUDA graphs (an allowance)": OTHER,
    }


def longest_tree(c: Config) -> int:
    """Tokens of a trace that uses its whole budget, with all its trained summaries."""
    budgets = c.budget_prior.budgets
    summaries = c.num_summaries * (len(budgets) if c.train_summaries == "all" else 1)
    length = c.max_prompt_tokens + budgets[-1] + summaries * (APPENDED + c.max_summary_tokens)
    return -(-length // 128) * 128  # rows are padded to FlexAttention's blocks


def row_tokens(c: Config) -> int:
    """Tokens of the longest training row: a tree that is longer than a row gets its own."""
    return max(-(-c.max_tokens_per_row // 128) * 128, longest_tree(c))


def training_peak(config, gpus: int, tokens: int) -> dict[str, int]:
    """Bytes by kind at the training peak of one of `gpus` processes, and the parameters' number.

    The update has two rows, since the second one finds the first one's gradients in memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (gpus,))  # before the fakes: it holds real numbers
        with FakeTensorMode(), stub_attention():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="flex_attention"
            )
            parameters = sum(p.numel() for p in model.parameters())
            distributed.make_trainable(model, gpu=True, mesh=mesh)
            model.forward = model.token_logprobs  # the tracker wants the root called
            model.takes_rows = True  # checked by values, which fake tensors do not have
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # as on a GPU
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            step(model, optimizer)  # a first time unseen: it makes the moments
            tracker = FSDPMemTracker(model, optimizer)
            with tracker:
                for last in (False, True):
                    distributed.accumulate(model, last)
                    model(fake_row(tokens), 1.0).sum().backward()
                    tracker.reset_mod_stats()
            (in_rows,) = tracker.get_tracker_snapshot("peak").values()
            with tracker:
                step(model, optimizer)
            (in_step,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    sizes = {getattr(kind, "value", kind): size for kind, size in in_rows.items()}
    layers = config.num_hidden_layers
    # The tracker's other kinds mix; these follow from the shapes, and the rest is the total's.
    kinds = {
        "weights, float32, sharded": sizes["Sharded Param"],
        "two moments of AdamW, sharded": 8 * parameters // gpus,
        "gradients, float32, summed over rows": 4 * parameters,
        "gathered bfloat16 weights": sizes["Unsharded Param"] + sizes["All Gather"],
        "activations: the layers' inputs": 2 * tokens * layers * config.hidden_size,
    }
    kinds["activations: one layer; logits"] = sizes["Total"] - sum(kinds.values())
    kinds["AdamW's step, beyond all this"] = max(0, in_step["Total"] - sizes["Total"])
    return {**kinds, "parameters": parameters}


def step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def fake_row(tokens: int) -> packing.Row:
    """A row whose every token is trained. Fake tensors have no values, so that is said by hand."""

    class Trained:
        def nonzero(self):
            return torch.empty(tokens, 1, dtype=torch.int64)

    row = {name: torch.empty(tokens, dtype=torch.int64) for name in packing.Row.__annotations__}
    row = packing.Row(**row | {"trained": Trained(), "old_logp": None})
    row.longest = tokens
    return row


class Attention(torch.autograd.Function):
    """The memory of FlexAttention: it keeps queries, keys, values, output and one float a query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, logsumexp = ctx.saved_tensors
        _ = torch.empty_like(logsumexp)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def stub_attention():
    from transformers.integrations.flex_attention import repeat_kv
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, q, k, v, mask, **_):
        heads = q.shape[1]
        if heads & (heads - 1):  # as transformers does: the kernel groups powers of two only
            k, v = (repeat_kv(x, heads // x.shape[1]) for x in (k, v))
        return Attention.apply(q, k, v).transpose(1, 2).contiguous(), None

    kept = ALL_ATTENTION_FUNCTIONS["flex_attention"], packing.flex_mask
    ALL_ATTENTION_FUNCTIONS["flex_attention"] = attention
    # Four dimensions: every family's forward takes such a mask as it is.
    packing.flex_mask = lambda row: row.input_ids.new_empty((1, 1, 1, 1), dtype=torch.bool)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["flex_attention"], packing.flex_mask = kept


def advice(c: Config, short: float) -> str:
    """What to lower when `short` GiB are missing."""
    cache = c.kv_cache_gb - short
    if c.engine == "vllm" and cache >= 2:
        return f"lower --kv-cache-gb to {cache:.0f}: sampling gets slower, results stay"
    if c.max_tokens_per_row > longest_tree(c):
        return (
            f"lower --max-tokens-per-row (activations are in proportion to it; not below the "
            f"longest tree, {longest_tree(c)}) and --kv-cache-gb, and plan again"
        )
    return "use more GPUs, or lower --max-budget or --num-summaries"


def describe(c: Config, config, machine: Machine) -> str:
    """The plan for each number of GPUs side by side, and what to lower where it does not fit."""
    plans = [plan(c, config, n) for n in machine.gpus]
    totals = [sum(p.values()) for p in plans]

    def line(name, values, form):
        return f"{name:50}" + "".join(f"{x:8{form}}" for x in values)

    lines = [f"{c.preset} · {c.experiment} · {c.model} · rows of {row_tokens(c)} tokens"]
    lines += [line("GiB of each process; GPUs:", machine.gpus, "")]
    lines += [line(f"  {name}", [p[name] for p in plans], ".1f") for name in plans[0]]
    lines += [line(f"  in all, of {machine.gpu_memory:g}", totals, ".1f")]
    for n, total in zip(machine.gpus, totals):
        short = total - 0.95 * machine.gpu_memory
        missing = f"does NOT fit: {short:.1f} GiB too much. {advice(c, short)}"
        lines.append(f"{n} GPU(s): {missing if short > 0 else 'fits'}")
    if c.engine == "plain":
        lines.append("The plain engine's caches are not in this: they grow with its batches.")
    return "\n".join(lines)


def open_config(model: str):
    from transformers import AutoConfig

    if model == "miniature":
        with torch.device("meta"):
            return arithmetic.make_model().config
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ValueError(
            f"--model {model}: its config.json is neither here nor can it be fetched from the hub "
            f"({str(e).splitlines()[0][:120]}). Copy that one file into a directory and pass that"
        ) from e


def main(args: list[str]):
    import tyro

    machine, rest = tyro.cli(Machine, args=args, add_help=False, return_unknown_args=True)
    with distributed.exit_on_bad_input():
        c = parse(rest)
        for n in machine.gpus:
            check(c, n)
        print(describe(c, open_config(c.model), machine))


if __name__ == "__main__":
    main(sys.argv[1:])
