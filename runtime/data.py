"""Where do questions come from?

A row is a question with its ground truth. Rows are read from a local .json, .jsonl or .parquet
file, from a named set on the Hugging Face hub, or made by the miniature; checked one by one; and
turned into prompts by the model's own tokenizer. Their order is a function of (seed, step) alone.
"""

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from runtime.config import Config
from runtime.models import first_line, skip_unreachable_hub
from tasks import arithmetic
from tasks.verifier import is_valid_ground_truth

# name -> (hub dataset repository, file, question field, answer field)
NAMED_SETS = {
    "deepscaler": (
        "agentica-org/DeepScaleR-Preview-Dataset",
        "deepscaler.json",
        "problem",
        "answer",
    ),
}
# The five files that the paper's numbers are on, from its authors' repository at one commit, with
# their SHA-256; "paper" stands for all five. Minerva lists several accepted answers for 75 of its
# 272 questions there, and OlympiadBench has 675 rows.
#
# An answer is right if it verifies against any one of the listed ground truths, each tried alone.
# For 6 Minerva questions the two listed answers do not verify against each other: four differ in
# value (0.01 and 0.02; 6630.65 and 6630; 3.53 and 3.52 × 10^2; a solution with and without its
# homogeneous part), two in form alone (t/m and (1/m)t; c/√2 and (1/√2)c). All stay: the makers of
# the set accept either, and so does the authors' code.
PAPER_SETS_URL = (
    "https://raw.githubusercontent.com/sail-sg/AnytimeReasoner/"
    "80cf3299c59bbe8670f485e446efbe80220467f2/anytime_reasoner/data/test/"
)
PAPER_SETS = {  # 30, 83, 500, 272 and 675 questions
    "paper/aime": "03fd341fee10fb71cf906be4eb3042081f314c4d16077489e41f9375085d20d2",
    "paper/amc": "2666a217cb566efb77ebfce61841d5d8855d4b4be89633b29df3a43dcfd942dd",
    "paper/math": "02e232722dd1f9ab307124bfff40621d32193632b6b84aa9a246e701f0478141",
    "paper/minerva": "ba6147602d8b2f9071ecf578e29aa1100c634bdfa982d4c6745c2bd3077554ba",
    "paper/olympiad_bench": "c1e099f7b5830fb843fa52d48d0af8a296a94745cb5981b4ce539dd18af6f8ee",
}
MINIATURE_ROWS = {"train": 2048, "test": 512}


@dataclass(frozen=True)
class Question:
    index: int  # its place in the set: part of every random key
    text: str
    ground_truth: object  # str, int, float, or a list of alternatives
    prompt: tuple[int, ...]  # token ids, chat template applied


def load_rows(
    source: str,
    question_field: str = "problem",
    answer_field: str = "answer",
    split: str = "train",
    need_ground_truth: bool = True,
) -> tuple[list[tuple[str, object]], int]:
    """(question, ground_truth) rows of a file, a named set or the miniature's `split`, and a count.

    The count is of rows dropped for a ground truth of None or blank: no answer could ever score.
    A reward function of the user's own may do without (need_ground_truth False): all are kept.
    ValueError names the file, the row and the fix.
    """
    if source == "miniature":
        return arithmetic.make_rows(split, MINIATURE_ROWS[split]), 0
    if source in PAPER_SETS:
        path, question_field, answer_field = fetch_paper_set(source), "problem", "answer"
    elif source in NAMED_SETS:
        path, question_field, answer_field = _download(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(
                f"{source} is neither a file nor one of the named sets "
                f"({', '.join([*NAMED_SETS, 'paper', *PAPER_SETS])})"
            )
    rows, dropped = [], 0
    for where, record in _records(path):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, {where}: expected an object with {question_field!r} and "
                f"{answer_field!r}, got {str(record)[:60]!r}"
            )
        for name in (question_field, answer_field)[: 1 + need_ground_truth]:
            if name not in record:
                raise ValueError(
                    f"{path}, {where}: no field {name!r} (it has "
                    f"{', '.join(record)}): name the right ones with --question-field "
                    "and --answer-field"
                )
        question, truth = record[question_field], record.get(answer_field)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(
                f"{path}, {where}: {question_field!r} is not a text: {str(question)[:60]!r}"
            )
        truth = truth.tolist() if isinstance(truth, np.ndarray) else truth
        truth = format(truth, "f") if isinstance(truth, Decimal) else truth  # parquet's decimals
        try:
            f"{question}{truth}".encode()
        except UnicodeEncodeError:  # JSON can say \ud800, which no tokenizer takes
            raise ValueError(
                f"{path}, {where}: half of a surrogate pair (\\ud800 to \\udfff) is "
                "no text: write the whole character"
            ) from None
        # To Python a bool is a number, to a grader true is not 1.
        gradable = not isinstance(truth, bool) and is_valid_ground_truth(truth)
        if gradable or not need_ground_truth:
            rows.append((question, truth))
        else:
            dropped += 1
    if not rows:
        raise ValueError(f"{path} holds no usable row: it is empty, or every ground truth is blank")
    return rows, dropped


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) pairs; `where` is a .jsonl's line or another format's row, from 1."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parse(line.strip(), path, number)
    elif path.suffix == ".json":
        records = _parse(_text(path), path, 1)
        if not isinstance(records, list):
            raise ValueError(
                f"{path}, line 1: expected a list of objects; for one object a line, "
                "name the file .jsonl"
            )
        yield from ((f"row {i}", record) for i, record in enumerate(records, 1))
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                f"{path}: reading parquet needs pyarrow: pip install pyarrow"
            ) from None
        try:
            records = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as e:  # pyarrow's errors are both
            raise ValueError(f"{path} is no readable parquet file ({first_line(e)})") from None
        yield from ((f"row {i}", record) for i, record in enumerate(records, 1))
    else:
        raise ValueError(f"{path}: unknown kind {path.suffix!r}: use .json, .jsonl or .parquet")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not in UTF-8 (byte {e.start}): save it as UTF-8") from None


def _parse(text: str, path: Path, number: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {number + e.lineno - 1}: not JSON ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # numbers of thousands of digits, deep nesting
        raise ValueError(
            f"{path}, from line {number} on: cannot be read as JSON ({first_line(e)})"
        ) from None


def _download(name: str) -> tuple[Path, str, str]:
    from huggingface_hub import hf_hub_download

    repo, file, question_field, answer_field = NAMED_SETS[name]
    skip_unreachable_hub()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset")), question_field, answer_field
    except Exception as e:  # offline, renamed, gated: whatever the hub's client raises
        raise ValueError(
            f"cannot fetch {file} of {repo} from the hub ({first_line(e)}): "
            "check the network, or download it and pass the file's path"
        ) from e


def set_names(names: tuple[str, ...]) -> list[str]:
    """The sets that were asked for, the collection "paper" as its five."""
    return [one for name in names for one in (PAPER_SETS if name == "paper" else [name])]


def fetch_paper_set(name: str) -> Path:
    """One of the authors' files, from the cache or their repository, checked by its hash.

    Cached in $XDG_CACHE_HOME/anytime-reasoner (~/.cache without it): a file put there by hand will
    do on a machine without network.
    """
    file, expected = name.removeprefix("paper/") + ".json", PAPER_SETS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anytime-reasoner"
    path = cache / file
    if not path.exists():
        try:
            with urllib.request.urlopen(PAPER_SETS_URL + file, timeout=10) as answer:
                content = answer.read()
        except OSError as e:  # no network, a server's error, a timeout
            raise ValueError(
                f"cannot fetch {PAPER_SETS_URL}{file} ({e}): check the network, or "
                f"put the file at {path}"
            ) from e
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # processes may fetch side by side
        partial.write_bytes(content)
        partial.replace(path)
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise ValueError(
            f"{path} is not the file of the paper's numbers (SHA-256 {found[:12]}, "
            f"not {expected[:12]}): delete it to fetch it again"
        )
    return path


def digest_of(questions: list[Question]) -> str:
    rows = [[q.text, q.ground_truth, q.prompt] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def chat_options(pairs: tuple[str, ...]) -> dict:
    """("enable_thinking=true", "name=text") -> {"enable_thinking": True, "name": "text"}."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--chat-template-args {pair}: write name=value")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def make_questions(
    rows: list[tuple[str, object]],
    tokenizer,
    template: str,
    max_prompt_tokens: int,
    system_prompt: str = "",
    chat_template_args: tuple[str, ...] = (),
) -> tuple[list[Question], int]:
    """Apply the prompt template and the model's chat template; drop overlong prompts.

    Returns the questions and how many were dropped. An R1-style chat template opens the thinking
    itself (`<think>`).
    """
    if "{question}" not in template:
        raise ValueError(
            f"--prompt-template {template!r} has no {{question}} in it: all prompts "
            "would be the same"
        )
    questions, dropped, options = [], 0, chat_options(chat_template_args)
    system = [{"role": "system", "content": system_prompt}] * bool(system_prompt)
    for text, truth in rows:
        # Not str.format: questions and templates are full of braces of their own.
        message = [*system, {"role": "user", "content": template.replace("{question}", text)}]
        try:
            rendered = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False, **options
            )
        except Exception as e:  # jinja's own, or none at all
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} does not work "
                f"({first_line(e)}): repair or add it"
            ) from None
        if rendered.rstrip().endswith("</think>"):
            raise ValueError(
                "the chat template closes the thinking before it begins: switch it on "
                "(Qwen3: --chat-template-args enable_thinking=true)"
            )
        prompt = tuple(tokenizer.encode(rendered, add_special_tokens=False))
        if len(prompt) <= max_prompt_tokens:
            questions.append(Question(len(questions), text, truth, prompt))
        else:
            dropped += 1
    if not questions:
        raise ValueError(
            f"all {dropped} prompts are longer than max_prompt_tokens = "
            f"{max_prompt_tokens}: raise it"
        )
    return questions, dropped


def load_questions(
    source: str, tokenizer, c: Config, split: str, limit: int = 0
) -> tuple[list[Question], str]:
    """The first `limit` (0: all) questions of a source, and a line that counts the dropped."""
    rows, invalid = load_rows(
        source, c.question_field, c.answer_field, split, need_ground_truth=c.reward == "math"
    )
    questions, overlong = make_questions(
        rows[: limit or None],
        tokenizer,
        c.prompt_template,
        c.max_prompt_tokens,
        c.system_prompt,
        c.chat_template_args,
    )
    return questions, (
        f"{source}: {len(questions)} questions ({invalid} dropped without a ground "
        f"truth, {overlong} longer than {c.max_prompt_tokens} prompt tokens)"
    )


def questions_of_step(
    questions: list[Question], step: int, per_step: int, seed: int
) -> list[Question]:
    """The questions of one step: shuffled anew each epoch, a last incomplete step left out.

    A function of (seed, step): resuming needs no data state, only the step.
    """
    steps_per_epoch = len(questions) // per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(questions))
    return [questions[i] for i in order[position * per_step : (position + 1) * per_step]]
