"""Beside TRL and transformers on a CPU: the same update and the same sampling, side by side.

    pip install trl==1.16.0                                  # beside requirements.txt
    OMP_NUM_THREADS=1 python scripts/bench_peers.py          # all parts, ten minutes of one core
    python scripts/bench_peers.py anytime --thinking 512 1024 --repeats 3    a part of them

anytime      forward + backward of one trace with 4 budgets × 4 summaries: a packed row against
             TRL's loss, in batches of like length (the trace; each cut) or in one padded batch
memory       the peak of resident memory that this adds, one process for each side
plain        forward + backward of 16 sequences without summaries: packed into rows of a given
             length against TRL's loss on one batch, which has no padding here
generation   8 traces with their summaries: PlainEngine against two calls of `generate`

Random weights, no early stop, so only the timing means anything. The sides take turns in one
process; gradients are compared first. Seconds of CPU time, medians; ratios repeat by repeat.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import brpo
from packing import Tree, pack_share, token_logprobs
from rollout import Markers, Sampling, sample_rollouts
from runtime.data import Question
from runtime.engines import PlainEngine
from scripts.bench_training import highest_resident, make_tree, seconds
from tasks import arithmetic

try:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, GenerationConfig
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad
except ImportError as error:
    raise SystemExit(
        f"bench_peers.py compares with TRL: pip install trl==1.16.0 ({error})"
    ) from None

VOCABULARY, PROMPT, SUMMARY, M, A = 4096, 64, 32, 4, 4
LENGTHS = (512, 1024, 2048)  # of thinking


def make_model(width: int = 256):
    """Four layers of a random Qwen2, with a vocabulary that makes the head cost something."""
    torch.manual_seed(0)
    model = arithmetic.make_model(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=3 * width,
        max_position_embeddings=4096,
    )
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


def sequences(tree: Tree) -> list[tuple[list[int], list[int], list[float]]]:
    """(prefix, tokens to train, an advantage of each): the trace, and the summaries written out."""
    summaries = [
        (
            tree.prompt + tree.thinking[: b.cut] + b.appended,
            b.summary,
            [b.advantage] * len(b.summary),
        )
        for b in tree.branches
    ]
    return [s for s in [(tree.prompt, tree.thinking, tree.advantages), *summaries] if s[1]]


def as_batch(rows, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Sequences as GRPOTrainer's loss takes them: [rows, T], prompts padded left."""

    def column(values, side, value):
        return pad([torch.tensor(v) for v in values], padding_value=value, padding_side=side)

    prompts, completions, advantages = zip(*rows)
    return {
        "prompt_ids": column(prompts, "left", pad_id),
        "prompt_mask": column([[1] * len(p) for p in prompts], "left", 0),
        "completion_ids": column(completions, "right", pad_id),
        "completion_mask": column([[1] * len(c) for c in completions], "right", 0),
        "advantages": column(advantages, "right", 0.0),
    }


def make_trainer(model) -> GRPOTrainer:
    trainer = GRPOTrainer(
        model,
        lambda completions, **kwargs: [0.0] * len(completions),
        GRPOConfig(
            "runs/bench_peers",
            per_device_train_batch_size=4,
            num_generations=4,
            loss_type="dr_grpo",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 8),
        processing_class=arithmetic.make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def by_trl(trainer: GRPOTrainer, batches):
    for rows in batches:
        batch = as_batch(rows)
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
        (loss * len(rows) * trainer.max_completion_length).backward()  # undo dr_grpo's division


def by_packing(model, trees: list[Tree], max_tokens: int):
    model.set_attn_implementation("sdpa_by_tree")  # as training has it on CPUs
    for row in pack_share(trees, 0, 1, max_tokens):
        logp = token_logprobs(model, row)
        loss, _ = brpo.policy_loss(logp, logp.detach(), row.advantages, row.trained, 1.0)
        loss.backward()
    model.set_attn_implementation("sdpa")  # what TRL's sides find


def anytime_sides(thinking: int, width: int = 256):
    """The update of one trace: (model, {side: function}), this project's side first."""
    model = make_model(width)
    trainer = make_trainer(model)
    tree = make_tree(random.Random(0), thinking, M, A, SUMMARY, PROMPT, VOCABULARY)
    trace, *summaries = sequences(tree)
    by_cut = [summaries[i : i + A] for i in range(0, M * A, A)]
    sides = {
        "packed row": lambda: by_packing(model, [tree], len(tree)),
        "TRL, batches of like length": lambda: by_trl(trainer, [[trace], *by_cut]),
        "TRL, one padded batch": lambda: by_trl(trainer, [[trace, *summaries]]),
    }
    if thinking > 1000:  # tens of seconds each
        sides.popitem()
    return model, sides


def plain_sides(length: int, count: int, row: int):
    """The update of `count` sequences of `length` trained tokens, packed into rows of `row`."""
    model, rng = make_model(), random.Random(0)
    trainer = make_trainer(model)
    trees = [make_tree(rng, length, M, 0, 0, PROMPT // 2, VOCABULARY) for _ in range(count)]
    return model, {
        "packed rows": lambda: by_packing(model, trees, row),
        "TRL, one batch": lambda: by_trl(trainer, [[s for t in trees for s in sequences(t)]]),
    }


def generation_sides(folder: str, traces: int, thinking: int, summary: int):
    """Traces of `thinking` tokens, and their summaries: {side: function -> tokens sampled}."""
    make_model().save_pretrained(folder)
    engine, model = PlainEngine(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rng, budgets = random.Random(0), tuple(thinking * (j + 1) // M for j in range(M))
    prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT // 2)] for _ in range(traces)]
    questions = [Question(i, "?", "1", tuple(prompt)) for i, prompt in enumerate(prompts)]
    markers = Markers(-1, (), (5, 4, 6), (6,), summary)  # no token ends anything
    sampling = Sampling(budgets, 1, A, 1.0, (0, 0))

    def ours():
        rollouts = sample_rollouts(engine, questions, sampling, markers)
        return sum(len(r.thinking) + sum(len(s.tokens) for s in r.summaries) for r in rollouts)

    @torch.no_grad()
    def generate(prefixes, tokens):
        width = max(map(len, prefixes))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prefixes])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes])
        settings = dict(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
        config = GenerationConfig(max_new_tokens=tokens, **settings)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return out[:, width:].tolist()

    def theirs():
        traces = generate(prompts, thinking)
        cuts = [p + z[:b] + [5, 4, 6] for p, z in zip(prompts, traces) for b in budgets]
        summaries = generate([cut for cut in cuts for _ in range(A)], summary)
        return sum(map(len, traces)) + sum(map(len, summaries))

    return {"PlainEngine": ours, "generate": theirs}


def compare(sides: dict, repeats: int):
    """Print the median CPU seconds of each side, and by how much the first side is faster."""
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, work in sides.items():
            spent = seconds(work)
            if repeat:  # the first one warms up
                times[name].append(spent)
    first = next(iter(times.values()))
    for name, values in times.items():
        ratios = [b / a for a, b in zip(first, values)]
        print(
            f"    {name:28}{statistics.median(values):8.3f} s   × {statistics.median(ratios):5.2f}"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def largest_gap(model, sides: dict) -> float:
    """The largest relative distance of a side's gradient from the first side's."""
    found = []
    for work in sides.values():
        model.zero_grad()
        work()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return max(((g - found[0]).norm() / found[0].norm()).item() for g in found)


def bench_anytime(repeats: int, lengths=LENGTHS):
    for thinking in lengths:
        model, sides = anytime_sides(thinking)
        gap = largest_gap(model, sides)
        print(f"anytime: {thinking} tokens of thinking; gradients within {gap:.0e}")
        compare(sides, repeats)


def bench_memory(repeats: int):
    print("memory: MiB added by the update of a trace of 512 tokens")
    for side in range(3):
        command = [sys.executable, __file__, "peak", "--repeats", str(side)]
        print(
            "   ",
            subprocess.run(command, capture_output=True, text=True, check=True).stdout,
            end="",
        )


def bench_peak(side: int):
    model, sides = anytime_sides(512)
    name, work = list(sides.items())[side]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # part of any training
    before = highest_resident()
    work()
    print(f"{name:28}{highest_resident() - before:8.0f}")


def bench_plain(repeats: int, length: int = 128, count: int = 16):
    for row in (512, 1024, 2048):
        model, sides = plain_sides(length, count, row)
        gap = largest_gap(model, sides)
        print(f"plain: {count} × {length} tokens in rows of {row}; gradients within {gap:.0e}")
        compare(sides, repeats)


def bench_generation(repeats: int, traces: int = 8, thinking: int = 256, summary: int = 16):
    with tempfile.TemporaryDirectory() as folder:
        sides = generation_sides(folder, traces, thinking, summary)
        tokens = {name: work() for name, work in sides.items()}
        assert len(set(tokens.values())) == 1, tokens
        print(f"generation: {traces} traces of {thinking} tokens, {traces * M * A} summaries")
        compare(sides, repeats)


def main():
    parts = ("anytime", "memory", "plain", "generation")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default="all", choices=["all", *parts, "peak"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--thinking", type=int, nargs="+", default=LENGTHS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    for part in parts if "all" in a.parts else a.parts:
        lengths = [a.thinking] if part == "anytime" else []
        globals()[f"bench_{part}"](a.repeats, *lengths)


if __name__ == "__main__":
    main()
