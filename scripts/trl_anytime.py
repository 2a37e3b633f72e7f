"""Anytime training in TRL: a GRPOTrainer that cuts its thinking traces and trains on packed rows.

    pip install trl==1.16.0               # the version it runs with in tests/peers
    python scripts/trl_anytime.py         # the default run's task; logs the reward at every budget

Copy the class, with budgets.py, rewards.py, brpo.py and packing.py. Reward functions are TRL's own:
every completion that they get is a trace up to its cut, the appended text and a summary, and what
they grade is what follows </think>. A summary token weighs 1/(M·A) of a thinking token. One
process, transformers' `generate`, and one update on each batch; the class refuses everything else.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import brpo
from budgets import BudgetPrior, cut_lengths
from packing import Branch, Tree, pack, token_logprobs
from rewards import THINK_END, appended_text, cumulative_returns, mean_rewards


class AnytimeTrainer(GRPOTrainer):
    """num_generations = G traces of at most b_M tokens, and A summaries at each of the M cuts."""

    def __init__(self, *args, prior: BudgetPrior, num_summaries=4, max_summary=118, **kwargs):
        super().__init__(*args, **kwargs)
        self.prior, self.A, self.max_summary = prior, num_summaries, max_summary
        a = self.args
        updates = a.num_iterations * a.steps_per_generation / a.gradient_accumulation_steps
        if a.use_vllm or a.world_size > 1 or updates > 1:
            raise ValueError("AnytimeTrainer takes one process, no vLLM, and one update a batch")

    def sample(self, prompts, max_tokens, stop):
        c = self.generation_config
        before = c.max_new_tokens, c.eos_token_id, self.eos_token_ids
        c.max_new_tokens, c.eos_token_id, self.eos_token_ids = max_tokens, stop, stop
        tokens, _ = self._generate_single_turn(prompts, None, {}, 1)
        c.max_new_tokens, c.eos_token_id, self.eos_token_ids = before
        return tokens

    def _generate_and_score_completions(self, inputs):
        tokenizer, eos, budgets = self._tokenizer, self.eos_token_ids, self.prior.budgets
        # N traces, their cuts, and A summaries of each; an end-of-text leaves nothing to ask for.
        stop = [tokenizer.convert_tokens_to_ids(THINK_END), *eos]
        prompts, _, _ = self._tokenize_prompts([x["prompt"] for x in inputs])
        trees = [Tree(p, z, []) for p, z in zip(prompts, self.sample(prompts, budgets[-1], stop))]
        for t in trees:
            for z in [t.thinking[:cut] for cut in cut_lengths(len(t.thinking), budgets)]:
                ask = "" if z[-1] in eos else appended_text(tokenizer.decode(z))
                ask = tokenizer.encode(ask, add_special_tokens=False)
                t.branches += [Branch(len(z), ask, []) for _ in range(self.A)]
        branches = [(t, b) for t in trees for b in t.branches]  # N·M·A
        seen = [t.thinking[: b.cut] + b.appended for t, b in branches]
        stems = [t.prompt + z for (t, _), z in zip(branches, seen)]
        for (_, b), y in zip(branches, self.sample(stems, self.max_summary, eos)):
            b.summary = y if b.appended else []
        # Scores by TRL's reward functions, and 0 without exactly one </think>.
        ids = [[i for i in z + b.summary if i not in eos] for z, (_, b) in zip(seen, branches)]
        texts = tokenizer.batch_decode(ids)
        one = torch.tensor([text.count(THINK_END) == 1 for text in texts])
        if isinstance(inputs[0]["prompt"], list):  # a conversation
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        rows = [x for x in inputs for _ in trees[0].branches]
        scores = self._calculate_rewards(rows, [x["prompt"] for x in rows], texts, ids).cpu()
        scores = (scores * self.reward_weights).nansum(-1) * one
        scores = scores.view(-1, self.num_generations, len(budgets), self.A)
        cuts = torch.tensor([b.cut for _, b in branches]).view_as(scores)[..., 0]
        # Advantages of thinking tokens and, with the weight 1/(M·A), of summaries.
        r = mean_rewards(scores)
        R = cumulative_returns(r, self.prior.probs)
        thinking = brpo.thinking_advantages(r, R, budgets, self.prior.probs).flatten(0, 1)
        summary = brpo.summary_advantages(scores, cuts).flatten() / len(trees[0].branches)
        for t, a in zip(trees, thinking):
            t.advantages = brpo.token_advantages(a, budgets, len(t.thinking)).tolist()
        for (_, b), a in zip(branches, summary.tolist()):
            b.advantage = a
        self._metrics["train"]["reward"].append(R[..., 0].mean().item())
        for b, value in zip(budgets, r.mean((0, 1)).tolist()):
            self._metrics["train"][f"reward@{b}"].append(value)
        return {"advantages": torch.zeros(len(trees)), "trees": trees}  # dealt into batches by TRL

    def _compute_loss(self, model, inputs):
        row = pack(inputs["trees"], 128 if model.device.type == "cuda" else 1).to(model.device)
        logp = token_logprobs(model, row, self.temperature)
        D = len(inputs["trees"]) * self.prior.budgets[-1] * self.current_gradient_accumulation_steps
        return brpo.policy_loss(logp, logp.detach(), row.advantages, row.trained, D)[0]


def main(steps: int, output_dir: str, base: str | None = None):
    """Train the default run's base on its task, with its budgets. Returns TRL's log."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks import arithmetic
    from tasks.verifier import Verifier

    base = base or arithmetic.load_or_write_base(ROOT / "runs", 0)
    with Verifier(num_workers=1) as verifier:

        def accuracy(completions, ground_truth, **kwargs):
            answers = [c[0]["content"].partition(THINK_END)[2] for c in completions]
            return verifier.score(zip(answers, ground_truth))

        rows = [
            {"prompt": [{"role": "user", "content": q}], "ground_truth": a}
            for q, a in arithmetic.make_rows("train", 2000)
        ]
        trainer = AnytimeTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            accuracy,
            GRPOConfig(
                output_dir,
                per_device_train_batch_size=8,  # traces of one packed row
                gradient_accumulation_steps=8,
                num_generations=8,
                learning_rate=6e-4,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
            prior=BudgetPrior.make("uniform", 64, 4),
            max_summary=7,
        )
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args().steps, folder)
