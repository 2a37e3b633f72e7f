"""Requesting summaries while traces think on, against waiting for the traces, on the vLLM engine.

    OMP_NUM_THREADS=1 python scripts/bench_streaming.py          # about two minutes of one core
    python scripts/bench_streaming.py --slots 64 --max-budget 1024

Streaming requests the summaries of a trace when it crosses a budget; two-phase when all traces have
ended (TwoPhases around the engine). Both sample the same tokens, which is checked in every repeat.
Lengths are skewed like those of a reasoning model: exponential with a third of the largest budget
as mean; about one trace in twenty reaches it. They are imposed, and weights are random, so only the
timing means anything. Both sides run in turn in one process; ratios are medians over repeats of
streaming / two-phase, each repeat against its own neighbour. Engine steps do not depend on the
machine; wall time does, so the process's CPU time (one thread) stands beside it.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import torch
import tyro

from budgets import BudgetPrior
from rollout import Markers, Sampling, sample_rollouts
from runtime import distributed
from runtime.data import Question
from runtime.engines import VllmEngine
from tasks import arithmetic
from tests.conftest import TwoPhases


class Imposed:
    """The engine, with the length of every trace given beforehand, and a record of what happened at
    which step."""

    def __init__(self, engine, lengths: dict[str, int]):
        self.engine, self.lengths = engine, lengths
        self.steps, self.first_summary, self.last_thinking = 0, 0, 0

    def add(self, request):
        if request.stream:
            request = replace(request, max_tokens=self.lengths[request.id], stop=())
        self.engine.add(request)

    def has_work(self):
        return self.engine.has_work()

    def step(self):
        self.steps += 1
        outputs = self.engine.step()
        for out in outputs:
            if out.finished and out.id in self.lengths:
                self.last_thinking = self.steps
            elif out.finished:
                self.first_summary = self.first_summary or self.steps
        return outputs


def write_model(path: Path, context: int):
    """The miniature's architecture with random weights and a longer context."""
    torch.manual_seed(0)
    arithmetic.make_model(max_position_embeddings=context).save_pretrained(path)


def compare(engine, questions, sampling: Sampling, markers, lengths, repeats):
    """Runs of both sides in turn: {side: [(steps, wall seconds, CPU seconds, first summary's step,
    last thinking's step)]}."""
    runs = {"streaming": [], "two-phase": []}
    for repeat in range(repeats + 1):
        texts = {}
        for side in list(runs) if repeat % 2 else list(runs)[::-1]:
            assert engine.engine.reset_prefix_cache()  # neither side finds what the other computed
            counted = Imposed(engine, lengths)
            side_engine = counted if side == "streaming" else TwoPhases(counted)
            drawn = replace(sampling, seed=(0, repeat))
            start, cpu_start = time.perf_counter(), time.process_time()
            rollouts = sample_rollouts(side_engine, questions, drawn, markers)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            texts[side] = [(r.thinking, [s.tokens for s in r.summaries]) for r in rollouts]
            steps = (counted.first_summary, counted.last_thinking)
            if repeat:  # the first one warms up
                runs[side].append((counted.steps, seconds, cpu_seconds, *steps))
        assert texts["streaming"] == texts["two-phase"], "the two sides must sample the same tokens"
    return runs


@dataclass(frozen=True)
class Arguments:
    """Streaming against two-phase sampling."""

    slots: tuple[int, ...] = (32, 512)  # Requests that run at a time, one table row each.
    questions: int = 8  # B
    rollouts: int = 8  # G
    budgets: int = 4  # M, evenly spaced.
    summaries: int = 4  # A, per budget.
    max_budget: int = 512  # b_M
    max_summary_tokens: int = 21  # Generated ones.
    repeats: int = 5


def main(a: Arguments):
    prompt_tokens = 32
    longest = prompt_tokens + a.max_budget + 3 + a.max_summary_tokens  # three are appended
    rng = random.Random(0)
    lengths = {
        f"{q}-{g}": min(a.max_budget, max(8, round(-math.log(1 - rng.random()) * a.max_budget / 3)))
        for q in range(a.questions)
        for g in range(a.rollouts)
    }
    questions = [
        Question(q, "?", "5", tuple(rng.randrange(5, 40) for _ in range(prompt_tokens)))
        for q in range(a.questions)
    ]
    markers = Markers.from_tokenizer(arithmetic.make_tokenizer(), a.max_summary_tokens)
    budgets = BudgetPrior.make("uniform", a.max_budget, a.budgets).budgets
    sampling = Sampling(budgets, a.rollouts, a.summaries, 1.0, (0, 0))
    ordered = sorted(lengths.values())
    print(
        f"{len(lengths)} traces of {ordered[0]}..{ordered[-1]} tokens (median "
        f"{statistics.median(ordered):.0f}), budgets {budgets}, "
        f"{a.summaries} summaries each of up to {a.max_summary_tokens}; "
        f"medians of {a.repeats} repeats",
        flush=True,
    )

    table = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), longest)
        for slots in a.slots:
            device = distributed.start()
            torch.set_num_threads(1)
            engine = VllmEngine(folder, device, longest, slots=slots)
            runs = compare(engine, questions, sampling, markers, lengths, a.repeats)
            engine.close()
            for side, values in runs.items():
                table.append((slots, side, *(statistics.median(v) for v in zip(*values))))
            ratios = [
                [x / y for x, y in zip(s, t)] for s, t in zip(runs["streaming"], runs["two-phase"])
            ]
            table.append((slots, "ratio", *(statistics.median(r) for r in zip(*ratios))))
            table.append((slots, "  lowest", *map(min, zip(*ratios))))
            table.append((slots, "  highest", *map(max, zip(*ratios))))
    distributed.stop()

    head = f"{'slots':>6}  {'':10}{'steps':>8}{'wall s':>9}{'CPU s':>9}"
    print(head + f"{'first summary at':>18}{'last trace at':>18}")
    for slots, name, steps, seconds, cpu_seconds, first, last in table:
        digits = 0 if name in ("streaming", "two-phase") else 2  # whole steps, or ratios
        print(
            f"{slots:6}  {name:10}{steps:8.{digits}f}{seconds:9.2f}{cpu_seconds:9.2f}"
            f"{first:18.{digits}f}{last:18.{digits}f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
