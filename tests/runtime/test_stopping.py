"""When thinking stops and what that costs: by hand, and by brute force over random records."""

import numpy as np
import pytest

from runtime.curves import stopping_figure
from runtime.stopping import PATIENCES, majority, stopped, stopping_cut


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
        "answers": [["4"], ["4"], ["4"], ["5"]],
        "scores": [[0], [0], [0], [1]],
        "summary_tokens": [[3], [5], [7], [9]],
    }
    budgets = (10, 20, 30, 40)
    assert stopped(r, budgets, None) == [1, 25, 25 + 9]  # one summary, where the trace ends
    assert stopped(r, budgets, 1) == [0, 10, 10 + 3]
    assert stopped(r, budgets, 2) == [0, 20, 20 + 3 + 5]
    # Three in a row are complete only at the end, where there is nothing left to stop; of the two
    # draws there, the one that a run without stopping gives.
    assert stopped(r, budgets, 3) == [1, 25, 25 + 3 + 5 + 9]


def test_stopping_by_brute_force():
    """Every τ tried, from its definition; and means, differences and errors of two sets."""
    rng, budgets, A = np.random.default_rng(0), (2, 4, 6, 8, 10), 3
    records = [
        {
            "question": q,
            "sample": s,
            "thinking_tokens": int(rng.integers(1, 11)),
            "answers": [[[None, "1", "2"][i] for i in row] for row in rng.integers(0, 3, (5, A))],
            "scores": rng.integers(0, 2, (5, A)).tolist(),
            "summary_tokens": rng.integers(1, 9, (5, A)).tolist(),
        }
        for q in range(40)
        for s in range(2)
    ]

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
            if k is not None and k <= j + 1 and budgets[j] < z and answer[j] is not None
            if all(answer[i] == answer[j] for i in range(j - k + 1, j + 1))
            if all(votes[i][answer[j]] >= agree for i in range(j - k + 1, j + 1))
        ]
        j = min(fits, default=4)
        asked = [i for i in range(5) if i < j and budgets[i] < z and k is not None] + [j]
        draw = r["answers"][j].index(answer[j])
        cost = min(budgets[j], z)
        return [r["scores"][j][draw], cost, cost + sum(sum(r["summary_tokens"][i]) for i in asked)]

    half = [r | {"question": r["question"] - 20} for r in records[40:]]
    figure = stopping_figure({"a": records[:40], "b": half}, budgets, seed=0)
    rules = [(None, 1), *((k, agree) for k in PATIENCES for agree in (1, 2, 3))]
    assert [(x["patience"], x["agree"]) for x in figure["mean"]] == rules and set(figure) > {"a"}
    stops = 0
    for rule, found in zip(rules, figure["mean"]):
        each = np.array([expected(r, *rule) for r in records])
        assert each.tolist() == [stopped(r, budgets, *rule) for r in records]
        base = np.array([expected(r, None, 1) for r in records])
        stops += (each[:, 1] < base[:, 1]).sum()
        for i, name in enumerate(("accuracy", "thinking_tokens", "all_tokens")):
            assert found[name] == pytest.approx(each[:, i].mean())
            paired = found["differences"][name]
            assert paired["difference"] == pytest.approx((each - base)[:, i].mean())
            # The textbook's standard error: over questions, in the two halves separately.
            for kind, x in ((found["errors"][name], each), (paired["stderr"], each - base)):
                x = x[:, i].reshape(2, 20, 2).mean(-1)
                assert kind == pytest.approx(np.hypot(*x.std(1)) / 20**0.5 / 2, rel=0.1, abs=1e-9)
    assert stops > 100
