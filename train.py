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
after), model/ (Hugging Face layout), checkpoints/ and rollouts/ (since the newest of them).
config.py holds every constant; docs/departures.md says where this departs from the paper.
"""

import torch
from tqdm import tqdm

import brpo
from evaluate import anytime_curve
from packing import Tree, balance, pack
from rewards import cumulative_returns, mean_rewards
from rollout import cuts_of, make_grader, sample_rollouts, scores_of, to_tree
from runtime import checkpoint, distributed, rundir
from runtime.config import Config, learning_rate, parse
from runtime.data import questions_of_step
from runtime.metrics import Clock, log, log_evaluation, report
from runtime.startup import Run, load, prepare
from tasks.reward_function import make_verifier

NOTHING = Tree([0], [], [])  # a row without loss, for a process that has one row fewer


def train(c: Config):
    with distributed.exit_on_bad_input():
        run = prepare(c)
        engine, model, optimizer = load(c, run)
    prior, rank, world = c.budget_prior, distributed.rank(), distributed.world_size()
    G, M, A = c.num_rollouts, len(prior.budgets), c.num_summaries
    verifier = make_verifier(c)
    grade = make_grader(verifier, run.tokenizer, run.protocol)
    multiple = 128 if run.device.type == "cuda" else 1  # FlexAttention's block size
    bar = tqdm(
        total=run.steps,
        initial=run.first_step,
        desc=c.experiment,
        unit="step",
        disable=rank > 0 or None,
    )  # None: no bar where stderr is no terminal
    distributed.note_sigterm()

    for step in range(run.first_step, run.steps + 1):
        # the anytime curve so far, at step 0 and the end too; and a checkpoint
        stopping = distributed.asked_to_stop()
        if not stopping and (step in (0, run.steps) or is_due(step, c.eval_every)):
            evaluate(c, run, engine, verifier, step)
        if step > run.first_step and (stopping or is_due(step, c.save_every, run.steps)):
            checkpoint.save_checkpoint(
                run.dir, step, run.identity, run.trajectory, model, optimizer, c.keep_checkpoints
            )
        if stopping or step == run.steps:
            break
        clock = Clock()

        # sample thinking traces, cut them at the budgets, sample summaries; grade as they arrive
        with clock("sample"):
            assert engine.version == step, f"the sampler is at step {engine.version}, not {step}"
            rollouts = rollouts_of_step(c, run, engine, grade, step)

        # dense rewards, returns, advantages
        scores = scores_of(rollouts, G, M, A)  # [B, G, M, A]
        rewards = mean_rewards(scores)  # [B, G, M]
        returns = cumulative_returns(rewards, prior.probs)  # [B, G, M]
        lengths = torch.tensor([len(r.thinking) for r in rollouts]).reshape(-1, G)  # [B, G]
        thinking_advantages = brpo.thinking_advantages(
            rewards, returns, prior.budgets, prior.probs, c.baseline, c.decay, lengths
        )  # [B, G, M]
        summary_advantages = c.summary_weight * brpo.summary_advantages(
            scores, cuts_of(rollouts, G, prior.budgets)
        )  # [B, G, M, A]

        # one tree per rollout; whole trees to rows and processes by token count, update by update
        trees = [
            to_tree(r, of_thinking, of_summaries, prior.budgets, c.train_summaries == "last")
            for r, of_thinking, of_summaries in zip(
                rollouts, thinking_advantages.flatten(0, 1), summary_advantages.flatten(0, 1)
            )
        ]
        size = len(trees) // c.updates_per_step
        updates = []
        for update in (trees[i : i + size] for i in range(0, len(trees), size)):
            plan = balance([len(t) for t in update], world, c.max_tokens_per_row)[rank]
            updates.append(
                [
                    pack([update[i] for i in row] or [NOTHING], multiple).to(run.device)
                    for row in plan
                ]
            )

        # log-probs under the weights that sampled, by the trainer itself, in the update's rows; the
        # first update still has these weights and takes its own
        with clock("old_logp"), torch.no_grad():
            old_logps = [[None] * len(updates[0])]
            old_logps += [
                [model.token_logprobs(row, c.temperature) for row in rows] for rows in updates[1:]
            ]

        optimizer.param_groups[0]["lr"] = learning_rate(c, step, run.steps)
        stats, grad_norms, applied = [], [], []
        with clock("update"):
            for rows, old in zip(updates, old_logps):
                for i, (row, old_logp) in enumerate(zip(rows, old)):
                    distributed.accumulate(model, last=i == len(rows) - 1)
                    logp = model.token_logprobs(row, c.temperature)
                    old_logp = logp.detach() if old_logp is None else old_logp
                    weight = brpo.sampler_weight(old_logp, row.sampler_logp, c.sampler_cap)
                    loss, sums = brpo.policy_loss(
                        logp, old_logp, row.advantages, row.trained, c.denominator, c.clip, weight
                    )
                    # × world: FSDP averages gradients, but the denominator spans all processes
                    (loss * world).backward()
                    gap = brpo.sampler_gap(old_logp, row.sampler_logp, row.trained)
                    stats.append({"loss": loss.detach(), **sums, **gap})
                grad_norms.append(distributed.clip_gradients(model, c.max_grad_norm))
                applied.append(distributed.all_finite(grad_norms[-1], stats[-len(rows) :]))
                if applied[-1]:  # one nan would stay in the weights for good
                    optimizer.step()
                optimizer.zero_grad()

        with clock("sync"):
            engine.sync_weights(distributed.full_weights(model), version=step + 1)

        log(
            c,
            run,
            bar,
            verifier,
            step,
            rollouts,
            rewards,
            returns,
            stats,
            grad_norms,
            applied,
            clock,
        )

    bar.close()
    if not stopping:
        checkpoint.save_model(model, run.tokenizer, run.dir / "model")
    verifier.close()
    engine.close()
    run.close()
    if stopping:
        distributed.exit_stopped(step)
    report(c, run.dir, run.history)
    distributed.stop()


# ----------------------------------------------------------------------- the steps that are long


def rollouts_of_step(c: Config, run: Run, engine, grade, step: int) -> list:
    """All B·G rollouts of a step, on every process, ordered by (question, sample).

    From here on every process holds the whole batch and computes the same advantages and metrics.
    """
    questions = questions_of_step(run.questions, step, c.questions_per_step, c.seed)
    path = run.dir / "rollouts" / f"step-{step:08d}.json"
    rollouts, trajectory = checkpoint.load_rollouts(  # sampled before an interruption?
        path,
        run.trajectory,
        questions,
        c.num_rollouts,
        len(c.budget_prior.budgets) * c.num_summaries,
    )
    if rollouts is None:
        mine = distributed.share(questions, c.tensor_parallel_size)
        rollouts = sample_rollouts(
            engine,
            mine,
            c.budget_prior.budgets,
            c.num_rollouts,
            c.num_summaries,
            run.protocol,
            c.temperature,
            (c.seed, step),
            grade,
        )
        rollouts = distributed.gather(rollouts, c.tensor_parallel_size)
        place = {q.index: i for i, q in enumerate(questions)}
        rollouts.sort(key=lambda r: (place[r.question.index], r.sample))
        trajectory = checkpoint.save_rollouts(path, run.trajectory, rollouts)
        if not c.save_every:  # no checkpoint will ever cover them
            rundir.drop_rollouts(run.dir, before=step)
    run.trajectory = trajectory
    return rollouts


def is_due(step: int, every: int, last: int = 0) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def evaluate(c: Config, run: Run, engine, verifier, step: int):
    """The anytime curve of this step, unless a resumed run has it."""
    if not any(e["step"] == step and e.get("settings") == run.evaluation for e in run.history):
        log_evaluation(
            run,
            step,
            anytime_curve(
                engine,
                run.eval_sets,
                c.evaluation_budgets,
                c.eval_samples,
                run.protocol,
                run.tokenizer,
                verifier,
                c.eval_temperature,
                c.seed,
                c.tensor_parallel_size,
            ),
        )


if __name__ == "__main__":
    distributed.main(lambda: train(parse()))
