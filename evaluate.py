"""The anytime curve: accuracy as a function of the thinking budget.

    python evaluate.py runs/miniature-ar-uniform-seed0/model            any saved model
    python evaluate.py A B --budgets 8 16 32 48 --output-dir runs/both  several models on one picture
    torchrun --nproc_per_node 8 evaluate.py MODEL --preset paper-8k     the paper's five sets, questions shared out

anytime_accuracy is the mean of the curve over the given budgets (J under a uniform prior on them), final_accuracy its
last point.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

import distributed
from budgets import BudgetPrior, prior_probs
from config import PRESETS, Config
from data import Question, load_questions
from rollout import (Protocol, make_engine, make_grader, open_model, require_engine, sample_rollouts,
                     scores_of)
from verifier import Verifier

EVALUATION = 2**31      # stands where a training step's number would in random keys: every evaluation draws the same


def anytime_curve(engine, sets: dict[str, list[Question]], budgets: tuple[int, ...], samples: int, protocol: Protocol,
                  tokenizer, verifier: Verifier, temperature: float = 0.6, seed: int = 0,
                  tensor_parallel_size: int = 1) -> dict:
    """Accuracy at every budget, on every set; the same dict on all processes, which share out the questions.

    accuracy_j = mean over questions and samples of r(x, y_j), one summary per cut; over several sets, the mean of their
    means (the paper's average). stderr_j is over questions (samples of one question are not independent).
    """
    grade = make_grader(verifier, tokenizer, protocol)
    curves = {}
    for number, (name, questions) in enumerate(sets.items()):
        mine = sample_rollouts(engine, distributed.share(questions, tensor_parallel_size), budgets, samples, 1, protocol,
                               temperature, (seed, EVALUATION, number), grade)
        rollouts = distributed.gather(mine, tensor_parallel_size)
        scores = scores_of(rollouts, samples, len(budgets), 1)[..., 0].double().mean(1)                   # [B, M]
        accuracy = scores.mean(0)
        spread = scores.std(0, correction=1) if len(scores) > 1 else torch.zeros(len(budgets))
        curves[name] = {
            "accuracy": accuracy.tolist(), "stderr": (spread / len(scores) ** 0.5).tolist(),
            "anytime_accuracy": accuracy.mean().item(), "final_accuracy": accuracy[-1].item(), "questions": len(scores),
            "thinking_tokens": sum(len(r.thinking) for r in rollouts) / len(rollouts),
            "closed": sum(r.finish == "closed" for r in rollouts) / len(rollouts)}
    mean = torch.tensor([c["accuracy"] for c in curves.values()], dtype=torch.float64).mean(0)
    return {"budgets": list(budgets), "accuracy": mean.tolist(), "anytime_accuracy": mean.mean().item(),
            "final_accuracy": mean[-1].item(), "samples": samples, "temperature": temperature, "seed": seed,
            "sets": curves}


def draw_curves(curves: dict[str, dict], path: Path):
    """The curves as a PNG: accuracy over budget with ± one standard error where there is one set."""
    import matplotlib
    matplotlib.use("Agg")       # no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for label, curve in curves.items():
        sets = list(curve["sets"].values())
        axes.errorbar(curve["budgets"], curve["accuracy"], yerr=sets[0]["stderr"] if len(sets) == 1 else None,
                      marker="o", markersize=4, capsize=2, label=f"{label} (anytime {curve['anytime_accuracy']:.3f})")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Arguments:
    """Measure the anytime curve of saved models."""

    models: Annotated[tuple[str, ...], "positional"]
    """Model directories or hub names."""
    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    """Where the fields left out below come from: sets, budgets, prompt, engine."""
    budgets: tuple[int, ...] = ()
    """Thinking budgets, increasing."""
    data: tuple[str, ...] = ()
    """Files or named sets."""
    samples: int = 0
    """Thinkings per question."""
    questions: int = -1
    """At most so many per set; 0: all."""
    temperature: float = -1.0
    """Sampling temperature."""
    seed: int = 0
    """Decides every sampled token."""
    engine: Literal["", "plain", "vllm"] = ""
    """What samples."""
    prompt_template: str = ""
    """The user message, with {question}."""
    question_field: str = "problem"
    """Column of the question in files."""
    answer_field: str = "answer"
    """Column of the ground truth in files."""
    output_dir: str = ""
    """Where eval.json and anytime_curve.png go; default: beside the first model."""


def main(args: list[str] | None = None):
    import tyro

    a = tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments), args=args)
    base = Config(**PRESETS[a.preset])
    budgets, samples = a.budgets or base.eval_budgets, a.samples or base.eval_samples
    engine_kind, temperature = a.engine or base.engine, base.eval_temperature if a.temperature < 0 else a.temperature
    with distributed.exit_on_bad_input():
        BudgetPrior(budgets, prior_probs("uniform", budgets))
        require_engine(engine_kind)
        opened = {m: open_model(m, budgets[-1], base.max_prompt_tokens, base.max_summary_tokens) for m in a.models}
        sets = {m: {} for m in a.models}
        for model in a.models:
            for name in a.data or base.eval_data:
                sets[model][name], report = load_questions(
                    name, opened[model][0], a.prompt_template or base.prompt_template, base.max_prompt_tokens,
                    a.question_field, a.answer_field, "test", base.eval_questions if a.questions < 0 else a.questions)
                if distributed.rank() == 0 and model == a.models[0]:
                    print(report)
    longest = base.max_prompt_tokens + budgets[-1] + base.max_summary_tokens
    curves = {}
    with Verifier(base.verifier_workers) as verifier:
        for model in a.models:
            device = distributed.start()    # for each: a vLLM engine takes the group of processes with it when it closes
            tokenizer, protocol = opened[model]
            engine = make_engine(engine_kind, model, device, longest, kv_cache_gb=base.kv_cache_gb)
            curves[model] = anytime_curve(engine, sets[model], budgets, samples, protocol, tokenizer, verifier, temperature,
                                          a.seed)
            engine.close()
            if distributed.rank() == 0:
                c = curves[model]
                print(f"{model}\n  accuracy " + "  ".join(f"@{b} {x:.3f}" for b, x in zip(budgets, c["accuracy"]))
                      + f"\n  anytime {c['anytime_accuracy']:.4f}   final {c['final_accuracy']:.4f}")
    if distributed.rank() == 0:
        output = Path(a.output_dir or Path(a.models[0]).parent / "evaluation")
        output.mkdir(parents=True, exist_ok=True)
        # One model: its curve is the file's content; several: one entry each.
        content = curves[a.models[0]] if len(curves) == 1 else {"models": curves}
        (output / "eval.json").write_text(json.dumps(content, indent=1))
        draw_curves(curves, output / "anytime_curve.png")
        print(f"wrote {output}/eval.json and anytime_curve.png")
    distributed.stop()


if __name__ == "__main__":
    main()
