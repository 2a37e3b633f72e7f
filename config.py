"""What a run is: every constant of the paper in one flat dataclass, the presets, and the eight experiments.

A flag given by hand wins over its experiment, an experiment over its preset. Nothing here imports torch: a mistake
in the flags is answered in a second.
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

from budgets import BudgetPrior, prior_probs

Experiment = Literal["grpo", "ar-base", "ar-linear", "ar-uniform", "grpo-linear", "grpo-decouple", "grpo-vr",
                     "grpo-vr-decouple"]


@dataclass(frozen=True)
class Config:
    """AnytimeReasoner with Budget Relative Policy Optimization. Defaults: the miniature, on CPU, with no download."""

    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    """Sizes and sources: the embedded default, or the paper's runs."""
    experiment: Experiment = "ar-uniform"
    """A line of the paper's comparison: sets num_budgets, prior, num_summaries, train_summaries and baseline."""

    # -- the method (symbols as in the paper) ------------------------------------------------------------------
    max_budget: int = 48
    """b_M, thinking tokens at most."""
    num_budgets: int = 4
    """M, evenly spaced."""
    prior: Literal["uniform", "linear", "base"] = "uniform"
    """P_j over the budgets."""
    budgets: tuple[int, ...] = ()
    """b_1 < ... < b_M by hand, any spacing; replaces max_budget and num_budgets."""
    probs: tuple[float, ...] = ()
    """P_1 ... P_M by hand; replaces prior."""
    num_rollouts: int = 8
    """G, thinkings per question."""
    num_summaries: int = 4
    """A, summaries per budget."""
    train_summaries: Literal["all", "last"] = "all"
    """Train the summaries of all cuts (decoupled, uniform prior) or of the last budget only (GRPO)."""
    baseline: Literal["brpo", "progress", "group", "none"] = "brpo"
    """V of the thinking: brpo (the mixture), progress (V1), group (V2, GRPO's), none."""
    decay: float = 0.5
    """λ of V1: how fast a rollout's older rewards are forgotten."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same one."""
    max_summary_tokens: int = 10
    """Of one summary, appended text included."""
    max_response_length: int = 218
    """With the number of sequences, the loss's constant denominator (the paper's b_M + (M·A + 1) summaries)."""
    summary_loss: Literal["sum", "mean"] = "mean"
    """sum: a summary token weighs as much as a thinking token (the authors' code); mean: 1/(M·A) of it."""

    # -- optimisation ------------------------------------------------------------------------------------------
    questions_per_step: int = 16
    """B, questions sampled per step."""
    updates_per_step: int = 2
    """Optimizer steps per sampling step, each on B / updates_per_step questions."""
    steps: int = 60
    """Sampling steps; 0: as many as `epochs` passes over the questions take."""
    epochs: int = 1
    """Passes over the questions, where steps is 0."""
    lr: float = 3e-4
    """AdamW, constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW."""
    weight_decay: float = 0.0
    """AdamW."""
    clip: float = 0.2
    """ε of the clipped ratio."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped here."""
    sampler_cap: float = 2.0
    """C of the sampler correction min(exp(old - sampler), C); 0 switches it off, as in the paper."""

    # -- model and data ----------------------------------------------------------------------------------------
    model: str = "miniature"
    """Hub name or directory of a model with a one-token </think>; "miniature" is trained here first."""
    train_data: str = "miniature"
    """A .json, .jsonl or .parquet file, a named set (deepscaler), or "miniature"."""
    eval_data: tuple[str, ...] = ("miniature",)
    """Likewise, any number of sets."""
    question_field: str = "problem"
    """Column of the question in files."""
    answer_field: str = "answer"
    """Column of the ground truth in files."""
    prompt_template: str = "{question}"
    """The user message."""
    max_prompt_tokens: int = 12
    """Longer prompts are dropped, with a count."""

    # -- engine and memory -------------------------------------------------------------------------------------
    engine: Literal["plain", "vllm"] = "plain"
    """What samples: transformers (anywhere), or vLLM (fast)."""
    tensor_parallel_size: int = 1
    """Processes that share one vLLM engine."""
    max_tokens_per_row: int = 1024
    """Memory knob of training: tokens per packed row, one row per forward; a longer tree gets a row of its own."""
    kv_cache_gb: float = 1.0
    """Memory knob of vLLM: its KV cache per process."""

    # -- the run -----------------------------------------------------------------------------------------------
    seed: int = 0
    """Decides the warm start, the order of questions and every sampled token."""
    output_dir: str = ""
    """Default: runs/<preset>-<experiment>-seed<seed>."""
    resume: str = ""
    """"auto" goes on from the newest checkpoint in output_dir (starts, if there is none); or a checkpoint's path."""
    save_every: int = 20
    """Steps between checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """The newest ones are kept."""
    eval_every: int = 20
    """Steps between evaluations (step 0 and the end included); 0: only those two."""
    eval_budgets: tuple[int, ...] = (6, 12, 18, 24, 30, 36, 42, 48)
    """Budgets of the anytime curve."""
    eval_samples: int = 4
    """Thinkings per evaluation question."""
    eval_temperature: float = 1.0
    """Sampling temperature of evaluation (the paper's is 0.6; at 1.0 the miniature's curve is J itself)."""
    eval_questions: int = 256
    """Questions per evaluation set at most; 0: all."""
    verifier_workers: int = 2
    """Grading processes per training process."""

    @property
    def budget_prior(self) -> BudgetPrior:
        """p_B, validated; ValueError names the flag."""
        if self.budgets:
            return BudgetPrior(self.budgets, self.probs or prior_probs(self.prior, self.budgets))
        made = BudgetPrior.make(self.prior, self.max_budget, self.num_budgets)
        return BudgetPrior(made.budgets, self.probs) if self.probs else made

    @property
    def largest_budget(self) -> int:
        """The longest thinking of the run, in training or evaluation."""
        return max(self.budget_prior.budgets[-1], self.eval_budgets[-1])

    @property
    def summary_weight(self) -> float:
        """What a summary token weighs in the loss, a thinking token being 1."""
        return 1.0 if self.summary_loss == "sum" else 1.0 / (len(self.budget_prior.budgets) * self.num_summaries)


PAPER_8K = dict(
    max_budget=8000, max_summary_tokens=128, max_response_length=8000 + 17 * 128, summary_loss="sum", num_rollouts=8,
    questions_per_step=64, updates_per_step=2, steps=0, epochs=1, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.01,
    model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", train_data="deepscaler",
    eval_data=("aime2024", "amc2022", "math500", "minerva", "olympiadbench"),
    prompt_template="{question} Let's think step by step and output the final answer within \\boxed{}.",
    max_prompt_tokens=1024, engine="vllm", max_tokens_per_row=32768, kv_cache_gb=24.0, save_every=40, eval_every=40,
    eval_budgets=tuple(range(250, 8001, 250)), eval_samples=4, eval_temperature=0.6,
    eval_questions=0, verifier_workers=4)
PRESETS = {
    "miniature": {},
    "paper-8k": PAPER_8K,
    # The longer run of the authors' repository: twice the budget, rollouts and questions, three epochs.
    "paper-16k": PAPER_8K | dict(
        max_budget=16000, max_response_length=16000 + 17 * 128, num_rollouts=16, questions_per_step=128, epochs=3,
        eval_budgets=tuple(range(500, 16001, 500)), eval_samples=2),
}

# SPEC 8's table. GRPO is the same code with one budget, one summary, and the group's mean as baseline.
COLUMNS = ("num_budgets", "prior", "num_summaries", "train_summaries", "baseline")
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


def parse(args: list[str] | None = None) -> Config:
    """The resolved config of a command line. Unknown flags are errors (exit code 2), --help lists all fields."""
    import tyro

    args = sys.argv[1:] if args is None else args

    def given(flag, choices, default):
        """The value of --flag, read ahead: it decides what the other flags default to. tyro judges bad ones below."""
        value = default
        for here, after in zip(args, [*args[1:], ""]):
            name, _, attached = here.partition("=")
            if name == f"--{flag}":
                value = attached or after
        return value if value in choices else default

    preset, experiment = given("preset", PRESETS, "miniature"), given("experiment", EXPERIMENTS, "ar-uniform")
    base = Config(**{"preset": preset, "experiment": experiment, **PRESETS[preset], **EXPERIMENTS[experiment]})
    config = tyro.cli(Config, default=base, args=args)
    default = f"runs/{config.preset}-{config.experiment}-seed{config.seed}"
    return replace(config, output_dir=config.output_dir or default)


def check(config: Config, world_size: int = 1) -> None:
    """Everything that flags alone can get wrong; ValueError names the flag and the mend."""
    c, budgets = config, config.budget_prior.budgets
    for name in ("num_rollouts", "num_summaries", "questions_per_step", "updates_per_step", "max_prompt_tokens",
                 "eval_samples", "tensor_parallel_size", "max_tokens_per_row", "keep_checkpoints", "verifier_workers"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{flag(name)} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "temperature", "clip", "max_grad_norm", "kv_cache_gb"):
        if not getattr(c, name) > 0:
            raise ValueError(f"--{flag(name)} {getattr(c, name)}: must be above 0")
    for name in ("steps", "epochs", "save_every", "eval_every", "eval_questions", "seed", "sampler_cap",
                 "eval_temperature"):
        if getattr(c, name) < 0:
            raise ValueError(f"--{flag(name)} {getattr(c, name)}: cannot be negative")
    if not 0 < c.decay <= 1:
        raise ValueError(f"--decay {c.decay}: λ lies in (0, 1]")
    if c.num_rollouts < 2 and c.baseline in ("brpo", "group"):
        raise ValueError(f"--baseline {c.baseline} compares rollouts of one question: --num-rollouts must be at least 2, "
                         f"not {c.num_rollouts}")
    if c.num_rollouts < 2 and c.num_summaries == 1:
        raise ValueError("--num-summaries 1 takes the group's mean as the summaries' baseline: --num-rollouts must be "
                         "at least 2")
    BudgetPrior(c.eval_budgets, prior_probs("uniform", c.eval_budgets))     # increasing, positive
    if c.questions_per_step % c.updates_per_step:
        raise ValueError(f"--questions-per-step {c.questions_per_step} does not split into --updates-per-step "
                         f"{c.updates_per_step} equal updates")
    if c.tensor_parallel_size > 1 and c.engine != "vllm":
        raise ValueError("--tensor-parallel-size needs --engine vllm: the plain engine samples on one device")
    if world_size % c.tensor_parallel_size:
        raise ValueError(f"{world_size} processes do not form groups of --tensor-parallel-size "
                         f"{c.tensor_parallel_size}: start a multiple of it")
    samplers = world_size // c.tensor_parallel_size
    if c.questions_per_step % samplers:
        raise ValueError(f"--questions-per-step {c.questions_per_step} does not divide over {samplers} sampling "
                         "processes: make it a multiple")
    if c.max_response_length < budgets[-1]:
        raise ValueError(f"--max-response-length {c.max_response_length} is below the largest budget {budgets[-1]}: "
                         "raise it")


def flag(name: str) -> str:
    return name.replace("_", "-")


def batch_arithmetic(config: Config, world_size: int) -> str:
    """The run's sizes, spelled out, to be read before anything is paid for."""
    c, prior = config, config.budget_prior
    m, samplers = len(prior.budgets), world_size // config.tensor_parallel_size
    thinkings = c.questions_per_step * c.num_rollouts
    return "\n".join([
        f"{c.preset} · {c.experiment} · seed {c.seed} · {world_size} process(es), {samplers} sampler(s) "
        f"-> {c.output_dir}",
        f"  budgets b_j   {' '.join(map(str, prior.budgets))}   P_j {' '.join(f'{p:.3g}' for p in prior.probs)}   "
        f"baseline {c.baseline}",
        f"  a step        {c.questions_per_step} questions × G {c.num_rollouts} = {thinkings} thinkings of up to "
        f"{prior.budgets[-1]} tokens, × M {m} × A {c.num_summaries} = {thinkings * m * c.num_summaries} summaries of "
        f"up to {c.max_summary_tokens}",
        f"  an update     {c.questions_per_step // c.updates_per_step} questions, {c.updates_per_step} updates a step; "
        f"loss denominator {thinkings // c.updates_per_step} × {c.max_response_length} = {denominator(c)}",
    ])


def denominator(config: Config) -> int:
    """D of the loss: thinkings of one update × maximum response length, whatever was actually sampled."""
    return config.questions_per_step // config.updates_per_step * config.num_rollouts * config.max_response_length


def as_json(config: Config) -> dict:
    return {f.name: getattr(config, f.name) for f in fields(config)}
