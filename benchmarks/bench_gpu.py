"""One GPU at the exact shapes of paper-8k: random weights of the real configuration, lengths as in
the paper.

    python benchmarks/bench_gpu.py                      training: log-probs and one update of 32 trees (one GPU's share of eight)
    python benchmarks/bench_gpu.py --rollout            and sampling with vLLM, weight sync included
    python benchmarks/bench_gpu.py --tiny               the same code on a CPU with a toy model, to see that it runs

Prints tokens/s, peak memory and MFU (model FLOPs, recomputation not counted, over --peak-tflops).
Medians over --repeats after one warm-up. Not run on a GPU yet: the README carries no figure from
it.
"""

import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tree import Branch, Tree, balance, is_visible, pack

import brpo
import distributed
from config import PRESETS, Config, denominator
from data import Question
from rollout import Protocol, make_engine, sample_rollouts, to_tree

# DeepSeek-R1-Distill-Qwen-1.5B, as its config.json states it.
REAL = dict(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
TOY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=512,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Arguments:
    rollout: bool = False
    """Also sample 8 thinkings of one question with vLLM and sync weights."""
    tiny: bool = False
    """Toy model and lengths."""
    trees: int = 32
    """32 questions × 8 rollouts / 8 GPUs in one update."""
    repeats: int = 3
    peak_tflops: float = 989.0
    """Dense bfloat16 peak of the GPU by its datasheet (H100 and H200: 989, A100: 312)."""


def random_trees(
    count: int, budgets: tuple[int, ...], num_summaries: int, vocab: int, seed: int = 0
) -> list[Tree]:
    """Prompts of 60-200 tokens, thinkings of lognormal length (median 0.6 b_M) capped at b_M,
    summaries of 20-60 tokens."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(vocab, (n,), generator=g).tolist()

    def between(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    trees = []
    for _ in range(count):
        length = max(
            1,
            min(
                budgets[-1],
                int(0.6 * budgets[-1] * math.exp(0.6 * torch.randn(1, generator=g).item())),
            ),
        )
        branches = [
            Branch(min(b, length), tokens(8), tokens(between(20, 60)), 0.1)
            for b in budgets
            for _ in range(num_summaries)
        ]
        trees.append(Tree(tokens(between(60, 200)), tokens(length), branches, [0.1] * length))
    return trees


def model_flops(model, rows) -> float:
    """Forward and backward FLOPs without recomputation: 6 per weight and token, and 12·D per layer
    and visible pair.

    The head counts for trained tokens only: no other logits are computed. Pairs are counted from
    the mask, block by block.
    """
    c = model.config
    head = c.hidden_size * c.vocab_size
    body = sum(math.prod(p.shape) for p in model.parameters()) - head * (
        1 if c.tie_word_embeddings else 2
    )
    total = 0.0
    for row in rows:
        n = len(row.input_ids)
        k = torch.arange(n, device=row.input_ids.device)
        pairs = sum(
            int(
                is_visible(
                    k[i : i + 1024, None], k[None, :], row.segment, row.trunk, row.limit
                ).sum()
            )
            for i in range(0, n, 1024)
        )
        total += (
            6 * body * n
            + 6 * head * int(row.trained.sum())
            + 12 * c.hidden_size * c.num_hidden_layers * pairs
        )
    return total


def timed(work, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(a: Arguments):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = Config(**PRESETS["paper-8k"])
    budgets = (200, 400, 600, 800) if a.tiny else c.budget_prior.budgets
    row_tokens = 4096 if a.tiny else c.max_tokens_per_row
    device = distributed.start()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as path:
        Qwen2ForCausalLM(
            Qwen2Config(**(TOY if a.tiny else REAL), eos_token_id=1, pad_token_id=0)
        ).to(torch.bfloat16).save_pretrained(path)
        longest = 200 + budgets[-1] + c.summary_room
        engine = (
            make_engine("vllm", path, device, longest, kv_cache_gb=c.kv_cache_gb)
            if a.rollout
            else None
        )
        model = distributed.load_policy(path, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr)

    trees = random_trees(a.trees, budgets, c.num_summaries, model.config.vocab_size)
    (plan,) = balance([len(t) for t in trees], 1, row_tokens)
    rows = [pack([trees[i] for i in row], row_tokens // 4).to(device) for row in plan]
    tokens = sum(len(t) for t in trees)
    unpacked = sum(
        (len(t.prompt) + b.cut + len(b.appended) + len(b.summary))
        for t in trees
        for b in t.branches
    ) + sum(len(t.prompt) + len(t.thinking) for t in trees)
    print(
        f"{a.trees} trees, {tokens} tokens in {len(rows)} rows; as separate sequences {unpacked} tokens ({unpacked / tokens:.1f} times as many)"
    )
    old = []

    def log_probs():
        old.clear()
        with torch.no_grad():
            old.extend(model.token_logprobs(row, c.temperature) for row in rows)

    def update():
        for i, (row, old_logp) in enumerate(zip(rows, old)):
            distributed.accumulate(model, last=i == len(rows) - 1)
            logp = model.token_logprobs(row, c.temperature)
            brpo.policy_loss(logp, old_logp, row.advantages, row.trained, denominator(c))[
                0
            ].backward()
        distributed.clip_gradients(model, c.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    flops = model_flops(model, rows)
    for name, work, share in (("log-probs", log_probs, 1 / 3), ("update", update, 1.0)):
        timed(work, device)  # warm-up: compiles FlexAttention
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(work, device) for _ in range(a.repeats))
        memory = (
            f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if device.type == "cuda"
            else ""
        )
        print(
            f"{name:10} {seconds:8.2f} s  {tokens / seconds:10.0f} tokens/s  MFU {flops * share / seconds / a.peak_tflops / 1e12:6.1%}{memory}"
        )

    if engine:
        protocol = Protocol(
            think_end=2,
            eos=(1,),
            cut_text=(3, 4, 2),
            answer_header=(5, 6, 7, 8, 9),
            max_summary_tokens=c.max_summary_tokens,
        )
        question = Question(0, "", "", tuple(range(10, 110)))
        sampled = []
        seconds = timed(
            lambda: sampled.extend(
                sample_rollouts(
                    engine,
                    [question],
                    budgets,
                    c.num_rollouts * 8,
                    c.num_summaries,
                    protocol,
                    1.0,
                    (0, 0),
                )
            ),
            device,
        )
        count = sum(len(r.thinking) + sum(len(s.tokens) for s in r.summaries) for r in sampled)
        print(
            f"rollout    {seconds:8.2f} s  {count / seconds:10.0f} sampled tokens/s ({len(sampled)} thinkings, one GPU's share of a step)"
        )
        sync = [
            timed(lambda: engine.sync_weights(distributed.full_weights(model), version=1), device)
            for _ in range(a.repeats)
        ]
        print(f"sync       {statistics.median(sync):8.2f} s")
        row = pack(
            [to_tree(sampled[0], [0.0] * 4, [[0.0] * c.num_summaries] * 4, budgets)], 128
        ).to(device)
        with torch.no_grad():
            gap = brpo.sampler_gap(model.token_logprobs(row, 1.0), row.sampler_logp, row.trained)
        print(
            f"sampler gap, before the sync's update: mean {gap['gap'] / row.trained.sum():.1e}, max {gap['gap_max']:.1e}"
        )
        engine.close()
    distributed.stop()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
