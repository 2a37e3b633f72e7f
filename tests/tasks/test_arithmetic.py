import random
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import arithmetic
from tasks.arithmetic import (
    BOX,
    CUT,
    EOS,
    HEADER,
    THINK,
    THINK_END,
    VOCABULARY,
    answer,
    known_answer,
    make_question,
    make_rows,
    one_pass,
    question_text,
    sloppy_trace,
    supervised_example,
)
from tasks.verifier import is_correct


def test_the_task_by_hand():
    assert question_text(2, ["+2", "*7", "-3"]) == "2 +2 *7 -3 ?"
    assert answer(2, ["+2", "*7", "-3"]) == 5  # 2, 4, 28 -> 8, 5
    assert answer(1, ["-3"]) == 8  # last digit, as in clock arithmetic


def test_rows_repeat_and_splits_are_disjoint():
    train, test = make_rows("train", 2048), make_rows("test", 512)
    assert train[:10] == make_rows("train", 10)
    assert train[0] == ("6 +5 *7 -5 +4 ?", "6")  # published figures are of these rows
    assert not {q for q, _ in train} & {q for q, _ in test}


def test_tokenizer_round_trip_every_word_one_token(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)  # as a user would load it
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in VOCABULARY]
    assert ids == [[i] for i in range(len(VOCABULARY))]
    text = f"2 +2 *7 ?<think> =2 +2 =4 *7 =8 so 8. wait =2{CUT}{THINK_END}{HEADER}{BOX}8}}<|end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == 20
    assert is_correct(f"{HEADER}{BOX}5}}", "5") and not is_correct(f"{HEADER}{BOX}6}}", "5")


def set_rates(monkeypatch, **rates):
    for name, value in rates.items():
        monkeypatch.setattr(arithmetic, name, value)


def test_a_trace_without_sloppiness_is_terse_and_right(monkeypatch):
    set_rates(monkeypatch, ERROR_RATE=0.0, SPOIL_RATE=0.0, AGAIN_RATE=0.0, RAMBLE_RATE=(0.0, 0.0))
    trace = sloppy_trace(2, ["+2", "*7", "-3"], random.Random(0))
    assert "".join(trace) == " =2 +2 =4 *7 =8 -3 =5 so 5.</think>"


@pytest.mark.parametrize(
    "rates, expected",
    [
        # 2 +2 is 4, but the last pass said 5. A repeated error stands; after a repair, the rest is
        # redone.
        (dict(REPAIR_RATE=0.0, SPOIL_RATE=0.0), " =2 +2 =5 *7 =5 so 5."),
        (dict(REPAIR_RATE=1.0, SPOIL_RATE=0.0), " =2 +2 =4 *7 =8 so 8."),
    ],
)
def test_a_later_pass_by_hand(monkeypatch, rates, expected):
    set_rates(monkeypatch, **rates)
    tokens, digits = one_pass(2, ["+2", "*7"], [2, 5, 5], 0.0, random.Random(0))
    assert "".join(tokens) == expected and digits[-1] == int(expected[-2])


def test_right_early_is_right_late_and_later_passes_repair_more_than_they_spoil():
    """What the miniature is for: own progress predicts, yet thinking on pays."""
    rng, stays, repaired, first, last = random.Random(0), [], [], [], []
    for _ in range(2000):
        question = make_question(rng)
        answers = [token for token in sloppy_trace(*question, rng) if token.startswith(" so ")]
        right = [token == f" so {answer(*question)}." for token in answers]
        first.append(right[0])
        last.append(right[-1])
        for now, then in zip(right, right[1:]):
            (stays if now else repaired).append(then)

    def share(flags):
        return sum(flags) / len(flags)

    assert share(stays) > 0.9 and 0.1 < share(repaired) < 0.5
    assert 0.3 < share(first) < 0.6 and share(last) > share(first) + 0.2  # skilled but sloppy


def test_a_cut_trace_knows_its_last_completed_answer():
    trace = " =2 +2 =5 *7 =5 so 5. wait =2 +2 =4 *7 =8 so 8.</think>"
    trace = re.findall(r" so \d\.| [^\s<]+|</think>", trace)
    assert set(trace) <= set(VOCABULARY) and len(trace) == 14
    known = [known_answer(trace[:n]) for n in (1, 3, 5, 6, 12, 13, 14)]
    assert known == ["2", "5", "5", "5", "5", "8", "8"]


def test_supervised_examples_follow_the_protocol_and_fit_the_budget():
    rng, cut, long = random.Random(1), 0, 0
    for _ in range(500):
        tokens, trained = supervised_example(rng)
        thinking = tokens[tokens.index(THINK) + 1 : tokens.index(HEADER)]
        assert tokens.count(THINK_END) == 1 and tokens[-1] == EOS
        assert tokens[tokens.index(BOX) + 1] == known_answer(thinking)
        # Trained: the trace with its own </think>, and the summary; not what the protocol appends.
        own = [token for token, train in zip(tokens, trained) if train]
        assert CUT not in own and HEADER not in own and own[-4:] == tokens[-4:]
        if CUT in thinking:
            cut += 1
            thinking = thinking[: thinking.index(CUT)]
        assert own[:-4] == thinking and len(thinking) <= arithmetic.LONGEST
        long += len(thinking) > arithmetic.LONGEST / 2
    assert 0.4 < cut / 500 < 0.9 and long > 100


def test_the_base_is_cached_and_rebuilt_when_a_setting_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(arithmetic.WARM_START, "steps", 1)
    monkeypatch.setitem(arithmetic.WARM_START, "batch", 2)
    path = arithmetic.load_or_write_base(tmp_path, 0)
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert arithmetic.load_or_write_base(tmp_path, 0) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert arithmetic.load_or_write_base(tmp_path, 1) != path
    monkeypatch.setitem(arithmetic.WARM_START, "lr", 1e-3)
    assert arithmetic.base_path(tmp_path, 0) != path
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError))
    with pytest.raises(PermissionError):  # only another run's base excuses a failed rename
        arithmetic.load_or_write_base(tmp_path, 0)
    assert not list(tmp_path.glob("*.partial"))
    assert AutoModelForCausalLM.from_pretrained(path).config.model_type == "qwen2"
