"""Sampling: thinking traces, their cuts at the budgets, and the summaries at each cut.

    sample z_1..z_G ~ π(·|x), at most b_M tokens each
    whenever z crosses a budget b_j, or ends before it:
        cut          z_≤b_j, of min(b_j, |z|) tokens
        append       the text that asks for a summary, see rewards.appended_text
        sample       y_{j,1}..y_{j,A} ~ π(·|x, z_≤b_j, appended), and grade each when it is complete

`sample_rollouts` is this algorithm on any engine that takes a `Request` and returns `Output`s
(runtime/engines.py). On vLLM the summaries are sampled while their trace thinks on, so that grading
overlaps generation and no slot is idle.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from budgets import cut_lengths
from rewards import THINK_END, appended_text, has_one_think_end


@dataclass(frozen=True)
class Request:
    """One sequence to sample. An engine has add(request), step() -> list[Output], has_work()."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[int, ...]  # generation ends with (and returns) any of these
    seed: int
    temperature: float
    stream: bool = False  # report tokens as they come, if the engine can


@dataclass
class Output:
    """New tokens of a request; on an engine that does not stream, all of them at once."""

    id: str
    tokens: list[int]  # new since the last Output of this request
    logp: list[float]  # the sampler's log π of these tokens, at the request's temperature
    finished: bool


@dataclass(frozen=True)
class Markers:
    """The token ids around thinking and summary, of one tokenizer: the only place models differ."""

    think_end: int
    eos: tuple[int, ...]
    after_cut: tuple[int, ...]  # appended where a trace is cut or never closed itself
    after_closed: tuple[int, ...]  # appended to a trace that ends with its own </think>
    max_summary_tokens: int  # generated ones; the appended text comes on top

    @classmethod
    def from_tokenizer(
        cls, tokenizer, max_summary_tokens: int = 118, eos: Iterable[int] = ()
    ) -> "Markers":
        """`eos`: further end-of-text ids (a model's generation config may list several).

        Raises ValueError when the tokenizer has no one-token </think> (traces are stopped and
        counted at that token), or no end-of-text token.
        """

        def encode(text):
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        name, think_end = tokenizer.name_or_path or "this model", encode(THINK_END)
        if len(think_end) != 1 or think_end[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer of {name} writes {THINK_END} as {len(think_end)} "
                "tokens: use a reasoning model that has it as one (R1-Distill, Qwen3)"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {name} has no end-of-text token, so summaries "
                "would never end: set eos_token"
            )
        return cls(
            think_end[0],
            tuple(sorted({tokenizer.eos_token_id, *eos})),
            encode(appended_text("")),
            encode(appended_text(THINK_END)),
            max_summary_tokens,
        )


@dataclass
class Summary:
    """One answer to one cut. `logp`: the sampler's log-probs of `tokens`, at its temperature."""

    budget_index: int  # 0..M-1
    draw: int  # 0..A-1
    cut: int  # thinking tokens it saw
    appended: list[int]
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    score: float = 0.0
    verdict: Any = None  # a future of the score, while it is being graded


@dataclass
class Rollout:
    """One thinking trace and its M·A summaries, ordered by (budget, draw)."""

    question: Any  # data.Question: .index, .prompt (token ids), .ground_truth
    sample: int  # 0..G-1
    thinking: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: str = ""  # "" running | "closed" by </think> | "eos" instead | "length" b_M
    summaries: list[Summary] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.question.index}-{self.sample}"


def request_seed(*key: int) -> int:
    """A 63-bit seed from (seed, step, question, sample, budget, draw): the whole randomness policy.

    Nothing else is drawn anywhere, so there is no generator state to save, and a resumed run
    repeats itself.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Sampling:
    """How many traces and summaries are drawn, and from which random numbers."""

    budgets: tuple[int, ...]  # b_1 < ... < b_M, in thinking tokens
    num_rollouts: int  # G
    num_summaries: int  # A
    temperature: float
    seed: tuple[int, ...]  # the leading part of every random key: (seed, step)


def sample_rollouts(
    engine, questions, sampling: Sampling, markers: Markers, grade: Callable | None = None
) -> list[Rollout]:
    """Sample G thinking traces per question and A summaries at each of the M cuts of each trace.

    grade(rollout, summary) is called as each summary is complete and returns a future of its score.
    Returns B·G rollouts ordered by (question, sample).
    """
    rollouts = [Rollout(q, g) for q in questions for g in range(sampling.num_rollouts)]
    thinking: dict[str, Rollout] = {}  # request id -> whose trace it is
    summarising: dict[str, tuple[Rollout, Summary]] = {}  # request id -> whose summary it is

    for r in rollouts:
        request = thinking_request(r, sampling, markers)
        thinking[request.id] = r
        engine.add(request)

    while engine.has_work():
        for out in engine.step():
            if out.id in thinking:
                r = thinking[out.id]
                extend_thinking(r, out, markers)
                for s in due_summaries(r, sampling.budgets, sampling.num_summaries, markers):
                    r.summaries.append(s)
                    if r.finish == "eos" and s.cut == len(r.thinking):
                        continue  # the text is over, nothing can follow: its score stays 0
                    request = summary_request(r, s, sampling, markers)
                    summarising[request.id] = (r, s)
                    engine.add(request)
            else:
                r, s = summarising[out.id]
                s.tokens.extend(out.tokens)
                s.logp.extend(out.logp)
                if out.finished and grade is not None:
                    s.verdict = grade(r, s)

    for r in rollouts:
        for s in r.summaries:
            if s.verdict is not None:
                s.score, s.verdict = float(s.verdict.result()), None
    return rollouts


def thinking_request(r: Rollout, sampling: Sampling, markers: Markers) -> Request:
    """Ask for a trace: the prompt, then at most b_M tokens."""
    return Request(
        id=r.id,
        prompt=tuple(r.question.prompt),
        max_tokens=sampling.budgets[-1],
        stop=(markers.think_end, *markers.eos),
        seed=request_seed(*sampling.seed, r.question.index, r.sample),
        temperature=sampling.temperature,
        stream=True,
    )


def summary_request(r: Rollout, s: Summary, sampling: Sampling, markers: Markers) -> Request:
    """Ask for a summary: prompt, trace up to the cut, appended text; then the answer."""
    return Request(
        id=f"{r.id}-{s.budget_index}-{s.draw}",
        prompt=(*r.question.prompt, *r.thinking[: s.cut], *s.appended),
        max_tokens=markers.max_summary_tokens,
        stop=markers.eos,
        seed=request_seed(*sampling.seed, r.question.index, r.sample, s.budget_index, s.draw),
        temperature=sampling.temperature,
    )


def extend_thinking(r: Rollout, out: Output, markers: Markers):
    """Append what the engine has sampled of the trace; once it is over, note how it ended."""
    r.thinking.extend(out.tokens)
    r.logp.extend(out.logp)
    if out.finished:
        last = r.thinking[-1]
        if last == markers.think_end:
            r.finish = "closed"
        else:
            r.finish = "eos" if last in markers.eos else "length"


def due_summaries(
    r: Rollout, budgets: tuple[int, ...], num_summaries: int, markers: Markers
) -> list[Summary]:
    """The new, empty summaries of every budget that the trace has crossed or can never reach."""
    due = []
    for j in range(len(r.summaries) // num_summaries, len(budgets)):
        # A trace that still runs at exactly b_j tokens is going to be longer, hence cut there.
        if not r.finish and len(r.thinking) < budgets[j]:
            break
        cut = cut_lengths(len(r.thinking), budgets)[j]
        closed = r.finish == "closed" and cut == len(r.thinking)  # its own </think> is there
        appended = markers.after_closed if closed else markers.after_cut
        due += [Summary(j, draw, cut, list(appended)) for draw in range(num_summaries)]
    return due


def make_grader(grader, tokenizer, markers: Markers) -> Callable[[Rollout, Summary], Any]:
    """grade(rollout, summary) -> a future of its score, or None where the format rule says 0.

    `grader`: anything with submit(summary, ground_truth, question, thinking=, thinking_tokens=) ->
    Future of a score in [0, 1].
    """

    def decode(ids) -> str:
        ids = [i for i in ids if i not in markers.eos]
        return tokenizer.decode(ids, skip_special_tokens=False)

    # The A summaries of a cut share its thinking, which can be long; caching answers gains nothing.
    decode_thinking = lru_cache(maxsize=256)(decode)

    def grade(rollout: Rollout, summary: Summary):
        thinking = decode_thinking(tuple(rollout.thinking[: summary.cut]))
        appended, answer = decode(summary.appended), decode(summary.tokens)
        if not has_one_think_end(thinking, appended, answer):
            return None
        question, context = rollout.question, {"thinking": thinking, "thinking_tokens": summary.cut}
        return grader.submit(answer, question.ground_truth, question.text, **context)

    return grade


def scores_of(
    rollouts: list[Rollout], num_rollouts: int, num_budgets: int, num_summaries: int
) -> torch.Tensor:
    """The verdicts as one tensor, [B, G, M, A]."""
    flat = [s.score for r in rollouts for s in r.summaries]
    return torch.tensor(flat).reshape(-1, num_rollouts, num_budgets, num_summaries)


def cuts_of(rollouts: list[Rollout], num_rollouts: int, budgets: tuple[int, ...]) -> torch.Tensor:
    """The cut of every budget, [B, G, M], int64."""
    cuts = [cut_lengths(len(r.thinking), budgets) for r in rollouts]
    return torch.tensor(cuts).reshape(-1, num_rollouts, len(budgets))
