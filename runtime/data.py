"""Questions with their ground truths, and the questions of each step.

Rows come from a .json, .jsonl, .csv or .parquet file (a path, an https:// address, or
hf://datasets/owner/name/file on the Hugging Face hub), from a named set, or from the miniature.
They are checked one by one and turned into prompts by the model's own tokenizer. Their order is a
function of (seed, step) alone. (The package `datasets` would retype answers: "007" becomes 7.)
"""

import csv
import hashlib
import io
import json
import math
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from unicodedata import normalize
from urllib.parse import urlsplit

import numpy as np

from rewards import appended_text
from runtime.config import Config
from runtime.models import first_line, skip_unreachable_hub
from tasks import arithmetic
from tasks.verifier import is_valid_ground_truth

NAMED_SETS = {"deepscaler": "hf://datasets/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json"}
# The five files that the paper's numbers are on, from its authors' repository at one commit, with
# their SHA-256; "paper" stands for all five. Minerva lists several accepted answers for 75 of its
# 272 questions there, and OlympiadBench has 675 rows.
#
# An answer is right if it verifies against any one of the listed ground truths, each tried alone.
# For 7 Minerva questions the two listed answers do not verify against each other: four differ in
# value (0.01 and 0.02), three in form alone (t/m and (1/m)t; a number with and without a compound
# unit). All stay: the makers of the set accept either, and so does the authors' code.
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
LOUD_DROPPED_SHARE = 0.1  # of a set's rows


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
    place = NAMED_SETS.get(source, source)
    if source in PAPER_SETS:
        place = str(fetch_paper_set(source))
    if source in NAMED_SETS or source in PAPER_SETS:
        question_field, answer_field = "problem", "answer"
    elif "://" not in source and not Path(source).is_file():
        names = ", ".join([*NAMED_SETS, "paper", *PAPER_SETS])
        problem = f"{source} is neither a file nor one of the named sets ({names})"
        raise ValueError(f"{problem}; a file on the hub is hf://datasets/owner/name/file")
    rows, dropped = [], 0
    for where, record in _records(place):
        try:
            question, truth = _row(record, question_field, answer_field, need_ground_truth)
        except ValueError as e:
            raise ValueError(f"{place}, {where}: {e}") from None
        if need_ground_truth and not is_valid_ground_truth(truth):
            dropped += 1
        else:
            rows.append((question, truth))
    if not rows:
        problem = "holds no usable row: it is empty, or every ground truth is blank"
        raise ValueError(f"{place} {problem}")
    return rows, dropped


def _row(record, question_field: str, answer_field: str, need_ground_truth: bool):
    """(question, ground_truth) of a record; ValueError says what is wrong with it.

    A question is a text, or a chat: a list of {"role", "content"}.
    """
    if not isinstance(record, dict):
        fields = (question_field, answer_field)
        raise ValueError(f"expected an object with {fields}, got {str(record)[:60]!r}")
    question = _field(record, question_field)
    chat = question if isinstance(question, list) else [{"role": "user", "content": question}]
    for message in chat or [{}]:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not content.strip() or "role" not in message:
            raise ValueError(f"{question_field!r} is not a text: {str(question)[:60]!r}")
    truth = _field(record, answer_field, needed=need_ground_truth)
    if isinstance(truth, Decimal):  # parquet's
        truth = format(truth, "f")
    elif isinstance(truth, list):
        truth = [format(t, "f") if isinstance(t, Decimal) else t for t in truth]
    if need_ground_truth:
        truth = _ground_truth(truth, answer_field)
    try:
        f"{question}{truth}".encode()
    except UnicodeEncodeError:  # JSON can say \ud800, which no tokenizer takes
        problem = "half of a surrogate pair (\\ud800 to \\udfff): write the whole character"
        raise ValueError(problem) from None
    return question, truth


def _field(record: dict, name: str, needed: bool = True):
    """A column by its name; `a.b` is the column of that name, or else b inside of a."""
    if name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    if dot and isinstance(record.get(outer), dict):
        return _field(record[outer], inner, needed)
    if not needed:
        return None
    fix = "name the right fields with --question-field and --answer-field"
    raise ValueError(f"no field {name!r} (it has {', '.join(map(str, record))}): {fix}")


def _ground_truth(truth, field: str):
    """What the verifier compares with: text, numbers, or a list of such; None is left to count."""
    parts = truth if isinstance(truth, list) else [truth]
    for part in parts:
        # To Python a bool is a number, but to a grader true is not 1.
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if not (part is None or isinstance(part, str) or number and math.isfinite(part)):
            problem = f"{field!r} is {part!r}, a {type(part).__name__}"
            raise ValueError(f"{problem}: the verifier reads texts and finite numbers")
    if isinstance(truth, str) and "####" in truth:  # GSM8K: a solution, then #### and the answer
        truth = truth.rpartition("####")[2].strip()
    return truth


def _records(place: str) -> Iterator[tuple[str, object]]:
    """(where, record) pairs; `where` is the line of a .jsonl file, otherwise the row, from 1."""
    kind = Path(urlsplit(place).path).suffix
    if kind not in (".json", ".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{place}: unknown kind {kind!r}: use .json, .jsonl, .csv or .parquet")
    content = _content(place)
    if kind == ".parquet":
        records = _parquet(content, place)
    elif kind == ".csv":
        records = _csv(_text(content, place), place)
    elif kind == ".json":
        records = _parse(_text(content, place), place)
        if not isinstance(records, list):
            fix = "for one object a line, name the file .jsonl"
            raise ValueError(f"{place}, line 1: expected a list of objects; {fix}")
    else:
        lines = enumerate(_text(content, place).split("\n"), 1)
        yield from ((f"line {n}", _parse(line, place, n)) for n, line in lines if line.strip())
        return
    yield from ((f"row {i}", record) for i, record in enumerate(records, 1))


def _content(place: str) -> bytes:
    """A file's bytes, from wherever it is; ValueError where it cannot be fetched."""
    try:
        if place.startswith("hf://datasets/"):
            from huggingface_hub import hf_hub_download

            skip_unreachable_hub()
            owner, name, file = place.removeprefix("hf://datasets/").split("/", 2)
            name, _, revision = name.partition("@")
            settings = {"repo_type": "dataset", "revision": revision or None}
            return Path(hf_hub_download(f"{owner}/{name}", file, **settings)).read_bytes()
        if "://" in place:
            with urllib.request.urlopen(place, timeout=10) as answer:
                return answer.read()
        return Path(place).read_bytes()
    except Exception as e:  # offline, renamed, gated: whatever the hub's client raises
        fix = "check the network, or download it and pass the file's path"
        raise ValueError(f"cannot fetch {place} ({first_line(e)}): {fix}") from e


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{place} is not in UTF-8 (byte {e.start}): save it as UTF-8") from None


def _parse(text: str, place: str, line: int = 1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{place}, line {line + e.lineno - 1}: not JSON ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"{place}, from line {line}: unreadable JSON ({first_line(e)})") from None


def _csv(text: str, place: str) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole solution
    try:
        records = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as e:
        raise ValueError(f"{place} is no readable csv file ({e})") from None
    for i, record in enumerate(records, 1):
        if None in record or None in record.values():  # csv's mark of too many or too few cells
            raise ValueError(f"{place}, row {i}: not as many cells as the first line has names")
    return records


def _parquet(content: bytes, place: str) -> list[dict]:
    try:
        import pyarrow
        import pyarrow.parquet

        return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except ImportError:
        raise ValueError(f"{place}: parquet needs pyarrow: pip install pyarrow") from None
    except (OSError, ValueError) as e:  # pyarrow's errors are both
        raise ValueError(f"{place} is no readable parquet file ({first_line(e)})") from None


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
            content = _content(url)
        except ValueError as e:
            raise ValueError(f"{e} or put it at {path}") from e
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
    for number, (question, truth) in enumerate(rows):
        chat = messages(question, c)
        rendered, text = render(chat, tokenizer, c), question
        if isinstance(question, list):
            text = question[-1]["content"]
        if number == 0:
            another = [*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + " again"}]
            check_rendered(rendered, render(another, tokenizer, c), tokenizer)
        prompt = tuple(tokenizer.encode(rendered, add_special_tokens=False))
        if len(prompt) <= c.max_prompt_tokens:
            questions.append(Question(len(questions), text, truth, prompt))
        else:
            dropped += 1
    if not questions:
        limit = f"--max-prompt-tokens {c.max_prompt_tokens}"
        raise ValueError(f"all {dropped} prompts are longer than {limit}: raise it")
    return questions, dropped


def messages(question: str | list[dict], c: Config) -> list[dict]:
    """The chat that asks: a row's own chat as it is, or system message and prompt template."""
    if isinstance(question, list):
        return question
    # Not str.format: questions and templates are full of braces of their own.
    user = {"role": "user", "content": c.prompt_template.replace("{question}", question)}
    return [{"role": "system", "content": c.system_prompt}] * bool(c.system_prompt) + [user]


def render(chat: list[dict], tokenizer, c: Config) -> str:
    """The prompt as text: a chat in the model's template, the date being the project's."""
    options = {"add_generation_prompt": True, "tokenize": False}
    # Templates may print the date, and a run that is resumed tomorrow must have the same prompts.
    options |= {"strftime_now": DATE.strftime} | chat_options(c.chat_template_args)
    try:
        return tokenizer.apply_chat_template(chat, **options)
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
        lost = f"{text[at : at + 20]!r} became {back[at : at + 20]!r}"
        which = f"the tokenizer of {tokenizer.name_or_path} ({type(tokenizer).__name__})"
        fix = "its tokenizer_config.json probably names the wrong tokenizer_class"
        raise ValueError(f"{which}: {lost}: {fix}")


def load_questions(source: str, tokenizer, c: Config, split: str, limit: int = 0):
    """The first `limit` (0: all) questions of a source, and a line that counts the dropped."""
    rows, invalid = load_rows(source, c.question_field, c.answer_field, split, c.reward == "math")
    questions, overlong = make_questions(rows[: limit or None], tokenizer, c)
    longer = f"{overlong} longer than {c.max_prompt_tokens} prompt tokens"
    report = (
        f"{source}: {len(questions)} questions ({invalid} dropped without a ground truth, {longer})"
    )
    if (dropped := invalid + overlong) > LOUD_DROPPED_SHARE * (len(questions) + dropped):
        report = f"WARNING {report}"
    return questions, report


def questions_of_step(questions: list, step: int, per_step: int, seed: int) -> list[Question]:
    """The questions of one step: shuffled anew each epoch, a last incomplete step left out.

    A function of (seed, step): resuming needs no data state, only the step.
    """
    steps_per_epoch = len(questions) // per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(questions))
    return [questions[i] for i in order[position * per_step : (position + 1) * per_step]]
