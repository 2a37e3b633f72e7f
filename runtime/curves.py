"""Statistics of an evaluation's scores, with standard errors.

A record is one evaluated trace, as plain JSON:

    {"question": 0..B-1, "sample": 0..S-1, "thinking_tokens": |z|, "finish": "closed",
     "cuts": [M of them], and for each budget and draw, [[A of them] for each of M budgets],
     "scores", "answers": what was boxed or null, "summary_tokens": tokens of each}

Statistics are computed from means over questions, and their standard errors by the bootstrap over
questions (samples of one question are not independent), seeded with the evaluation's seed.
"""

import json
import warnings
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

import brpo
from rewards import cumulative_returns, mean_rewards
from rollout import Rollout, Sampling
from runtime import rundir
from runtime.models import model_digest
from runtime.stopping import rules, stopped
from runtime.watch import graded_text, readable
from tasks.reward_function import reward_source
from tasks.verifier import extract_answer

# After the M accuracies: what else is averaged over the traces of a question.
COLUMNS = ("thinking_tokens", "closed", "overthinking", "summary_tokens")
# And of each of R stopping rules (stopping.py), in this order.
STOPPED = ("stopped_accuracy", "stopped_thinking_tokens", "stopped_all_tokens")
Sets = dict[str, np.ndarray]  # {set: [B, M + 4 + 3R]}, see per_question
RESAMPLES = 1000
FORMAT = 2  # of records and of the sampler behind them: those of another one are not read


def record(r: Rollout, budgets: tuple[int, ...], tokenizer) -> dict:
    """What is kept of a trace; of the very first one, its text too."""
    draws = len(r.summaries) // len(budgets)

    def by_budget(values: list) -> list[list]:
        return [values[i : i + draws] for i in range(0, len(values), draws)]

    texts = [graded_text(s, tokenizer) for s in r.summaries]
    kept = {
        "question": r.question.index,
        "sample": r.sample,
        "finish": r.finish,
        "thinking_tokens": len(r.thinking),
        "cuts": [s.cut for s in r.summaries[::draws]],
        "summary_tokens": by_budget([len(s.tokens) for s in r.summaries]),
        # Whole numbers read and store better; a reward function may score between 0 and 1.
        "scores": by_budget([s.score if s.score % 1 else int(s.score) for s in r.summaries]),
        "answers": by_budget([extract_answer(text) or None for text in texts]),
    }
    if r.question.index == r.sample == 0:
        kept["example"] = readable(r, budgets, tokenizer)
    return kept


def fingerprint(model: str, reward: str, *settings) -> str:
    """A hash of all that records depend on besides their questions."""
    parts = (FORMAT, model_digest(model) or model, reward_source(reward), settings)
    return rundir.digest(*parts)[:16]


def read_records(folder: Path) -> list[dict]:
    return [r for path in sorted(folder.glob("*.json")) for r in json.loads(path.read_text())]


def write_records(folder: Path, records: list[dict]):
    """One complete file or none: a kill in between leaves a .tmp that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    first = min(r["question"] for r in records)
    rundir.write(folder / f"from-question-{first:06d}.json", json.dumps(records))


def curve_of(records: dict[str, list[dict]], sampling: Sampling) -> dict:
    """Everything the records {set: [record]} say, as it stands in eval.json."""
    columns = {name: per_question(of_set) for name, of_set in records.items()}
    patience, agree = zip(*rules(sampling.num_summaries))
    return {
        "budgets": list(sampling.budgets),
        **summarise(columns, sampling.budgets, sampling.seed[0]),
        "stopping": {"patience": patience, "agree": agree},
        "samples": sampling.num_rollouts,
        "temperature": sampling.temperature,
        "seed": sampling.seed[0],
        "variance": variance_figure(records, sampling.budgets, sampling.temperature),
        "example": next(iter(records.values()))[0]["example"],
    }


def by_question(records: list[dict]) -> list[list[dict]]:
    """The records of each question, both ordered by their number."""
    ordered = sorted(records, key=lambda r: (r["question"], r["sample"]))
    return [list(samples) for _, samples in groupby(ordered, key=lambda r: r["question"])]


def per_question(records: list[dict]) -> np.ndarray:
    """Means over the samples of each question: accuracy at M budgets, COLUMNS, and STOPPED at each
    of R rules. [B, M + 4 + 3R].

    overthinking = share of traces with max_k r_k > r_M        right earlier, wrong at the end
    """

    def columns(r: dict) -> list[float]:
        rewards = [sum(scores) / len(scores) for scores in r["scores"]]
        overthinking = max(rewards) > rewards[-1]
        closed = r["finish"] == "closed"
        stops = np.transpose([stopped(r, *rule) for rule in rules(len(r["scores"][0]))]).ravel()
        summary = np.mean(r["summary_tokens"])
        return [*rewards, r["thinking_tokens"], closed, overthinking, summary, *stops]

    return np.array([np.mean([columns(r) for r in q], axis=0) for q in by_question(records)])


def statistics_of(means: np.ndarray, budgets: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The curve and its summary numbers, from means over questions. [..., K] -> {name: [...]}.

    anytime_accuracy = (1/M) Σ_j accuracy_j        final_accuracy = accuracy_M
    anytime_index = Σ_j (Q*_j + Q*_{j+1})/2 · (b_{j+1} - b_j) / ((b_M - b_1) Q_max)
        Q*_j = max_{i≤j} accuracy_i       arXiv 2601.11038 leaves Q_max open: 1 here, and the
                                          largest Q* in anytime_index_relative
    stopped_difference = stopped_accuracy - that of thinking to the end, rule by rule
    """
    accuracy = means[..., : len(budgets)]
    best = np.maximum.accumulate(accuracy, -1)  # Q*
    stops = dict(zip(STOPPED, np.split(means[..., len(budgets) + len(COLUMNS) :], 3, -1)))
    with np.errstate(invalid="ignore"):  # nan for a single budget, or without a right answer
        area = ((best[..., 1:] + best[..., :-1]) / 2 * np.diff(budgets)).sum(-1)
        index = area / np.float64(budgets[-1] - budgets[0])
        relative = index / best[..., -1]
    return {
        "accuracy": accuracy,
        "anytime_accuracy": accuracy.mean(-1),
        "anytime_index": index,
        "anytime_index_relative": relative,
        "final_accuracy": accuracy[..., -1],
        "tokens_to_90": tokens_to_90(accuracy, budgets),
        **{name: means[..., len(budgets) + i] for i, name in enumerate(COLUMNS)},
        **stops,
        "stopped_difference": stops[STOPPED[0]] - stops[STOPPED[0]][..., :1],
    }


def tokens_to_90(accuracy: np.ndarray, budgets: tuple[int, ...]) -> np.ndarray:
    """The least budget that reaches nine tenths of the final accuracy, in tokens.

        min{ b : accuracy(b) ≥ 0.9 · accuracy_M }

    The curve between two budgets is a straight line; below the first there is none, so b_1 stands
    for anything up to it. nan where the final accuracy is 0. [..., M] -> [...].
    """
    b = np.array(budgets, dtype=float)
    target = 0.9 * accuracy[..., -1:]
    j = (accuracy >= target).argmax(-1)[..., None]  # the first budget that does
    before = np.maximum(j - 1, 0)
    high, low = (np.take_along_axis(accuracy, i, -1) for i in (j, before))
    rise = np.where(high > low, high - low, 1.0)  # 0 only at j = 0
    tokens = b[before] + (b[j] - b[before]) * ((target - low) / rise)
    return np.where(target > 0, tokens, np.nan)[..., 0]


def sufficient_budgets(columns: np.ndarray, budgets: tuple[int, ...]) -> list[int | None]:
    """Of each question, the smallest budget from which on most of its summaries are right.

        min{ b_j : accuracy_k > 1/2 for all k ≥ j }        None where the last budget is too small

    [B, K] -> B budgets.
    """
    right = columns[:, : len(budgets)] > 0.5
    steady = np.logical_and.accumulate(right[:, ::-1], axis=1)[:, ::-1]  # right from here on
    first = [row.argmax() if row.any() else None for row in steady]
    return [None if j is None else budgets[j] for j in first]


def resample(columns: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Means over all questions, then over questions drawn anew. [B, K] -> [1 + RESAMPLES, K].

    The draw depends on (seed, number of the set, B) alone: two models on the same questions are
    resampled alike, which pairs their differences.
    """
    rng, n = np.random.default_rng([seed, number]), len(columns)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n @ columns
    return np.concatenate([columns.mean(0)[None], drawn])


def resampled_statistics(sets: Sets, budgets: tuple[int, ...], seed: int) -> dict[str, dict]:
    """{"mean" or a set: statistics_of its resampled means, each [1 + RESAMPLES, ...]}.

    Over several sets: the mean of their means (the paper's average), resampled set by set.
    """
    rows = {name: resample(x, seed, number) for number, (name, x) in enumerate(sets.items())}
    rows = {"mean": np.mean(list(rows.values()), axis=0), **rows}
    return {name: statistics_of(means, budgets) for name, means in rows.items()}


def summarise(sets: Sets, budgets: tuple[int, ...], seed: int) -> dict:
    """Statistics with standard errors, of every set and of the mean over sets."""
    out = {}
    for name, statistics in resampled_statistics(sets, budgets, seed).items():
        values = {k: x[0].tolist() for k, x in statistics.items()}
        errors = {k: _spread(x[1:]).tolist() for k, x in statistics.items()}
        out[name] = {**values, "stderr": errors.pop("accuracy"), "errors": errors}
    for name, columns in sets.items():
        out[name]["questions"] = len(columns)
        out[name]["sufficient_budgets"] = sufficient_budgets(columns, budgets)
    return rundir.without_nan({**out.pop("mean"), "sets": out})


def paired_differences(first: Sets, second: Sets, budgets: tuple[int, ...], seed: int) -> dict:
    """second - first on the same questions, with paired bootstrap standard errors.

    {"mean" or a set: {statistic: {"difference": x, "stderr": s}}}
    """
    a, b = (resampled_statistics(sets, budgets, seed) for sets in (first, second))
    out = {name: {} for name in a}
    for name, statistics in a.items():
        for k, x in statistics.items():
            d = b[name][k] - x
            out[name][k] = {"difference": d[0].tolist(), "stderr": _spread(d[1:]).tolist()}
    return rundir.without_nan(out)


def _spread(drawn: np.ndarray) -> np.ndarray:
    """Standard deviation over the resamples where the statistic exists (nan without any)."""
    with warnings.catch_warnings(action="ignore"):  # numpy's about columns of nan alone
        return np.nanstd(drawn, axis=0)


def variance_figure(sets: dict, budgets: tuple, temperature: float, group: int = 8) -> dict | None:
    """The paper's variance figure, on evaluation data: Var[R-V]/Var[R] and Corr[V, R] per segment.

    As in the authors' code: a uniform prior over 4 even budgets, whatever training's prior is; the
    samples of a question in groups of G = `group` (one smaller group if there are fewer); over
    rollouts with tokens in the segment; set by set, then the mean over sets. `paper` says what the
    paper's figure shows if it is the same quantity: T = 0.6, G = 8, A = 4, b_M = 8000. None where
    the 4 budgets are not among those evaluated. sets {name: records}.
    """
    quarters = [budgets[-1] * j // 4 for j in (1, 2, 3, 4)]
    if any(b not in budgets for b in quarters) or budgets[-1] % 4:
        return None
    probs, out = (0.25,) * 4, {}
    for name, records in sets.items():
        questions = by_question(records)
        g = min(group, len(questions[0]))
        groups = [q[i : i + g] for q in questions for i in range(0, len(q) // g * g, g)]
        lengths, scores = (
            torch.tensor([[r[key] for r in rollouts] for rollouts in groups], dtype=torch.float64)
            for key in ("thinking_tokens", "scores")
        )
        scores = scores[:, :, [budgets.index(b) for b in quarters]]  # [B·S/G, G, 4, A]
        rewards = mean_rewards(scores)
        prior = (rewards, cumulative_returns(rewards, probs), quarters, probs)
        out[name] = brpo.variance_diagnostics(*prior, thinking_lengths=lengths)
    A, keys = scores.shape[-1], out[name]
    same = (temperature, g, A, budgets[-1]) == (0.6, 8, 4, 8000)
    figure = {
        "budgets": quarters,
        "temperature": temperature,
        "G": g,
        "A": A,
        "paper": "last segment: brpo 0.33-0.45, group 0.61-0.82" if same else None,
        **{k: torch.stack([o[k] for o in out.values()]).nanmean(0).tolist() for k in keys},
        "sets": {n: {k: v.tolist() for k, v in o.items()} for n, o in out.items()},
    }
    return rundir.without_nan(figure)
