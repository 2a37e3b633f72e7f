"""What would the model answer if it had to stop now? One question, watched while it thinks, or
shown afterwards."""

import sys

from rewards import answer_paragraph
from rollout import Markers, Rollout, Sampling, sample_rollouts
from runtime.engines import PlainEngine
from tasks.verifier import extract_answer


def ask(engine, question, sampling: Sampling, opened, label: str = "", out=None):
    """Sample one trace of `question` and an answer at each budget; print both as they come.

    The same tokens as sample 0 of question 0 in an evaluation of the same seed and budgets.
    """
    if isinstance(engine, PlainEngine):
        engine.one_token_steps = True
    watched = Watched(engine, sampling.budgets, opened.markers, opened.tokenizer, out or sys.stdout)
    print(f"{label and label + ': '}{question.text}", file=watched.out)
    sample_rollouts(watched, [question], sampling, opened.markers)
    watched.close()


class Watched:
    """An engine around an engine, which prints what comes through: the trace token by token, and
    each answer at its budget. There the trace's print waits for the answer; its sampling does not.
    """

    def __init__(self, engine, budgets: tuple[int, ...], markers: Markers, tokenizer, out):
        self.engine, self.budgets, self.markers = engine, budgets, markers
        self.tokenizer, self.out = tokenizer, out
        self.thinking: list[int] = []
        self.answers: dict[int, list[int]] = {}  # budget index -> tokens so far
        self.complete: set[int] = set()
        self.over = False  # the trace has ended
        self.printed, self.asked = "", 0  # of the trace; budgets whose answer is printed

    def add(self, request):
        self.engine.add(request)

    def has_work(self) -> bool:
        return self.engine.has_work()

    def step(self):
        outputs = self.engine.step()
        for out in outputs:
            _, _, *summary = map(int, out.id.split("-"))  # question-sample[-budget-draw]
            if not summary:
                self.thinking += out.tokens
                self.over = self.over or out.finished
            else:
                self.answers.setdefault(summary[0], []).extend(out.tokens)
                self.complete |= {summary[0]} if out.finished else set()
        self.show()
        return outputs

    def show(self):
        """Print the trace up to the next budget, that budget's answer if it is complete, go on."""
        while self.asked < len(self.budgets):
            budget = self.budgets[self.asked]
            text = self.tokenizer.decode(self.thinking[:budget])
            if not text.endswith("\ufffd") or self.over:  # else: half a character
                print(text[len(self.printed) :], end="", file=self.out, flush=True)
                self.printed = text
            if self.asked not in self.complete:
                return
            self.print_answer(budget)

    def print_answer(self, budget: int):
        tokens = [t for t in self.answers.get(self.asked, []) if t not in self.markers.eos]
        text = answer_paragraph(self.tokenizer.decode(tokens))
        answer = extract_answer(text) or (text and f"(no box) {text}") or "none: the text had ended"
        seen = min(budget, len(self.thinking))
        after = f"{budget} tokens" + ("" if seen == budget else f" (the trace has {seen})")
        bold = ("\033[1m", "\033[0m") if self.out.isatty() else ("", "")
        print(f"\n    {bold[0]}after {after}: {answer}{bold[1]}", file=self.out, flush=True)
        self.asked += 1

    def close(self):
        """What was never asked for: budgets behind an end-of-text."""
        self.complete = set(range(len(self.budgets)))
        self.show()


def readable(rollout: Rollout, budgets: tuple[int, ...], tokenizer) -> dict:
    """A rollout as text: at each budget the thinking since the one before, and its first summary's
    answer and score. As JSON in samples.jsonl, and on the terminal after training."""
    cuts, start, draws = [], 0, len(rollout.summaries) // len(budgets)
    for b, s in zip(budgets, rollout.summaries[::draws]):
        cuts.append(
            {
                "budget": b,
                "thinking": tokenizer.decode(rollout.thinking[start : s.cut]),
                "answer": tokenizer.decode(s.tokens).removesuffix(tokenizer.eos_token),
                "score": s.score,
            }
        )
        start = s.cut
    return {
        "question": rollout.question.text,
        "ground_truth": rollout.question.ground_truth,
        "finish": rollout.finish,
        "cuts": cuts,
    }


def example_lines(example: dict, width: int = 60) -> list[str]:
    """A rollout (from `readable`) as a line per budget; of a long text, its end."""

    def flat(text: str, width: int) -> str:
        text = " ".join(text.split())
        return text if len(text) <= width else "…" + text[1 - width :]

    longest = min(width, max(len(flat(cut["thinking"], width)) for cut in example["cuts"]))
    return [
        f"{cut['budget']:>8}  {flat(cut['thinking'], width):{longest}}  -> "
        f"{flat(cut['answer'], 30):30}  {'right' if cut['score'] else 'wrong'}"
        for cut in example["cuts"]
    ]
