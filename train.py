"""AnytimeReasoner: train a policy to be right at every thinking budget, with Budget Relative Policy Optimization.

    python train.py                                         CPU: the miniature, from nothing to a curve in minutes
    python train.py --experiment grpo                       the same, with final-reward GRPO
    torchrun --nproc_per_node 2 train.py                    two CPU processes, the same numbers
    torchrun --nproc_per_node 1 train.py --preset paper-8k  one GPU
    torchrun --nproc_per_node 8 train.py --preset paper-8k  8 GPUs: the paper's main run
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --preset paper-8k
                                                            two machines (the same line on both)
    ... --resume auto                                       go on after a crash, with the same numbers

The default run warm-starts a tiny model on arithmetic with wasteful traces, then raises its accuracy at every budget;
`config.py` holds every constant. It leaves in <output_dir>: config.json, metrics.jsonl (a line a step), eval.json,
anytime_curve.png (before and after), model/ (Hugging Face layout), checkpoints/, rollouts/ (since the newest of them).

Departures from the paper, and from the authors' code where the two differ:
 1. The sampler correction min(exp(old - sampler), C) is on, with C = 2; `--sampler-cap 0` is the paper.
 2. Randomness is a function of (seed, step, question, sample), not the state of a generator.
 3. Questions left over at the end of an epoch are skipped, so that every update has the same size.
 4. Summaries that are not trained (GRPO's variants) are sampled and graded, but left out of the update.
 5. A thinking that ends in end-of-text is asked for no summary and scores 0; the authors' code asks behind it.
 6. Grading is by math-verify behind our own rules (verifier.py), not by string form and sympy.
 7. The authors' code weighs a summary token as much as a thinking token, and so do the paper presets; the miniature,
    whose thinkings are short, weighs it 1/(M·A) (`--summary-loss mean`).
 8. The miniature is evaluated at temperature 1.0, where the curve is J itself; the paper presets at the paper's 0.6.
"""

import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import brpo
import distributed
import miniature
from config import Config, as_json, batch_arithmetic, check, denominator, parse
from data import load_questions, questions_of_step
from evaluate import anytime_curve, draw_curves
from rewards import cumulative_returns, mean_rewards
from rollout import (Protocol, cuts_of, load_rollouts, make_engine, make_grader, open_model, require_engine,
                     sample_rollouts, save_rollouts, scores_of, to_tree)
from tree import Tree, balance, pack
from verifier import LOUD_FAILURE_SHARE, Verifier, failure_share

EXPECTED_RISE = 0.25            # of anytime accuracy, in the default run
NOTHING = Tree([0], [], [])     # a row without loss, for a process whose share of an update is one row shorter


def train(c: Config):
    with distributed.exit_on_bad_input():
        run = prepare(c)
    device = distributed.start()
    engine, model, optimizer = load(c, run, device)
    prior, rank, world = c.budget_prior, distributed.rank(), distributed.world_size()
    budgets, probs = torch.tensor(prior.budgets), torch.tensor(prior.probs)
    G, M, A = c.num_rollouts, len(prior.budgets), c.num_summaries
    verifier = Verifier(c.verifier_workers)
    grade = make_grader(verifier, run.tokenizer, run.protocol)
    # On a GPU only a few row lengths: FlexAttention compiles once per length (and needs multiples of 128).
    multiple = max(128, c.max_tokens_per_row // 4 // 128 * 128) if device.type == "cuda" else 1
    bar = tqdm(total=run.steps, initial=run.first_step, desc=c.experiment, unit="step", disable=rank > 0)

    for step in range(run.first_step, run.steps + 1):
        # the anytime curve so far, at step 0 and the end too; and a checkpoint, so that what follows can be lost
        if step in (0, run.steps) or (c.eval_every and step % c.eval_every == 0):
            evaluate_and_draw(c, run, engine, verifier, step)
        if step > run.first_step and c.save_every and (step % c.save_every == 0 or step == run.steps):
            distributed.save_checkpoint(run.dir, step, run.identity, model, optimizer, c.keep_checkpoints)
            drop_rollouts(run, before=step)
        if step == run.steps:
            break
        clock = Clock()

        # sample thinkings, cut them at the budgets, sample summaries; verify as they arrive
        with clock("sample"):
            assert engine.version == step, f"the sampler holds the weights of step {engine.version}, not {step}"
            questions = questions_of_step(run.questions, step, c.questions_per_step, c.seed)
            kept = run.dir / "rollouts" / f"step-{step:08d}.pkl"
            rollouts = load_rollouts(kept, run.identity)        # an interrupted run may have sampled this step already
            if rollouts is None:
                mine = distributed.share(questions, c.tensor_parallel_size)
                rollouts = sample_rollouts(engine, mine, prior.budgets, G, A, run.protocol, c.temperature,
                                           (c.seed, step), grade)
                # From here on every process holds the whole batch and computes the same advantages and metrics.
                rollouts = distributed.gather(rollouts, c.tensor_parallel_size)
                place = {q.index: i for i, q in enumerate(questions)}
                rollouts.sort(key=lambda r: (place[r.question.index], r.sample))
                if rank == 0:
                    save_rollouts(kept, run.identity, rollouts)

        # dense rewards, returns, advantages
        scores = scores_of(rollouts, G, M, A)                                                       # [B, G, M, A]
        rewards = mean_rewards(scores)                                                              # [B, G, M]
        returns = cumulative_returns(rewards, probs)                                                # [B, G, M]
        thinking = brpo.thinking_advantages(rewards, returns, budgets, probs, c.baseline, c.decay)  # [B, G, M]
        summary = brpo.summary_advantages(scores, cuts_of(rollouts, G, prior.budgets))              # [B, G, M, A]
        summary = summary * c.summary_weight

        # one tree per rollout; whole trees to rows and processes by token count, update by update
        trees = [to_tree(*each, prior.budgets, c.train_summaries == "last")
                 for each in zip(rollouts, thinking.flatten(0, 1).tolist(), summary.flatten(0, 1).tolist())]
        size = len(trees) // c.updates_per_step
        updates = []
        for update in (trees[i:i + size] for i in range(0, len(trees), size)):
            plan = balance([len(t) for t in update], world, c.max_tokens_per_row)[rank]
            updates.append([pack([update[i] for i in row] or [NOTHING], multiple).to(device) for row in plan])

        # log-probs under the weights that sampled, from the trainer itself, in the very rows of the update
        with clock("old_logp"), torch.no_grad():
            old_logps = [[model.token_logprobs(row, c.temperature) for row in rows] for rows in updates]

        stats, grad_norms = [], []
        with clock("update"):
            for rows, old in zip(updates, old_logps):
                for i, (row, old_logp) in enumerate(zip(rows, old)):
                    distributed.accumulate(model, last=i == len(rows) - 1)
                    logp = model.token_logprobs(row, c.temperature)
                    weight = brpo.sampler_weight(old_logp, row.sampler_logp, c.sampler_cap)
                    loss, metrics = brpo.policy_loss(logp, old_logp, row.advantages, row.trained, denominator(c),
                                                     c.clip, weight)
                    (loss * world).backward()   # × world: FSDP averages gradients, the denominator spans all already
                    gap = brpo.sampler_gap(old_logp, row.sampler_logp, row.trained)
                    stats.append({"loss": loss.detach(), **metrics, **gap})
                grad_norms.append(distributed.clip_gradients(model, c.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()

        with clock("sync"):
            engine.sync_weights(distributed.full_weights(model), version=step + 1)

        log(c, run, bar, verifier, step, rollouts, rewards, returns, stats, grad_norms, clock)

    bar.close()
    distributed.save_model(model, run.tokenizer, run.dir / "model")
    verifier.close()
    engine.close()
    if rank == 0:
        report(c, run)
    distributed.stop()


# ------------------------------------------------------------------------------------------- around the loop


@dataclass
class Run:
    """What `prepare` found out before any weight was loaded."""

    dir: Path
    tokenizer: object
    protocol: Protocol
    questions: list
    eval_sets: dict
    steps: int
    checkpoint: Path | None
    first_step: int
    identity: dict              # every setting that changes the numbers; a checkpoint must agree with it
    history: list = field(default_factory=list)     # evaluations so far


def prepare(c: Config) -> Run:
    """Check everything that can be checked without weights; ValueError names the flag, file or row, and the mend."""
    world, here = distributed.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check(c, world)
    gpus = torch.cuda.device_count()
    if gpus and here > gpus:
        raise ValueError(f"{here} processes on a machine with {gpus} GPU(s): start with --nproc_per_node {gpus}")
    if not gpus and c.preset != "miniature":
        raise ValueError(f"--preset {c.preset} needs GPUs and none is visible: check CUDA_VISIBLE_DEVICES and the "
                         "driver, or run the miniature")
    require_engine(c.engine)

    out = Path(c.output_dir)
    # Not part of a run's identity: where it runs, how often it looks and saves, how far it goes.
    free = {"output_dir", "resume", "save_every", "keep_checkpoints", "steps", "epochs", "verifier_workers",
            "kv_cache_gb", "tensor_parallel_size", "max_tokens_per_row"}
    free |= {name for name in as_json(c) if name.startswith("eval_")}
    identity = json.loads(json.dumps({k: v for k, v in as_json(c).items() if k not in free}))
    if not c.resume:
        if (out / "config.json").exists():
            raise ValueError(f"--output-dir {out} holds another run: choose a new one, or continue it with "
                             "--resume auto")
        checkpoint = None
    elif c.resume == "auto":
        checkpoint = (distributed.checkpoints(out) or [None])[-1]
    else:
        checkpoint = Path(c.resume)
    first_step = distributed.check_checkpoint(checkpoint, identity) if checkpoint else 0

    tokenizer, protocol = open_model(c.model, c.largest_budget, c.max_prompt_tokens, c.max_summary_tokens)
    how = (tokenizer, c.prompt_template, c.max_prompt_tokens, c.question_field, c.answer_field)
    questions, report = load_questions(c.train_data, *how)
    reports, eval_sets = [report], {}
    for name in c.eval_data:
        eval_sets[name], report = load_questions(name, *how, "test", c.eval_questions)
        reports.append(report)
    if len(questions) < c.questions_per_step:
        raise ValueError(f"{c.train_data} has {len(questions)} usable questions, fewer than --questions-per-step "
                         f"{c.questions_per_step}: lower it")
    steps = c.steps or c.epochs * (len(questions) // c.questions_per_step)
    if steps < first_step:
        raise ValueError(f"{checkpoint} is at step {first_step}, beyond --steps {steps}: raise it")
    if distributed.rank() == 0:
        print(batch_arithmetic(c, world), *(f"  {line}" for line in reports), sep="\n")
        print(f"  {steps} steps from {first_step}" + (f" (resuming {checkpoint})" if checkpoint else ""))
    return Run(out, tokenizer, protocol, questions, eval_sets, steps, checkpoint, first_step, identity)


def load(c: Config, run: Run, device):
    """Engine, model and optimizer at the step to start from. The engine comes first: it takes its memory before
    training does."""
    rank = distributed.rank()
    if rank == 0:
        run.dir.mkdir(parents=True, exist_ok=True)
        (run.dir / "config.json").write_text(json.dumps(as_json(c), indent=1))
        # Drop what lies behind the checkpoint: those steps are about to be done, and written, again.
        first_evaluation = run.first_step + 1 if run.checkpoint else 0      # that of the checkpoint's step is done
        for name, first in (("metrics.jsonl", run.first_step), ("evals.jsonl", first_evaluation)):
            lines = (run.dir / name).read_text().splitlines() if (run.dir / name).exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first]
            (run.dir / name).write_text("".join(line + "\n" for line in kept))
        if c.model == "miniature":
            miniature.load_or_write_base(Path("runs"), c.seed)
    distributed.barrier()
    run.history = [json.loads(line) for line in (run.dir / "evals.jsonl").read_text().splitlines()]

    path = str(miniature.base_path(Path("runs"), c.seed)) if c.model == "miniature" else c.model
    longest = c.max_prompt_tokens + c.largest_budget + c.max_summary_tokens
    if device.type == "cpu":
        # Tiny tensors: a second thread costs more than it brings, and much more on a busy machine. Before the engine:
        # once vLLM runs on a CPU, it turns this call into one that does nothing.
        torch.set_num_threads(1)
    engine = make_engine(c.engine, path, device, longest, c.tensor_parallel_size, c.kv_cache_gb)
    torch.manual_seed(c.seed)       # after the engine, whose start reseeds; nothing below draws, this is a safety net
    model = distributed.load_policy(path, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)
    if run.checkpoint:
        distributed.load_checkpoint(run.checkpoint, model, optimizer)
        engine.sync_weights(distributed.full_weights(model), version=run.first_step)
    return engine, model, optimizer


def drop_rollouts(run: Run, before: int):
    """Rollouts are kept from the newest checkpoint on: a resumed run trains on them again, without sampling again."""
    if distributed.rank() == 0:
        for path in (run.dir / "rollouts").glob("step-*.pkl"):
            if int(path.stem.removeprefix("step-")) < before:
                path.unlink()


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


def evaluate_and_draw(c: Config, run: Run, engine, verifier, step: int):
    """The anytime curve of this step into eval.json and the picture; nothing to do if a resumed run has it already."""
    if any(e["step"] == step for e in run.history):
        return
    curve = anytime_curve(engine, run.eval_sets, c.eval_budgets, c.eval_samples, run.protocol, run.tokenizer, verifier,
                          c.eval_temperature, c.seed, c.tensor_parallel_size)
    run.history.append({"step": step, **curve})
    if distributed.rank() == 0:
        with (run.dir / "evals.jsonl").open("a") as f:
            f.write(json.dumps(run.history[-1]) + "\n")
        (run.dir / "eval.json").write_text(json.dumps({**run.history[-1], "before": run.history[0]}, indent=1))
        draw_curves({f"step {e['step']}": e for e in (run.history[0], run.history[-1])}, run.dir / "anytime_curve.png")
        tqdm.write(f"step {step:4d}  evaluation: anytime {curve['anytime_accuracy']:.3f}  "
                   f"final {curve['final_accuracy']:.3f}")


def log(c: Config, run: Run, bar, verifier, step, rollouts, rewards, returns, stats, grad_norms, clock):
    """One line to the terminal and the same numbers to metrics.jsonl. The README explains each key."""
    stats = distributed.gather([{k: float(v) for k, v in s.items()} for s in stats])
    graded = distributed.gather([verifier.take_stats()])
    if distributed.rank() > 0:
        return
    total = {k: sum(s[k] for s in stats) for k in stats[0]}
    per_token = {k: total[k] / total["tokens"] for k in total}
    grades = {k: sum(g[k] for g in graded) for k in graded[0]}
    lengths = torch.tensor([len(r.thinking) for r in rollouts]).reshape(rewards.shape[:2])      # [B, G]
    summaries = [s for r in rollouts for s in r.summaries]
    prior = (rewards, returns, torch.tensor(c.budget_prior.budgets), torch.tensor(c.budget_prior.probs), c.decay)
    variance, variance_trained = brpo.variance_diagnostics(*prior), brpo.variance_diagnostics(*prior, lengths)
    metrics = {
        "step": step,
        "loss": total["loss"] / c.updates_per_step,
        "anytime_reward": returns[..., 0].mean().item(),
        "reward": rewards.mean((0, 1)).tolist(),
        "thinking_tokens": lengths.float().mean().item(),
        "summary_tokens": sum(len(s.tokens) for s in summaries) / len(summaries),
        **{kind: sum(r.finish == kind for r in rollouts) / len(rollouts) for kind in ("closed", "eos", "length")},
        "trained_tokens": total["tokens"],
        "clip_share": per_token["clipped"],
        "kl": per_token["kl"],
        "grad_norm": grad_norms,
        "sampler_gap": per_token["gap"],
        "sampler_gap_max": max(s["gap_max"] for s in stats),
        "sampler_gap_outside": per_token["gap_outside"],
        **{f"variance/{k}": v.tolist() for k, v in variance.items()},
        **{f"variance_trained/{k}": v.tolist() for k, v in variance_trained.items()},
        **{f"verifier/{k}": v for k, v in grades.items()},
        **clock.seconds, "time/step": time.perf_counter() - clock.start,
        **({"peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}),
    }
    with (run.dir / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(without_nan(metrics)) + "\n")
    bar.update()
    m = metrics
    tqdm.write(f"step {step:4d}  reward {' '.join(f'{r:.2f}' for r in m['reward'])}  "
               f"anytime {m['anytime_reward']:.3f}  thinking {m['thinking_tokens']:.1f}  "
               f"loss {m['loss']:+.2e}  grad {max(grad_norms):.2e}  clip {m['clip_share']:.3f}  "
               f"gap {m['sampler_gap']:.1e}  {m['time/step']:.1f}s")
    if (share := failure_share(grades)) > LOUD_FAILURE_SHARE:
        tqdm.write(f"WARNING step {step}: {share:.1%} of the gradings failed and scored 0, biasing rewards: {grades}")


def without_nan(value):
    """nan as null, all the way down: JSON has no nan, and strict readers refuse it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return [without_nan(v) for v in value] if isinstance(value, list) else value


def report(c: Config, run: Run):
    before, after = run.history[0], run.history[-1]
    print("\nbudget  " + "".join(f"{b:>8}" for b in after["budgets"]) + "   anytime")
    for name, e in (("before", before), ("after", after)):
        print(f"{name:8}" + "".join(f"{a:8.3f}" for a in e["accuracy"]) + f"{e['anytime_accuracy']:10.3f}")
    rise = after["anytime_accuracy"] - before["anytime_accuracy"]
    if c == replace(Config(), seed=c.seed, output_dir=c.output_dir, resume=c.resume):   # the default run, any seed
        print(f"anytime accuracy rose by {rise:.3f}; expected: at least {EXPECTED_RISE} (seeds 0-4: 0.414 to 0.467)"
              + ("" if rise >= EXPECTED_RISE else "   << LESS THAN EXPECTED"))
    print(f"wrote {run.dir}/: model/, metrics.jsonl, eval.json, anytime_curve.png")


if __name__ == "__main__":
    train(parse())
