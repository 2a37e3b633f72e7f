"""The anytime curve: accuracy as a function of the thinking budget.

    python evaluate.py runs/miniature-ar-uniform-seed0/model            any saved model
    python evaluate.py A B --budgets 8 16 32 48 --output-dir runs/both  several, with differences
    torchrun --nproc_per_node 8 evaluate.py MODEL --preset paper-8k     the paper's five sets
    python evaluate.py MODEL --ask "2 +3 *7 ?" --patience 2             one question, as it thinks

anytime_accuracy is the mean of the curve over the given budgets (J under a uniform prior on them),
final_accuracy its last point. Leaves in the output directory: eval.json, table.md,
anytime_curve.png, and records/: score and answer of each summary, from which all of these are
computed. An evaluation that was interrupted goes on from its records.
"""

from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from rollout import Sampling, make_grader, sample_rollouts
from runtime import distributed
from runtime.config import Config, parse_evaluation
from runtime.curves import curve_of, fingerprint, read_records, record, write_records
from runtime.engines import make_engine
from runtime.models import check_numbers
from runtime.plots import labels_of, write_results
from runtime.rundir import digest
from runtime.startup import Opened, make_verifier, prepare_evaluation
from runtime.watch import ask

EVALUATION = 2**31  # where a random key has the training step, so that evaluations draw alike
TRACES_PER_CHUNK = 2048  # per process, between two writes of the records


def evaluation_sampling(c: Config, num_summaries: int = 1) -> Sampling:
    """What an evaluation draws: S samples a question instead of G rollouts, A = 1 by default."""
    return Sampling(
        c.evaluation_budgets,
        c.eval_samples,
        num_summaries,
        c.eval_temperature,
        (c.seed, EVALUATION),
    )


def anytime_curve(
    engine, sets: dict[str, list], sampling: Sampling, opened: Opened, group_size: int = 1
) -> dict:
    """Accuracy at every budget, on every set; the same dict on all processes, which share the work.

        accuracy_j = mean over questions and samples of r(x, y_j), one summary per cut

    Over several sets, the mean of their means (the paper's average). `group_size`: processes that
    share one engine.
    """
    return curve_of(sample_records(engine, sets, sampling, opened, group_size), sampling)


def sample_records(
    engine,
    sets: dict[str, list],
    sampling: Sampling,
    opened: Opened,
    group_size: int = 1,
    folder: Path | None = None,
    label: str = "",
) -> dict[str, list[dict]]:
    """{set: records (curves.py), ordered by question and sample}, the same on all processes.

    With a `folder`, questions recorded there are not sampled again; new ones are recorded after
    about TRACES_PER_CHUNK traces a process. With a `label`: a progress bar where a terminal is.
    """
    samplers = distributed.world_size() // group_size
    chunk = max(1, TRACES_PER_CHUNK * samplers // sampling.num_rollouts)
    summaries = sampling.num_rollouts * len(sampling.budgets) * sampling.num_summaries
    bar = tqdm(
        total=sum(map(len, sets.values())) * summaries,
        desc=label,
        unit=" summaries",
        disable=None if label and distributed.rank() == 0 else True,  # None: where no terminal is
    )

    def grade_and_count(rollout, summary):
        bar.update(samplers)  # assume the other processes progress at the same rate
        return opened.grade(rollout, summary)

    out = {}
    for number, (name, questions) in enumerate(sets.items()):
        drawn = replace(sampling, seed=(*sampling.seed, number))
        place = folder / f"{number}-{digest(questions)[:16]}" if folder else None
        records = read_records(place) if place else []
        known = {r["question"] for r in records}
        bar.update(len(known) * summaries)
        missing = [q for q in questions if q.index not in known]
        for start in range(0, len(missing), chunk):
            distributed.expect_progress()
            share = distributed.share(missing[start : start + chunk], group_size)
            rollouts = sample_rollouts(engine, share, drawn, opened.markers, grade_and_count)
            new = [record(r, sampling.budgets, opened.tokenizer) for r in rollouts]
            new = distributed.gather(new, group_size)
            if place and distributed.rank() == 0:
                write_records(place, new)
            records += new
        out[name] = sorted(records, key=lambda r: (r["question"], r["sample"]))
    bar.update(bar.total - bar.n)  # where a text was over, no summary was graded
    bar.close()
    return out


def main(args: list[str] | None = None):
    with distributed.exit_on_bad_input():
        a, c = parse_evaluation(args)
        opened = prepare_evaluation(a, c)
    labels, curves, records = labels_of(a.models), {}, {}
    sampling = evaluation_sampling(c, a.summaries)
    with make_verifier(c) as verifier:
        for model, o in opened.items():
            # For each model anew: a vLLM engine ends the group of processes when it closes.
            device = distributed.start()
            with distributed.exit_on_bad_input():  # damaged weights are found only now
                engine = make_engine(c.engine, model, device, o.longest, kv_cache_gb=c.kv_cache_gb)
                check_numbers(engine, None, o.longest, device)
            o.grade = make_grader(verifier, o.tokenizer, o.markers)
            if a.ask:
                if distributed.rank() == 0:
                    drawn = replace(sampling, num_rollouts=1, seed=(*sampling.seed, 0))
                    (question,) = o.sets["ask"]
                    ask(engine, question, drawn, o, labels[model], a.patience)
            else:
                settings = (device.type, c.engine, asdict(sampling), asdict(o.markers))
                name = fingerprint(model, c.reward, *settings)
                folder = a.output / "records" / f"{labels[model].replace('/', '-')}-{name}"
                records[model] = sample_records(
                    engine, o.sets, sampling, o, 1, folder, labels[model]
                )
                curves[model] = curve_of(records[model], sampling)
            engine.close()
    if distributed.rank() == 0 and not a.ask:
        write_results(a, c, labels, curves, records, opened)
    distributed.stop()


if __name__ == "__main__":
    distributed.main(main)
