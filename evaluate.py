"""The anytime curve: accuracy as a function of the thinking budget.

    python evaluate.py runs/miniature-ar-uniform-seed0/model            any saved model
    python evaluate.py A B --budgets 8 16 32 48 --output-dir runs/both  several, with differences
    torchrun --nproc_per_node 8 evaluate.py MODEL --preset paper-8k     the paper's five sets
    python evaluate.py MODEL --ask "2 +3 *7 ?" --budgets 6 12 24        one question, as it thinks

anytime_accuracy is the mean of the curve over the given budgets (J under a uniform prior on them),
final_accuracy its last point. Leaves in the output directory: eval.json, table.md,
anytime_curve.png, and records/: the score of every summary, from which all of these are computed.
An evaluation that was interrupted goes on from its records.

The paper's variance figure is the "variance" block of

    evaluate.py MODEL --preset paper-8k --data paper/aime paper/amc --samples 32 --summaries 4 \\
        --budgets 2000 4000 6000 8000
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

import distributed
from config import FINAL_TABLES, PRESETS, Config, check, refuse_empty
from curves import (
    digest,
    fingerprint,
    paired_differences,
    per_question,
    read_records,
    record,
    summarise,
    variance_figure,
    write_records,
)
from data import Question, load_questions, make_questions, set_names
from engines import make_engine, require_engine
from models import open_tokenizer
from plots import draw_curves, labels_of, table
from reward_function import make_verifier, require_reward
from rollout import Protocol, make_grader, sample_rollouts
from verifier import Verifier
from watch import ask

EVALUATION = 2**31      # where a random key has the training step, so that evaluations draw alike
TRACES_PER_CHUNK = 2048     # per process, between two writes of the records


def anytime_curve(engine, sets: dict[str, list[Question]], budgets: tuple[int, ...], samples: int,
                  protocol: Protocol, tokenizer, verifier: Verifier, temperature: float = 0.6,
                  seed: int = 0, tensor_parallel_size: int = 1) -> dict:
    """Accuracy at every budget, on every set; the same dict on all processes, which share the work.

        accuracy_j = mean over questions and samples of r(x, y_j), one summary per cut

    Over several sets, the mean of their means (the paper's average).
    """
    records = sample_records(engine, sets, budgets, samples, protocol, tokenizer, verifier,
                             temperature, seed, tensor_parallel_size)
    return curve_of(records, budgets, samples, temperature, seed)


def curve_of(records: dict[str, list[dict]], budgets: tuple[int, ...], samples: int,
             temperature: float, seed: int) -> dict:
    """Everything the records {set: [record]} say, as it stands in eval.json."""
    columns = {name: per_question(of) for name, of in records.items()}
    return {"budgets": list(budgets), **summarise(columns, budgets, seed),
            "samples": samples, "temperature": temperature, "seed": seed,
            "variance": variance_figure(records, budgets, temperature),
            "example": next(iter(records.values()))[0]["example"]}


def sample_records(engine, sets: dict[str, list[Question]], budgets: tuple[int, ...], samples: int,
                   protocol: Protocol, tokenizer, verifier: Verifier, temperature: float,
                   seed: int, tensor_parallel_size: int = 1, summaries: int = 1,
                   folder: Path | None = None, chunk: int = 0, label: str = "") -> dict:
    """{set: records (curves.py), ordered by question and sample}, the same on all processes.

    With a `folder`, questions recorded there are not sampled again, and new ones are recorded there
    after every `chunk` of questions (0: about TRACES_PER_CHUNK traces a process). With a `label`, a
    progress bar, unless stderr is no terminal.
    """
    grade = make_grader(verifier, tokenizer, protocol)
    samplers = distributed.world_size() // tensor_parallel_size
    chunk = chunk or max(1, TRACES_PER_CHUNK * samplers // samples)
    # tqdm's None: no bar where stderr is no terminal
    bar = tqdm(total=sum(map(len, sets.values())) * samples * len(budgets) * summaries, desc=label,
               unit=" summaries", disable=None if label and distributed.rank() == 0 else True)

    def grade_and_count(rollout, summary):
        bar.update(samplers)        # the others are about as far
        return grade(rollout, summary)

    out = {}
    for number, (name, questions) in enumerate(sets.items()):
        place = folder / f"{number}-{digest(questions)}" if folder else None
        records = read_records(place) if place else []
        known = {r["question"] for r in records}
        bar.update(len(records) * len(budgets) * summaries)
        left = [q for q in questions if q.index not in known]
        for start in range(0, len(left), chunk):
            mine = distributed.share(left[start:start + chunk], tensor_parallel_size)
            rollouts = sample_rollouts(engine, mine, budgets, samples, summaries, protocol,
                                       temperature, (seed, EVALUATION, number), grade_and_count)
            new = distributed.gather([record(r, budgets, tokenizer) for r in rollouts],
                                     tensor_parallel_size)
            if place and distributed.rank() == 0:
                write_records(place, new)
            records += new
        out[name] = sorted(records, key=lambda r: (r["question"], r["sample"]))
    bar.update(bar.total - bar.n)       # where a text was over, no summary was graded
    bar.close()
    return out


@dataclass(frozen=True)
class Arguments:
    """Measure the anytime curve of saved models."""

    models: Annotated[tuple[str, ...], "positional"]    # Model directories or hub names.
    # Where the fields left out below come from: sets, budgets, samples, prompt, engine.
    preset: Literal["miniature", "paper-8k", "paper-16k"] = "miniature"
    ask: str = ""                       # Answer this one question, as the model thinks about it.
    budgets: tuple[int, ...] = ()       # Thinking budgets, increasing.
    data: tuple[str, ...] = ()          # Files, named sets, or "paper" for the authors' five files.
    samples: int = 0                    # Thinking traces per question.
    summaries: int = 1                  # A, per budget; more of them only sharpen the estimate.
    questions: int = -1                 # At most so many per set; 0: all.
    temperature: float = -1.0           # Sampling temperature.
    seed: int = 0                       # Decides every sampled token, and the bootstrap.
    engine: Literal["", "plain", "vllm"] = ""   # Sampling by transformers or by vLLM.
    prompt_template: str = ""           # The user message, with {question}.
    system_prompt: str = ""             # The system message.
    chat_template_args: tuple[str, ...] = ()    # Of the chat template, as name=value.
    max_prompt_tokens: int = 0          # Longer prompts are dropped, with a count.
    question_field: str = "problem"     # Column of the question in files.
    answer_field: str = "answer"        # Column of the ground truth in files.
    reward: str = ""                    # "math", or module:function, as in training.
    chunk: int = 0                      # Questions between two writes of the records; 0: automatic.
    # Where the results go; default: evaluation/ beside the first model.
    output_dir: str = ""


def settings(a: Arguments) -> Config:
    """The preset with what the arguments override; ValueError names a bad one."""
    if a.summaries < 1:
        raise ValueError(f"--summaries {a.summaries}: must be at least 1")
    if a.samples < 0 or a.chunk < 0:
        raise ValueError(f"--samples {a.samples}, --chunk {a.chunk}: cannot be negative")
    given = {"eval_budgets": a.budgets, "eval_data": a.data, "eval_samples": a.samples,
             "engine": a.engine, "prompt_template": a.prompt_template,
             "system_prompt": a.system_prompt, "chat_template_args": a.chat_template_args,
             "reward": a.reward, "max_prompt_tokens": a.max_prompt_tokens}
    given = {name: value for name, value in given.items() if value}
    if a.questions != Arguments.questions:
        given["eval_questions"] = a.questions
    if a.temperature != Arguments.temperature:
        given["eval_temperature"] = a.temperature
    return replace(Config(**{**PRESETS[a.preset], **FINAL_TABLES[a.preset], **given}), seed=a.seed,
                   question_field=a.question_field, answer_field=a.answer_field)


def output_directory(a: Arguments) -> Path:
    return Path(a.output_dir or Path(a.models[0]).parent / "evaluation")


def prepare(a: Arguments, c: Config) -> dict:
    """{model: (tokenizer, protocol, question sets)}, checked before any weight is loaded."""
    if not a.models:
        raise ValueError("no model: name one or more directories or hub names")
    if "miniature" in a.models:
        raise ValueError("miniature is no model to evaluate but one that train.py makes: name its "
                         "directory, runs/.../model")
    for name in ("samples", "summaries", "questions", "temperature", "seed", "chunk"):
        if getattr(a, name) < 0 and getattr(a, name) != getattr(Arguments, name):
            raise ValueError(f"--{name} {getattr(a, name)}: cannot be negative")
    check(c)
    require_engine(c.engine)
    require_reward(c.reward)
    opened = {}
    for model in a.models:
        tokenizer, eos = open_tokenizer(model, c.max_prompt_tokens + c.evaluation_budgets[-1]
                                        + c.summary_room)
        sets = {}
        for name in [] if a.ask else set_names(c.eval_data):
            sets[name], report = load_questions(
                name, tokenizer, c.prompt_template, c.max_prompt_tokens, c.question_field,
                c.answer_field, "test", c.eval_questions, **c.question_options)
            if distributed.rank() == 0 and model == a.models[0]:
                print(report)
        if a.ask:
            sets, _ = make_questions([(a.ask, "")], tokenizer, c.prompt_template,
                                     c.max_prompt_tokens, c.system_prompt, c.chat_template_args)
        protocol = Protocol.of(tokenizer, c.max_summary_tokens, eos, c.max_appended_tokens)
        opened[model] = tokenizer, protocol, sets
    if distributed.rank() == 0 and not a.ask:
        try:
            output_directory(a).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--output-dir {output_directory(a)} cannot be written "
                             f"({e.strerror}): choose another") from None
    return opened


def main(args: list[str] | None = None):
    import tyro

    refuse_empty(args)
    a = tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments), args=args,
                 console_outputs=distributed.rank() == 0)
    with distributed.exit_on_bad_input():
        c = settings(a)
        opened = prepare(a, c)
    output = output_directory(a)
    labels, curves, records = labels_of(a.models), {}, {}
    with make_verifier(c) as verifier:
        for model, (tokenizer, protocol, sets) in opened.items():
            # For each model: a vLLM engine ends the group of processes when it closes.
            device = distributed.start()
            engine = make_engine(c.engine, model, device, c.longest_sequence,
                                 kv_cache_gb=c.kv_cache_gb)
            if a.ask:
                if distributed.rank() == 0:
                    ask(engine, sets[0], c.evaluation_budgets, protocol, tokenizer,
                        c.eval_temperature, (c.seed, EVALUATION, 0), labels[model])
                engine.close()
                continue
            place = fingerprint(model, c.reward, device.type, c.engine, c.evaluation_budgets,
                                c.eval_samples, a.summaries, c.eval_temperature, c.seed,
                                asdict(protocol))
            folder = output / "records" / f"{labels[model].replace('/', '-')}-{place}"
            records[model] = sample_records(
                engine, sets, c.evaluation_budgets, c.eval_samples, protocol, tokenizer, verifier,
                c.eval_temperature, c.seed, summaries=a.summaries, folder=folder, chunk=a.chunk,
                label=labels[model])
            engine.close()
            curves[model] = curve_of(records[model], c.evaluation_budgets, c.eval_samples,
                                     c.eval_temperature, c.seed)
    if distributed.rank() == 0 and not a.ask:
        write_results(a, c, output, labels, curves, records, opened)
    distributed.stop()


def write_results(a: Arguments, c: Config, output: Path, labels: dict[str, str],
                  curves: dict[str, dict], records: dict[str, dict], opened: dict):
    """eval.json, table.md, anytime_curve.png; and the table on the terminal."""
    first, *others = a.models
    texts = {m: {name: [(q.index, q.text) for q in of] for name, of in opened[m][2].items()}
             for m in a.models}
    columns = {m: {name: per_question(of) for name, of in records[m].items()} for m in a.models}
    # Only where both were asked the same: a tokenizer may have dropped other prompts as overlong.
    differences = {m: paired_differences(columns[first], columns[m], c.evaluation_budgets, c.seed)
                   for m in others if texts[m] == texts[first]}
    # One model: its curve is the file's content; several: one entry each.
    content = curves[first] if not others else {
        "models": curves, "paired_differences": {"from": first, "to": differences}}
    output.mkdir(parents=True, exist_ok=True)
    (output / "eval.json").write_text(json.dumps(content, indent=1))
    text = table({labels[m]: curve for m, curve in curves.items()},
                 {f"{labels[m]} - {labels[first]}": of for m, of in differences.items()})
    (output / "table.md").write_text(text)
    draw_curves({labels[m]: curve for m, curve in curves.items()}, output / "anytime_curve.png")
    for m, curve in curves.items():
        print(f"{labels[m]}\n  accuracy " + "  ".join(
            f"@{b} {x:.3f}" for b, x in zip(curve["budgets"], curve["accuracy"])))
    print(f"\n{text}\nwrote {output}/: eval.json, table.md, anytime_curve.png")


if __name__ == "__main__":
    distributed.main(main)
