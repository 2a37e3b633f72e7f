"""What training costs, part by part, on a CPU: each claim of speed or memory with its other side.

    OMP_NUM_THREADS=1 python scripts/bench_training.py               all parts, some minutes
    python scripts/bench_training.py tree memory host advantages     some of them
    python scripts/bench_training.py step                            makes the miniature's base

tree         forward + backward of packed trees against the same sequences written out one by one
memory       peak memory of log-probs in chunks against all logits at once, over V and tokens
host         work per step that no GPU does, at paper scale: balance, pack, block masks
advantages   the tensor code against a loop over rollouts and budgets, 64 × 8 × 4
step         the seconds of a miniature step, by part and by the length of packed rows
threads      one CPU thread against two, over model sizes: from which size on does a second pay?

Both sides of a ratio take turns in one process (memory: one process each); ratios are medians.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import brpo
from packing import Branch, Tree, flex_mask, is_visible, pack, pack_share, token_logprobs
from tasks import arithmetic

VOCABULARY = len(arithmetic.VOCABULARY)


def make_tree(rng, thinking, budgets=4, summaries=4, summary=32, prompt=64, vocabulary=VOCABULARY):
    """Random tokens in the shape of a trace with M evenly spaced cuts and A summaries at each."""

    def tokens(n):
        return [rng.randrange(vocabulary) for _ in range(n)]

    branches = [
        Branch(thinking * (j + 1) // budgets, tokens(8), tokens(summary), 1.0)
        for j in range(budgets)
        for _ in range(summaries)
    ]
    return Tree(tokens(prompt), tokens(thinking), branches, [1.0] * thinking)


def written_out(tree: Tree) -> list[Tree]:
    """The trace, and each summary with a copy of its prefix, as trees without branches."""
    pieces = [Tree(tree.prompt, tree.thinking, [])]
    return pieces + [
        Tree(tree.prompt + tree.thinking[: b.cut] + b.appended, b.summary, [])
        for b in tree.branches
    ]


def seconds(work, *args) -> float:
    """Of CPU time, in one thread: other work on the machine counts less than on the wall clock."""
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def bench_tree(repeats: int):
    def run(model, rows):
        for row in rows:
            token_logprobs(model, row).sum().backward()

    print("tree: forward + backward of one trace, 4 budgets × 4 summaries of 32 tokens")
    # A dense mask costs T² and a layer width²: the wide one has the layers of Qwen2.5-0.5B.
    for width, inner, lengths in ((256, 768, (512, 1024, 2048)), (896, 4864, (512, 1024))):
        model = arithmetic.make_model(
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=4096,
        )
        for thinking in lengths:
            tree = make_tree(random.Random(0), thinking)
            packed, separate = pack([tree]), [pack([piece]) for piece in written_out(tree)]

            pairs = [
                (seconds(run, model, [packed]), seconds(run, model, separate))
                for _ in range(repeats)
            ]
            ratios = [b / a for a, b in pairs]
            tokens = len(packed.input_ids), sum(len(row.input_ids) for row in separate)
            packed_s, separate_s = (statistics.median(side) for side in zip(*pairs))
            print(
                f"  width {width}, thinking {thinking:5}: {tokens[0]} tokens against {tokens[1]} "
                f"({tokens[1] / tokens[0]:.1f} × as many); {packed_s:.2f} s against "
                f"{separate_s:.2f} s: {statistics.median(ratios):.1f} × as fast "
                f"({min(ratios):.1f}-{max(ratios):.1f})",
                flush=True,
            )


def peak_memory(vocabulary: int, tokens: int, chunk: int) -> float:
    """MiB that one forward + backward adds to this process's largest resident memory."""
    model = arithmetic.make_model(num_hidden_layers=1, max_position_embeddings=2 * tokens)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    row = pack([make_tree(random.Random(0), tokens, summaries=0)])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # part of any training, not of the log-probs
    before = highest_resident()
    if chunk:
        token_logprobs(model, row, chunk=chunk).sum().backward()
    else:
        logits = model(row.input_ids[None]).logits[0, :-1].float()
        logits.log_softmax(-1).gather(-1, row.input_ids[1:, None]).sum().backward()
    return highest_resident() - before


def highest_resident() -> float:
    """MiB of this process so far. Not ru_maxrss, which starts from the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def bench_memory():
    print("memory: MiB added by log-probs, forward + backward, chunks of 1024 against all logits")
    for vocabulary, tokens in ((32_000, 2048), (32_000, 4096), (64_000, 2048)):
        sizes = [sys.executable, __file__, "peak", "--sizes", str(vocabulary), str(tokens)]
        outputs = [
            subprocess.run([*sizes, str(chunk)], capture_output=True, text=True, check=True).stdout
            for chunk in (1024, 0)
        ]
        chunked, whole = map(float, outputs)
        print(
            f"  V {vocabulary:7} × {tokens} tokens: {chunked:6.0f} against {whole:6.0f} "
            f"({vocabulary * tokens * 4 / 2**20:.0f} for one float32 copy of the logits)"
        )


def bench_host(repeats: int):
    from torch.nn.attention.flex_attention import create_block_mask

    rng = random.Random(0)
    trees = [make_tree(rng, rng.randrange(500, 8000), summary=100) for _ in range(512)]
    rows = []

    def work():
        rows[:] = pack_share(trees, 0, 8, 32768, 128)

    print(f"host: 512 traces, {sum(map(len, trees))} tokens, 8 processes; of one of them:")
    packing = statistics.median(seconds(work) for _ in range(repeats))
    masks = statistics.median(seconds(lambda: [flex_mask(r) for r in rows]) for _ in range(repeats))
    print(
        f"  balance and pack {packing:.2f} s; {len(rows)} block masks {masks:.2f} s (on a GPU it "
        "counts these)"
    )
    row = pack([make_tree(rng, 6000, summary=100)], 128)
    n = len(row.input_ids)

    def rule(batch, head, q, k):
        return is_visible(q, k, row.branch, row.trunk, row.trunk_end)

    counted = statistics.median(seconds(lambda: flex_mask(row)) for _ in range(repeats))
    evaluated = seconds(lambda: create_block_mask(rule, None, None, n, n, device="cpu"))
    print(
        f"  block mask of one row of {n} tokens: {1000 * counted:.1f} ms counted, "
        f"{1000 * evaluated:.0f} ms by create_block_mask: {evaluated / counted:.0f} × as fast"
    )


def advantages_by_loop(rewards, returns, budgets, probs, decay):
    """The paper's formulas, number by number."""
    questions, rollouts, m = rewards.shape
    out = torch.zeros_like(rewards)
    for q in range(questions):
        for g in range(rollouts):
            for j in range(m):
                weights = [decay ** (j - k) for k in range(j)]
                past = sum(w * rewards[q, g, k].item() for k, w in enumerate(weights))
                own = past / sum(weights) * sum(probs[j:]) if j else 0.0
                group = sum(returns[q, h, j].item() for h in range(rollouts)) / rollouts
                share = (budgets[j - 1] if j else 0) / budgets[-1]
                out[q, g, j] = returns[q, g, j].item() - share * own - (1 - share) * group
    return out


def bench_advantages(repeats: int):
    torch.manual_seed(0)
    budgets, probs = (2000, 4000, 6000, 8000), (0.25,) * 4
    rewards = torch.randint(0, 5, (64, 8, 4)) / 4.0
    returns = (rewards * 0.25).flip(-1).cumsum(-1).flip(-1)
    results = []

    def tensors():
        results.append(brpo.thinking_advantages(rewards, returns, budgets, probs))

    def loop():
        results.append(advantages_by_loop(rewards, returns, budgets, probs, 0.5))

    pairs = [(seconds(tensors), seconds(loop)) for _ in range(repeats)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"advantages: {1000 * statistics.median(a for a, _ in pairs):.2f} ms against "
        f"{1000 * statistics.median(b for _, b in pairs):.0f} ms in a loop: {ratio:.0f} × as "
        f"fast, largest difference {(results[0] - results[1]).abs().max():.0e}"
    )


def bench_step(repeats: int):
    print("step: seconds of a miniature step, medians (step 0 left out)")
    with tempfile.TemporaryDirectory() as directory:
        for row in (512, 1024, 2048):
            out = Path(directory) / str(row)
            flags = f"--steps {repeats + 1} --max-tokens-per-row {row} --eval-questions 8"
            flags = [*flags.split(), "--save-every", "0", "--output-dir", out]
            command = [sys.executable, ROOT / "train.py", *flags]
            subprocess.run(command, capture_output=True, check=True)
            lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()][1:]
            parts = {k: statistics.median(x[k] for x in lines) for k in lines[0] if "time/" in k}
            print(
                f"  rows of {row:4} tokens: "
                + "  ".join(f"{k.removeprefix('time/')} {v:.2f}" for k, v in parts.items())
            )


def bench_threads(repeats: int):
    print("threads: wall time of a forward + backward of a row of 512 tokens, 1 against 2 threads")
    row = pack([make_tree(random.Random(0), 256, summary=16)])
    for hidden, layers in ((64, 3), (128, 4), (256, 4), (256, 8), (384, 8), (576, 12)):
        model = arithmetic.make_model(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=1024,
        )

        def wall(threads, model=model):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            token_logprobs(model, row).sum().backward()
            return time.perf_counter() - start

        wall(1), wall(2)
        pairs = [(wall(1), wall(2)) for _ in range(3 * repeats)]
        one = statistics.median(a for a, _ in pairs)
        print(
            f"  {model.num_parameters() / 1e6:6.2f}M parameters: {1000 * one:6.0f} ms, with two "
            f"threads {statistics.median(a / b for a, b in pairs):.2f} × as fast"
        )
    torch.set_num_threads(1)


def main():
    parts = ("tree", "memory", "host", "advantages", "step", "threads")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default="all", choices=["all", *parts, "peak"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    for part in parts if "all" in a.parts else a.parts:
        if part == "peak":
            print(peak_memory(*a.sizes))
        else:
            globals()[f"bench_{part}"](*([] if part == "memory" else [a.repeats]))


if __name__ == "__main__":
    main()
