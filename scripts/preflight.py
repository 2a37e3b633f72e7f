"""A check of this machine: every part of a run once, small, before the long run is paid for.

    torchrun --nproc_per_node 8 scripts/preflight.py --preset paper-8k    the paper's model
    python scripts/preflight.py                                           the miniature, on a CPU

Takes every flag of train.py; budgets, rollouts and questions are SMALL unless given by hand. Trains
two steps of the real model with evaluation and checkpoints, takes the second one again from the
first one's checkpoint, then tries the training forward alone. Prints a verdict for every part; exit
code 1 if one fails. How long it takes at 1.5B is unknown: that has not run yet.

Writes into --output-dir (runs/preflight, emptied at each start; the miniature's base into runs/):
at most two checkpoints of 12 bytes a weight and the model twice, which is 28 bytes a weight for a
bfloat16 model, or 50 GB for the paper's. At the end the logs alone are left.
"""

import json
import resource
import shutil
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
import rollout
import train
from packing import Branch, Tree, pack
from runtime import distributed, startup
from runtime.config import Config, check, parse
from scripts.plan import GIB, row_tokens
from tasks import arithmetic

SMALL = {
    "max-budget": 96,
    "num-budgets": 2,
    "num-rollouts": 4,
    "num-summaries": 2,
    "updates-per-step": 2,
    "steps": 2,
    "save-every": 1,
    "keep-checkpoints": 2,
    "eval-questions": 2,
    "eval-samples": 1,
    "num-eval-budgets": 1,
    "kv-cache-gb": 2,
    "lr": 1e-4,  # large: an update that the sampler missed must show in its gap
    "output-dir": "runs/preflight",
}
# Mean |difference| of log-probs, between two ways to compute the same: one per precision.
LIMIT = {"cpu": 1e-4, "cuda": 3e-2}


def small(args: list[str]) -> Config:
    """The run of these flags in small; questions: as many as processes, two at least, in pairs."""
    world = distributed.world_size()
    if parse(args).preset == "miniature":  # its own traces are short
        args = ["--max-budget", "48", *args]
    questions = world if world % 2 == 0 else 2 * world
    flags = [str(x) for k, v in SMALL.items() for x in (f"--{k}", v)]
    c = parse([*flags, "--questions-per-step", str(questions), *args])  # the last one counts
    return replace(c, eval_data=(c.train_data,))


def main(args: list[str]) -> bool:
    with distributed.exit_on_bad_input():
        full, c = parse(args), small(args)
        for config in (full, c):
            check(config, distributed.world_size())
    device, out = distributed.start(), Path(c.output_dir)
    if distributed.rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
    distributed.barrier()

    checkpoints = out / "checkpoints"
    with patch.object(startup, "make_grader", every_other_grader):
        train.train(c)
        first, second = metrics_of(out)
        if distributed.rank() == 0:  # a run does not go back to before its newest checkpoint
            shutil.rmtree(checkpoints / "step-00000002")
        train.train(replace(c, resume=str(checkpoints / "step-00000001")))
        _, again = metrics_of(out)

    cpu, limit = device.type == "cpu", LIMIT[device.type]
    frozen = sum(norm == 0 for m in (first, second, again) for norm in m["grad_norm"])
    repeats = limit * abs(second["loss"]) + 1e-6 if cpu else float("inf")
    good = [
        verdict("updates without a gradient", frozen, 0),
        verdict("sampler against trainer", first["sampler_gap"], limit),
        # Sampled by weights that one update has moved: a missed sync would leave the old ones.
        verdict("the same after a weight sync", second["sampler_gap"], limit),
        verdict("the same after a resume", again["sampler_gap"], limit),
        verdict(
            "the resumed step repeats itself: difference in loss",
            abs(again["loss"] - second["loss"]),
            repeats,
        ),
    ]

    distributed.start()
    base = arithmetic.base_path(Path("runs"), c.seed) if c.model == "miniature" else c.model
    before = 0 if cpu else torch.cuda.memory_allocated()  # what the closed engines left
    model = distributed.load_policy(str(base), device)
    separate = tree_against_separate(model, device)
    good.append(verdict("a tree against separate sequences", separate, limit))
    if cpu:
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        say("FlexAttention against dense", "trains on GPUs only")
        say("memory", f"{gib:.1f} GiB at the peak of this process")
    else:
        dense = flex_against_dense(model, device)
        good.append(verdict("FlexAttention against dense", dense, limit))
        good.append(memory(model, device, full, before))
    for name, seconds in second.items():
        if name.startswith("time/"):
            say(f"a small step, {name.removeprefix('time/')}", f"{seconds:.1f} s")
    if distributed.rank() == 0:
        for large in (checkpoints, out / "model"):
            shutil.rmtree(large)
    distributed.stop()
    return all(good)


def every_other_grader(verifier, tokenizer, markers):
    """Grade as usual, but let every other summary score 1, whatever it says.

    At budgets this small nearly every true score is the same, and without a difference nothing is
    learned: no weight would move, and a sync that does nothing would pass.
    """
    grade = rollout.make_grader(verifier, tokenizer, markers)

    def every_other(r, summary):
        grade(r, summary)
        score = Future()
        score.set_result((r.sample + summary.budget_index + summary.draw) % 2)
        return score

    return every_other


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def say(part: str, numbers: str, verdict: str = ""):
    """A line for one part, from the first process."""
    if distributed.rank() == 0:
        print(f"{verdict:4}  {part:52} {numbers}", flush=True)


def verdict(part: str, value: float, limit: float, unit: str = "") -> bool:
    ok = value <= limit
    say(part, f"{value:.2g}{unit} (limit {limit:.2g}{unit})", "ok" if ok else "FAIL")
    return ok


def memory(model, device, full: Config, before: int) -> bool:
    """One update at the real row length on a GPU, and what the sampler will hold beside it."""
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    tokens = row_tokens(full)
    row = pack([Tree([0], torch.randint(100, (tokens - 1,)).tolist(), [])], 128).to(device)
    for last in (False, True):  # the second row finds the first one's gradients
        distributed.accumulate(model, last)
        model.token_logprobs(row, 1.0).sum().backward()
    distributed.clip_gradients(model, 1.0)
    optimizer.step()
    weights = 2 * sum(p.numel() for p in model.parameters()) / full.tensor_parallel_size / GIB
    cache = full.kv_cache_gb if full.engine == "vllm" else 0.0
    used = (torch.cuda.max_memory_allocated() - before) / GIB + weights + cache
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return verdict(f"memory: a row of {tokens} tokens, and the sampler", used, 0.9 * total, " GiB")


# ----------------------------------------------------- two ways to compute the same, on this device


def example(vocabulary: int) -> Tree:
    """A tree with cuts inside, at the end and twice at one place; random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    branches = [Branch(cut, tokens(5), tokens(20)) for cut in (50, 50, 150, 200)]
    return Tree(tokens(30), tokens(200), branches)


def tree_against_separate(model, device) -> float:
    """Mean |Δ log-prob| between one packed tree and its sequences in rows of their own."""
    tree = example(model.config.vocab_size)
    trunk = [Tree(tree.prompt, tree.thinking, [])]
    separate = trunk + [
        Tree(tree.prompt + tree.thinking[: b.cut] + b.appended, b.summary, [])
        for b in tree.branches
    ]
    row, rows = pack([tree], 128), [pack([t], 128) for t in separate]
    with torch.no_grad():
        packed = model.token_logprobs(row.to(device), 1.0)[row.trained.to(device)]
        alone = torch.cat(
            [model.token_logprobs(r.to(device), 1.0)[r.trained.to(device)] for r in rows]
        )
    return (packed - alone).abs().mean().item()


def flex_against_dense(model, device) -> float:
    """Mean |Δ log-prob| between FlexAttention and a dense mask, on the example tree."""
    row = pack([example(model.config.vocab_size)], 128).to(device)
    logps, kept = [], model.config._attn_implementation
    with torch.no_grad():
        for implementation in ("flex_attention", "sdpa"):
            model.set_attn_implementation(implementation)
            logps.append(model.token_logprobs(row, 1.0)[row.trained])
    model.set_attn_implementation(kept)
    return (logps[0] - logps[1]).abs().mean().item()


if __name__ == "__main__":
    distributed.main(lambda: sys.exit(not main(sys.argv[1:])))
