"""The anytime curve: accuracy as a function of the thinking budget.

    python evaluate.py runs/miniature-ar-uniform-seed0/model            any saved model
    python evaluate.py A B --budgets 8 16 32 48 --output-dir runs/both  several on one picture
    torchrun --nproc_per_node 8 evaluate.py MODEL --preset paper-8k     the paper's five sets

anytime_accuracy is the mean of the curve over the given budgets (J under a uniform prior on them),
final_accuracy its last point.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

import distributed
from config import PRESETS, Config
from data import Question, load_questions, open_tokenizer
from engines import make_engine, require_engine
from reward_function import make_verifier, require_reward
from rollout import Protocol, make_grader, sample_rollouts, scores_of
from verifier import Verifier

EVALUATION = 2**31      # where a random key has the training step, so that evaluations draw alike


def anytime_curve(engine, sets: dict[str, list[Question]], budgets: tuple[int, ...], samples: int,
                  protocol: Protocol, tokenizer, verifier: Verifier, temperature: float = 0.6,
                  seed: int = 0, tensor_parallel_size: int = 1) -> dict:
    """Accuracy at every budget, on every set; the same dict on all processes, which share the work.

        accuracy_j = mean over questions and samples of r(x, y_j), one summary per cut

    Over several sets, the mean of their means (the paper's average). stderr_j is over questions:
    samples of one question are not independent.
    """
    grade = make_grader(verifier, tokenizer, protocol)
    curves = {}
    for number, (name, questions) in enumerate(sets.items()):
        mine = sample_rollouts(engine, distributed.share(questions, tensor_parallel_size), budgets,
                               samples, 1, protocol, temperature, (seed, EVALUATION, number), grade)
        rollouts = distributed.gather(mine, tensor_parallel_size)
        scores = scores_of(rollouts, samples, len(budgets), 1)[..., 0].double().mean(1)     # [B, M]
        accuracy = scores.mean(0)
        spread = scores.std(0) if len(scores) > 1 else torch.zeros(len(budgets))
        curves[name] = {
            "accuracy": accuracy.tolist(), "stderr": (spread / len(scores) ** 0.5).tolist(),
            "anytime_accuracy": accuracy.mean().item(), "final_accuracy": accuracy[-1].item(),
            "questions": len(scores),
            "thinking_tokens": sum(len(r.thinking) for r in rollouts) / len(rollouts),
            "closed": sum(r.finish == "closed" for r in rollouts) / len(rollouts)}
    accuracies = [c["accuracy"] for c in curves.values()]
    mean = torch.tensor(accuracies, dtype=torch.float64).mean(0)
    return {"budgets": list(budgets), "accuracy": mean.tolist(),
            "anytime_accuracy": mean.mean().item(), "final_accuracy": mean[-1].item(),
            "samples": samples, "temperature": temperature, "seed": seed, "sets": curves}


def draw_curves(curves: dict[str, dict], path: Path):
    """The curves as a PNG: accuracy over budget, ± one standard error where there is one set."""
    import matplotlib
    matplotlib.use("Agg")       # no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for label, curve in curves.items():
        sets = list(curve["sets"].values())
        axes.errorbar(curve["budgets"], curve["accuracy"],
                      yerr=sets[0]["stderr"] if len(sets) == 1 else None, marker="o", markersize=4,
                      capsize=2, label=f"{label} (anytime {curve['anytime_accuracy']:.3f})")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Arguments:
    """Measure the anytime curve of saved models."""

    models: Annotated[tuple[str, ...], "positional"]    # Model directories or hub names.
    # Where the fields left out below come from: sets, budgets, prompt, engine.
    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    budgets: tuple[int, ...] = ()       # Thinking budgets, increasing.
    data: tuple[str, ...] = ()          # Files or named sets.
    samples: int = 0                    # Thinking traces per question.
    questions: int = -1                 # At most so many per set; 0: all.
    temperature: float = -1.0           # Sampling temperature.
    seed: int = 0                       # Decides every sampled token.
    engine: Literal["", "plain", "vllm"] = ""   # Sampling by transformers or by vLLM.
    prompt_template: str = ""           # The user message, with {question}.
    system_prompt: str = ""             # The system message.
    chat_template_args: tuple[str, ...] = ()    # Of the chat template, as name=value.
    question_field: str = "problem"     # Column of the question in files.
    answer_field: str = "answer"        # Column of the ground truth in files.
    reward: str = ""                    # "math", or module:function, as in training.
    # Where eval.json and anytime_curve.png go; default: beside the first model.
    output_dir: str = ""


def settings(a: Arguments) -> Config:
    """The preset with what the arguments override."""
    given = {"eval_budgets": a.budgets, "eval_data": a.data, "eval_samples": a.samples,
             "engine": a.engine, "prompt_template": a.prompt_template,
             "system_prompt": a.system_prompt, "chat_template_args": a.chat_template_args,
             "reward": a.reward}
    given = {name: value for name, value in given.items() if value}
    if a.questions >= 0:
        given["eval_questions"] = a.questions
    if a.temperature >= 0:
        given["eval_temperature"] = a.temperature
    return replace(Config(**PRESETS[a.preset]), seed=a.seed, question_field=a.question_field,
                   answer_field=a.answer_field, **given)


def prepare(a: Arguments, c: Config) -> dict:
    """{model: (tokenizer, protocol, question sets)}, checked before any weight is loaded."""
    require_engine(c.engine)
    require_reward(c.reward)
    opened = {}
    for model in a.models:
        tokenizer, eos = open_tokenizer(model, c.max_prompt_tokens + c.evaluation_budgets[-1]
                                        + c.max_summary_tokens)
        sets = {}
        for name in c.eval_data:
            sets[name], report = load_questions(
                name, tokenizer, c.prompt_template, c.max_prompt_tokens, c.question_field,
                c.answer_field, "test", c.eval_questions, **c.question_options)
            if distributed.rank() == 0 and model == a.models[0]:
                print(report)
        opened[model] = tokenizer, Protocol.of(tokenizer, c.max_summary_tokens, eos), sets
    return opened


def main(args: list[str] | None = None):
    import tyro

    a = tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments), args=args)
    with distributed.exit_on_bad_input():
        c = settings(a)
        opened = prepare(a, c)
    curves = {}
    with make_verifier(c) as verifier:
        for model, (tokenizer, protocol, sets) in opened.items():
            # For each model: a vLLM engine ends the group of processes when it closes.
            device = distributed.start()
            engine = make_engine(c.engine, model, device, c.longest_sequence,
                                 kv_cache_gb=c.kv_cache_gb)
            curve = anytime_curve(engine, sets, c.evaluation_budgets, c.eval_samples, protocol,
                                  tokenizer, verifier, c.eval_temperature, c.seed)
            engine.close()
            curves[model] = curve
            if distributed.rank() == 0:
                points = zip(curve["budgets"], curve["accuracy"])
                print(f"{model}\n  accuracy " + "  ".join(f"@{b} {x:.3f}" for b, x in points)
                      + f"\n  anytime {curve['anytime_accuracy']:.4f}"
                      + f"   final {curve['final_accuracy']:.4f}")
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
