"""What a run is: every constant of the paper, the presets, and the eight experiments.

`Config` is one flat dataclass of ranges, defaults and comments, from which tyro makes the command
line. A flag given by hand wins over its experiment, an experiment over its preset.
"""

import importlib.util
import json
import os
import re
import sys
from contextlib import redirect_stderr
from dataclasses import asdict, fields, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from budgets import BudgetPrior, prior_probs

# The paper's comparison. GRPO is the same code with one budget, one summary and the group's mean.
COLUMNS = ("num_budgets", "prior", "num_summaries", "train_summaries", "baseline")
# fmt: off
EXPERIMENTS = {name: dict(zip(COLUMNS, row)) for name, row in {
    "grpo":             (1, "base",    1, "last", "group"),
    "ar-base":          (4, "base",    4, "all",  "brpo"),
    "ar-linear":        (4, "linear",  4, "all",  "brpo"),
    "ar-uniform":       (4, "uniform", 4, "all",  "brpo"),
    "grpo-linear":      (4, "linear",  1, "last", "group"),
    "grpo-decouple":    (4, "base",    4, "all",  "group"),
    "grpo-vr":          (4, "base",    1, "last", "brpo"),
    "grpo-vr-decouple": (4, "base",    4, "all",  "brpo"),
}.items()}
# fmt: on

# Ranges, checked wherever a Config is made: from flags, in code, by `replace`. A value outside of
# its range raises a ValueError; nan and infinity are outside of all of them.
SETTINGS = ConfigDict(allow_inf_nan=False, extra="forbid")
Count = Annotated[int, Field(ge=1, lt=2**31)]  # at 2^31 the random keys of evaluation begin
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]  # each field says what 0 means
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=1e9)]  # the upper bound only catches slips
PositiveOrZero = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]  # a flag without a value is an error
Numbers = Annotated[tuple[PositiveOrZero, ...], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Preset = Literal["miniature", "small", "paper-8k", "paper-16k"]
Engine = Literal["plain", "vllm"]
Experiment = Literal[*EXPERIMENTS]


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class Config:
    """AnytimeReasoner with Budget Relative Policy Optimization."""

    # ---- Where the defaults of all other flags come from ----
    preset: Preset = "miniature"  # Sizes and sources; with --model, small: a first run of its own.
    # A row of the paper's comparison: num_budgets, prior, num_summaries, train_summaries, baseline.
    experiment: Experiment = "ar-uniform"

    # ---- The method, with the paper's symbols ----
    max_budget: Count = 64  # b_M, the largest thinking budget in tokens.
    num_budgets: Count = 4  # M, evenly spaced.
    prior: Literal["uniform", "linear", "base"] = "uniform"  # P_j over the budgets.
    budgets: Counts | None = None  # b_1 < ... < b_M by hand; replaces max_budget and num_budgets.
    probs: Numbers | None = None  # P_1 ... P_M by hand; replaces prior.
    num_rollouts: Count = 8  # G, thinking traces per question.
    num_summaries: Count = 4  # A, summaries per budget.
    # Train the summaries of all cuts (decoupled, uniform prior), or of the last budget (GRPO).
    train_summaries: Literal["all", "last"] = "all"
    # V of the thinking: brpo (the mixture), progress (V1), group (V2, GRPO's), none; or another
    # name in brpo.BASELINES.
    baseline: str = "brpo"
    decay: Fraction = 0.5  # λ of V1: how fast a rollout's older rewards are forgotten.
    temperature: Positive = 1.0  # Sampling temperature; log-probs are taken at the same one.
    max_summary_tokens: Count = 7  # Generated tokens of one summary, whatever was appended.
    denominator_summary_tokens: Count = 10  # What a summary adds to the loss's denominator.
    # A summary token weighs as much as a thinking token (sum: the authors), or 1/(M·A) (mean).
    summary_loss: Literal["sum", "mean"] = "mean"

    # ---- Optimisation ----
    questions_per_step: Count = 16  # B, questions sampled per step.
    updates_per_step: Count = 2  # Optimizer steps per sampling step, each on its part of the B.
    steps: CountOrZero = 50  # Sampling steps; 0: those of `epochs` passes over the questions.
    epochs: CountOrZero = 1  # Passes over the questions, where steps is 0.
    lr: Fraction = 6e-4  # AdamW's learning rate at the first step.
    # constant (the paper's), or linear: down to 0 over the run, so that its last step is not luck.
    lr_schedule: Literal["constant", "linear"] = "linear"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)  # AdamW's decay rates.
    weight_decay: BelowOne = 0.0  # AdamW's weight decay.
    clip: Positive = 0.2  # ε of the clipped ratio.
    max_grad_norm: Positive = 1.0  # The global gradient norm is clipped here.
    sampler_cap: PositiveOrZero = 2.0  # C of the sampler correction; 0: none, as in the paper.

    # ---- Model and data ----
    model: str = "miniature"  # Hub name or directory; "miniature" is made here first.
    # A .json, .jsonl, .csv or .parquet file: a path, an https:// address, or
    # hf://datasets/owner/name/file; or a named set (deepscaler).
    train_data: str = "miniature"
    eval_data: Names = ("miniature",)  # Likewise, any number of sets.
    question_field: str = "problem"  # Column of the question in files; nested ones as a.b.
    answer_field: str = "answer"  # Column of the ground truth in files.
    prompt_template: str = "{question}"  # The user message.
    system_prompt: str = ""  # The system message; "": none of ours.
    chat_template_args: tuple[str, ...] = ()  # As name=value (Qwen3: enable_thinking=true).
    max_prompt_tokens: Count = 12  # Longer prompts are dropped, with a count.
    # "math" (the verifier), or module:function(summary, ground_truth, question) -> float in [0, 1].
    reward: str = "math"
    reward_timeout: Positive = 10.0  # Seconds for one call of that function.

    # ---- Generation, grading, and two memory knobs ----
    engine: Engine = "plain"  # Sampling by transformers (anywhere), or by vLLM (fast).
    tensor_parallel_size: Count = 1  # Processes that share one vLLM engine.
    max_tokens_per_row: Count = 512  # Training memory: tokens per forward; a longer tree is alone.
    kv_cache_gb: Positive = 1.0  # Sampling memory: vLLM's KV cache per process.
    verifier_workers: Count = 2  # Grading processes per training process.

    # ---- Seed, files, logs ----
    seed: Seed = 0  # Decides the warm start, the order of questions and every sampled token.
    # Default: runs/<preset>-<experiment>-seed<seed>, with what is not the default named in between.
    output_dir: str = ""
    # Beside metrics.jsonl, which is always written. (Not --log: torchrun has a flag like that.)
    logger: Literal["none", "wandb", "tensorboard"] = "none"
    resume: str = ""  # A checkpoint; auto: the newest in output_dir, or a start without one.
    save_every: CountOrZero = 20  # Steps between checkpoints; 0: none, except on SIGTERM.
    keep_checkpoints: Count = 2  # The newest ones are kept.

    # ---- Evaluation ----
    eval_every: CountOrZero = 25  # Steps between evaluations; 0: only before and after training.
    num_eval_budgets: Count = 8  # Points of the anytime curve, evenly spaced up to b_M.
    eval_budgets: Counts | None = None  # These points by hand; replaces num_eval_budgets.
    eval_samples: Count = 4  # Thinking traces per evaluation question.
    eval_temperature: PositiveOrZero = 1.0  # The paper's is 0.6; at 1.0 the curve is J itself.
    eval_questions: CountOrZero = 256  # Questions per evaluation set at most; 0: all.

    @property
    def budget_prior(self) -> BudgetPrior:
        """p_B, validated; ValueError names what is wrong."""
        largest, n = self.max_budget, self.num_budgets
        budgets = self.budgets or BudgetPrior.make(self.prior, largest, n).budgets
        return BudgetPrior(budgets, self.probs or prior_probs(self.prior, budgets))

    @property
    def evaluation_budgets(self) -> tuple[int, ...]:
        """The budgets of the anytime curve, validated."""
        largest, n = self.budget_prior.budgets[-1], self.num_eval_budgets
        budgets = self.eval_budgets or tuple(largest * j // n for j in range(1, n + 1))
        return BudgetPrior(budgets, prior_probs("uniform", budgets)).budgets

    @property
    def longest_thinking(self) -> int:
        """Tokens of the longest trace in training or evaluation."""
        return max(self.budget_prior.budgets[-1], self.evaluation_budgets[-1])

    @property
    def response_length(self) -> int:
        """In the loss's denominator: b_M + (M·A + 1) · denominator_summary_tokens."""
        budgets = self.budget_prior.budgets
        summaries = len(budgets) * self.num_summaries + 1  # as the authors count them
        return budgets[-1] + summaries * self.denominator_summary_tokens

    @property
    def denominator(self) -> int:
        """D of the loss: rollouts of one update × maximum response length, whatever was sampled."""
        questions = self.questions_per_step // self.updates_per_step
        return questions * self.num_rollouts * self.response_length

    @property
    def summary_weight(self) -> float:
        """What a summary token weighs in the loss, a thinking token being 1."""
        summaries = len(self.budget_prior.budgets) * self.num_summaries
        return 1.0 if self.summary_loss == "sum" else 1.0 / summaries


# What a first run with another model takes from the paper.
SMALL = {
    "max_budget": 2000,
    "max_summary_tokens": 118,
    "denominator_summary_tokens": 128,  # the authors set 10 aside for the appended text
    "summary_loss": "sum",
    "lr": 1e-6,
    "lr_schedule": "constant",
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "train_data": "deepscaler",
    "eval_data": ("paper/math",),
    "eval_questions": 64,
    "prompt_template": "{question} Let's think step by step and output the final answer within "
    "\\boxed{}.",
    "max_prompt_tokens": 1024,
    "engine": "vllm" if importlib.util.find_spec("vllm") else "plain",
    "max_tokens_per_row": 16384,
    "kv_cache_gb": 8.0,
    "save_every": 10,
    "eval_temperature": 0.6,
}
PAPER_8K = SMALL | {
    "max_budget": 8000,
    "questions_per_step": 64,
    "steps": 0,
    "epochs": 1,
    "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    # While training, the two small sets: 113 questions × 32 samples are 3616 traces, each of up to
    # 8000 tokens and 32 summaries: at most 43M tokens, what 8 training steps sample.
    "eval_data": ("paper/aime", "paper/amc"),
    "eval_samples": 32,
    "eval_every": 20,
    "engine": "vllm",
    "max_tokens_per_row": 32768,
    "kv_cache_gb": 24.0,
    "verifier_workers": 4,
    # A crash costs the steps since the newest checkpoint. The paper's 620 steps took 30 hours, so a
    # step takes about 3 minutes, and at most half an hour is lost. A checkpoint is 21 GB (1.78e9
    # weights and two moments each, in float32), written by 8 processes at once.
    "save_every": 10,
    "num_eval_budgets": 32,
    "eval_questions": 0,
}
# The longer run of the authors' repository: twice the budget, rollouts and questions. A step
# samples up to eight times the tokens, so checkpoints are fewer steps apart.
LONGER = {"max_budget": 16000, "num_rollouts": 16, "questions_per_step": 128, "epochs": 3}
LONGER["save_every"] = 2
PRESETS = {"miniature": {}, "small": SMALL, "paper-8k": PAPER_8K, "paper-16k": PAPER_8K | LONGER}
MINIATURE_VOCABULARY = 57  # tokens of tasks/arithmetic.py, by which a saved miniature is known

# What evaluate.py changes in a paper preset, for final tables: 1560 questions × 80 samples are
# 124,800 traces; with 32 summaries each, at most 1.5G tokens at 8000 tokens of thinking, 2.5G at
# 16,000. On AIME's 30 questions 80 samples leave the questions themselves as the main uncertainty.
FINAL_TABLES = {"eval_data": ("paper",), "eval_samples": 80}


def parse(args: list[str] | None = None) -> Config:
    """The settings of a command line. A wrong flag ends with a message and exit code 2."""
    (preset, experiment, model), _ = read(kind, args, add_help=False, return_unknown_args=True)
    default = defaults(preset or preset_for(model), experiment)
    c = read(Config, args, default=default)
    return replace(c, output_dir=c.output_dir or directory_of(c))


def kind(
    preset: Preset | None = None, experiment: Experiment = "ar-uniform", model: str = "miniature"
):
    """The flags that decide the defaults of all others, and are therefore read first."""
    return preset, experiment, model


def preset_for(*models: str) -> str:
    """The preset where none is named: no size of the miniature suits another model."""
    return "miniature" if all(map(is_miniature, models)) else "small"


def is_miniature(model: str) -> bool:
    """Is it the default run's model, or one that such a run has saved?"""
    try:
        settings = json.loads((Path(model) / "config.json").read_text())
        return settings["vocab_size"] == MINIATURE_VOCABULARY
    except (OSError, ValueError, KeyError, TypeError):  # a hub name, or nothing that can be read
        return model == "miniature"


def defaults(preset: str, experiment: str = "ar-uniform") -> Config:
    """What a preset and an experiment come to, before any other flag."""
    flags = PRESETS[preset] | EXPERIMENTS[experiment]
    return Config(preset=preset, experiment=experiment, **flags)


# What does not change a run's numbers: where it is, how often it looks and saves, how far it goes.
FREE = set(
    "output_dir resume save_every keep_checkpoints steps epochs verifier_workers kv_cache_gb "
    "tensor_parallel_size max_tokens_per_row num_eval_budgets reward_timeout logger".split()
)


def settings_that_count(c: Config) -> dict:
    """The settings that change a run's numbers, as JSON holds them."""
    free = FREE
    if c.lr_schedule == "linear":
        free = FREE - {"steps", "epochs"}  # the rate of a step depends on how many there will be
    settings = json.loads(json.dumps(asdict(c)))
    return {k: v for k, v in settings.items() if k not in free and not k.startswith("eval_")}


def directory_of(c: Config) -> str:
    """runs/<preset>-<experiment>[-<setting>-<value>]...-seed<seed>: all that is not the default."""
    usual = settings_that_count(replace(defaults(c.preset, c.experiment), seed=c.seed))
    settings = settings_that_count(c)
    changed = {k: file_name(str(v), 40) for k, v in settings.items() if usual.get(k) != v}
    names = [f"{c.preset}-{c.experiment}", *(f"{k}-{v}" for k, v in changed.items())]
    return f"runs/{file_name('-'.join(names))}-seed{c.seed}"


def file_name(text: str, longest: int = 180) -> str:
    """A text as part of a file's name; of a long one the beginning and a digest."""
    name = re.sub(r"[^\w.]+", "-", text).strip("-")
    if len(name) > longest:
        name = f"{name[:longest]}-{sha256(text.encode()).hexdigest()[:8]}"
    return name


def read(flags, args: list[str] | None, **options):
    """tyro.cli; a mistake, which every process finds, is printed by the first one alone."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    with redirect_stderr(sys.stderr if first else StringIO()):  # tyro prints range errors anyway
        return tyro.cli(flags, args=args, console_outputs=first, **options)


def check(c: Config, world_size: int = 1):
    """All that flags get wrong only together; ValueError names the flag and the fix."""
    largest = c.budget_prior.budgets[-1]  # raises where budgets or probabilities are wrong
    if not c.eval_budgets and c.num_eval_budgets > largest:
        raise ValueError(f"--num-eval-budgets {c.num_eval_budgets}: only {largest} tokens to share")
    _ = c.evaluation_budgets  # raises where they do not increase
    if c.num_rollouts < 2 and (c.baseline in ("brpo", "group") or c.num_summaries == 1):
        raise ValueError(
            f"--baseline {c.baseline} with --num-summaries {c.num_summaries} compares rollouts of "
            "one question: --num-rollouts must be at least 2"
        )
    if c.questions_per_step % c.updates_per_step:
        raise ValueError(
            f"--questions-per-step {c.questions_per_step} does not split into "
            f"--updates-per-step {c.updates_per_step} equal updates"
        )
    if c.tensor_parallel_size > 1 and c.engine != "vllm":
        raise ValueError("--tensor-parallel-size needs --engine vllm: transformers uses one device")
    samplers, rest = divmod(world_size, c.tensor_parallel_size)
    if rest:
        raise ValueError(
            f"{world_size} processes do not form groups of --tensor-parallel-size "
            f"{c.tensor_parallel_size}: start a multiple of it"
        )
    if c.questions_per_step % samplers:
        raise ValueError(
            f"--questions-per-step {c.questions_per_step} does not divide over "
            f"{samplers} sampling processes: make it a multiple"
        )


def learning_rate(c: Config, step: int, steps: int) -> float:
    """The rate of one of `steps` sampling steps, counted from 0."""
    return c.lr * (1 - step / steps) if c.lr_schedule == "linear" else c.lr


def batch_arithmetic(c: Config, world_size: int) -> str:
    """The run's sizes, spelled out, to be read before anything is paid for."""
    prior, samplers = c.budget_prior, world_size // c.tensor_parallel_size
    budgets, M, U = " ".join(map(str, prior.budgets)), len(prior.budgets), c.updates_per_step
    probs = " ".join(f"{p:.3g}" for p in prior.probs)
    B, G, A = c.questions_per_step, c.num_rollouts, c.num_summaries
    return (
        f"{c.preset} · {c.experiment} · seed {c.seed} · {world_size} process(es), "
        f"{samplers} sampler(s) -> {c.output_dir}\n"
        f"  budgets b_j   {budgets}   P_j {probs}   baseline {c.baseline}\n"
        f"  a step        {B} questions × G {G} = {B * G} thinking traces of up to "
        f"{prior.budgets[-1]} tokens,\n"
        f"                × M {M} × A {A} = {B * G * M * A} summaries of up to "
        f"{c.max_summary_tokens}\n"
        f"  an update     {B // U} questions, {U} updates a step; loss denominator "
        f"{B * G // U} × {c.response_length} = {c.denominator}"
    )


# ------------------------------------------------------------------------- the flags of evaluate.py


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class Evaluation:
    """Measure the anytime curve of saved models."""

    models: tyro.conf.Positional[Names] = ()  # Model directories or hub names.
    ask: str = ""  # Answer this one question, as the model thinks about it.
    patience: CountOrZero = 0  # Then stop at the same answer at so many budgets in a row; 0: never.
    summaries: Count = 1  # A, per budget; more of them sharpen the estimate, and vote when to stop.
    # Where the results go; default: evaluation/ beside a run's model, or runs/evaluation/<models>.
    output_dir: str = ""

    # The rest are settings of the preset (budgets to temperature: its eval_budgets and so on).
    preset: Preset  # Where their defaults come from.
    budgets: Counts  # Thinking budgets, increasing.
    data: Names  # Files, named sets, or "paper" for the authors' five files.
    samples: Count  # Thinking traces per question.
    questions: CountOrZero  # At most so many per set; 0: all.
    temperature: PositiveOrZero  # Sampling temperature.
    seed: Seed  # Decides every sampled token, and the bootstrap.
    engine: Engine  # Sampling by transformers or by vLLM.
    prompt_template: str  # The user message, with {question}.
    system_prompt: str  # The system message; "": none of ours.
    chat_template_args: tuple[str, ...]  # Of the chat template, as name=value.
    max_prompt_tokens: Count  # Longer prompts are dropped, with a count.
    question_field: str  # Column of the question in files.
    answer_field: str  # Column of the ground truth in files.
    reward: str  # "math", or module:function, as in training.

    @property
    def output(self) -> Path:
        """The directory of the results: one for each model, or set of models, unless named."""
        first = Path(self.models[0])
        if len(self.models) == 1 and first.name == "model":
            return Path(self.output_dir or first.parent / "evaluation")
        return Path(self.output_dir or f"runs/evaluation/{file_name('-and-'.join(self.models))}")


def parse_evaluation(args: list[str] | None = None) -> tuple[Evaluation, Config]:
    """The arguments of evaluate.py, and the settings that they come to."""
    (preset, *_), _ = read(kind, args, add_help=False, return_unknown_args=True)
    a, c = read_evaluation(preset or "miniature", args)
    if not preset and preset_for(*a.models) != "miniature":
        return read_evaluation("small", args)
    return a, c


def read_evaluation(preset: str, args: list[str] | None) -> tuple[Evaluation, Config]:
    final = FINAL_TABLES if preset.startswith("paper") else {}
    c = replace(defaults(preset), **final)
    c = replace(c, eval_budgets=c.evaluation_budgets)
    names = {f.name: f.name for f in fields(Evaluation) if hasattr(c, f.name)}  # a flag -> Config's
    names |= {f: f"eval_{f}" for f in ("budgets", "data", "samples", "questions", "temperature")}
    a = read(Evaluation, args, default=Evaluation(**{f: getattr(c, n) for f, n in names.items()}))
    return a, replace(c, **{n: getattr(a, f) for f, n in names.items()})
