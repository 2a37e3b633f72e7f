"""The anytime curve: accuracy as a function of the thinking budget.

    python evaluate.py runs/miniature-ar-uniform-seed0/model            any saved model
    python evaluate.py A B --budgets 8 16 32 48 --output-dir runs/both  several, with differences
    torchrun --nproc_per_node 8 evaluate.py MODEL --preset paper-8k     the paper's five sets
    python evaluate.py MODEL --ask "2 +3 *7 ?" --budgets 6 12 24        one question, as it thinks

anytime_accuracy is the mean of the curve over the given budgets (J under a uniform prior on them),
final_accuracy its last point. Leaves in the output directory: eval.json, table.md,
anytime_curve.png, and records/: the score of every summary, from which all of these are computed.
An evaluation that was interrupted goes on from its records.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from rollout import Protocol, make_grader, sample_rollouts
from runtime import distributed
from runtime.config import Evaluation, evaluation_config, refuse_empty
from runtime.curves import curve_of, fingerprint, read_records, record, write_records
from runtime.data import Question
from runtime.engines import make_engine
from runtime.plots import labels_of, write_results
from runtime.rundir import digest
from runtime.startup import prepare_evaluation
from runtime.watch import ask
from tasks.reward_function import make_verifier
from tasks.verifier import Verifier

EVALUATION = 2**31  # where a random key has the training step, so that evaluations draw alike
TRACES_PER_CHUNK = 2048  # per process, between two writes of the records


def anytime_curve(
    engine,
    sets: dict[str, list[Question]],
    budgets: tuple[int, ...],
    samples: int,
    protocol: Protocol,
    tokenizer,
    verifier: Verifier,
    temperature: float = 0.6,
    seed: int = 0,
    tensor_parallel_size: int = 1,
) -> dict:
    """Accuracy at every budget, on every set; the same dict on all processes, which share the work.

        accuracy_j = mean over questions and samples of r(x, y_j), one summary per cut

    Over several sets, the mean of their means (the paper's average).
    """
    records = sample_records(
        engine,
        sets,
        budgets,
        samples,
        protocol,
        tokenizer,
        verifier,
        temperature,
        seed,
        tensor_parallel_size,
    )
    return curve_of(records, budgets, samples, temperature, seed)


def sample_records(
    engine,
    sets: dict[str, list[Question]],
    budgets: tuple[int, ...],
    samples: int,
    protocol: Protocol,
    tokenizer,
    verifier: Verifier,
    temperature: float,
    seed: int,
    tensor_parallel_size: int = 1,
    summaries: int = 1,
    folder: Path | None = None,
    chunk: int = 0,
    label: str = "",
) -> dict:
    """{set: records (curves.py), ordered by question and sample}, the same on all processes.

    With a `folder`, questions recorded there are not sampled again, and new ones are recorded there
    after every `chunk` of questions (0: about TRACES_PER_CHUNK traces a process). With a `label`, a
    progress bar, unless stderr is no terminal.
    """
    grade = make_grader(verifier, tokenizer, protocol)
    samplers = distributed.world_size() // tensor_parallel_size
    chunk = chunk or max(1, TRACES_PER_CHUNK * samplers // samples)
    # tqdm's None: no bar where stderr is no terminal
    bar = tqdm(
        total=sum(map(len, sets.values())) * samples * len(budgets) * summaries,
        desc=label,
        unit=" summaries",
        disable=None if label and distributed.rank() == 0 else True,
    )

    def grade_and_count(rollout, summary):
        bar.update(samplers)  # the others are about as far
        return grade(rollout, summary)

    out = {}
    for number, (name, questions) in enumerate(sets.items()):
        place = folder / f"{number}-{digest(questions)[:16]}" if folder else None
        records = read_records(place) if place else []
        known = {r["question"] for r in records}
        bar.update(len(records) * len(budgets) * summaries)
        left = [q for q in questions if q.index not in known]
        for start in range(0, len(left), chunk):
            mine = distributed.share(left[start : start + chunk], tensor_parallel_size)
            rollouts = sample_rollouts(
                engine,
                mine,
                budgets,
                samples,
                summaries,
                protocol,
                temperature,
                (seed, EVALUATION, number),
                grade_and_count,
            )
            new = distributed.gather(
                [record(r, budgets, tokenizer) for r in rollouts], tensor_parallel_size
            )
            if place and distributed.rank() == 0:
                write_records(place, new)
            records += new
        out[name] = sorted(records, key=lambda r: (r["question"], r["sample"]))
    bar.update(bar.total - bar.n)  # where a text was over, no summary was graded
    bar.close()
    return out


def main(args: list[str] | None = None):
    import tyro

    refuse_empty(args)
    a = tyro.cli(
        tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Evaluation),
        args=args,
        console_outputs=distributed.rank() == 0,
    )
    with distributed.exit_on_bad_input():
        c = evaluation_config(a)
        opened = prepare_evaluation(a, c)
    labels, curves, records = labels_of(a.models), {}, {}
    with make_verifier(c) as verifier:
        for model, (tokenizer, protocol, sets) in opened.items():
            # For each model: a vLLM engine ends the group of processes when it closes.
            device = distributed.start()
            engine = make_engine(
                c.engine, model, device, c.longest_sequence, kv_cache_gb=c.kv_cache_gb
            )
            if a.ask:
                if distributed.rank() == 0:
                    ask(
                        engine,
                        sets[0],
                        c.evaluation_budgets,
                        protocol,
                        tokenizer,
                        c.eval_temperature,
                        (c.seed, EVALUATION, 0),
                        labels[model],
                    )
                engine.close()
                continue
            place = fingerprint(
                model,
                c.reward,
                device.type,
                c.engine,
                c.evaluation_budgets,
                c.eval_samples,
                a.summaries,
                c.eval_temperature,
                c.seed,
                asdict(protocol),
            )
            folder = a.output / "records" / f"{labels[model].replace('/', '-')}-{place}"
            records[model] = sample_records(
                engine,
                sets,
                c.evaluation_budgets,
                c.eval_samples,
                protocol,
                tokenizer,
                verifier,
                c.eval_temperature,
                c.seed,
                summaries=a.summaries,
                folder=folder,
                chunk=a.chunk,
                label=labels[model],
            )
            engine.close()
            curves[model] = curve_of(
                records[model], c.evaluation_budgets, c.eval_samples, c.eval_temperature, c.seed
            )
    if distributed.rank() == 0 and not a.ask:
        write_results(a, c, labels, curves, records, opened)
    distributed.stop()


if __name__ == "__main__":
    distributed.main(main)
