"""A reward function of your own in the math verifier's place: --reward module:function

    def function(summary: str, ground_truth, question: str) -> float:       # in [0, 1]

`summary` is what the policy wrote after the answer header, without end-of-text; one that breaks the
format rule scores 0 without a call. `ground_truth` is the row's, or None. A function that names
`thinking` (str, up to the cut) or `thinking_tokens` (int) gets these as well. A future may be
returned. Calls run while the sampler goes on, in processes without torch, and are killed after
`timeout` seconds. That, a death, an error and a value outside [0, 1] score 0 and are counted.
"""

import contextlib
import functools
import importlib
import inspect
import sys
from concurrent.futures import Future
from pathlib import Path

from tasks.verifier import FAILURES, Grader

ROOT = str(Path(__file__).resolve().parents[1])
START_TIMEOUT = 300.0  # seconds for the imports of a module, which may load a judge's weights
CONTEXT = {"thinking": "", "thinking_tokens": 0}  # what a function may ask for by name


class RewardFunction(Grader):
    """A user's function, called in `num_workers` processes."""

    def __init__(self, name: str, num_workers: int = 2, timeout: float = 10.0):
        self.name = name
        super().__init__(_call, num_workers, timeout, _problem, name)

    def submit(self, summary: str, ground_truth, question: str = "", **context) -> Future:
        """A future of a score in [0, 1], never an error. The context is CONTEXT's."""
        score, task = Future(), (self.name, (summary, ground_truth, question), context)
        self._after_fork()
        self._schedule(task, lambda reply: self._finish(reply, score))
        return score

    def _finish(self, reply, score: Future):
        if isinstance(reply, str):
            lost = {"timeouts": f"no score within {self.timeout} s", "deaths": "its process died"}
            if not any(self.stats[failure] for failure in FAILURES):
                message = f"{lost.get(reply, reply)}; such summaries score 0"
                print(f"WARNING --reward {self.name}: {message}", file=sys.stderr)
            reply = reply if reply in lost else "exceptions"
        self._count(reply, score)


def require_reward(name: str, ground_truth=None, question: str = ""):
    """ValueError where the function cannot be found, imported or called, or returns no number.

    It is called once, with the ground truth in a box as the summary.
    """
    if name == "math":
        return
    found = Future()
    with Grader(_problem, 1, START_TIMEOUT, str) as grader:
        trial = (f"\\boxed{{{ground_truth}}}", ground_truth, question)
        grader._schedule((name, trial), found.set_result)
        problem = found.result()
    if problem:
        lost = ("deaths", "timeouts")
        problem = "importing it ends the process, or hangs" if problem in lost else problem
        fix = "the module in the current directory or installed, function(summary, truth, question)"
        raise ValueError(f"--reward {name}: {problem}. It must be module:function, {fix}")


def reward_source(name: str) -> str:
    """The name and, for a file in the current directory, its text: scores depend on it."""
    path = Path(name.partition(":")[0].replace(".", "/") + ".py")
    return name + (path.read_text() if path.is_file() else "")


@functools.cache
def _load(name: str):
    """The function, in a worker. Its modules may be called like ours: `tasks` is the user's."""
    ours = {key: sys.modules.pop(key) for key in [*sys.modules] if key.split(".")[0] == "tasks"}
    sys.path[:] = ["", *(path for path in sys.path if path != ROOT)]
    try:
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute)
    finally:
        sys.modules.update(ours)


def _problem(name: str, trial: tuple) -> str:
    """In words why the function, which is called with `trial`, cannot be used; "" if it can."""
    try:
        function = _load(name)
        if inspect.isclass(function) or not callable(function):
            return f"it is a {type(function).__name__}, not a function"
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            return "it is async or a generator; a reward is returned"
        context = _arguments(function, CONTEXT)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    with contextlib.suppress(Exception):  # of a text that nobody wrote, it may complain
        score = function(*trial, **context)
        if not hasattr(score, "__float__") and not hasattr(score, "result"):
            return f"it returned {score!r}, a {type(score).__name__}, which is not a number"
    return ""


def _arguments(function, context: dict) -> dict:
    """The part of the context that the function names. TypeError if it cannot be called with it."""
    signature = inspect.signature(function)
    wanted = {name: value for name, value in context.items() if name in signature.parameters}
    signature.bind("", None, "", **wanted)
    return wanted


def _call(name: str, call: tuple, context: dict) -> float | str:
    """A score, or in words what went wrong, in a worker."""
    try:
        function = _load(name)
        score = function(*call, **_arguments(function, context))
        score = float(score.result() if hasattr(score, "result") else score)
        return score if 0 <= score <= 1 else f"it returned {score}, which is not in [0, 1]"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
