"""One GPU at the shapes of paper-8k: random weights of the real configuration, lengths as there.

    python scripts/bench_gpu.py              log-probs and one update of 32 trees, a GPU's share
    python scripts/bench_gpu.py --rollout    and sampling with vLLM, weight sync included
    python scripts/bench_gpu.py --tiny       the same code on a CPU with a toy model

Prints tokens/s, peak memory and MFU (model FLOPs, recomputation not counted, over --peak-tflops).
Medians over --repeats after one warm-up. Not run on a GPU yet: the README has no figure from it.
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
import brpo
import train
from packing import Branch, Tree, is_visible, pack, pack_share
from rollout import Markers, Sampling, sample_rollouts
from runtime import distributed
from runtime.config import PRESETS, Config
from runtime.data import Question
from runtime.engines import make_engine

# DeepSeek-R1-Distill-Qwen-1.5B, as its config.json states it.
REAL = {
    **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
    **{"num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072},
    **{"vocab_size": 151936, "tie_word_embeddings": False},
}
TOY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32768},
    **{"vocab_size": 512, "tie_word_embeddings": False},
}
# Token ids that stand for a tokenizer's.
CUT_TEXT, ANSWER_HEADER = (3, 4, 2), (5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Arguments:
    rollout: bool = False  # Also sample 64 traces of one question with vLLM, and sync.
    tiny: bool = False  # Toy model and lengths.
    trees: int = 32  # 32 questions × 8 rollouts / 8 GPUs in one update.
    repeats: int = 3  # Medians over so many.
    # Dense bfloat16 peak of the GPU by its datasheet (H100 and H200: 989, A100: 312).
    peak_tflops: float = 989.0


def random_trees(
    count: int, budgets: tuple[int, ...], num_summaries: int, vocab: int, seed: int = 0
) -> list[Tree]:
    """Prompts of 60-200 tokens, traces of lognormal length (median 0.6 b_M) capped at b_M,
    summaries of 20-60 tokens."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(vocab, (n,), generator=g).tolist()

    def between(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    trees = []
    for _ in range(count):
        length = int(0.6 * budgets[-1] * math.exp(0.6 * torch.randn(1, generator=g).item()))
        length = min(max(length, 1), budgets[-1])
        branches = [
            Branch(min(b, length), tokens(8), tokens(between(20, 60)), 0.1)
            for b in budgets
            for _ in range(num_summaries)
        ]
        trees.append(Tree(tokens(between(60, 200)), tokens(length), branches, [0.1] * length))
    return trees


def model_flops(model, rows) -> float:
    """Forward and backward FLOPs, recomputation not counted.

        6 per weight and token  +  12 · hidden size per layer and visible (q, k) pair

    The head counts for trained tokens only: no other logits are computed.
    """
    c = model.config
    head = c.hidden_size * c.vocab_size
    embeddings = head * (1 if c.tie_word_embeddings else 2)
    body = sum(math.prod(p.shape) for p in model.parameters()) - embeddings
    total = 0.0
    for row in rows:
        k = torch.arange(len(row.input_ids), device=row.input_ids.device)
        pairs = 0
        for q in k.split(1024):  # block by block: the whole mask would be too large
            visible = is_visible(q[:, None], k[None, :], row.branch, row.trunk, row.trunk_end)
            pairs += int(visible.sum())
        total += 6 * body * len(k) + 6 * head * int(row.trained.sum())
        total += 12 * c.hidden_size * c.num_hidden_layers * pairs
    return total


def timed(work, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_training(a: Arguments, c: Config, model, budgets, row_tokens: int, device):
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr)
    trees = random_trees(a.trees, budgets, c.num_summaries, model.config.vocab_size)
    rows = [row.to(device) for row in pack_share(trees, 0, 1, row_tokens, 128)]
    tokens = sum(len(t) for t in trees)
    unpacked = sum(len(t.prompt) + len(t.thinking) for t in trees)
    unpacked += sum(
        len(t.prompt) + b.cut + len(b.appended) + len(b.summary) for t in trees for b in t.branches
    )
    print(
        f"{a.trees} trees, {tokens} tokens in {len(rows)} rows; as separate sequences {unpacked} "
        f"tokens ({unpacked / tokens:.1f} times as many)"
    )

    def log_probs():
        with torch.no_grad():
            for row in rows:
                row.old_logp = row.sampler_logp = model.token_logprobs(row, c.temperature)

    def update():
        assert train.update(model, optimizer, rows, c).applied

    flops = model_flops(model, rows)
    for name, work, share in (("log-probs", log_probs, 1 / 3), ("update", update, 1.0)):
        timed(work, device)  # warm-up: compiles FlexAttention
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(work, device) for _ in range(a.repeats))
        mfu = flops * share / seconds / a.peak_tflops / 1e12
        print(f"{name:10} {seconds:8.2f} s  {tokens / seconds:10.0f} tokens/s  MFU {mfu:6.1%}")
        if device.type == "cuda":
            print(f"{'':10} peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def bench_sampling(a: Arguments, c: Config, engine, model, budgets, device):
    markers = Markers(2, (1,), CUT_TEXT, ANSWER_HEADER, c.max_summary_tokens)
    question, rollouts = Question(0, "", "", tuple(range(10, 110))), []
    sampling = Sampling(budgets, c.num_rollouts * 8, c.num_summaries, 1.0, (0, 0))

    def sample():
        rollouts.extend(sample_rollouts(engine, [question], sampling, markers))

    seconds = timed(sample, device)
    count = sum(len(r.thinking) + sum(len(s.tokens) for s in r.summaries) for r in rollouts)
    print(
        f"rollout    {seconds:8.2f} s  {count / seconds:10.0f} sampled tokens/s "
        f"({len(rollouts)} rollouts, one GPU's share of a step)"
    )
    sync = [
        timed(lambda: engine.sync_weights(distributed.full_weights(model), version=1), device)
        for _ in range(a.repeats)
    ]
    print(f"sync       {statistics.median(sync):8.2f} s")
    r = rollouts[0]
    branches = [Branch(s.cut, s.appended, s.tokens, 0.0, s.logp) for s in r.summaries if s.tokens]
    row = pack([Tree(list(question.prompt), r.thinking, branches, [], r.logp)], 128).to(device)
    with torch.no_grad():
        gap = brpo.sampler_gap(model.token_logprobs(row, 1.0), row.sampler_logp, row.trained)
    print(
        f"sampler gap, before the sync's update: mean {gap['gap'] / row.trained.sum():.1e}, "
        f"max {gap['gap_max']:.1e}"
    )


def main(a: Arguments):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = Config(**PRESETS["paper-8k"])
    budgets = (200, 400, 600, 800) if a.tiny else c.budget_prior.budgets
    device = distributed.start()
    torch.manual_seed(0)
    engine = None
    with tempfile.TemporaryDirectory() as path:
        config = Qwen2Config(**(TOY if a.tiny else REAL), eos_token_id=1, pad_token_id=0)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        if a.rollout:
            appended = len(CUT_TEXT) + len(ANSWER_HEADER)
            longest = 200 + budgets[-1] + appended + c.max_summary_tokens
            cache = 1.0 if a.tiny else c.kv_cache_gb
            engine = make_engine("vllm", path, device, longest, kv_cache_gb=cache)
        model = distributed.load_policy(path, device)
    bench_training(a, c, model, budgets, 4096 if a.tiny else c.max_tokens_per_row, device)
    if engine:
        bench_sampling(a, c, engine, model, budgets, device)
        engine.close()
    distributed.stop()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
