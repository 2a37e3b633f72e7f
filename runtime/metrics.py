"""What a step and an evaluation report: a line on the terminal, an object in metrics.jsonl.

docs/metrics.md explains each key: what it is, and which values are healthy.
"""

import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import brpo
from runtime import distributed, rundir
from runtime.checkpoint import last_good
from runtime.plots import curve_lines, draw_curves
from runtime.watch import example_lines, readable
from tasks.verifier import FAILURES

MAX_SKIPPED = 5  # updates in a row with a nan or an infinity: then the run stops
# A step beyond one of these gets a warning: its updates may have destroyed the policy.
LOUD = {"kl": 0.5, "clip_share": 0.5}
LOUD_SAMPLER_GAP = 0.1  # mean |log-prob difference|; 0.02 was measured in bfloat16 on a GPU
LOUD_FAILURE_SHARE = 0.02  # of the gradings that score 0 for another reason than a wrong answer
LOUD_GRAD_NORM = 1e3  # × max_grad_norm, before clipping
FINISHES = ("closed", "eos", "length")  # of a trace, see rollout.Rollout
SAMPLES_PER_STEP = 2  # rollouts that samples.jsonl keeps as text, of one question each
# Dense bfloat16 peaks by the datasheets, in TFLOP/s; the first name that matches counts.
PEAK_TFLOPS = {
    **{"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{"H200 NVL": 835, "H200": 989, "B200": 2250},
}


class Clock:
    """Wall seconds per named part of a step."""

    def __init__(self):
        self.seconds, self.start = {}, time.perf_counter()

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[f"time/{name}"] = time.perf_counter() - start


class Progress:
    """Two bars on a terminal: the steps, and below it the summaries graded since the last line of
    the log, since a step or an evaluation can take minutes.

    Nothing where stderr is no terminal, and nothing from other processes than the first.
    """

    def __init__(self, c, steps: int, first_step: int):
        disable = None if distributed.rank() == 0 else True  # None: where stderr is no terminal
        budgets = len(c.budget_prior.budgets)
        self.steps = tqdm(
            total=steps, initial=first_step, desc=c.experiment, unit="step", disable=disable
        )
        graded = "{n_fmt} summaries graded (a step has {total_fmt})"
        self.graded = tqdm(
            total=c.questions_per_step * c.num_rollouts * budgets * c.num_summaries,
            bar_format=graded + ", {elapsed}, {rate_noinv_fmt}",
            unit="",
            miniters=1,  # or a guess from a fast step would stall the next, slow one
            leave=False,
            disable=disable,
        )
        self.samplers = distributed.world_size() // c.tensor_parallel_size

    def counting(self, grade: Callable) -> Callable:
        """`grade`, counted. Assume that the other processes progress at the same rate."""

        def grade_and_count(rollout, summary):
            self.graded.update(self.samplers)
            return grade(rollout, summary)

        return grade_and_count

    def close(self):
        self.graded.close()
        self.steps.close()


def multiplied_weights(model) -> int:
    """The number N of weights that multiply every token: all but an untied input embedding, of
    which a token only looks one row up."""
    tied = model.config.get_text_config().tie_word_embeddings
    unused = 0 if tied else model.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in model.parameters()) - unused


def flops_utilization(
    weights: int, tokens: float, seconds: float, processes: int, gpu: str
) -> float | None:
    """MFU, the share of the GPUs' peak that forward and backward of the trained tokens take.

        6 · N · T / (seconds · W · peak)

    N `weights` that multiply, T trained `tokens`, W `processes` with a GPU each. A lower bound:
    prompts, appended text, attention scores and recomputation are work too and not counted.
    None where the peak of `gpu` (its name) is not known; a MIG slice has a part of it only.
    """
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)]
    if not peaks or "MIG" in gpu:
        return None
    return 6 * weights * tokens / (seconds * processes * peaks[0] * 1e12)


class Update(NamedTuple):
    """What one optimizer step did, in this process."""

    sums: list[dict]  # of every row: loss, and brpo's sums over its trained tokens
    grad_norm: float  # over all processes, before clipping
    applied: bool  # False: skipped for a nan or an infinity


class Step(NamedTuple):
    """What a step hands to the log."""

    number: int
    rollouts: list
    rewards: torch.Tensor  # [B, G, M]
    returns: torch.Tensor  # [B, G, M]
    updates: list[Update]
    clock: Clock


def log_step(c, run, step: Step):
    """Gather the step's numbers from all processes; the first one prints and writes them.

    FloatingPointError on all of them after MAX_SKIPPED updates in a row that were not applied.
    """
    distributed.expect_progress()
    sums = [{k: float(v) for k, v in s.items()} for u in step.updates for s in u.sums]
    sums, graded = distributed.gather(sums), distributed.gather([run.verifier.take_stats()])
    for u in step.updates:
        run.skipped = 0 if u.applied else run.skipped + 1
    if distributed.rank() == 0:
        m = metrics_of(c, run.weights, step, sums, graded)
        append(run.dir / "metrics.jsonl", rundir.without_nan(m))
        run.logger.log(step.number, rundir.without_nan(m))
        for r in step.rollouts[:: c.num_rollouts][:SAMPLES_PER_STEP]:
            text = readable(r, c.budget_prior.budgets, run.tokenizer)
            append(run.dir / "samples.jsonl", {"step": step.number, **text})
        run.bar.steps.update()
        run.bar.graded.reset()
        say(
            f"step {step.number:4d}  reward {' '.join(f'{r:.2f}' for r in m['reward'])}  "
            f"anytime {m['anytime_reward']:.3f}  thinking {m['thinking_tokens']:.1f}  "
            f"loss {m['loss']:+.2e}  {m['time/step']:.1f}s\n           "
            f"grad {max(m['grad_norm']):.2e}  clip {m['clip_share']:.3f}  "
            f"gap {m['sampler_gap']:.1e}  {throughput(m)}"
        )
        for warning in warnings(c, m, step):
            say(f"WARNING step {step.number}: {warning}")
    if run.skipped >= MAX_SKIPPED:
        problem = f"{run.skipped} updates in a row had a nan or an infinity. "
        raise FloatingPointError(problem + last_good(run.dir))


def append(path: Path, line: dict):
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def throughput(m: dict) -> str:
    """The speed of a step, at the end of its line. `m`: the step's metrics."""
    sampled, trained = m["sampled_tokens_per_second"], m["trained_tokens_per_second"]
    mfu = f"  mfu {m['mfu']:.1%}" if "mfu" in m else ""
    return f"tokens/s sampled {sampled:,.0f} trained {trained:,.0f}{mfu}"


def metrics_of(c, weights: int, step: Step, sums: list[dict], graded: list[dict]) -> dict:
    """The step's line in metrics.jsonl. sums (of every row) and graded: of all processes.

    `weights`: multiplied_weights of the model.
    """
    rollouts, rewards, returns = step.rollouts, step.rewards, step.returns
    lengths = torch.tensor([len(r.thinking) for r in rollouts]).reshape(rewards.shape[:2])  # [B, G]
    summaries = [s for r in rollouts for s in r.summaries]
    total = {k: sum(s[k] for s in sums) for k in sums[0]}
    per_token = {k: total[k] / total["tokens"] for k in total}
    sampled = int(lengths.sum()) + sum(len(s.tokens) for s in summaries)
    seconds = step.clock.seconds
    m = {
        "step": step.number,
        "anytime_reward": returns[..., 0].mean().item(),
        "reward": rewards.mean((0, 1)).tolist(),
        "thinking_tokens": lengths.float().mean().item(),
        "summary_tokens": sum(len(s.tokens) for s in summaries) / len(summaries),
        **{k: sum(r.finish == k for r in rollouts) / len(rollouts) for k in FINISHES},
        "loss": total["loss"] / len(step.updates),
        "trained_tokens": total["tokens"],
        "clip_share": per_token["clipped"],
        "kl": per_token["kl"],
        "sampler_gap": per_token["gap"],
        "sampler_gap_max": max(s["gap_max"] for s in sums),
        "sampler_gap_outside": per_token["gap_outside"],
        "grad_norm": [u.grad_norm for u in step.updates],
        "skipped_updates": sum(not u.applied for u in step.updates),
        **{f"verifier/{k}": sum(g[k] for g in graded) for k in graded[0]},
        "sampled_tokens_per_second": sampled / seconds["time/sample"],
        "trained_tokens_per_second": total["tokens"] / seconds["time/update"],
        **seconds,
        "time/step": time.perf_counter() - step.clock.start,
    }
    prior = (rewards, returns, c.budget_prior.budgets, c.budget_prior.probs, c.decay)
    for prefix, chosen in (("variance", None), ("variance_trained", lengths)):
        for name, values in brpo.variance_diagnostics(*prior, chosen).items():
            m[f"{prefix}/{name}"] = values.tolist()
    if torch.cuda.is_available():
        gpu, update = torch.cuda.get_device_name(), seconds["time/update"]
        world = distributed.world_size()
        mfu = flops_utilization(weights, total["tokens"], update, world, gpu)
        if mfu is not None:
            m["mfu"] = mfu
        m["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return m


def warnings(c, m: dict, step: Step) -> list[str]:
    """What must not pass unseen. `m`: the step's metrics."""
    found, size = [], len(step.rollouts) // len(step.updates)
    for i, u in enumerate(step.updates):
        if not u.applied:
            at = sorted({r.question.index for r in step.rollouts[i * size : (i + 1) * size]})
            found.append(f"update {i} had a nan or an infinity, so it was skipped. Questions: {at}")
    for name, bound in LOUD.items():
        if m[name] > bound:
            found.append(f"{name} {m[name]:.3g} is above {bound}: the policy moved far in one step")
    for norm in m["grad_norm"]:
        if LOUD_GRAD_NORM * c.max_grad_norm < norm < math.inf:
            found.append(f"a gradient of norm {norm:.3g} was clipped to {c.max_grad_norm}")
    if m["sampler_gap"] > LOUD_SAMPLER_GAP:
        problem = "trainer and sampler compute different probabilities for the same tokens"
        found.append(f"sampler_gap {m['sampler_gap']:.3g} is above {LOUD_SAMPLER_GAP}: {problem}")
    if not any(m["reward"]):
        cause = "the policy has collapsed, or there is nothing to learn from"
        if m["step"] == 0:
            cause = f"compare the answers in samples.jsonl with --answer-field {c.answer_field}"
        found.append(f"no summary was right: {cause}")
    grades = {k.removeprefix("verifier/"): v for k, v in m.items() if k.startswith("verifier/")}
    share = sum(grades[name] for name in FAILURES) / max(grades["graded"], 1)
    if share > LOUD_FAILURE_SHARE:
        found.append(f"{share:.1%} of the gradings failed, which biases rewards: {grades}")
    return found


def say(line: str):
    """A line above the progress bar, if there is one, and at once: somebody may follow a log."""
    tqdm.write(line)
    sys.stdout.flush()


def require_logger(kind: str):
    """ValueError where the logger's package is missing."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(f"--logger {kind}: it is not installed. pip install {kind}")


class Logger:
    """The keys of metrics.jsonl in wandb or TensorBoard too; in the first process alone."""

    def __init__(self, kind: str, output_dir: Path, config: dict):
        self.kind = kind if distributed.rank() == 0 else "none"
        if self.kind == "wandb":
            import wandb

            where = {"name": output_dir.name, "dir": str(output_dir)}
            self.run = wandb.init(project="anytime-reasoner", config=config, **where)
        elif self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.run = SummaryWriter(str(output_dir / "tensorboard"))

    def log(self, step: int, values: dict):
        values = flat({k: v for k, v in values.items() if k != "step"})
        if self.kind == "wandb":
            self.run.log(values, step=step)
        elif self.kind == "tensorboard":
            for name, value in values.items():
                self.run.add_scalar(name, value, step)

    def close(self):
        if self.kind != "none":
            self.run.finish() if self.kind == "wandb" else self.run.close()


def flat(values: dict) -> dict[str, float]:
    """Numbers alone: a list becomes key/1, key/2, ...; a dict key/name. None and text are left."""
    out = {}
    for key, value in values.items():
        value = dict(enumerate(value, 1)) if isinstance(value, list) else value
        if isinstance(value, dict):
            out |= {f"{key}/{name}": v for name, v in flat(value).items()}
        elif isinstance(value, (int, float)):
            out[key] = value
    return out


def before_and_after(history: list[dict]) -> tuple[dict, dict]:
    """The newest evaluation, and the earliest with its settings and questions before it."""
    after = history[-1]
    return next(e for e in history if e.get("settings") == after.get("settings")), after


def log_evaluation(run, step: int, curve: dict):
    """An anytime curve (evaluate.anytime_curve) into the history, the files and the picture."""
    run.history.append({"step": step, **curve, "settings": run.evaluation})
    if distributed.rank() > 0:
        return
    run.bar.graded.reset()
    before, after = before_and_after(run.history)
    append(run.dir / "evals.jsonl", after)
    rundir.write(run.dir / "eval.json", json.dumps({**after, "before": before}, indent=1))
    draw_curves({f"step {e['step']}": e for e in (before, after)}, run.dir / "anytime_curve.png")
    logged = ("accuracy", "anytime_accuracy", "final_accuracy", "sets")
    run.logger.log(step, {"eval": {k: curve[k] for k in logged}})
    anytime, final = curve["anytime_accuracy"], curve["final_accuracy"]
    say(f"step {step:4d}  evaluation: anytime {anytime:.3f}  final {final:.3f}")


def print_summary(c, run):
    """One question and the anytime curve before and after training, on the terminal."""
    if distributed.rank() > 0:
        return
    before, after = before_and_after(run.history)
    if before["step"] > run.history[0]["step"]:
        print(f"\nevaluations before step {before['step']} had other settings: not compared")
    question = after["example"]
    print(f"\n{question['question']}   (ground truth {question['ground_truth']})")
    for name, e in (("before", before), ("after", after)):
        print(f"{name} training, the thinking up to each budget and the answer given there:")
        print(*example_lines(e["example"]), sep="\n")
    print("\n" + curve_lines({"before": before, "after": after}))
    print(f"wrote {run.dir}/: model/, metrics.jsonl, samples.jsonl, eval.json, anytime_curve.png")
