"""AnytimeReasoner: train a policy to be right at every thinking budget, by BRPO.

    python train.py                                         CPU: the miniature, in minutes
    python train.py --experiment grpo                       the same, with final-reward GRPO
    torchrun --nproc_per_node 2 train.py                    two CPU processes, the same numbers
    torchrun --nproc_per_node 1 train.py --preset paper-8k  one GPU
    torchrun --nproc_per_node 8 train.py --preset paper-8k  8 GPUs: the paper's main run
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --preset paper-8k                          2 machines (the same line on both)
    ... --resume auto                                       go on after a crash, the same numbers

The default run warm-starts a tiny model on arithmetic with wasteful thinking traces, then raises
its accuracy at every budget. A run leaves in <output_dir>: config.json, metrics.jsonl (a line a
step), samples.jsonl (a few rollouts a step, as text), eval.json, anytime_curve.png (before and
after), model/ (Hugging Face layout) and checkpoints/. runtime/config.py holds every constant;
docs/departures.md says where this departs from the paper.
"""

from itertools import chain

import torch
from torch import Tensor

import brpo
from evaluate import anytime_curve, evaluation_sampling
from packing import Branch, Row, Tree, pack_share
from rewards import cumulative_returns, mean_rewards
from rollout import Rollout, Sampling, cuts_of, sample_rollouts, scores_of
from runtime import checkpoint, distributed
from runtime.config import Config, learning_rate, parse
from runtime.data import questions_of_step
from runtime.metrics import Clock, Step, Update, log_evaluation, log_step, print_summary
from runtime.startup import Run, load, prepare


def train(c: Config):
    """The algorithm. B questions, G rollouts a question, M budgets, A summaries a budget."""
    with distributed.exit_on_bad_input():
        run = prepare(c)
        engine, model, optimizer = load(c, run)
    prior, G, M, A = c.budget_prior, c.num_rollouts, len(c.budget_prior.budgets), c.num_summaries
    distributed.note_sigterm()

    for step in range(run.first_step, run.steps + 1):
        # Evaluate and save a checkpoint where they are due; stop where a scheduler asks for it.
        stopping = distributed.asked_to_stop()
        if not stopping and (step in (0, run.steps) or is_due(step, c.eval_every)):
            evaluate_policy(c, run, engine, step)
        if step > run.first_step and (stopping or is_due(step, c.save_every, run.steps)):
            keep = c.keep_checkpoints
            checkpoint.save_checkpoint(run.dir, step, run.identity, model, optimizer, keep)
        if stopping or step == run.steps:
            break
        clock = Clock()

        # Sample thinking traces, cut them at the budgets, sample summaries, grade them.
        with clock("sample"):
            rollouts = rollouts_of_step(c, run, engine, step)

        # Scores -> dense rewards -> returns -> advantages, on every process for the whole batch.
        scores = scores_of(rollouts, G, M, A)  # [B, G, M, A]
        rewards = mean_rewards(scores)  # [B, G, M]
        returns = cumulative_returns(rewards, prior.probs)  # [B, G, M]
        thinking_advantages = brpo.thinking_advantages(
            rewards, returns, prior.budgets, prior.probs, c.baseline, c.decay
        )  # [B, G, M]
        summary_advantages = c.summary_weight * brpo.summary_advantages(
            scores, cuts_of(rollouts, G, prior.budgets)
        )  # [B, G, M, A]

        # One tree per rollout, packed once for all updates and processes.
        last_only = c.train_summaries == "last"
        trees = to_trees(
            rollouts, thinking_advantages, summary_advantages, prior.budgets, last_only
        )
        updates = rows_of_updates(c, run, trees)

        # Recompute old log-probs before the first optimizer step; the first update is on-policy
        # and reuses its own forward pass.
        with clock("old_logp"), torch.no_grad():
            for row in chain.from_iterable(updates[1:]):
                row.old_logp = model.token_logprobs(row, c.temperature)

        # Ascend the clipped objective: one optimizer step per update.
        optimizer.param_groups[0]["lr"] = learning_rate(c, step, run.steps)
        with clock("update"):
            done = [update(model, optimizer, rows, c) for rows in updates]

        # The sampler takes over the new weights.
        with clock("sync"):
            engine.sync_weights(distributed.full_weights(model), version=step + 1)
        log_step(c, run, Step(step, rollouts, rewards, returns, done, clock))

    finish(c, run, engine, model, step, stopping)


def update(model, optimizer, rows: list[Row], c: Config) -> Update:
    """One optimizer step on an update's packed rows, of which each process holds its share."""
    sums = []
    for row in rows:
        distributed.accumulate(model, last=row is rows[-1])  # reduce gradients once per update
        logp = model.token_logprobs(row, c.temperature)  # [T]
        old_logp = logp.detach() if row.old_logp is None else row.old_logp
        weight = brpo.sampler_weight(old_logp, row.sampler_logp, c.sampler_cap)
        loss, row_sums = brpo.policy_loss(
            logp, old_logp, row.advantages, row.trained, c.denominator, c.clip, weight
        )
        # FSDP averages gradients over processes, but the denominator spans all of them.
        (loss * distributed.world_size()).backward()
        gap = brpo.sampler_gap(old_logp, row.sampler_logp, row.trained)
        sums.append({"loss": loss.detach(), **row_sums, **gap})
    grad_norm = distributed.clip_gradients(model, c.max_grad_norm)
    finite = distributed.all_finite(grad_norm, sums)
    if finite:  # one nan would stay in the weights for good
        optimizer.step()
    optimizer.zero_grad()
    return Update(sums, grad_norm, applied=finite)


def is_due(step: int, every: int, last: int = 0) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def rollouts_of_step(c: Config, run: Run, engine, step: int) -> list[Rollout]:
    """All B·G rollouts of a step, on every process, ordered by (question, sample)."""
    assert engine.version == step, f"the sampler has the weights of step {engine.version}"
    questions = questions_of_step(run.questions, step, c.questions_per_step, c.seed)
    share = distributed.share(questions, c.tensor_parallel_size)
    budgets = c.budget_prior.budgets
    sampling = Sampling(budgets, c.num_rollouts, c.num_summaries, c.temperature, (c.seed, step))
    rollouts = sample_rollouts(engine, share, sampling, run.markers, run.grade)
    rollouts = distributed.gather(rollouts, c.tensor_parallel_size)
    order = {q.index: i for i, q in enumerate(questions)}
    return sorted(rollouts, key=lambda r: (order[r.question.index], r.sample))


def to_trees(
    rollouts: list[Rollout],
    thinking_advantages: Tensor,
    summary_advantages: Tensor,
    budgets: tuple[int, ...],
    last_only: bool = False,
) -> list[Tree]:
    """One training tree per rollout: A_j on the thinking tokens of segment j, one per summary.

    thinking_advantages [B, G, M], summary_advantages [B, G, M, A]. last_only trains the summaries
    of the last budget alone (GRPO); the others are left out, since nothing attends to them.
    """
    trees, last = [], len(budgets) - 1
    thinking_advantages = thinking_advantages.flatten(0, 1)  # [B·G, M]
    summary_advantages = summary_advantages.flatten(0, 1)  # [B·G, M, A]
    for r, segments, summaries in zip(rollouts, thinking_advantages, summary_advantages):
        branches = []
        for s in r.summaries:
            if s.tokens and (s.budget_index == last or not last_only):
                advantage = summaries[s.budget_index, s.draw].item()
                branches.append(Branch(s.cut, s.appended, s.tokens, advantage, s.logp))
        per_token = brpo.token_advantages(segments, budgets, len(r.thinking)).tolist()
        trees.append(Tree(list(r.question.prompt), r.thinking, branches, per_token, r.logp))
    return trees


def rows_of_updates(c: Config, run: Run, trees: list[Tree]) -> list[list[Row]]:
    """This process's packed rows of every update: whole trees, dealt out by token count."""
    multiple = 128 if run.device.type == "cuda" else 1  # FlexAttention's block size
    rank, world = distributed.rank(), distributed.world_size()
    size = len(trees) // c.updates_per_step
    updates = []
    for start in range(0, len(trees), size):
        share = trees[start : start + size]
        rows = pack_share(share, rank, world, c.max_tokens_per_row, multiple)
        updates.append([row.to(run.device) for row in rows])
    return updates


def evaluate_policy(c: Config, run: Run, engine, step: int):
    """The anytime curve of this step, unless a resumed run has it."""
    if any(e["step"] == step and e["settings"] == run.evaluation for e in run.history):
        return
    sampling = evaluation_sampling(c)
    curve = anytime_curve(engine, run.sets, sampling, run, c.tensor_parallel_size)
    log_evaluation(run, step, curve)


def finish(c: Config, run: Run, engine, model, step: int, stopped: bool):
    """Save the model and say what was learned; or, after SIGTERM, exit with its code."""
    if not stopped:
        checkpoint.save_model(model, run.tokenizer, run.dir / "model")
    run.close()
    engine.close()
    if stopped:
        distributed.exit_stopped(step)
    print_summary(c, run)
    distributed.stop()


if __name__ == "__main__":
    distributed.main(lambda: train(parse()))
