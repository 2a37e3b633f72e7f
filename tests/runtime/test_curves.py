"""Statistics of records, each by hand, by brute force or against a textbook formula."""

from types import SimpleNamespace

import numpy as np
import pytest

from runtime import curves
from runtime.curves import (
    paired_differences,
    per_question,
    resample,
    statistics_of,
    summarise,
    tokens_to_90,
    variance_figure,
)

BUDGETS = (10, 20, 40)


def record(question, sample, scores, tokens=5, finish="closed"):
    return {
        "question": question,
        "sample": sample,
        "thinking_tokens": tokens,
        "finish": finish,
        "summary_tokens": [[4] * len(s) for s in scores],
        "cuts": [tokens] * len(scores),
        "answers": [[None] * len(s) for s in scores],
        "scores": scores,
    }


def random_columns(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    accuracy = np.sort((rng.random((n, 3)) + shift).clip(0, 1), axis=1)
    return np.concatenate([accuracy, rng.random((n, 4))], axis=1)


def test_a_record_keeps_scores_answers_and_tokens():
    question = SimpleNamespace(index=1)
    summaries = [SimpleNamespace(score=s, cut=1) for s in (0.25, 1.0, 0.0, 0.5)]
    rollout = SimpleNamespace(
        question=question, sample=0, finish="closed", thinking=[1], summaries=summaries
    )
    words = {1: r"so \boxed{7}", 2: "\n\n\\boxed{x}.\n\n\\boxed{8}<|end|>", 3: "8<|end|>"}
    tokenizer = SimpleNamespace(eos_token="<|end|>", decode=lambda ids: words[ids[0]])
    for summary, token in zip(summaries, (1, 2, 3, 1)):
        summary.tokens = [token] * token
    kept = curves.record(rollout, (10, 20), tokenizer)
    assert kept["scores"] == [[0.25, 1], [0, 0.5]] and type(kept["scores"][0][1]) is int
    assert kept["answers"] == [
        ["7", "x"],
        [None, "7"],
    ]  # as they are graded: of the first paragraph
    assert kept["summary_tokens"] == [[1, 2], [3, 1]]


def test_a_question_is_the_mean_of_its_samples():
    rows = per_question(
        [
            record(1, 0, [[1, 0], [1, 1], [0, 0]], tokens=9, finish="length"),
            record(0, 0, [[0, 0], [1, 1], [1, 1]]),
            record(1, 1, [[0, 0], [0, 0], [1, 0]], tokens=3),
        ]
    )
    # accuracies, thinking tokens, closed, overthinking (question 1: its first sample), summary
    assert rows[:, :7].tolist() == [[0, 1, 1, 5, 1, 0, 4], [0.25, 0.5, 0.25, 6, 0.5, 0.5, 4]]


def test_tokens_to_a_share_of_the_final_accuracy_by_hand():
    accuracy = np.array(
        [
            [0.1, 0.5, 1.0],  # 0.9 lies 0.4 / 0.5 of the way from 20 to 40
            [0.6, 0.6, 0.6],  # there from the first budget on
            [0.0, 0.8, 0.8],  # 0.72 of 0.8: nine tenths of the way from 10 to 20
            [0.9, 0.2, 0.5],  # the first time counts
            [0.3, 0.1, 0.0],
        ]
    )  # nothing to reach
    expected = [36, 10, 19, 10, np.nan]
    assert tokens_to_90(accuracy, BUDGETS) == pytest.approx(expected, nan_ok=True)
    assert tokens_to_90(accuracy[2], BUDGETS) == pytest.approx(19)


def test_the_smallest_budget_that_suffices_by_hand():
    """Right at once, later, too early, at half of its traces only, never."""
    rows = [[1, 1, 1], [0, 0.75, 1], [1, 0.25, 0.75], [0.5, 0.5, 0.5], [0, 0, 0]]
    found = curves.sufficient_budgets(np.array(rows, dtype=float), (8, 16, 32))
    assert found == [8, 16, 32, None, None]


def test_anytime_accuracy_is_the_mean_over_budgets():
    statistics = statistics_of(np.array([0.1, 0.2, 0.6, 7, 1, 0, 4]), BUDGETS)
    assert statistics["anytime_accuracy"] == pytest.approx(0.3)
    assert statistics["final_accuracy"] == 0.6 and statistics["thinking_tokens"] == 7


def test_the_anytime_index_by_hand():
    """Q* of the first row: 0.2, 0.6, 0.6. Trapezoids (0.4 · 10 + 0.6 · 20) / 30 = 16 / 30."""
    rows = np.array([[0.2, 0.6, 0.4, 7, 1, 0, 4], [0.5, 0.5, 0.5, 7, 1, 0, 4], [0.0] * 7])
    statistics = statistics_of(rows, BUDGETS)
    assert statistics["anytime_index"] == pytest.approx([16 / 30, 0.5, 0])
    relative = statistics["anytime_index_relative"]
    assert relative == pytest.approx([16 / 18, 1, np.nan], nan_ok=True)
    single = statistics_of(np.array([0.2, 7, 1, 0, 4]), (10,))
    assert np.isnan(single["anytime_index"]) and single["anytime_accuracy"] == 0.2


def test_the_bootstraps_standard_error_of_a_mean_is_the_textbooks():
    columns = random_columns(80, 0)
    described = summarise({"a": columns}, BUDGETS, seed=0)
    expected = columns[:, :3].std(0) / 80**0.5
    assert described["stderr"] == pytest.approx(expected, rel=0.1)
    assert summarise({"a": columns}, BUDGETS, seed=0) == described  # seeded
    assert summarise({"a": columns}, BUDGETS, seed=1)["stderr"] != described["stderr"]


def test_several_sets_count_alike_whatever_their_size():
    sets = {"small": random_columns(10, 0), "large": random_columns(1000, 1, 0.3)}
    described = summarise(sets, BUDGETS, seed=0)
    means = [columns[:, :3].mean(0) for columns in sets.values()]
    assert described["accuracy"] == pytest.approx(np.mean(means, axis=0))
    errors = [np.array(s["stderr"]) for s in described["sets"].values()]
    assert described["stderr"] == pytest.approx(np.hypot(*errors) / 2, rel=0.1)


def test_a_paired_difference_is_surer_than_the_two_it_is_of():
    """By the textbook: the standard deviation over questions of the difference, over √n."""
    first = random_columns(200, 0)
    second = first + 0.1 + 0.02 * np.random.default_rng(5).standard_normal(first.shape)
    of = paired_differences({"a": first}, {"a": second}, BUDGETS, seed=0)["a"]
    difference = (second - first)[:, 2]
    assert of["final_accuracy"]["difference"] == pytest.approx(difference.mean())
    assert of["final_accuracy"]["stderr"] == pytest.approx(difference.std() / 200**0.5, rel=0.1)
    alone = summarise({"a": first}, BUDGETS, seed=0)["errors"]["final_accuracy"]
    assert of["final_accuracy"]["stderr"] < 0.2 * alone


def test_resampling_is_the_same_for_two_models_on_the_same_questions():
    a, b = resample(random_columns(30, 0), 0, 2), resample(random_columns(30, 0) + 1, 0, 2)
    assert b - a == pytest.approx(np.ones_like(a))


def test_a_statistic_that_does_not_exist_is_null():
    columns = random_columns(5, 0)
    columns[:, :3] = 0
    described = summarise({"a": columns}, BUDGETS, seed=0)
    assert described["tokens_to_90"] is None and described["errors"]["tokens_to_90"] is None


def test_the_variance_figure_by_brute_force():
    """30 questions, 4 samples in 2 groups of G = 2, A = 2, five budgets of which four are used."""
    rng = np.random.default_rng(0)
    budgets, quarters = (2, 3, 4, 6, 8), (2, 4, 6, 8)
    records = [
        record(q, s, rng.integers(0, 2, (5, 2)).tolist(), tokens=int(rng.integers(1, 9)))
        for q in range(30)
        for s in range(4)
    ]
    figure = variance_figure({"a": records}, budgets, 0.6, group=2)
    assert figure["budgets"] == list(quarters) and (figure["G"], figure["A"]) == (2, 2)
    assert figure["paper"] is None  # other sizes: another quantity
    r = {
        (x["question"], x["sample"]): np.mean([x["scores"][j] for j in (0, 2, 3, 4)], axis=1)
        for x in records
    }
    returns = {k: np.array([v[j:].sum() / 4 for j in range(4)]) for k, v in r.items()}
    for j, start in enumerate((0, 2, 4, 6)):
        kept = [x for x in records if x["thinking_tokens"] > start]
        left, total = [], []
        for x in kept:
            key = (x["question"], x["sample"])
            partner = (x["question"], x["sample"] ^ 1)
            group = (returns[key][j] + returns[partner][j]) / 2
            weights = [0.5 ** (j - k) for k in range(j)]
            own = np.average(r[key][:j], weights=weights) * (4 - j) / 4 if j else 0.0
            left.append(returns[key][j] - (start / 8 * own + (1 - start / 8) * group))
            total.append(returns[key][j])
        assert figure["residual/brpo"][j] == pytest.approx(np.var(left) / np.var(total))
    assert variance_figure({"a": records}, (3, 8, 9, 10, 11), 0.6, 2) is None


def test_the_papers_variance_is_named_only_for_the_same_quantity():
    rng = np.random.default_rng(0)
    records = [
        record(q, s, rng.integers(0, 2, (4, 4)).tolist(), tokens=9000)
        for q in range(4)
        for s in range(8)
    ]
    budgets = (2000, 4000, 6000, 8000)
    assert "0.33-0.45" in variance_figure({"a": records}, budgets, 0.6, 8)["paper"]
    assert variance_figure({"a": records}, budgets, 1.0, 8)["paper"] is None
    assert variance_figure({"a": records}, budgets, 0.6, 4)["paper"] is None
    assert variance_figure({"a": records}, (4000, 8000, 12000, 16000), 0.6, 8)["paper"] is None


def test_records_are_written_whole_or_not_at_all(tmp_path):
    curves.write_records(tmp_path / "0", [record(3, 0, [[1]]), record(2, 0, [[0]])])
    (tmp_path / "0" / "from-question-000009.partial").write_text("[{")
    assert [r["question"] for r in curves.read_records(tmp_path / "0")] == [3, 2]
    assert curves.read_records(tmp_path / "1") == []
