"""When to stop: as soon as the answer has stayed the same.

The answer â_j at cut j is the most frequent one of its A summaries. Thinking stops at the first cut
where at least k' of the A gave it, and where that has been so for k cuts in a row (k: patience):

    τ = min{ j : â_j = â_{j-1} = ... = â_{j-k+1} }

A trace that ends before is not stopped.
"""

from collections import Counter


def rules(draws: int) -> list[tuple[int, int]]:
    """(k, k') of an evaluation with A = `draws`. The first thinks to the end: k = 0."""
    return [(0, 1), *((k, agree) for k in (1, 2, 3) for agree in range(1, draws + 1))]


def majority(answers: list[str | None]) -> int:
    """The first draw that gave the most frequent answer of a cut; 0 where none gave one. [A]."""
    votes = Counter(a for a in answers if a is not None)
    return max(range(len(answers)), key=lambda draw: votes[answers[draw]])


def stopping_cut(answers: list[list[str | None]], patience: int, agree: int = 1) -> int | None:
    """τ, counted from 0; None where the answers so far give no reason to stop. [cuts][A]."""
    previous, same = None, 0
    for j, drawn in enumerate(answers):
        answer = drawn[majority(drawn)]
        agreed = answer is not None and drawn.count(answer) >= agree
        same = (same + 1 if answer == previous else 1) if agreed else 0
        previous = answer
        if same >= patience:
            return j
    return None


def stopped(r: dict, patience: int, agree: int = 1) -> tuple[float, int, int]:
    """What a record (curves.py) comes to: the score of the majority answer where its trace stops,
    tokens of thinking, and all sampled tokens, summaries included.

    Summaries are sampled at every cut up to τ, or at those within the trace and at its end; with
    patience 0 nobody watches, and they are sampled at the end alone.
    """
    within = [j for j, cut in enumerate(r["cuts"]) if cut < r["thinking_tokens"]]
    last, before = len(r["cuts"]) - 1, []
    if patience:
        tau = stopping_cut([r["answers"][j] for j in within], patience, agree)
        last, before = (last, within) if tau is None else (tau, within[:tau])
    thinking, score = r["cuts"][last], r["scores"][last][majority(r["answers"][last])]
    return score, thinking, thinking + sum(sum(r["summary_tokens"][j]) for j in [*before, last])
