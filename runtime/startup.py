"""Is everything there? What a run checks, and then loads, before its first step.

`prepare` checks all that can be checked without weights, so that a mistake costs seconds; `load`
makes engine, model and optimizer at the step to start from.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from rollout import Protocol
from runtime import checkpoint, distributed, rundir
from runtime.config import Config, Evaluation, batch_arithmetic, check
from runtime.data import digest_of, load_questions, make_questions, set_names
from runtime.engines import make_engine, require_engine
from runtime.metrics import Logger, require_logger
from runtime.models import check_attention, model_digest, open_tokenizer
from tasks import arithmetic
from tasks.reward_function import require_reward, reward_source


@dataclass
class Run:
    """What `prepare` found out before any weight was loaded."""

    dir: Path
    lock: object  # the directory is this run's while this file is open
    device: torch.device
    tokenizer: object
    protocol: Protocol
    questions: list
    eval_sets: dict
    steps: int
    checkpoint: Path | None
    first_step: int
    trajectory: str  # digest of the identity and of all rollouts trained on so far
    identity: dict  # all that changes the numbers; checkpoints must agree
    evaluation: dict  # all that changes an evaluation; only like ones are compared
    history: list = field(default_factory=list)  # evaluations so far
    logger: Logger | None = None
    skipped: int = 0  # updates skipped in a row

    def close(self):
        """End the log, and let go of the directory: only the first process holds it."""
        self.logger.close()
        if self.lock:
            self.lock.close()


def prepare(c: Config) -> Run:
    """Check all that can be checked without weights.

    ValueError names the flag, file or row, and the fix.
    """
    world = distributed.world_size()
    check(c, world)
    distributed.check_machine(c.preset)
    require_engine(c.engine)
    require_reward(c.reward)
    require_logger(c.logger)
    device, directory = distributed.start(), Path(c.output_dir)
    lock = rundir.enter(directory, c.resume)

    # Not part of a run's identity: where it runs, how often it looks and saves, how far it goes.
    free = {
        "output_dir",
        "resume",
        "save_every",
        "keep_checkpoints",
        "steps",
        "epochs",
        "verifier_workers",
        "kv_cache_gb",
        "tensor_parallel_size",
        "max_tokens_per_row",
        "num_eval_budgets",
        "reward_timeout",
        "logger",
    }
    if c.lr_schedule == "linear":
        free -= {"steps", "epochs"}  # the rate of every step depends on how many there will be
    settings = json.loads(json.dumps(asdict(c)))
    identity = {k: v for k, v in settings.items() if k not in free and not k.startswith("eval_")}

    tokenizer, eos = open_tokenizer(c.model, c.longest_sequence)
    check_attention(c.model)
    protocol = Protocol.of(tokenizer, c.max_summary_tokens, eos, c.max_appended_tokens)
    how = (tokenizer, c.prompt_template, c.max_prompt_tokens, c.question_field, c.answer_field)
    questions, report = load_questions(c.train_data, *how, **c.question_options)
    reports, eval_sets = [report], {}
    for name in set_names(c.eval_data):
        eval_sets[name], report = load_questions(
            name, *how, "test", c.eval_questions, **c.question_options
        )
        reports.append(report)
    if len(questions) < c.questions_per_step:
        raise ValueError(
            f"{c.train_data} has {len(questions)} usable questions, fewer than "
            f"--questions-per-step {c.questions_per_step}: lower it"
        )
    identity |= {
        "data": digest_of(questions),
        "model_files": model_digest(c.model),
        "reward_file": rundir.digest(reward_source(c.reward)),
    }
    newest, first_step, trajectory = checkpoint.find(directory, c.resume, identity)
    evaluation = {
        "budgets": list(c.evaluation_budgets),
        "samples": c.eval_samples,
        "temperature": c.eval_temperature,
        "seed": c.seed,
        "data": {name: digest_of(questions) for name, questions in eval_sets.items()},
    }
    steps = c.steps or c.epochs * (len(questions) // c.questions_per_step)
    if steps < first_step:
        raise ValueError(f"{newest} is at step {first_step}, beyond --steps {steps}: raise it")
    if distributed.rank() == 0:
        print(batch_arithmetic(c, world), *(f"  {line}" for line in reports), sep="\n")
        print(f"  {steps} steps from {first_step}" + (f" (resuming {newest})" if newest else ""))
    return Run(
        directory,
        lock,
        device,
        tokenizer,
        protocol,
        questions,
        eval_sets,
        steps,
        newest,
        first_step,
        trajectory,
        identity,
        evaluation,
    )


def load(c: Config, run: Run):
    """Engine, model and optimizer at the first step. The engine first: it takes its memory before
    training does."""
    device = run.device
    if distributed.rank() == 0:
        run.history = rundir.begin(run.dir, run.checkpoint, run.first_step)
        rundir.drop_covered(run.dir, run.first_step, c.keep_checkpoints)  # a kill came before
        if c.model == "miniature":
            arithmetic.load_or_write_base(Path("runs"), c.seed)
    run.history = distributed.broadcast(run.history)
    run.logger = Logger(c.logger, run.dir, asdict(c))
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a log file is no place for bars

    path = str(arithmetic.base_path(Path("runs"), c.seed)) if c.model == "miniature" else c.model
    if device.type == "cpu":
        distributed.limit_threads(path)  # before the engine: once vLLM runs it does nothing
    engine = make_engine(
        c.engine, path, device, c.longest_sequence, c.tensor_parallel_size, c.kv_cache_gb
    )
    torch.manual_seed(c.seed)  # after the engine, whose start reseeds; nothing below draws
    model = distributed.load_policy(path, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay
    )
    if run.checkpoint:
        checkpoint.load_checkpoint(run.checkpoint, model, optimizer)
        engine.sync_weights(distributed.full_weights(model), version=run.first_step)
    if distributed.rank() == 0:  # last: with it the directory holds a run, which --resume wants
        rundir.write(run.dir / "config.json", json.dumps(asdict(c), indent=1))
    return engine, model, optimizer


def prepare_evaluation(a: Evaluation, c: Config) -> dict:
    """{model: (tokenizer, protocol, question sets)}, checked before any weight is loaded."""
    if not a.models:
        raise ValueError("no model: name one or more directories or hub names")
    if "miniature" in a.models:
        raise ValueError(
            "miniature is no model to evaluate but one that train.py makes: name its "
            "directory, runs/.../model"
        )
    check(c)
    require_engine(c.engine)
    require_reward(c.reward)
    opened = {}
    for model in a.models:
        tokenizer, eos = open_tokenizer(
            model, c.max_prompt_tokens + c.evaluation_budgets[-1] + c.summary_room
        )
        sets = {}
        for name in [] if a.ask else set_names(c.eval_data):
            sets[name], report = load_questions(
                name,
                tokenizer,
                c.prompt_template,
                c.max_prompt_tokens,
                c.question_field,
                c.answer_field,
                "test",
                c.eval_questions,
                **c.question_options,
            )
            if distributed.rank() == 0 and model == a.models[0]:
                print(report)
        if a.ask:
            sets, _ = make_questions(
                [(a.ask, "")],
                tokenizer,
                c.prompt_template,
                c.max_prompt_tokens,
                c.system_prompt,
                c.chat_template_args,
            )
        protocol = Protocol.of(tokenizer, c.max_summary_tokens, eos, c.max_appended_tokens)
        opened[model] = tokenizer, protocol, sets
    if distributed.rank() == 0 and not a.ask:
        try:
            a.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(
                f"--output-dir {a.output} cannot be written ({e.strerror}): choose another"
            ) from None
    return opened
