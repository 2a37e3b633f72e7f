r"""Verifiable dense rewards, and the returns of a rollout's segments.

A rollout is a thinking trace z, cut at the budgets b_1 < ... < b_M, and A summaries y at every cut.
A summary scores r(x, y) = 1 if its answer is the ground truth and the text closes its thinking
exactly once, else 0. Whether an answer *is* the ground truth is decided in tasks/verifier.py, or by
a reward function of your own; here is how a summary is requested, where its answer stands, and what
the scores add up to:

    score    r(x, y)      of one summary                                       [B, G, M, A]
    reward   r_j          mean of the A scores at budget j                     [B, G, M]
    return   R_j          what segment j, b_{j-1} < t ≤ b_j, can still earn    [B, G, M]

B questions, G rollouts per question, M budgets, A summaries per budget. This file works when copied
alone into an empty folder.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

THINK_END = "</think>"
CUT_TEXT = f"...\n\n...\n\n{THINK_END}"  # closes a trace that did not close itself
ANSWER_HEADER = "\n\n**Final Answer**\n"  # asks for the summary
BLANK_LINE = re.compile(r"\n\s*\n")


def appended_text(thinking: str) -> str:
    """What is appended to a trace at its cut, so that the policy goes on with a summary.

        z_≤b ends with its own </think>    the answer header
        cut within the thinking            cut text, which ends with </think>, then the header
        unclosed after b_M tokens          the same as cut

    `thinking`: the text of z_≤b, special tokens included. A trace that ended with end-of-text
    instead of </think> is over: nothing can follow it, so ask for nothing and score 0.
    """
    return ANSWER_HEADER if thinking.endswith(THINK_END) else CUT_TEXT + ANSWER_HEADER


def answer_paragraph(summary: str) -> str:
    r"""The part of a summary that is graded: its first paragraph that is not blank.

        "\boxed{4}.\n\nWait, let me check: ... \boxed{5}"   ->   "\boxed{4}."

    `summary` is what the policy wrote after the answer header. What follows the first paragraph
    would be more thinking, outside of the budget: were it graded, accuracy at budget b would no
    longer mean accuracy after b tokens of thinking. Blank lines directly after the header are
    forgiven.
    """
    return BLANK_LINE.split(summary.strip(), maxsplit=1)[0].rstrip()


def has_one_think_end(
    thinking: str, appended: str, summary: str, think_end: str = THINK_END
) -> bool:
    """The format rule: the whole text holds exactly one </think>.

    It is the trace's own where the trace closed itself, the appended one where it was cut; the
    summary must not add another, which would be a second round of thinking. Text, not token ids: a
    policy can also spell </think> in several smaller tokens.
    """
    return (thinking + appended + summary).count(think_end) == 1


def mean_rewards(scores: Tensor) -> Tensor:
    """The verifiable dense reward at budget j.

        r_j = (1/A) Σ_a r(x, y_{j,a})

    scores [B, G, M, A] -> [B, G, M].
    """
    return scores.mean(dim=-1)


def cumulative_returns(rewards: Tensor, probs: Sequence[float] | Tensor) -> Tensor:
    """The return of segment j: the reward still to come, weighed by the budget prior.

        R_j = Σ_{k≥j} P_k r_k

    A token after b_{j-1} cannot change what the trace was worth when it was cut there or earlier,
    so only rewards at budgets j..M are credited to segment j. R_1 is the anytime objective's
    estimate. rewards [B, G, M], probs [M] -> [B, G, M].
    """
    weighted = rewards * torch.as_tensor(probs, dtype=rewards.dtype, device=rewards.device)
    return weighted.flip(-1).cumsum(-1).flip(-1)
