"""When thinking stops and what that costs: by hand, and by brute force over random records."""

import numpy as np
import pytest

from runtime.curves import STOPPED, per_question, summarise
from runtime.stopping import majority, rules, stopped, stopping_cut


def test_the_majority_by_hand():
    assert majority(["3", "5", "5", None]) == 1
    assert majority(["3", "5", "5", "3"]) == 0  # a tie: the first
    assert majority([None, None, None, "7"]) == 3  # no answer is no vote
    assert majority([None, None]) == 0


def test_the_stopping_cut_by_hand():
    answers = [[None, None], ["3", "3"], ["5", "3"], ["5", "5"], ["5", "5"], ["5", None]]
    # Of the third cut the majority is "5", the first of the two.
    assert [stopping_cut(answers, k) for k in (1, 2, 3, 4, 5)] == [1, 3, 4, 5, None]
    # Both must agree: the third cut and the last one have no answer then.
    assert [stopping_cut(answers, k, agree=2) for k in (1, 2, 3)] == [1, 4, None]
    assert stopping_cut([["2"], [None], ["2"], ["2"]], 2) == 3  # nothing between interrupts
    assert stopping_cut([], 1) is None


def test_what_stopping_costs_by_hand():
    """A trace of 25 tokens, cut at 10, 20 and twice at its end."""
    r = {
        "thinking_tokens": 25,
        "cuts": [10, 20, 25, 25],
        "answers": [["4"], ["4"], ["4"], ["5"]],
        "scores": [[0], [0], [0], [1]],
        "summary_tokens": [[3], [5], [7], [9]],
    }
    assert stopped(r, 0) == (1, 25, 25 + 9)  # one summary, where the trace ends
    assert stopped(r, 1) == (0, 10, 10 + 3)
    assert stopped(r, 2) == (0, 20, 20 + 3 + 5)
    # Three in a row are complete only at the end, where there is nothing left to stop; of the two
    # draws there, the one that a run without stopping gives.
    assert stopped(r, 3) == (1, 25, 25 + 3 + 5 + 9)


def test_stopping_by_brute_force():
    """Every τ tried, from its definition; and means, differences and errors of two sets."""
    rng, budgets, A = np.random.default_rng(0), (2, 4, 6, 8, 10), 3
    records = [
        {
            "question": q,
            "sample": s,
            "finish": "closed",
            "thinking_tokens": int(rng.integers(1, 11)),
            "answers": [[[None, "1", "2"][i] for i in row] for row in rng.integers(0, 3, (5, A))],
            "scores": rng.integers(0, 2, (5, A)).tolist(),
            "summary_tokens": rng.integers(1, 9, (5, A)).tolist(),
        }
        for q in range(40)
        for s in range(2)
    ]

    for r in records:
        r["cuts"] = [min(b, r["thinking_tokens"]) for b in budgets]

    def expected(r, k, agree):
        z = r["thinking_tokens"]
        votes = [{a: row.count(a) for a in row if a is not None} for row in r["answers"]]
        answer = [
            max(v, key=lambda a, v=v, row=row: (v[a], -row.index(a))) if v else None
            for v, row in zip(votes, r["answers"])
        ]
        fits = [
            j
            for j in range(5)
            if k and k <= j + 1 and budgets[j] < z and answer[j] is not None
            if all(answer[i] == answer[j] for i in range(j - k + 1, j + 1))
            if all(votes[i][answer[j]] >= agree for i in range(j - k + 1, j + 1))
        ]
        j = min(fits, default=4)
        asked = [i for i in range(5) if i < j and budgets[i] < z and k] + [j]
        draw = r["answers"][j].index(answer[j])
        cost = min(budgets[j], z)
        return [r["scores"][j][draw], cost, cost + sum(sum(r["summary_tokens"][i]) for i in asked)]

    sets = {"a": per_question(records[:40]), "b": per_question(records[40:])}
    summary, stops = summarise(sets, budgets, seed=0), 0
    base = np.array([expected(r, 0, 1) for r in records])
    assert rules(3)[:3] == [(0, 1), (1, 1), (1, 2)] and len(rules(3)) == 10
    for i, rule in enumerate(rules(3)):
        each = np.array([expected(r, *rule) for r in records])
        assert each.tolist() == [list(stopped(r, *rule)) for r in records]
        stops += (each[:, 1] < base[:, 1]).sum()
        columns = dict(zip(STOPPED, each.T), stopped_difference=(each - base)[:, 0])
        for name, column in columns.items():
            assert summary[name][i] == pytest.approx(column.mean())
            # The textbook's standard error: over questions, in the two sets separately.
            error = np.hypot(*column.reshape(2, 20, 2).mean(-1).std(1)) / 20**0.5 / 2
            assert summary["errors"][name][i] == pytest.approx(error, rel=0.1, abs=1e-9)
    assert stops > 100
