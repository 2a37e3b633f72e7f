"""A reward function of your own in the math verifier's place: --reward module:function

    def function(summary: str, ground_truth, question: str) -> float:       # in [0, 1]

`summary` is what the policy wrote after the answer header, without end-of-text; one that breaks the
format rule scores 0 without a call. `ground_truth` is the row's, as JSON has it, or None. A future
may be returned. Calls run while the sampler goes on, in processes without torch, and are killed
after `timeout` seconds. That, a death, an error and a value outside [0, 1] score 0 and are counted.
"""

import importlib
import inspect
import json
import sys
from concurrent.futures import Future
from pathlib import Path

from tasks.verifier import FAILURES, Grader, exchange, serve_worker, start_worker


class RewardFunction(Grader):
    """A user's function, called in `num_workers` processes."""

    def __init__(self, name: str, num_workers: int = 2, timeout: float = 10.0):
        self.flag = f"--reward {name}"
        super().__init__(worker_command(name), num_workers, timeout)

    def submit(self, summary: str, ground_truth, question: str) -> Future:
        """A future of a score in [0, 1], never an error."""
        future, call = Future(), json.dumps([summary, ground_truth, question], default=str)
        self._enqueue(call, lambda reply: self._finish(future, reply))
        return future

    def _finish(self, future: Future, reply: str):
        lost = {"timeouts": f"no score within {self.timeout} s", "deaths": "its process died"}
        score = lost.get(reply) or json.loads(reply)  # or in words what went wrong
        with self._lock:
            self.stats["graded"] += 1
            if isinstance(score, str):
                self.stats[reply if reply in lost else "exceptions"] += 1
                if sum(map(self.stats.get, FAILURES)) == 1:
                    print(f"WARNING {self.flag}: {score}; such summaries score 0", file=sys.stderr)
                score = 0.0
        future.set_result(score)


def require_reward(name: str):
    """ValueError where the function cannot be found, imported or called with three arguments."""
    if name == "math":
        return
    process = start_worker(worker_command(name))
    reply = exchange(process)
    process.kill()
    if reply != "ready":
        error = json.loads(reply) if reply[0] == '"' else "importing it ends the process, or hangs"
        fix = "the module in the current directory or installed, function(summary, truth, question)"
        raise ValueError(f"--reward {name}: {error}. It must be module:function, {fix}")


def reward_source(name: str) -> str:
    """The name and, for a file in the current directory, its text: scores depend on it."""
    path = Path(name.partition(":")[0].replace(".", "/") + ".py")
    return name + (path.read_text() if path.is_file() else "")


def worker_command(name: str) -> list[str]:
    # At first the root, so that nothing in the current directory shadows what the worker imports.
    root = str(Path(__file__).resolve().parents[1])
    start = f"import sys; sys.path[0] = {root!r}; import tasks.reward_function as f; f.work()"
    return ["-c", start, name]


def work():
    """A worker process, which answers its parent's lines."""
    sys.path[0] = ""  # from here on, imports are the user's
    for module in [m for m in sys.modules if m.partition(".")[0] == "tasks"]:
        del sys.modules[module]  # a package of the user's may be called tasks
    serve_worker(lambda line: reply_to(line, sys.argv[1]), int(sys.argv[2]))


def reply_to(line: str, name: str) -> str:
    """A score, or in words what went wrong, as JSON. To an empty line: can it be called?"""
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        inspect.signature(function).bind("", None, "")
        if not line:
            return "ready"
        score = function(*json.loads(line))
        score = float(score.result() if hasattr(score, "result") else score)
        if not 0 <= score <= 1:
            raise ValueError(f"it returned {score}, which is not in [0, 1]")
        return json.dumps(score)
    except Exception as e:
        return json.dumps(f"{type(e).__name__}: {e}")
