"""What do the scores of an evaluation say, and how surely?

A record is one evaluated trace, as plain JSON:

    {"question": 0..B-1, "sample": 0..S-1, "thinking_tokens": |z|, "finish": "closed",
     "summary_tokens": tokens of its summaries, mean, "scores": [[A of them] for each of M budgets]}

Everything here is a function of records. A statistic is computed from means over questions, and its
standard error by the bootstrap over questions: samples of one question are not independent.
Randomness: numpy, from the seed alone.
"""

import json
from pathlib import Path

import numpy as np
import torch

import brpo
from budgets import prior_probs
from rewards import cumulative_returns, mean_rewards
from rollout import Rollout, Sampling
from runtime import rundir
from runtime.models import model_digest
from runtime.watch import readable
from tasks.reward_function import reward_source

# Behind the M accuracies: what else is averaged over the traces of a question.
COLUMNS = ("thinking_tokens", "closed", "overthinking", "summary_tokens")
RESAMPLES = 1000
SHARE = 0.9


def record(r: Rollout, budgets: tuple[int, ...], tokenizer) -> dict:
    """What is kept of a trace. The very first one is kept as text, too."""
    draws = len(r.summaries) // len(budgets)
    # Verdicts as whole numbers, which read and store better; a reward function may score between.
    scores = [s.score if s.score % 1 else int(s.score) for s in r.summaries]
    is_first = r.question.index == r.sample == 0
    first = {"example": readable(r, budgets, tokenizer)} if is_first else {}
    return {
        "question": r.question.index,
        "sample": r.sample,
        "finish": r.finish,
        "thinking_tokens": len(r.thinking),
        "summary_tokens": sum(len(s.tokens) for s in r.summaries) / len(r.summaries),
        "scores": [scores[i : i + draws] for i in range(0, len(scores), draws)],
        **first,
    }


def fingerprint(model: str, reward: str, *settings) -> str:
    """A hash of all that records depend on, besides their questions: the model's files (a hub
    name's commit), a reward function's file, the settings."""
    return rundir.digest(model_digest(model) or model, reward_source(reward), settings)[:16]


def read_records(place: Path) -> list[dict]:
    return [r for path in sorted(place.glob("*.json")) for r in json.loads(path.read_text())]


def write_records(place: Path, records: list[dict]):
    """One complete file or none: a kill in between leaves a .partial that nobody reads."""
    place.mkdir(parents=True, exist_ok=True)
    first = min(r["question"] for r in records)
    rundir.write(place / f"from-question-{first:06d}.json", json.dumps(records))


def curve_of(records: dict[str, list[dict]], sampling: Sampling) -> dict:
    """Everything the records {set: [record]} say, as it stands in eval.json."""
    columns = {name: per_question(of) for name, of in records.items()}
    budgets, temperature, seed = sampling.budgets, sampling.temperature, sampling.seed[0]
    return {
        "budgets": list(budgets),
        **summarise(columns, budgets, seed),
        "samples": sampling.num_rollouts,
        "temperature": temperature,
        "seed": seed,
        "variance": variance_figure(records, budgets, temperature),
        "example": next(iter(records.values()))[0]["example"],
    }


def per_question(records: list[dict]) -> np.ndarray:
    """Means over the samples of each question: accuracy at M budgets, then COLUMNS. [B, M + 4].

    overthinking = share of traces with max_k r_k > r_M        right earlier, wrong at the end
    """
    by_question = {}
    for r in records:
        rewards = [sum(scores) / len(scores) for scores in r["scores"]]
        by_question.setdefault(r["question"], []).append(
            [
                *rewards,
                r["thinking_tokens"],
                r["finish"] == "closed",
                max(rewards) > rewards[-1],
                r["summary_tokens"],
            ]
        )
    return np.array([np.mean(by_question[q], axis=0) for q in sorted(by_question)])


def statistics_of(means: np.ndarray, budgets: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The curve and its summary numbers, from means over questions. [..., M + 4] -> {name: [...]}.

    anytime_accuracy = (1/M) Σ_j accuracy_j        final_accuracy = accuracy_M
    """
    accuracy = means[..., : len(budgets)]
    return {
        "accuracy": accuracy,
        "anytime_accuracy": accuracy.mean(-1),
        "final_accuracy": accuracy[..., -1],
        "tokens_to_90": tokens_to_share(accuracy, budgets),
        **{name: means[..., len(budgets) + i] for i, name in enumerate(COLUMNS)},
    }


def tokens_to_share(
    accuracy: np.ndarray, budgets: tuple[int, ...], share: float = SHARE
) -> np.ndarray:
    """The least budget that reaches a share of the final accuracy, in tokens.

        min{ b : accuracy(b) ≥ share · accuracy_M }

    The curve between two budgets is a straight line; below the first there is none, so b_1 stands
    for anything up to it. nan where the final accuracy is 0. [..., M] -> [...].
    """
    b = np.array(budgets, dtype=float)
    target = share * accuracy[..., -1:]
    j = (accuracy >= target).argmax(-1)[..., None]  # the first budget that does
    before = np.maximum(j - 1, 0)
    high, low = (np.take_along_axis(accuracy, i, -1) for i in (j, before))
    rise = np.where(high > low, high - low, 1.0)  # 0 only at j = 0
    tokens = b[before] + (b[j] - b[before]) * np.where(j > 0, (target - low) / rise, 0.0)
    return np.where(target > 0, tokens, np.nan)[..., 0]


def resample(columns: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Means over questions drawn with replacement. [B, K] -> [RESAMPLES, K].

    The draw depends on (seed, number of the set, B) alone: two models on the same questions are
    resampled alike, which pairs their differences.
    """
    rng, n = np.random.default_rng([seed, number]), len(columns)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n @ columns


def summarise(sets: dict[str, np.ndarray], budgets: tuple[int, ...], seed: int) -> dict:
    """Statistics with standard errors, of every set and of the mean over sets.

    Over several sets: the mean of their means (the paper's average), resampled set by set.
    sets {name: [B, M + 4]}.
    """
    draws = [resample(columns, seed, number) for number, columns in enumerate(sets.values())]
    means = [columns.mean(0) for columns in sets.values()]

    def described(mean, drawn):
        values, spread = statistics_of(mean, budgets), statistics_of(drawn, budgets)
        errors = {name: _spread(x).tolist() for name, x in spread.items()}
        return {
            **{name: x.tolist() for name, x in values.items()},
            "stderr": errors.pop("accuracy"),
            "errors": errors,
        }

    return rundir.without_nan(
        {
            **described(np.mean(means, axis=0), np.mean(draws, axis=0)),
            "sets": {
                name: {**described(mean, drawn), "questions": len(columns)}
                for (name, columns), mean, drawn in zip(sets.items(), means, draws)
            },
        }
    )


def paired_differences(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray], budgets: tuple[int, ...], seed: int
) -> dict:
    """second - first on the same questions, with paired bootstrap standard errors.

    {"mean" or a set: {statistic: {"difference": x, "stderr": s}}}
    """
    # Row 0 of each [1 + RESAMPLES, K] holds the means, the others the resampled ones.
    rows = {
        name: [
            np.concatenate([model[name].mean(0)[None], resample(model[name], seed, number)])
            for model in (first, second)
        ]
        for number, name in enumerate(first)
    }
    rows = {"mean": [np.mean(side, axis=0) for side in zip(*rows.values())], **rows}
    out = {}
    for name, sides in rows.items():
        a, b = (statistics_of(side, budgets) for side in sides)
        out[name] = {
            k: {
                "difference": (b[k] - a[k])[0].tolist(),
                "stderr": _spread((b[k] - a[k])[1:]).tolist(),
            }
            for k in a
        }
    return rundir.without_nan(out)


def _spread(drawn: np.ndarray) -> np.ndarray:
    """Standard deviation over the resamples where the statistic exists (nan without any)."""
    exists = ~np.isnan(drawn)
    n = np.maximum(exists.sum(0), 1)
    mean = np.where(exists, drawn, 0).sum(0) / n
    spread = np.sqrt(np.where(exists, (drawn - mean) ** 2, 0).sum(0) / n)
    return np.where(exists.any(0), spread, np.nan)


def variance_figure(
    sets: dict[str, list[dict]], budgets: tuple[int, ...], temperature: float, group: int = 8
) -> dict | None:
    """The paper's variance figure, on evaluation data: Var[R-V]/Var[R] and Corr[V, R] per segment.

    As in the authors' code: a uniform prior over 4 even budgets whatever the training's prior; the
    samples of a question in groups of G = `group` (8 as in the paper's training; one smaller group
    if there are fewer), V2 the mean of such a group, the rollout itself included; over rollouts
    with tokens in the segment; set by set, and then the mean over sets.

    Not the paper's unless T = 0.6, G = 8, A = 4 and b_M = 8000: only then does `paper` say what its
    figure shows. (The same of training's own rollouts, at their temperature and prior, is
    variance_trained/* in metrics.jsonl.) None where the 4 budgets are not among those evaluated.
    """
    quarters = [budgets[-1] * j // 4 for j in (1, 2, 3, 4)]
    if any(b not in budgets for b in quarters) or budgets[-1] % 4:
        return None
    at, probs, out = [budgets.index(b) for b in quarters], prior_probs("uniform", quarters), {}
    for name, records in sets.items():
        samples = 1 + max(r["sample"] for r in records)
        g = min(group, samples)
        kept = sorted(
            (r for r in records if r["sample"] < samples // g * g),
            key=lambda r: (r["question"], r["sample"]),
        )
        scores = torch.tensor([[r["scores"][j] for j in at] for r in kept], dtype=torch.float64)
        rewards = mean_rewards(scores).unflatten(0, (-1, g))  # [B·S/G, G, 4]
        returns = cumulative_returns(rewards, probs)
        lengths = torch.tensor([r["thinking_tokens"] for r in kept]).unflatten(0, (-1, g))
        out[name] = brpo.variance_diagnostics(
            rewards, returns, quarters, probs, thinking_lengths=lengths
        )
    names = list(next(iter(out.values())))
    mean = {k: torch.stack([o[k] for o in out.values()]).nanmean(0).tolist() for k in names}
    same = (temperature, g, scores.shape[-1], budgets[-1]) == (0.6, 8, 4, 8000)
    return rundir.without_nan(
        {
            "budgets": quarters,
            "temperature": temperature,
            "G": g,
            "A": scores.shape[-1],
            "paper": "last segment: brpo 0.33-0.45, group 0.61-0.82" if same else None,
            **mean,
            "sets": {n: {k: v.tolist() for k, v in o.items()} for n, o in out.items()},
        }
    )
