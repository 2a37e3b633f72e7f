"""Traces as text: a question answered while the model thinks about it, and examples afterwards."""

import sys

from rewards import answer_paragraph
from rollout import Rollout, Sampling, Summary, sample_rollouts
from runtime.engines import PlainEngine
from tasks.verifier import extract_answer


def ask(engine, question, sampling: Sampling, opened, label: str = "", out=None):
    """Sample one trace of `question` and an answer at each budget; print both as they come.

    The tokens are those of sample 0 of question 0 in an evaluation of the same seed and budgets.
    """
    if isinstance(engine, PlainEngine):
        engine.one_token_steps = True
    watched = Watched(engine, question, sampling.budgets, opened.tokenizer, out or sys.stdout)
    print(f"{label and label + ': '}{question.text}", file=watched.out)
    (rollout,) = sample_rollouts(watched, [question], sampling, opened.markers, watched.answered)
    for summary in rollout.summaries:  # also those after an end-of-text, which are never sampled
        watched.answered(rollout, summary)
    watched.show()


class Watched:
    """An engine around an engine that prints the trace token by token and, at each budget, the
    answer given there. Printing waits for an answer; sampling does not."""

    def __init__(self, engine, question, budgets: tuple[int, ...], tokenizer, out):
        self.engine, self.add, self.has_work = engine, engine.add, engine.has_work
        self.trace_id, self.budgets = Rollout(question, 0).id, budgets
        self.tokenizer, self.out, self.thinking = tokenizer, out, []
        self.answers, self.printed = {}, ""  # {budget index: answer}; the part of the trace
        self.budget_index = 0  # the next one whose answer is to be printed

    def step(self):
        outputs = self.engine.step()
        self.thinking += [t for out in outputs if out.id == self.trace_id for t in out.tokens]
        self.show()
        return outputs

    def answered(self, rollout: Rollout, summary: Summary):
        if summary.draw == 0:
            text = answer_paragraph(answer_text(summary, self.tokenizer))
            answer = extract_answer(text) or (text and f"(no box) {text}")
            self.answers[summary.budget_index] = answer or "none: the text had ended"

    def show(self):
        """Print the trace up to the next budget, its answer if it is complete, and go on."""
        while self.budget_index < len(self.budgets):
            budget = self.budgets[self.budget_index]
            seen = self.thinking[:budget]
            text = self.tokenizer.decode(seen).rstrip("\ufffd")  # no part of a character
            print(text[len(self.printed) :], end="", file=self.out, flush=True)
            self.printed = text
            if self.budget_index not in self.answers:
                return
            after = f"{budget} tokens" + f" (the trace has {len(seen)})" * (len(seen) < budget)
            bold, plain = ("\033[1m", "\033[0m") if self.out.isatty() else ("", "")
            line = f"{bold}after {after}: {self.answers[self.budget_index]}{plain}"
            print(f"\n    {line}", file=self.out, flush=True)
            self.budget_index += 1


def answer_text(summary: Summary, tokenizer) -> str:
    return tokenizer.decode(summary.tokens).removesuffix(tokenizer.eos_token)


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


def example_lines(example: dict, width: int = 60) -> list[str]:
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
