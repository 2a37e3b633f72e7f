"""What a run is: every constant of the paper, the presets, and the eight experiments.

`Config` is one flat dataclass; its five parts are the groups of `--help`. A flag given by hand wins
over its experiment, an experiment over its preset. Nothing here imports torch: a mistake in the
flags is answered in a second.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from budgets import BudgetPrior, prior_probs

Experiment = Literal[
    "grpo",
    "ar-base",
    "ar-linear",
    "ar-uniform",
    "grpo-linear",
    "grpo-decouple",
    "grpo-vr",
    "grpo-vr-decouple",
]


@dataclass(frozen=True)
class Kind:
    """Where the defaults of all other flags come from."""

    # Sizes and sources: the embedded default (CPU, no download), or the paper's runs.
    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    # A row of the paper's comparison: num_budgets, prior, num_summaries, train_summaries, baseline.
    experiment: Experiment = "ar-uniform"


@dataclass(frozen=True)
class Method:
    """The method, with the paper's symbols."""

    max_budget: int = 64  # b_M, the largest thinking budget in tokens.
    num_budgets: int = 4  # M, evenly spaced.
    prior: Literal["uniform", "linear", "base"] = "uniform"  # P_j over the budgets.
    # b_1 < ... < b_M by hand, any spacing; replaces max_budget and num_budgets.
    budgets: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()  # P_1 ... P_M by hand; replaces prior.
    num_rollouts: int = 8  # G, thinking traces per question.
    num_summaries: int = 4  # A, summaries per budget.
    # Train the summaries of all cuts (decoupled, uniform prior), or of the last budget (GRPO).
    train_summaries: Literal["all", "last"] = "all"
    # V of the thinking: brpo (the mixture), progress (V1), group (V2, GRPO's), none.
    baseline: Literal["brpo", "progress", "group", "none"] = "brpo"
    decay: float = 0.5  # λ of V1: how fast a rollout's older rewards are forgotten.
    temperature: float = 1.0  # Sampling temperature; log-probs are taken at the same one.
    max_summary_tokens: int = 7  # Generated tokens of one summary, whatever was appended.
    max_appended_tokens: int = 3  # Room for the text appended before a summary.
    # With the number of sequences, the loss's denominator; 0: b_M + (M·A + 1) times the sum of the
    # two above.
    max_response_length: int = 0
    # A summary token weighs as much as a thinking token (sum: the authors), or 1/(M·A) (mean).
    summary_loss: Literal["sum", "mean"] = "mean"


@dataclass(frozen=True)
class Optimisation:
    """Steps, batches and AdamW."""

    questions_per_step: int = 16  # B, questions sampled per step.
    # Optimizer steps per sampling step, each on B / updates_per_step questions.
    updates_per_step: int = 2
    steps: int = 50  # Sampling steps; 0: as many as `epochs` passes over the questions take.
    epochs: int = 1  # Passes over the questions, where steps is 0.
    lr: float = 6e-4  # AdamW's learning rate at the first step.
    # constant (the paper's), or linear: down to 0 over the run, so that its last step is not luck.
    lr_schedule: Literal["constant", "linear"] = "linear"
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates.
    weight_decay: float = 0.0  # AdamW's weight decay.
    clip: float = 0.2  # ε of the clipped ratio.
    max_grad_norm: float = 1.0  # The global gradient norm is clipped here.
    # C of the sampler correction min(exp(old - sampler), C); 0: no correction, as in the paper.
    sampler_cap: float = 2.0


@dataclass(frozen=True)
class ModelAndData:
    """What is trained, and on which questions."""

    # Hub name or directory of a model with a one-token </think>; "miniature" is made here first.
    model: str = "miniature"
    # A .json, .jsonl or .parquet file, a named set (deepscaler), or "miniature".
    train_data: str = "miniature"
    eval_data: tuple[str, ...] = ("miniature",)  # Likewise, any number of sets.
    question_field: str = "problem"  # Column of the question in files.
    answer_field: str = "answer"  # Column of the ground truth in files.
    prompt_template: str = "{question}"  # The user message.
    system_prompt: str = ""  # The system message; "": none of ours.
    # Arguments of the model's chat template, as name=value (Qwen3: enable_thinking=true).
    chat_template_args: tuple[str, ...] = ()
    max_prompt_tokens: int = 12  # Longer prompts are dropped, with a count.
    # "math" (the verifier), or module:function(summary, ground_truth, question) -> float in [0, 1].
    reward: str = "math"
    reward_timeout: float = 10.0  # Seconds for one call of that function.


@dataclass(frozen=True)
class EngineAndMemory:
    """How tokens are generated, and the two memory knobs."""

    # Sampling by transformers (anywhere), or by vLLM (fast).
    engine: Literal["plain", "vllm"] = "plain"
    tensor_parallel_size: int = 1  # Processes that share one vLLM engine.
    # Training memory: tokens per packed row, one row a forward; a longer tree gets its own row.
    max_tokens_per_row: int = 512
    kv_cache_gb: float = 1.0  # Sampling memory: vLLM's KV cache per process.
    verifier_workers: int = 2  # Grading processes per training process.


@dataclass(frozen=True)
class Run:
    """Seed, files, evaluation."""

    seed: int = 0  # Decides the warm start, the order of questions and every sampled token.
    output_dir: str = ""  # Default: runs/<preset>-<experiment>-seed<seed>.
    # Curves and the evaluation's figure beside metrics.jsonl, which is always written.
    # (Not --log: torchrun takes that for one of its own.)
    logger: Literal["none", "wandb", "tensorboard"] = "none"
    # auto: from the newest checkpoint in output_dir (or start, without one); or a checkpoint.
    resume: str = ""
    save_every: int = 20  # Steps between checkpoints; 0: none, except on SIGTERM.
    keep_checkpoints: int = 2  # The newest ones are kept.
    # Steps between evaluations (besides those at step 0 and the end); 0: only those two.
    eval_every: int = 25
    num_eval_budgets: int = 8  # Points of the anytime curve, evenly spaced up to b_M.
    # The points of the curve by hand; replaces num_eval_budgets.
    eval_budgets: tuple[int, ...] = ()
    eval_samples: int = 4  # Thinking traces per evaluation question.
    # Sampling temperature of evaluation (the paper's is 0.6; at 1.0 the curve is J itself).
    eval_temperature: float = 1.0
    eval_questions: int = 256  # Questions per evaluation set at most; 0: all.


PARTS = {
    "kind": Kind,
    "method": Method,
    "optimisation": Optimisation,
    "model_and_data": ModelAndData,
    "engine_and_memory": EngineAndMemory,
    "run": Run,
}


# A dataclass lists the fields of its bases from the last to the first.
@dataclass(frozen=True)
class Config(Run, EngineAndMemory, ModelAndData, Optimisation, Method, Kind):
    """All flags of a run, flat. The defaults are the miniature's."""

    @property
    def budget_prior(self) -> BudgetPrior:
        """p_B, validated; ValueError names the flag."""
        if self.budgets:
            probs = self.probs or prior_probs(self.prior, self.budgets)
            return BudgetPrior(self.budgets, probs)
        made = BudgetPrior.make(self.prior, self.max_budget, self.num_budgets)
        return BudgetPrior(made.budgets, self.probs) if self.probs else made

    @property
    def evaluation_budgets(self) -> tuple[int, ...]:
        """The budgets of the anytime curve, validated."""
        largest, n = self.budget_prior.budgets[-1], self.num_eval_budgets
        even = tuple(largest * j // n for j in range(1, n + 1))
        chosen = self.eval_budgets or even
        return BudgetPrior(chosen, prior_probs("uniform", chosen)).budgets

    @property
    def longest_thinking(self) -> int:
        """Tokens of the longest trace in training or evaluation."""
        return max(self.budget_prior.budgets[-1], self.evaluation_budgets[-1])

    @property
    def summary_room(self) -> int:
        """Tokens of one summary at most, the appended text included."""
        return self.max_appended_tokens + self.max_summary_tokens

    @property
    def response_length(self) -> int:
        """The maximum response length in the loss's denominator: one trace and all its
        summaries."""
        budgets = self.budget_prior.budgets
        sequences = len(budgets) * self.num_summaries + 1
        return self.max_response_length or budgets[-1] + sequences * self.summary_room

    @property
    def denominator(self) -> int:
        """D of the loss: rollouts of one update × maximum response length, whatever was sampled."""
        questions = self.questions_per_step // self.updates_per_step
        return questions * self.num_rollouts * self.response_length

    @property
    def summary_weight(self) -> float:
        """What a summary token weighs in the loss, a thinking token being 1."""
        if self.summary_loss == "sum":
            return 1.0
        return 1.0 / (len(self.budget_prior.budgets) * self.num_summaries)


PAPER_8K = {
    # The authors set 10 tokens aside for the appended text (R1-Distill's has 5 or 8), of 128.
    "max_budget": 8000,
    "max_summary_tokens": 118,
    "max_appended_tokens": 10,
    "summary_loss": "sum",
    "num_rollouts": 8,
    "questions_per_step": 64,
    "updates_per_step": 2,
    "steps": 0,
    "epochs": 1,
    "lr": 1e-6,
    "lr_schedule": "constant",
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "train_data": "deepscaler",
    # While training, the two small sets: 113 questions × 32 samples are 3616 traces, each of up to
    # 8000 tokens and 32 summaries: at most 43M tokens, what 8 training steps sample.
    "eval_data": ("paper/aime", "paper/amc"),
    "eval_samples": 32,
    "eval_every": 20,
    "prompt_template": "{question} Let's think step by step and output the final answer within "
    "\\boxed{}.",
    "max_prompt_tokens": 1024,
    "engine": "vllm",
    "max_tokens_per_row": 32768,
    "kv_cache_gb": 24.0,
    "verifier_workers": 4,
    "save_every": 40,
    "num_eval_budgets": 32,
    "eval_temperature": 0.6,
    "eval_questions": 0,
}
# The longer run of the authors' repository: twice the budget, rollouts and questions.
PAPER_16K = PAPER_8K | {
    "max_budget": 16000,
    "num_rollouts": 16,
    "questions_per_step": 128,
    "epochs": 3,
}
PRESETS = {"miniature": {}, "paper-8k": PAPER_8K, "paper-16k": PAPER_16K}

# What evaluate.py changes in a paper preset, for final tables: 1560 questions × 80 samples are
# 124,800 traces; with 32 summaries each, at most 1.5G tokens at 8000 tokens of thinking, 2.5G at
# 16,000. On AIME's 30 questions 80 samples leave the questions themselves as the main uncertainty.
FINAL_TABLES = {
    "miniature": {},
    **dict.fromkeys(("paper-8k", "paper-16k"), {"eval_data": ("paper",), "eval_samples": 80}),
}

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


def parse(args: list[str] | None = None) -> Config:
    """The resolved config of a command line. A wrong flag ends with a message and exit code 2."""
    import tyro

    refuse_empty(args)
    # Twice: preset and experiment decide what all the other flags default to.
    first = os.environ.get("RANK", "0") == "0"  # one message, not one from every process
    kind, _ = tyro.cli(
        Kind, args=args, add_help=False, return_unknown_args=True, console_outputs=first
    )
    base = Config(**{**vars(kind), **PRESETS[kind.preset], **EXPERIMENTS[kind.experiment]})
    parts = tyro.cli(
        tyro.conf.OmitArgPrefixes[Parts],
        args=args,
        default=Parts(
            **{
                name: part(**{f.name: getattr(base, f.name) for f in fields(part)})
                for name, part in PARTS.items()
            }
        ),
        console_outputs=first,
    )
    flags = {k: v for part in vars(parts).values() for k, v in vars(part).items()}
    config = Config(**flags)
    default = f"runs/{config.preset}-{config.experiment}-seed{config.seed}"
    return replace(config, output_dir=config.output_dir or default)


def refuse_empty(args: list[str] | None):
    """A flag for a list without a value would mean its default, which nobody wants who types it."""
    args = sys.argv[1:] if args is None else args
    for given, following in zip(args, [*args[1:], "--"]):
        if given.replace("_", "-") in LISTS and following.startswith("--"):
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"error: {given} has no value: give it one or more, or leave it out",
                    file=sys.stderr,
                )
            sys.exit(2)


LISTS = ("--budgets", "--probs", "--eval-budgets", "--eval-data", "--data")


@dataclass(frozen=True)
class Parts:
    """AnytimeReasoner with Budget Relative Policy Optimization."""

    kind: Kind
    method: Method
    optimisation: Optimisation
    model_and_data: ModelAndData
    engine_and_memory: EngineAndMemory
    run: Run


# name: (lowest, highest) value, both allowed; of tuples, each entry's. Counts stay below 2^31,
# where the random keys of evaluation begin; the other upper bounds only catch slips and infinity.
TINY, MANY = 5e-324, 2**31 - 1
RANGES = {
    **dict.fromkeys(
        (
            "max_budget",
            "num_budgets",
            "budgets",
            "num_rollouts",
            "num_summaries",
            "questions_per_step",
            "updates_per_step",
            "max_summary_tokens",
            "max_prompt_tokens",
            "num_eval_budgets",
            "eval_budgets",
            "eval_samples",
            "tensor_parallel_size",
            "max_tokens_per_row",
            "keep_checkpoints",
            "verifier_workers",
        ),
        (1, MANY),
    ),
    **dict.fromkeys(
        (
            "steps",
            "epochs",
            "save_every",
            "eval_every",
            "eval_questions",
            "max_appended_tokens",
            "max_response_length",
        ),
        (0, MANY),
    ),
    "seed": (0, 2**63 - 1),
    "probs": (0, 1),
    "decay": (TINY, 1),
    "lr": (TINY, 1),
    "betas": (0, 1 - 1e-9),
    "weight_decay": (0, 1),
    "clip": (TINY, 1e3),
    "sampler_cap": (0, 1e6),
    "max_grad_norm": (TINY, 1e9),
    "temperature": (TINY, 100),
    "eval_temperature": (0, 100),
    "kv_cache_gb": (TINY, 1e5),
    "reward_timeout": (TINY, 1e5),
}


def check(config: Config, world_size: int = 1) -> None:
    """Everything that flags alone can get wrong; ValueError names the flag and the fix."""
    c = config
    for name, (lowest, highest) in RANGES.items():
        values = getattr(c, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < lowest:
                must = {0: "cannot be negative", TINY: "must be above 0"}
                raise ValueError(
                    f"{flag(name)} {value}: " + must.get(lowest, f"must be at least {lowest}")
                )
            if not value <= highest:  # nan too
                raise ValueError(f"{flag(name)} {value}: must be at most {highest:g}")
    if not c.eval_data:
        raise ValueError("--eval-data: name at least one file or set")
    if c.num_rollouts < 2 and c.baseline in ("brpo", "group"):
        raise ValueError(
            f"--baseline {c.baseline} compares rollouts of one question: "
            f"--num-rollouts must be at least 2, not {c.num_rollouts}"
        )
    if c.num_rollouts < 2 and c.num_summaries == 1:
        raise ValueError(
            "--num-summaries 1 uses the group's mean as the summaries' baseline: "
            "--num-rollouts must be at least 2"
        )
    largest = c.budget_prior.budgets[-1]
    if not c.eval_budgets and c.num_eval_budgets > largest:
        raise ValueError(f"--num-eval-budgets {c.num_eval_budgets}: only {largest} tokens to share")
    _ = c.evaluation_budgets  # raises where they do not increase
    if 0 < c.max_response_length < largest:
        raise ValueError(
            f"--max-response-length {c.max_response_length} is below the largest "
            f"budget {largest}: raise it, or leave it out"
        )
    check_processes(c, world_size)


def check_processes(c: Config, world_size: int) -> None:
    """The batch arithmetic over processes; ValueError names the flag and the fix."""
    if c.questions_per_step % c.updates_per_step:
        raise ValueError(
            f"--questions-per-step {c.questions_per_step} does not split into "
            f"--updates-per-step {c.updates_per_step} equal updates"
        )
    if c.tensor_parallel_size > 1 and c.engine != "vllm":
        raise ValueError(
            "--tensor-parallel-size needs --engine vllm: the plain engine samples on one device"
        )
    if world_size % c.tensor_parallel_size:
        raise ValueError(
            f"{world_size} processes do not form groups of --tensor-parallel-size "
            f"{c.tensor_parallel_size}: start a multiple of it"
        )
    samplers = world_size // c.tensor_parallel_size
    if c.questions_per_step % samplers:
        raise ValueError(
            f"--questions-per-step {c.questions_per_step} does not divide over "
            f"{samplers} sampling processes: make it a multiple"
        )


def learning_rate(config: Config, step: int, steps: int) -> float:
    """The rate of one of `steps` sampling steps, counted from 0."""
    return config.lr * (1 - step / steps) if config.lr_schedule == "linear" else config.lr


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def batch_arithmetic(config: Config, world_size: int) -> str:
    """The run's sizes, spelled out, to be read before anything is paid for."""
    c, prior = config, config.budget_prior
    m, samplers = len(prior.budgets), world_size // c.tensor_parallel_size
    traces = c.questions_per_step * c.num_rollouts
    budgets = " ".join(map(str, prior.budgets))
    probs = " ".join(f"{p:.3g}" for p in prior.probs)
    return "\n".join(
        [
            f"{c.preset} · {c.experiment} · seed {c.seed} · {world_size} process(es), "
            f"{samplers} sampler(s) -> {c.output_dir}",
            f"  budgets b_j   {budgets}   P_j {probs}   baseline {c.baseline}",
            f"  a step        {c.questions_per_step} questions × G {c.num_rollouts} = {traces} "
            f"thinking traces of up to {prior.budgets[-1]} tokens, × M {m} × A {c.num_summaries} = "
            f"{traces * m * c.num_summaries} summaries of up to {c.max_summary_tokens}",
            f"  an update     {c.questions_per_step // c.updates_per_step} questions, "
            f"{c.updates_per_step} updates a step; loss denominator "
            f"{traces // c.updates_per_step} × {c.response_length} = {c.denominator}",
        ]
    )


# ------------------------------------------------------------------------- the flags of evaluate.py


@dataclass(frozen=True)
class Evaluation:
    """Measure the anytime curve of saved models."""

    models: Annotated[tuple[str, ...], "positional"]  # Model directories or hub names.
    # Where the fields left out below come from: sets, budgets, samples, prompt, engine.
    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    ask: str = ""  # Answer this one question, as the model thinks about it.
    budgets: tuple[int, ...] = ()  # Thinking budgets, increasing.
    data: tuple[str, ...] = ()  # Files, named sets, or "paper" for the authors' five files.
    samples: int = 0  # Thinking traces per question.
    summaries: int = 1  # A, per budget; more of them only sharpen the estimate.
    questions: int = -1  # At most so many per set; 0: all.
    temperature: float = -1.0  # Sampling temperature.
    seed: int = 0  # Decides every sampled token, and the bootstrap.
    engine: Literal["", "plain", "vllm"] = ""  # Sampling by transformers or by vLLM.
    prompt_template: str = ""  # The user message, with {question}.
    system_prompt: str = ""  # The system message.
    chat_template_args: tuple[str, ...] = ()  # Of the chat template, as name=value.
    max_prompt_tokens: int = 0  # Longer prompts are dropped, with a count.
    question_field: str = "problem"  # Column of the question in files.
    answer_field: str = "answer"  # Column of the ground truth in files.
    reward: str = ""  # "math", or module:function, as in training.
    chunk: int = 0  # Questions between two writes of the records; 0: automatic.
    # Where the results go; default: evaluation/ beside the first model.
    output_dir: str = ""

    @property
    def output(self) -> Path:
        return Path(self.output_dir or Path(self.models[0]).parent / "evaluation")


def evaluation_config(a: Evaluation) -> Config:
    """The preset with what the arguments override; ValueError names a bad one."""
    if a.summaries < 1:
        raise ValueError(f"--summaries {a.summaries}: must be at least 1")
    for name in ("samples", "questions", "temperature", "seed", "chunk"):
        if getattr(a, name) < 0 and getattr(a, name) != getattr(Evaluation, name):
            raise ValueError(f"--{name} {getattr(a, name)}: cannot be negative")
    given = {
        "eval_budgets": a.budgets,
        "eval_data": a.data,
        "eval_samples": a.samples,
        "engine": a.engine,
        "prompt_template": a.prompt_template,
        "system_prompt": a.system_prompt,
        "chat_template_args": a.chat_template_args,
        "reward": a.reward,
        "max_prompt_tokens": a.max_prompt_tokens,
    }
    given = {name: value for name, value in given.items() if value}
    if a.questions != Evaluation.questions:
        given["eval_questions"] = a.questions
    if a.temperature != Evaluation.temperature:
        given["eval_temperature"] = a.temperature
    return replace(
        Config(**{**PRESETS[a.preset], **FINAL_TABLES[a.preset], **given}),
        seed=a.seed,
        question_field=a.question_field,
        answer_field=a.answer_field,
    )


def parse_evaluation(args: list[str] | None = None) -> tuple[Evaluation, Config]:
    """The arguments of evaluate.py, and the settings that they come to."""
    import tyro

    refuse_empty(args)
    a = tyro.cli(
        tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Evaluation),
        args=args,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    return a, evaluation_config(a)
