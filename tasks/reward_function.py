"""Your own reward in the math verifier's place: --reward module:function

    def function(summary: str, ground_truth, question: str) -> float:       # in [0, 1]

`summary` is all that the policy wrote behind the answer header (the verifier reads its first
paragraph only), without end-of-text; a summary that breaks the format rule, one </think>, scores 0
unasked. `ground_truth` is the row's, as JSON has it, or None. The function may return a future.

It runs where grading runs, while the engine samples on: in processes of its own, started with exec
(no copy of a process with CUDA and threads) and without torch. A call that takes longer than
`timeout` is killed with its process. That, a death, an exception and a value outside [0, 1] score 0
and are counted as the verifier counts its failures; the first is printed.
"""

import importlib
import inspect
import json
import os
import sys
from concurrent.futures import Future
from pathlib import Path

from rewards import answer_paragraph
from tasks.verifier import START_TIMEOUT, Grader, Verifier, ask, serve, start


class RewardFunction(Grader):
    """`submit` summaries as they arrive; one thread and one process per worker grade them."""

    def __init__(self, name: str, num_workers: int = 2, timeout: float = 10.0):
        self.name, self._complained = name, False
        super().__init__(command(name), num_workers, timeout)

    def submit(self, summary: str, ground_truth, question: str) -> Future:
        """A future of a score in [0, 1] that never raises."""
        future, task = Future(), json.dumps([summary, ground_truth, question], default=str)
        self._ask(task, lambda reply: self._finish(future, reply))
        return future

    def _finish(self, future: Future, text: str):
        words = {"timeouts": f"no answer within {self.timeout} s", "deaths": "its process died"}
        reply = {"error": words[text]} if text in words else json.loads(text)
        with self._lock:
            self.stats["graded"] += 1
            if "error" in reply:
                self.stats[text if text in words else "exceptions"] += 1
            first = "error" in reply and not self._complained
            self._complained |= first
        if first:
            print(
                f"WARNING --reward {self.name}: {reply['error']}. Such summaries score 0 and are "
                "counted; further ones are not printed",
                file=sys.stderr,
                flush=True,
            )
        future.set_result(reply.get("score", 0.0))


def command(name: str) -> list[str]:
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); import tasks.reward_function as f; f.work()"
    return ["-c", code, name]


class SummaryVerifier(Verifier):
    """The math verifier, on the part of a summary that counts: its first paragraph."""

    def submit(self, summary: str, ground_truth, question: str = "") -> Future:
        return super().submit(answer_paragraph(summary), ground_truth)


def make_verifier(c):
    """What grades, by the flag --reward: the math verifier, or a function."""
    if c.reward == "math":
        return SummaryVerifier(c.verifier_workers)
    return RewardFunction(c.reward, c.verifier_workers, c.reward_timeout)


def reward_source(name: str) -> str:
    """The name and, where it is a file in the current directory, the text of the function's module:
    scores that are kept are of this text."""
    path = Path(name.partition(":")[0].replace(".", "/") + ".py")
    return name + (path.read_text() if path.is_file() else "")


def require_reward(name: str):
    """ValueError where the function cannot be found, imported or called with three arguments."""
    if name == "math":
        return
    process = start(command(name))
    reply = ask(process, "", START_TIMEOUT)
    process.kill()
    if reply != "ready":
        error = json.loads(reply)["error"] if reply[0] == "{" else "importing it ends the process"
        raise ValueError(
            f"--reward {name}: {error}. It wants module:function, the module in the "
            "current directory or installed, and function(summary, ground_truth, "
            "question)"
        )


def load(name: str):
    """The function, which must take three arguments."""
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    inspect.signature(function).bind("", None, "")
    return function


def call(function, line: str) -> str:
    """A score as JSON. ValueError for a value outside of [0, 1]."""
    score = function(*json.loads(line))
    score = float(score.result() if hasattr(score, "result") else score)
    if not 0 <= score <= 1:
        raise ValueError(f"it returned {score}, which is not in [0, 1]")
    return json.dumps({"score": score})


def serve_function(name: str, parent: int):
    """A worker: the function is imported at the first line, and called for all others."""
    function = None

    def answer(line: str) -> str:
        nonlocal function
        try:
            if line:
                return call(function, line)
            function = load(name)
            return "ready"
        except Exception as e:
            return json.dumps({"error": f"{type(e).__name__}: {e}"})

    sys.path.insert(0, os.getcwd())
    serve(answer, parent)


def work():
    """A worker process: name of the function and pid of the parent on the command line."""
    serve_function(sys.argv[1], int(sys.argv[2]))
