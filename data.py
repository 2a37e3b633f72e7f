"""Where do questions come from?

A row is a question with its ground truth. Rows are read from a local .json / .jsonl / .parquet file, from a named set
on the Hugging Face hub, or made by the miniature; checked one by one; and turned into prompts. Their order is a function
of (seed, step) alone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import miniature
from verifier import is_valid_ground_truth

# name -> (hub dataset repository, file, question field, answer field)
NAMED_SETS = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json", "problem", "answer"),
    "aime2024": ("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "problem", "answer"),
    "amc2022": ("AI-MO/aimo-validation-amc", "data/train-00000-of-00001.parquet", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", "problem", "answer"),
    "minerva": ("math-ai/minervamath", "test.jsonl", "question", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench", "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
                      "question", "final_answer"),
}
MINIATURE_ROWS = {"train": 2048, "test": 512}


@dataclass(frozen=True)
class Question:
    index: int                  # its place in the set: part of every random key
    text: str
    ground_truth: object        # str, int, float, or a list of alternatives
    prompt: tuple[int, ...]     # token ids, chat template applied


def load_rows(source: str, question_field: str = "problem", answer_field: str = "answer",
              split: str = "train") -> tuple[list[tuple[str, object]], int]:
    """(question, ground_truth) rows of a file, a named set, or the miniature's `split`; and how many rows were dropped
    for an invalid gold (None or blank: no answer could ever score). ValueError names the file, the row and the mend."""
    if source == "miniature":
        return miniature.make_rows(split, MINIATURE_ROWS[split]), 0
    if source in NAMED_SETS:
        path, question_field, answer_field = _download(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"{source} is neither a file nor one of the named sets ({', '.join(NAMED_SETS)})")
    rows, dropped = [], 0
    for where, record in _records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {where}: expected an object with {question_field!r} and {answer_field!r}, "
                             f"got {str(record)[:60]!r}")
        for name in (question_field, answer_field):
            if name not in record:
                raise ValueError(f"{path}, {where}: no field {name!r} (it has {', '.join(record)}): "
                                 "name the right ones with --question-field and --answer-field")
        question, gold = record[question_field], record[answer_field]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{path}, {where}: {question_field!r} is not a text: {str(question)[:60]!r}")
        gold = gold.tolist() if isinstance(gold, np.ndarray) else gold
        if is_valid_ground_truth(gold):
            rows.append((question, gold))
        else:
            dropped += 1
    if not rows:
        raise ValueError(f"{path} holds no usable row: it is empty, or every ground truth is blank")
    return rows, dropped


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) pairs; `where` is the line of a .jsonl and the row of the other formats, counted from 1."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", _parse(line.strip(), path, number)
    elif path.suffix == ".json":
        records = _parse(path.read_text(encoding="utf-8"), path, 1)
        if not isinstance(records, list):
            raise ValueError(f"{path}, line 1: expected a list of objects; for one object a line, name the file .jsonl")
        yield from ((f"row {i}", record) for i, record in enumerate(records, 1))
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
        yield from ((f"row {i}", record) for i, record in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    else:
        raise ValueError(f"{path}: unknown kind {path.suffix!r}: use .json, .jsonl or .parquet")


def _parse(text: str, path: Path, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {first_line + e.lineno - 1}: not JSON ({e.msg})") from None


def _download(name: str) -> tuple[Path, str, str]:
    from huggingface_hub import hf_hub_download

    repo, file, question_field, answer_field = NAMED_SETS[name]
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset")), question_field, answer_field
    except Exception as e:      # offline, renamed, gated: whatever the hub's client raises, the mend is the same
        reason = f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
        raise ValueError(f"cannot fetch {file} of {repo} from the hub ({reason}): "
                         "check the network, or download it and pass the file's path") from e


def make_questions(rows: list[tuple[str, object]], tokenizer, template: str,
                   max_prompt_tokens: int) -> tuple[list[Question], int]:
    """Apply the prompt template and the model's chat template; drop prompts longer than max_prompt_tokens.

    Returns the questions and how many were dropped. An R1-style chat template opens the thinking itself (`<think>`).
    """
    if "{question}" not in template:
        raise ValueError(f"--prompt-template {template!r} has no {{question}} in it: all prompts would be the same")
    questions, dropped = [], 0
    for text, gold in rows:
        # Not str.format: questions and templates are full of braces of their own.
        message = [{"role": "user", "content": template.replace("{question}", text)}]
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt = tuple(tokenizer.encode(rendered, add_special_tokens=False))
        if len(prompt) <= max_prompt_tokens:
            questions.append(Question(len(questions), text, gold, prompt))
        else:
            dropped += 1
    if not questions:
        raise ValueError(f"all {dropped} prompts are longer than max_prompt_tokens = {max_prompt_tokens}: raise it")
    return questions, dropped


def load_questions(source: str, tokenizer, template: str, max_prompt_tokens: int, question_field: str = "problem",
                   answer_field: str = "answer", split: str = "train", limit: int = 0) -> tuple[list[Question], str]:
    """Rows to prompts in one go: the first `limit` (0: all) questions of a source, and a line that counts the dropped."""
    rows, invalid = load_rows(source, question_field, answer_field, split)
    questions, overlong = make_questions(rows[:limit or None], tokenizer, template, max_prompt_tokens)
    return questions, (f"{source}: {len(questions)} questions ({invalid} dropped without a ground truth, "
                       f"{overlong} longer than {max_prompt_tokens} prompt tokens)")


def questions_of_step(questions: list[Question], step: int, per_step: int, seed: int) -> list[Question]:
    """The questions of one step: the set is shuffled anew each epoch, and a last incomplete step is left out.

    A function of (seed, step): resuming needs no data state, only the step.
    """
    steps_per_epoch = len(questions) // per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(questions))
    return [questions[i] for i in order[position * per_step:(position + 1) * per_step]]
