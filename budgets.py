"""Thinking budgets, the prior over them, and the cuts of a trace.

Anytime reasoning maximises the expected reward over a *prior on thinking budgets*:

    J(θ) = E_{x, z ~ π(·|x)}  E_{b ~ p_B}  E_{y ~ π(·|x, z_≤b)} [ r(x, y) ]

z is the thinking trace, z_≤b its first b tokens, y the summary that states the answer after them.
p_B has the finite support b_1 < ... < b_M with probabilities P_1..P_M. This file knows only
integers and probabilities: no tokens, no text, no tensors. It works when copied alone into an empty
folder.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetPrior:
    """p_B: the support b_1 < ... < b_M (in thinking tokens) and the probabilities P_1..P_M.

    Any spacing and any probabilities are allowed; `make` gives the paper's three. Validated on
    creation, so whoever holds one need not check again. Raises ValueError naming the field and the
    fix.
    """

    budgets: tuple[int, ...]
    probs: tuple[float, ...]

    def __post_init__(self):
        b, p = self.budgets, self.probs
        if not b:
            raise ValueError("budgets is empty: give at least one thinking budget, as in (2000,)")
        if any(int(x) != x or x < 1 for x in b):
            raise ValueError(f"budgets {list(b)}: each must be a whole number of tokens >= 1")
        if any(left >= right for left, right in zip(b, b[1:])):
            raise ValueError(f"budgets {list(b)} are not increasing: sort them and drop duplicates")
        if len(p) != len(b):
            raise ValueError(
                f"probs has {len(p)} entries for {len(b)} budgets: give one probability per budget"
            )
        # Written as `not (x >= 0)` because every comparison with nan is False.
        if any(not (x >= 0) for x in p):
            raise ValueError(f"probs {list(p)}: a probability cannot be negative (or nan)")
        if abs(sum(p) - 1) > 1e-6:
            raise ValueError(f"probs {list(p)} sum to {sum(p):g}, not 1: divide each by the sum")

    @classmethod
    def make(cls, kind: str, max_budget: int, num_budgets: int) -> "BudgetPrior":
        """The paper's priors on even spacing b_j = j · max_budget / M.

        uniform  P_j = 1/M              every budget matters alike (AR-uniform)
        linear   P_j = b_j / Σ_k b_k    large budgets matter more (AR-linear)
        base     P_M = 1, else 0        ordinary final-reward RL (AR-base, and GRPO with M = 1)
        """
        if num_budgets < 1 or max_budget % num_budgets:
            raise ValueError(
                f"max_budget {max_budget} does not split into {num_budgets} even "
                "budgets: change num_budgets, or list the budgets yourself"
            )
        budgets = tuple(max_budget // num_budgets * j for j in range(1, num_budgets + 1))
        return cls(budgets, prior_probs(kind, budgets))


def prior_probs(kind: str, budgets: tuple[int, ...]) -> tuple[float, ...]:
    """P_1..P_M of the named prior on any list of budgets (see `BudgetPrior.make` for the
    formulas)."""
    m = len(budgets)
    if kind == "uniform":
        return (1 / m,) * m
    if kind == "linear":
        return tuple(b / sum(budgets) for b in budgets)
    if kind == "base":
        return (0.0,) * (m - 1) + (1.0,)
    raise ValueError(f"unknown prior {kind!r}: use uniform, linear or base")


def cut_lengths(thinking_length: int, budgets: tuple[int, ...]) -> list[int]:
    """How many thinking tokens the summary at each budget gets to see.

        cut_j = min(b_j, |z|)

    Budgets past the end of the trace share one cut. They are kept, not skipped: each still draws
    its own A summaries, so every (rollout, budget) has scores of its own.
    """
    return [min(b, thinking_length) for b in budgets]
