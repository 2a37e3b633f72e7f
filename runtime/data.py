"""Questions with their ground truths, and the questions of each step.

Rows come from a local .json, .jsonl or .parquet file, from a named set on the Hugging Face hub, or
from the miniature. They are checked one by one and turned into prompts by the model's own
tokenizer. Their order is a function of (seed, step) alone.
"""

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from unicodedata import normalize

import numpy as np

from rewards import appended_text
from runtime.config import Config
from runtime.models import first_line, skip_unreachable_hub
from tasks import arithmetic
from tasks.verifier import is_valid_ground_truth

# name -> (hub dataset repository, file)
NAMED_SETS = {"deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json")}
# The five files that the paper's numbers are on, from its authors' repository at one commit, with
# their SHA-256; "paper" stands for all five. Minerva lists several accepted answers for 75 of its
# 272 questions there, and OlympiadBench has 675 rows.
#
# An answer is right if it verifies against any one of the listed ground truths, each tried alone.
# For 6 Minerva questions the two listed answers do not verify against each other: four differ in
# value (0.01 and 0.02), two in form alone (t/m and (1/m)t). All stay: the makers of the set accept
# either, and so does the authors' code.
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
DATE = datetime(2025, 1, 1)  # today, for chat templates that ask
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

    The count is of rows dropped for a ground truth of None or blank, which no answer could match;
    with need_ground_truth False (a reward function of the user's own) all are kept. ValueError
    names the file, the row and the fix.
    """
    if source == "miniature":
        return arithmetic.make_rows(split, MINIATURE_ROWS[split]), 0
    path = Path(source)
    if source in NAMED_SETS or source in PAPER_SETS:
        path = _download(*NAMED_SETS[source]) if source in NAMED_SETS else fetch_paper_set(source)
        question_field, answer_field = "problem", "answer"
    elif not path.is_file():
        names = ", ".join([*NAMED_SETS, "paper", *PAPER_SETS])
        raise ValueError(f"{source} is neither a file nor one of the named sets ({names})")
    rows, dropped = [], 0
    for where, record in _records(path):
        try:
            question, truth = _row(record, question_field, answer_field, need_ground_truth)
        except ValueError as e:
            raise ValueError(f"{path}, {where}: {e}") from None
        # To Python a bool is a number, but to a grader true is not 1.
        if need_ground_truth and (isinstance(truth, bool) or not is_valid_ground_truth(truth)):
            dropped += 1
        else:
            rows.append((question, truth))
    if not rows:
        raise ValueError(f"{path} holds no usable row: it is empty, or every ground truth is blank")
    return rows, dropped


def _row(record, question_field: str, answer_field: str, need_ground_truth: bool):
    """(question, ground_truth) of a record; ValueError says what is wrong with it."""
    fields = (question_field, answer_field)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {fields}, got {str(record)[:60]!r}")
    for name in fields[: 1 + need_ground_truth]:
        if name not in record:
            fix = "name the right fields with --question-field and --answer-field"
            raise ValueError(f"no field {name!r} (it has {', '.join(record)}): {fix}")
    question, truth = record[question_field], record.get(answer_field)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{question_field!r} is not a text: {str(question)[:60]!r}")
    truth = format(truth, "f") if isinstance(truth, Decimal) else truth  # parquet's decimals
    try:
        f"{question}{truth}".encode()
    except UnicodeEncodeError:  # JSON can say \ud800, which no tokenizer takes
        problem = "half of a surrogate pair (\\ud800 to \\udfff): write the whole character"
        raise ValueError(problem) from None
    return question, truth


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) pairs; `where` is the line of a .jsonl file, otherwise the row, from 1."""
    if path.suffix == ".jsonl":
        lines = enumerate(_text(path).split("\n"), 1)
        yield from ((f"line {n}", _parse(line, path, n)) for n, line in lines if line.strip())
        return
    if path.suffix == ".json":
        records = _parse(_text(path), path)
        if not isinstance(records, list):
            fix = "for one object a line, name the file .jsonl"
            raise ValueError(f"{path}, line 1: expected a list of objects; {fix}")
    elif path.suffix == ".parquet":
        records = _parquet(path)
    else:
        raise ValueError(f"{path}: unknown kind {path.suffix!r}: use .json, .jsonl or .parquet")
    yield from ((f"row {i}", record) for i, record in enumerate(records, 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not in UTF-8 (byte {e.start}): save it as UTF-8") from None


def _parse(text: str, path: Path, line: int = 1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {line + e.lineno - 1}: not JSON ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"{path}, from line {line}: unreadable JSON ({first_line(e)})") from None


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    except (OSError, ValueError) as e:  # pyarrow's errors are both
        raise ValueError(f"{path} is no readable parquet file ({first_line(e)})") from None


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    skip_unreachable_hub()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as e:  # offline, renamed, gated: whatever the hub's client raises
        fix = "check the network, or download it and pass the file's path"
        raise ValueError(f"cannot fetch {file} of {repo} ({first_line(e)}): {fix}") from e


def set_names(names: tuple[str, ...]) -> list[str]:
    """The sets that were asked for, the collection "paper" as its five."""
    return [one for name in names for one in (PAPER_SETS if name == "paper" else [name])]


def fetch_paper_set(name: str) -> Path:
    """One of the authors' files, from the cache or their repository, checked by its SHA-256.

    Cached in $XDG_CACHE_HOME/anytime-reasoner (~/.cache without it): a file put there by hand will
    do on a machine without network.
    """
    file = name.removeprefix("paper/") + ".json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anytime-reasoner"
    url, path = PAPER_SETS_URL + file, cache / file
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content = answer.read()
        except OSError as e:  # no network, a server's error, a timeout
            fix = f"check the network, or put the file at {path}"
            raise ValueError(f"cannot fetch {url} ({e}): {fix}") from e
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # processes may fetch side by side
        partial.write_bytes(content)
        partial.replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != PAPER_SETS[name]:
        raise ValueError(f"{path} is not the file of the paper's numbers: delete it to fetch it")
    return path


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
            options[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return options


def make_questions(rows: list[tuple], tokenizer, c: Config) -> tuple[list[Question], int]:
    """Apply the prompt template and the model's chat template; drop overlong prompts.

    Returns the questions and how many were dropped. An R1-style chat template opens the thinking
    itself (`<think>`).
    """
    if "{question}" not in c.prompt_template:
        problem = f"--prompt-template {c.prompt_template!r} has no {{question}} in it"
        raise ValueError(f"{problem}: all prompts would be the same")
    questions, dropped = [], 0
    for number, (text, truth) in enumerate(rows):
        rendered = render(text, tokenizer, c)
        if number == 0:
            check_rendered(rendered, render(text + " again", tokenizer, c), tokenizer)
        prompt = tuple(tokenizer.encode(rendered, add_special_tokens=False))
        if len(prompt) <= c.max_prompt_tokens:
            questions.append(Question(len(questions), text, truth, prompt))
        else:
            dropped += 1
    if not questions:
        limit = f"max_prompt_tokens = {c.max_prompt_tokens}"
        raise ValueError(f"all {dropped} prompts are longer than {limit}: raise it")
    return questions, dropped


def render(question: str, tokenizer, c: Config) -> str:
    """The prompt as text: system and user message in the model's chat template."""
    # Not str.format: questions and templates are full of braces of their own.
    user = {"role": "user", "content": c.prompt_template.replace("{question}", question)}
    system = [{"role": "system", "content": c.system_prompt}] * bool(c.system_prompt)
    options = {"add_generation_prompt": True, "tokenize": False}
    # Templates may print the date, and a run that is resumed tomorrow must have the same prompts.
    options |= {"strftime_now": DATE.strftime} | chat_options(c.chat_template_args)
    try:
        return tokenizer.apply_chat_template([*system, user], **options)
    except Exception as e:  # jinja's own, or none at all
        problem = f"the chat template of {tokenizer.name_or_path} does not work"
        raise ValueError(f"{problem} ({first_line(e)}): repair or add it") from None


def check_rendered(prompt: str, another: str, tokenizer):
    """ValueError where the model would not see the question, could not think, or text is lost."""
    template = f"the chat template of {tokenizer.name_or_path}"
    if prompt == another:
        raise ValueError(f"{template} leaves the question out: {prompt[:60]!r}: repair it")
    if prompt.rstrip().endswith("</think>"):
        fix = "switch it on (Qwen3: --chat-template-args enable_thinking=true)"
        raise ValueError(f"the chat template closes the thinking before it begins: {fix}")
    text = normalize("NFC", prompt + appended_text(""))  # some tokenizers store that form
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:  # characters that a small vocabulary lacks
        text = appended_text("")
        ids = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if normalize("NFC", back).strip() != text.strip():
        at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), len(back))
        kind, lost = (
            type(tokenizer).__name__,
            f"{text[at : at + 20]!r} became {back[at : at + 20]!r}",
        )
        fix = "its tokenizer_config.json probably names the wrong tokenizer_class"
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} ({kind}): {lost}: {fix}")


def load_questions(source: str, tokenizer, c: Config, split: str, limit: int = 0):
    """The first `limit` (0: all) questions of a source, and a line that counts the dropped."""
    rows, invalid = load_rows(source, c.question_field, c.answer_field, split, c.reward == "math")
    questions, overlong = make_questions(rows[: limit or None], tokenizer, c)
    longer = f"{overlong} longer than {c.max_prompt_tokens} prompt tokens"
    dropped = f"{invalid} dropped without a ground truth, {longer}"
    return questions, f"{source}: {len(questions)} questions ({dropped})"


def questions_of_step(questions: list, step: int, per_step: int, seed: int) -> list[Question]:
    """The questions of one step: shuffled anew each epoch, a last incomplete step left out.

    A function of (seed, step): resuming needs no data state, only the step.
    """
    steps_per_epoch = len(questions) // per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(questions))
    return [questions[i] for i in order[position * per_step : (position + 1) * per_step]]
