"""What runs on this GPU and how fast, measured part by part and written to docs/gpu.md.

    python scripts/gpu_report.py                        every part, at most 5 minutes each
    python scripts/gpu_report.py --parts update kernel  some of them again; the others are kept
    python scripts/gpu_report.py --tiny                 the same code on a CPU with a toy model

Needs no download: weights are random, in the shape of DeepSeek-R1-Distill-Qwen-1.5B, and lengths
are like those of paper-8k. Each part runs in a process of its own, so one that fails says why and
the others go on. MFU is model FLOPs, recomputation not counted, over --peak-tflops.
"""

import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import brpo
import packing
import train
from packing import Branch, Tree, is_visible, pack, pack_share
from rollout import Markers, Sampling, sample_rollouts
from runtime import distributed
from runtime.config import PRESETS, Config
from runtime.data import Question
from runtime.engines import PlainEngine
from scripts import plan, preflight
from tasks import arithmetic

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
AFTER_CLOSED = (5, 6, 7, 8, 9)  # token ids that stand for a tokenizer's
AFTER_CUT = (3, 4, 2, *AFTER_CLOSED)
SECONDS = 300  # for one part
Part = Literal[
    "correctness", "update", "packing", "kernel", "sampling", "preflight", "step", "miniature"
]
Rows = list[tuple[str, str]]  # what, measured


@dataclass(frozen=True)
class Arguments:
    parts: tuple[Part, ...] = Part.__args__  # Which to measure.
    tiny: bool = False  # Toy model and lengths, in a minute or two on a CPU.
    # Dense bfloat16 peak of the GPU by its datasheet (H100 and H200: 989, A100: 312).
    peak_tflops: float = 989.0
    repeats: int = 3  # Medians over so many.
    output: Path = ROOT / "docs/gpu.md"
    results: Path = Path("runs/gpu_report")  # One file for each part, and its log.
    inside: bool = False  # Run the one part in this process (what the script itself calls).

    @property
    def budgets(self) -> tuple[int, ...]:
        return (50, 100, 150, 200) if self.tiny else (2000, 4000, 6000, 8000)

    @property
    def row_tokens(self) -> int:
        return 4096 if self.tiny else PRESETS["paper-8k"]["max_tokens_per_row"]


# -------------------------------------------------------------------------- what the parts build on


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


def separate_trees(trees: list[Tree]) -> list[Tree]:
    """Every trace and every summary as a sequence of its own: what packing saves."""
    alone = [Tree(t.prompt, t.thinking, [], t.advantages) for t in trees]
    for t in trees:
        for b in t.branches:
            prefix = t.prompt + t.thinking[: b.cut] + b.appended
            alone.append(Tree(prefix, b.summary, [], [b.advantage] * len(b.summary)))
    return alone


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


def timed(work: Callable) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable, repeats: int) -> float:
    """After one warm-up, which compiles; the peak of memory is counted after it as well."""
    timed(work)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return statistics.median(timed(work) for _ in range(repeats))


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / plan.GIB if torch.cuda.is_available() else 0.0


def model_config(a: Arguments, **changes):
    from transformers import Qwen2Config

    return Qwen2Config(**{**(TOY if a.tiny else REAL), "pad_token_id": 0, **changes})


def make_policy(a: Arguments, device, **changes):
    """Random weights as training holds them: on a GPU bfloat16 compute, FSDP2, FlexAttention."""
    from transformers import Qwen2ForCausalLM

    gpu = device.type == "cuda"
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(model_config(a, **changes))
    model.set_attn_implementation("flex_attention" if gpu else "sdpa")
    return distributed.make_trainable(model, gpu)


def write_model(a: Arguments, path: Path, **changes) -> Path:
    """A directory with random weights and the miniature's tokenizer, of which ids past its own
    decode to nothing."""
    from transformers import Qwen2ForCausalLM

    tokenizer = arithmetic.make_tokenizer()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = model_config(a, eos_token_id=tokenizer.eos_token_id, **changes)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def flags_of(a: Arguments, model: Path) -> list[str]:
    """Of a run of paper-8k without a download and without vLLM."""
    preset = "miniature" if a.tiny else "paper-8k"
    flags = f"--preset {preset} --model {model} --output-dir {a.results}/runs/{model.name}"
    flags += " --engine plain --train-data miniature --eval-data miniature --max-prompt-tokens 200"
    return f"{flags} --max-summary-tokens 100 --verifier-workers 2".split()


def run(a: Arguments, script: str, *flags: str) -> str:
    """The output of a script of ours; RuntimeError with its last lines if it fails."""
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{script}: " + " / ".join(done.stdout.strip().splitlines()[-3:]))
    return done.stdout


# -------------------------------------------------------------------------------------- the parts


def correctness(a: Arguments, device) -> Rows:
    model = make_policy(a, device, num_hidden_layers=2)
    rows = [
        (
            "mean difference of log-probs, a tree against its separate sequences",
            f"{preflight.tree_against_separate(model, device):.1e}",
        )
    ]
    if device.type == "cpu":
        return rows
    difference = preflight.flex_against_dense(model, device)
    rows.append(("the same, FlexAttention against a dense mask", f"{difference:.1e}"))
    row = pack([preflight.example(model.config.vocab_size)], 128).to(device)
    gradients = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model.token_logprobs(row, 1.0).sum().backward()
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    rows.append(("cosine of their gradients", f"{cosine:.5f}"))
    return rows


def update(a: Arguments, device) -> Rows:
    """One optimizer step on 32 trees, a GPU's share of paper-8k's 32 questions × 8 rollouts."""
    c = Config(**PRESETS["paper-8k"])
    planned = {}
    if device.type == "cuda":
        distributed.stop()  # planning makes a fake process group of its own
        planned = plan.training_peak(model_config(a), 1, a.row_tokens)
        device = distributed.start()
    model = make_policy(a, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr)
    trees = random_trees(4 if a.tiny else 32, a.budgets, c.num_summaries, model.config.vocab_size)
    rows = [row.to(device) for row in pack_share(trees, 0, 1, a.row_tokens, 128)]
    tokens, flops = sum(len(t) for t in trees), model_flops(model, rows)

    def log_probs():
        with torch.no_grad():
            for row in rows:
                row.old_logp = row.sampler_logp = model.token_logprobs(row, c.temperature)

    def one_update():
        assert train.update(model, optimizer, rows, c).applied

    def figure(seconds, share):
        speed = f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens/s"
        mfu = flops * share / seconds / a.peak_tflops / 1e12
        return speed + (f", MFU {mfu:.1%}" if device.type == "cuda" else "")

    out = [(f"{len(trees)} trees", f"{tokens:,} tokens in {len(rows)} rows, {flops:.3g} FLOPs")]
    out.append(("log-probs of these", figure(median_seconds(log_probs, a.repeats), 1 / 3)))
    out.append(("one update on these", figure(median_seconds(one_update, a.repeats), 1.0)))
    if planned:
        gib = (sum(planned.values()) - planned["parameters"]) / plan.GIB
        out.append(("peak memory of it", f"{peak_gib():.1f} GiB (scripts/plan.py: {gib:.1f})"))
    return out


def packed_against_separate(a: Arguments, device) -> Rows:
    """Forward and backward of some trees, as trees and as sequences of their own."""
    model, out = make_policy(a, device), []
    trees = random_trees(2 if a.tiny else 4, a.budgets, 4, model.config.vocab_size)
    for name, some in (("packed trees", trees), ("separate sequences", separate_trees(trees))):
        rows = [row.to(device) for row in pack_share(some, 0, 1, a.row_tokens, 128)]
        seconds = median_seconds(partial(forward_backward, model, rows), 1)
        tokens = sum(len(t) for t in some)
        what = f"{len(trees)} traces with all summaries, {name}"
        out.append((what, f"{seconds:.2f} s, {tokens:,} tokens"))
    return out


def forward_backward(model, rows):
    for row in rows:
        distributed.accumulate(model, row is rows[-1])
        (model.token_logprobs(row, 1.0) * row.advantages).sum().backward()
    model.zero_grad()


def kernel(a: Arguments, device) -> Rows:
    """FlexAttention alone and in the model, and the log-probs of a chunk of logits."""
    c, out = model_config(a), []
    (tree,) = random_trees(1, a.budgets, 4, c.vocab_size, seed=1)
    tree.thinking, tree.advantages = [7] * a.budgets[-1], [0.1] * a.budgets[-1]
    row = pack([tree], 128).to(device)
    model = make_policy(a, device, num_hidden_layers=4 if device.type == "cuda" else 2)
    for name in ("flex_attention", "sdpa") if device.type == "cuda" else ("sdpa",):
        model.set_attn_implementation(name)
        seconds = median_seconds(partial(forward_backward, model, [row]), a.repeats)
        layers = model.config.num_hidden_layers
        what = f"forward and backward, {layers} layers, a row of {len(row.input_ids)}, {name}"
        out.append((what, f"{seconds:.3f} s"))
    if device.type == "cuda":
        out += flex_kernel(a, c, row)
    n, half = (256, torch.float32) if a.tiny else (4096, torch.bfloat16)
    h = torch.randn(n, c.hidden_size, device=device, dtype=half, requires_grad=True)
    head = torch.nn.Linear(c.hidden_size, c.vocab_size, False, device, half)
    targets = torch.randint(c.vocab_size, (n,), device=device)
    for name in ("eager", "compiled") if device.type == "cuda" else ("eager",):
        function = getattr(packing, f"{name}_target_logprobs")
        for chunk in (n // 4, n):
            work = partial(chunked_logprobs, function, head, h, targets, chunk)
            seconds = median_seconds(work, a.repeats)
            what = f"log-probs of {n} tokens with gradients, {name}, {chunk} at a time"
            out.append((what, f"{seconds * 1e3:.1f} ms, peak {peak_gib():.1f} GiB"))
    return out


def chunked_logprobs(function, head, h, targets, chunk: int):
    for i in range(0, len(h), chunk):
        function(head(h[i : i + chunk]), targets[i : i + chunk], 1.0).sum().backward()


def flex_kernel(a: Arguments, c, row) -> Rows:
    from torch.nn.attention.flex_attention import flex_attention

    size = (1, c.num_attention_heads, len(row.input_ids), c.hidden_size // c.num_attention_heads)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    blocks = row.block_mask.kv_num_blocks.sum() + row.block_mask.full_kv_num_blocks.sum()
    flops, out = 4 * size[1] * size[3] * int(blocks) * 128**2, []
    for kind, dynamic in (("lengths as inputs", True), ("one fixed length", False)):
        flex = torch.compile(flex_attention, dynamic=dynamic)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend = partial(flex, *inputs, block_mask=row.block_mask)
        with torch.no_grad():
            forward = median_seconds(attend, 5)
        gradient = torch.randn_like(q)
        both = median_seconds(lambda: attend().backward(gradient), 5)  # noqa: B023
        back = both - forward
        speed = f"{flops / forward / 1e12:.0f} and {2.5 * flops / back / 1e12:.0f} TFLOP/s"
        out.append((f"FlexAttention, forward and backward, {kind}", speed))
    return out


def sampling(a: Arguments, device) -> Rows:
    """The plain engine at full width: speed, weight sync, its log-probs beside the trainer's."""
    longest, traces = (64, 4) if a.tiny else (256, 32)
    path = write_model(a, a.results / "model")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    engine = PlainEngine(str(path), device, dtype)
    model = distributed.load_policy(str(path), device)
    markers = Markers(2, (1,), AFTER_CUT, AFTER_CLOSED, 20)
    budgets, rollouts = (longest // 2, longest), []
    question = Question(0, "", "", tuple(range(10, 50)))
    settings = Sampling(budgets, traces, 4, 1.0, (0, 0))
    seconds = timed(lambda: rollouts.extend(sample_rollouts(engine, [question], settings, markers)))
    count = sum(len(r.thinking) + sum(len(s.tokens) for s in r.summaries) for r in rollouts)
    what = f"sampling by transformers, {traces} traces of {longest}"
    out = [(what, f"{count / seconds:,.0f} tokens/s")]
    trees = []
    for r in rollouts:
        branches = [Branch(s.cut, s.appended, s.tokens, 0, s.logp) for s in r.summaries if s.tokens]
        trees.append(Tree(list(question.prompt), r.thinking, branches, [], r.logp))
    row = pack(trees[:8], 128).to(device)
    with torch.no_grad():
        gap = brpo.sampler_gap(model.token_logprobs(row, 1.0), row.sampler_logp, row.trained)
    mean, most = gap["gap"].item() / int(row.trained.sum()), gap["gap_max"].item()
    out.append(("sampler gap, |difference of log-probs|", f"mean {mean:.1e}, largest {most:.1e}"))
    sync = median_seconds(
        lambda: engine.sync_weights(distributed.full_weights(model), version=1), a.repeats
    )
    return [*out, ("weight sync", f"{sync:.3f} s")]


def preflight_passes(a: Arguments, device) -> Rows:
    path = write_model(a, a.results / "small-model", num_hidden_layers=4 if not a.tiny else 2)
    text = run(a, "scripts/preflight.py", *flags_of(a, path))
    found = re.findall(r"^(ok|FAIL|   ) +(\w.{51}) (\S.*)$", text, re.M)
    return [(f"preflight: {what.strip()}", f"{x} {ok}".strip()) for ok, what, x in found]


def whole_step(a: Arguments, device) -> Rows:
    """train.py itself: two steps with every part of them."""
    path = write_model(a, a.results / "step-model")
    budget = 48 if a.tiny else 512
    small = f"--max-budget {budget} --num-rollouts 4 --questions-per-step 4 --steps 2"
    small += " --save-every 0 --updates-per-step 2"
    small += " --eval-questions 2 --eval-samples 1 --num-eval-budgets 1"
    run(a, "train.py", *flags_of(a, path), *small.split())
    lines = (a.results / "runs" / path.name / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    times = [f"{k.removeprefix('time/')} {x:.1f} s" for k, x in last.items() if "time/" in k]
    what = f"the second step of 16 traces, budget {budget}, by the plain engine"
    return [(what, ", ".join(times)), ("its sampler gap", f"{last['sampler_gap']:.1e}")]


def miniature(a: Arguments, device) -> Rows:
    flags = ["--output-dir", f"{a.results}/miniature", "--max-tokens-per-row", "16384"]
    seconds = timed(lambda: run(a, "train.py", *flags))
    result = json.loads((a.results / "miniature/eval.json").read_text())
    first, last = result["before"]["anytime_accuracy"], result["anytime_accuracy"]
    what = "the default run, seed 0: anytime accuracy before and after"
    return [(what, f"{first:.3f} and {last:.3f}, in {seconds:.0f} s")]


PARTS: dict[str, Callable] = {
    "correctness": correctness,
    "update": update,
    "packing": packed_against_separate,
    "kernel": kernel,
    "sampling": sampling,
    "preflight": preflight_passes,
    "step": whole_step,
    "miniature": miniature,
}


# ------------------------------------------------------------------------------------- the report


def measure(a: Arguments, part: str):
    """One part in a process of its own; its result, or why there is none, in <results>/<part>.json.

    What a part prints is kept in <results>/<part>.log.
    """
    path, log = a.results / f"{part}.json", a.results / f"{part}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--inside", "--parts", part, "--results", str(a.results)]
    command += ["--peak-tflops", str(a.peak_tflops), "--repeats", str(a.repeats)]
    command += ["--tiny"] if a.tiny else []
    start = time.perf_counter()
    with open(log, "w") as f:
        try:
            subprocess.run(command, stdout=f, stderr=f, timeout=SECONDS)
            lines = log.read_text().strip().splitlines() or ["nothing was printed"]
            errors = [line for line in lines if "Error" in line]
            reason = (errors or lines)[-1]
        except subprocess.TimeoutExpired:
            reason = f"not finished after {SECONDS} s"
    if not path.exists():
        path.write_text(json.dumps([["did not run", reason[:300]]]))
    print(f"{part} ({time.perf_counter() - start:.0f} s)", flush=True)
    for what, measured in json.loads(path.read_text()):
        print(f"    {what:75} {measured}", flush=True)


def machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{gpu}; {versions}, Python {platform.python_version()}; {date.today()}"


def write_report(a: Arguments):
    command = "python scripts/gpu_report.py" + (" --tiny" if a.tiny else "")
    lines = ["# Measured on a GPU", "", f"`{command}`", "", machine(), ""]
    for part in Part.__args__:
        path = a.results / f"{part}.json"
        if path.exists():
            lines += [f"## {part.capitalize()}", "", "| what | measured |", "|---|---|"]
            lines += [f"| {what} | {measured} |" for what, measured in json.loads(path.read_text())]
            lines.append("")
    a.output.write_text("\n".join(lines[:-1]) + "\n")


def main(a: Arguments):
    a.results.mkdir(parents=True, exist_ok=True)
    if a.inside:
        (part,) = a.parts
        rows = PARTS[part](a, distributed.start())
        (a.results / f"{part}.json").write_text(json.dumps(rows))
        return
    for part in a.parts:
        if a.tiny and part == "miniature":
            continue  # on a CPU that is `python train.py`
        measure(a, part)
        write_report(a)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
