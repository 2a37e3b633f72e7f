"""What a run checks, and then loads, before its first step.

`prepare` checks all that can be checked without weights, so that a mistake costs seconds; `load`
makes engine, model and optimizer at the step to start from.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from brpo import BASELINES
from packing import check_attention
from rewards import answer_paragraph
from rollout import Markers, make_grader
from runtime import checkpoint, distributed, rundir
from runtime.config import Config, Evaluation, batch_arithmetic, check, settings_that_count
from runtime.data import load_questions, make_questions, set_names
from runtime.engines import make_engine, require_engine
from runtime.metrics import Logger, Progress, multiplied_weights, require_logger
from runtime.models import check_numbers, model_digest, open_tokenizer, read_config
from tasks import arithmetic
from tasks.reward_function import RewardFunction, require_reward, reward_source
from tasks.verifier import Verifier


@dataclass(kw_only=True)
class Opened:
    """A model's tokenizer, and the evaluation questions in its tokens; no weight is loaded yet."""

    tokenizer: object
    markers: Markers
    sets: dict[str, list]  # name -> questions
    longest: int  # tokens of the longest sequence, prompt and summary included
    reports: list[str]  # what was read, one line a set
    grade: Callable | None = None  # rollout.make_grader's


@dataclass(kw_only=True)
class Run(Opened):
    """What the loop needs besides engine, model and optimizer."""

    dir: Path
    lock: object  # the directory is this run's until it is released
    device: torch.device
    questions: list
    steps: int
    checkpoint: Path | None
    first_step: int
    identity: dict  # all that changes the numbers; checkpoints must agree
    evaluation: dict  # all that changes an evaluation; only like ones are compared
    history: list = field(default_factory=list)  # evaluations so far
    verifier: object = None
    logger: Logger | None = None
    bar: Progress | None = None
    weights: int = 0  # metrics.multiplied_weights of the model
    skipped: int = 0  # updates skipped in a row

    def close(self):
        """End the graders and the log, and let go of the directory."""
        for part in (self.verifier, self.logger, self.bar):
            if part is not None:
                part.close()
        if self.lock is not None:
            self.lock.release()


def open_model(
    model: str, c: Config, longest_thinking: int, ask: str = "", train: bool = True
) -> Opened:
    """ValueError where the model cannot be used as `c` says, or the questions cannot be read.

    `ask`: this one question instead of the evaluation sets. `train`: must it be trainable too?
    """
    tokenizer, eos, context = open_tokenizer(model, train)
    markers = Markers.from_tokenizer(tokenizer, c.max_summary_tokens, eos)
    summary = len(markers.after_cut) + c.max_summary_tokens
    longest = c.max_prompt_tokens + longest_thinking + summary
    if longest > context:
        raise ValueError(
            f"{model} has a context of {context}, but --max-prompt-tokens {c.max_prompt_tokens} + "
            f"largest budget {longest_thinking} + summary {summary} = {longest} tokens: lower them"
        )
    if train and model != "miniature":
        check_attention(read_config(model), longest)
    sets, reports = {}, []
    if ask:
        sets["ask"], _ = make_questions([(ask, "")], tokenizer, c)
    for name in [] if ask else set_names(c.eval_data):
        sets[name], report = load_questions(name, tokenizer, c, "test", c.eval_questions)
        reports.append(report)
    return Opened(tokenizer=tokenizer, markers=markers, sets=sets, longest=longest, reports=reports)


def prepare(c: Config) -> Run:
    """Check all that can be checked without weights.

    ValueError names the flag, file or row, and the fix.
    """
    world = distributed.world_size()
    check(c, world)
    thinking = c.questions_per_step * c.num_rollouts * c.budget_prior.budgets[-1]
    distributed.check_machine(thinking)
    if c.baseline not in BASELINES:
        raise ValueError(f"--baseline {c.baseline}: brpo.BASELINES has {', '.join(BASELINES)}")
    require_engine(c.engine)
    require_logger(c.logger)
    device, directory = distributed.start(), Path(c.output_dir)
    lock = rundir.enter(directory, c.resume)

    opened = open_model(c.model, c, c.longest_thinking)
    questions, report = load_questions(c.train_data, opened.tokenizer, c, "train")
    if len(questions) < c.questions_per_step:
        raise ValueError(
            f"{c.train_data} has {len(questions)} usable questions, fewer than "
            f"--questions-per-step {c.questions_per_step}: lower it"
        )
    require_reward(c.reward, questions[0].ground_truth, questions[0].text)
    identity = identity_of(c, questions)
    newest, first_step = checkpoint.find(directory, c.resume, identity)
    steps = c.steps or c.epochs * (len(questions) // c.questions_per_step)
    if steps < first_step:
        raise ValueError(f"{newest} is at step {first_step}, beyond --steps {steps}: raise it")
    if distributed.rank() == 0:
        reports = [report, *opened.reports, *expensive_evaluation(c, opened.sets)]
        print(batch_arithmetic(c, world), *(f"  {line}" for line in reports), sep="\n")
        print(f"  {steps} steps from {first_step}" + (f" (resuming {newest})" if newest else ""))
    return Run(
        **vars(opened),
        dir=directory,
        lock=lock,
        device=device,
        questions=questions,
        steps=steps,
        checkpoint=newest,
        first_step=first_step,
        identity=identity,
        evaluation={
            "budgets": list(c.evaluation_budgets),
            "samples": c.eval_samples,
            "temperature": c.eval_temperature,
            "seed": c.seed,
            "data": {name: rundir.digest(questions) for name, questions in opened.sets.items()},
        },
    )


def expensive_evaluation(c: Config, sets: dict[str, list]) -> list[str]:
    """A line where an evaluation costs more tokens than the training between two of them."""
    summary, budgets = c.max_summary_tokens, c.evaluation_budgets
    traces = sum(map(len, sets.values())) * c.eval_samples
    evaluation = traces * (budgets[-1] + len(budgets) * summary)
    budgets = c.budget_prior.budgets
    trace = budgets[-1] + len(budgets) * c.num_summaries * summary
    steps = c.eval_every or c.steps or math.inf
    training = steps * c.questions_per_step * c.num_rollouts * trace
    if evaluation <= training:
        return []
    return [
        f"an evaluation samples up to {evaluation:,} tokens, the {steps} training steps between "
        f"two up to {training:,}: --eval-questions, --eval-samples and --eval-every decide that"
    ]


class SummaryVerifier(Verifier):
    """The math verifier, on the part of a summary that counts: its first paragraph."""

    def submit(self, summary: str, ground_truth, question: str = "", **context) -> Future:
        return super().submit(answer_paragraph(summary), ground_truth)


def make_verifier(c: Config) -> SummaryVerifier | RewardFunction:
    """The grader that the flag --reward names."""
    if c.reward == "math":
        return SummaryVerifier(c.verifier_workers)
    return RewardFunction(c.reward, c.verifier_workers, c.reward_timeout)


def identity_of(c: Config, questions: list) -> dict:
    """All that changes a run's numbers: a checkpoint of another identity is not resumed."""
    return settings_that_count(c) | {
        "data": rundir.digest(questions),
        "model_files": model_digest(c.model),
        "reward_file": rundir.digest(reward_source(c.reward)),
    }


def load(c: Config, run: Run):
    """Engine, model and optimizer at the first step; graders, log and progress bar into `run`.

    The engine first: it takes its memory before training does.
    """
    device, first = run.device, distributed.rank() == 0
    if first:
        run.history = rundir.begin(run.dir, run.checkpoint, run.first_step, c.keep_checkpoints)
        if c.model == "miniature":
            arithmetic.load_or_write_base(Path("runs"), c.seed)
    run.history = distributed.broadcast(run.history)
    run.logger = Logger(c.logger, run.dir, asdict(c))

    path = c.model
    if c.model == "miniature":
        path = str(arithmetic.base_path(Path("runs"), c.seed))
    if device.type == "cpu":
        distributed.limit_threads(path)
    engine = make_engine(c.engine, path, device, run.longest, c.tensor_parallel_size, c.kv_cache_gb)
    torch.manual_seed(c.seed)  # after the engine, whose start reseeds; nothing below draws
    model = distributed.load_policy(path, device)
    run.weights = multiplied_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay
    )
    if run.checkpoint:
        checkpoint.load_checkpoint(run.checkpoint, model, optimizer)
    # Without a checkpoint too: weights that do not arrive as they are should stop the run here.
    engine.sync_weights(distributed.full_weights(model), version=run.first_step)
    check_numbers(engine, model, run.longest, device)
    run.verifier = make_verifier(c)
    run.bar = Progress(c, run.steps, run.first_step)
    run.grade = run.bar.counting(make_grader(run.verifier, run.tokenizer, run.markers))
    if first:  # Written last: its presence marks a started run.
        rundir.write_settings(run.dir, asdict(c))
    return engine, model, optimizer


def prepare_evaluation(a: Evaluation, c: Config) -> dict[str, Opened]:
    """Every model with its questions, checked before any weight is loaded."""
    if "miniature" in a.models:
        raise ValueError(
            "miniature is no model to evaluate but one that train.py makes: name its "
            "directory, runs/.../model"
        )
    check(c)
    distributed.check_machine()
    require_engine(c.engine)
    opened = {m: open_model(m, c, c.evaluation_budgets[-1], a.ask, train=False) for m in a.models}
    question = next(iter(opened[a.models[0]].sets.values()))[0]
    require_reward(c.reward, question.ground_truth, question.text)
    if distributed.rank() == 0 and not a.ask:
        print(*opened[a.models[0]].reports, sep="\n")
        try:
            a.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(
                f"--output-dir {a.output} cannot be written ({e.strerror}): choose another"
            ) from None
    return opened
