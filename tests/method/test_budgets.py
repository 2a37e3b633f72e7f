import pytest

from budgets import BudgetPrior, cut_lengths, prior_probs


def test_uniform_prior_by_hand():
    prior = BudgetPrior.make("uniform", 8000, 4)
    assert prior.budgets == (2000, 4000, 6000, 8000)
    assert prior.probs == (0.25, 0.25, 0.25, 0.25)


def test_linear_prior_by_hand():
    assert BudgetPrior.make("linear", 8000, 4).probs == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert prior_probs("linear", (1, 9)) == pytest.approx((0.1, 0.9))  # uneven spacing


def test_base_prior_is_all_on_the_last_budget():
    assert BudgetPrior.make("base", 8000, 4).probs == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "budgets, probs, complaint",
    [
        ((), (), "empty"),
        ((2, 2), (0.5, 0.5), "not increasing"),
        ((4, 2), (0.5, 0.5), "not increasing"),
        ((0, 2), (0.5, 0.5), ">= 1"),
        ((2, 4), (1.0,), "1 entries for 2 budgets"),
        ((2, 4), (0.5, 0.6), "sum to 1.1"),
        ((2, 4), (1.5, -0.5), "negative"),
        ((2, 4), (float("nan"), 1.0), "negative"),
        ((2, 4), (1 + 1e-9, -1e-9), "negative"),  # exactly 0 is the lowest
        ((2, 4), (0.5, 0.5 + 2e-6), "not 1"),
        ((2, 4), (0.5, 0.5 - 2e-6), "not 1"),
        ((1.5, 4), (0.5, 0.5), "whole number"),
    ],
)
def test_a_bad_prior_is_refused_by_name(budgets, probs, complaint):
    with pytest.raises(ValueError, match=complaint):
        BudgetPrior(budgets, probs)


def test_the_bounds_of_a_prior_are_allowed():
    for budgets, probs in [((1,), (1.0,)), ((1, 2), (0.0, 1.0)), ((3, 4), (0.5, 0.5 + 5e-7))]:
        assert BudgetPrior(budgets, probs).probs == probs
    assert BudgetPrior.make("uniform", 3, 3).budgets == (1, 2, 3)
    assert BudgetPrior.make("linear", 1, 1).probs == (1.0,)


def test_make_refuses_uneven_division_and_unknown_kinds():
    with pytest.raises(ValueError, match="even budgets"):
        BudgetPrior.make("uniform", 10, 4)
    with pytest.raises(ValueError, match="even budgets"):
        BudgetPrior.make("uniform", 10, 0)
    with pytest.raises(ValueError, match="unknown prior"):
        BudgetPrior.make("cubic", 8, 4)


def test_cuts_past_the_end_share_the_end():
    assert cut_lengths(5, (2, 4, 6, 8)) == [2, 4, 5, 5]
    assert cut_lengths(0, (2, 4)) == [0, 0]
