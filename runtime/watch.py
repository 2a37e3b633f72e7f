"""Traces as text: a question answered while the model thinks about it, and examples afterwards."""

import sys

from rewards import answer_paragraph
from rollout import Rollout, Sampling, Summary, sample_rollouts
from runtime.engines import PlainEngine
from runtime.stopping import majority, stopping_cut
from tasks.verifier import extract_answer


def ask(engine, question, sampling: Sampling, opened, label: str = "", patience: int = 0, out=None):
    """Sample one trace of `question` and an answer at each budget; print both as they come.

    The tokens are those of sample 0 of question 0 in an evaluation of the same seed and budgets.
    `patience`: stop once the answer has stayed the same at as many budgets in a row; 0: never.
    """
    if isinstance(engine, PlainEngine):
        engine.one_token_steps = True
    watched = Watched(engine, question, sampling, opened.tokenizer, patience, out or sys.stdout)
    print(f"{label and label + ': '}{question.text}", file=watched.out)
    (rollout,) = sample_rollouts(watched, [question], sampling, opened.markers, watched.answered)
    for summary in rollout.summaries:  # also those after an end-of-text, which are never sampled
        watched.answered(rollout, summary)


class Watched:
    """An engine around an engine that prints the trace token by token and, at each budget, the
    answer given there. Printing waits for an answer; sampling does not."""

    def __init__(self, engine, question, sampling: Sampling, tokenizer, patience: int, out):
        self.engine, self.add, self.budgets = engine, engine.add, sampling.budgets
        self.trace_id, self.thinking, self.finished = Rollout(question, 0).id, [], False
        self.tokenizer, self.out, self.printed = tokenizer, out, ""  # the part of the trace
        self.patience, self.stopped = patience, False
        # Of each budget and draw: what was boxed or None, and what is printed.
        self.answers = [[None] * sampling.num_summaries for _ in self.budgets]
        self.budget_index = 0  # the next one whose answer is to be printed

    def has_work(self) -> bool:
        return self.engine.has_work() and not self.stopped

    def step(self):
        outputs = self.engine.step()
        for out in outputs:
            if out.id == self.trace_id:
                self.thinking += out.tokens
                self.finished = out.finished
        self.show()
        return outputs

    def answered(self, rollout: Rollout, summary: Summary):
        text = graded_text(summary, self.tokenizer)
        boxed = extract_answer(text) or None
        shown = boxed or (text and f"(no box) {text}") or "none: the text had ended"
        self.answers[summary.budget_index][summary.draw] = boxed, shown
        self.show()

    def show(self):
        """Print the trace up to the next budget, its answer if it is complete, and go on."""
        while self.budget_index < len(self.budgets) and not self.stopped:
            budget, drawn = self.budgets[self.budget_index], self.answers[self.budget_index]
            seen = self.thinking[:budget]
            text = self.tokenizer.decode(seen).rstrip("\ufffd")  # no part of a character
            print(text[len(self.printed) :], end="", file=self.out, flush=True)
            self.printed = text
            if None in drawn:
                return
            _, answer = drawn[majority([boxed for boxed, _ in drawn])]
            after = f"{budget} tokens" + f" (the trace has {len(seen)})" * (len(seen) < budget)
            bold, plain = ("\033[1m", "\033[0m") if self.out.isatty() else ("", "")
            line = f"{bold}after {after}: {answer}{plain}"
            print(f"\n    {line}", file=self.out, flush=True)
            self.budget_index += 1
            answers = [[boxed for boxed, _ in row] for row in self.answers[: self.budget_index]]
            running = not self.finished or budget < len(self.thinking)
            if self.patience and running and stopping_cut(answers, self.patience) is not None:
                self.stopped = True  # by now the trace has gone on, while the answer was sampled
                saved = 0 if self.finished else self.budgets[-1] - len(self.thinking)
                why = f"stopped: the same answer at {self.patience} budgets in a row. Saved {saved}"
                print(f"{why} of at most {self.budgets[-1]} tokens of thinking", file=self.out)


def answer_text(summary: Summary, tokenizer) -> str:
    return tokenizer.decode(summary.tokens).removesuffix(tokenizer.eos_token)


def graded_text(summary: Summary, tokenizer) -> str:
    """The part of a summary that its answer is read from."""
    return answer_paragraph(answer_text(summary, tokenizer))


def readable(rollout: Rollout, budgets: tuple[int, ...], tokenizer) -> dict:
    """A rollout as text: at each budget the thinking since the one before, and its first summary's
    answer and score. As JSON in samples.jsonl, and on the terminal after training."""
    cuts, start, draws = [], 0, len(rollout.summaries) // len(budgets)
    for budget, s in zip(budgets, rollout.summaries[::draws]):
        thinking = tokenizer.decode(rollout.thinking[start : s.cut])
        answer = answer_text(s, tokenizer)
        cuts.append({"budget": budget, "thinking": thinking, "answer": answer, "score": s.score})
        start = s.cut
    question, truth = rollout.question.text, rollout.question.ground_truth
    return {"question": question, "ground_truth": truth, "finish": rollout.finish, "cuts": cuts}


def example_lines(example: dict, width: int = 44) -> list[str]:
    """A rollout (from `readable`) as a line per budget; of a long text, its end."""

    def flat(text: str, width: int) -> str:
        text = " ".join(text.split())
        return text if len(text) <= width else "…" + text[1 - width :]

    longest = max(len(flat(cut["thinking"], width)) for cut in example["cuts"])
    return [
        f"{cut['budget']:>8}  {flat(cut['thinking'], width):{longest}}  -> "
        f"{flat(cut['answer'], 30):30}  {'right' if cut['score'] else 'wrong'}"
        for cut in example["cuts"]
    ]
