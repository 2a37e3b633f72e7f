import random

from transformers import AutoModelForCausalLM, AutoTokenizer

import miniature
from miniature import BOX, CUT, HEADER, THINK_END, answer, make_question, make_rows, question_text, sloppy_trace, supervised_example
from verifier import is_correct


def test_the_task_by_hand():
    assert question_text(2, ["+2", "*7", "-3"]) == "2 +2 *7 -3 ?"
    assert answer(2, ["+2", "*7", "-3"]) == 5      # 2, 4, 28 -> 8, 5
    assert answer(1, ["-3"]) == 8                  # last digit, as in clock arithmetic


def test_rows_repeat_and_splits_are_disjoint():
    train, test = make_rows("train", 2048), make_rows("test", 512)
    assert train[:10] == make_rows("train", 10)
    assert not {q for q, _ in train} & {q for q, _ in test}


def test_tokenizer_round_trip_every_word_one_token(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)     # as a user would load it
    assert [tokenizer.encode(word, add_special_tokens=False) for word in miniature.VOCABULARY] == [[i] for i in range(len(miniature.VOCABULARY))]
    text = f"2 +2 *7 -3 ?<think> =2 +2 =4{CUT}{THINK_END}{HEADER}{BOX}5}}<|end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert is_correct(f"{HEADER}{BOX}5}}", "5") and not is_correct(f"{HEADER}{BOX}6}}", "5")


def test_traces_without_sloppiness_are_terse_and_right(monkeypatch):
    monkeypatch.setattr(miniature, "ERROR_RATE", 0.0)
    monkeypatch.setattr(miniature, "RAMBLE_RATE", (0.0, 0.0))
    assert "".join(sloppy_trace(2, ["+2", "*7", "-3"], random.Random(0))) == " =2 +2 =4 *7 =8 -3 =5</think>"


def test_checks_repair_errors_and_fit_the_budget():
    rng = random.Random(0)
    right = terse = 0
    for _ in range(2000):
        question = make_question(rng)
        trace = sloppy_trace(*question, rng)
        right += trace[-2] == f" ={answer(*question)}"
        terse += len(trace) == 2 * len(question[1]) + 2
    assert 0.75 < right / 2000 < 0.97       # skilled but sloppy
    assert terse / 2000 < 0.3               # most traces waste tokens


def test_a_cut_example_boxes_the_last_digit_written():
    rng = random.Random(1)
    for _ in range(200):
        _, continuation = supervised_example(rng)
        boxed = continuation[continuation.index(BOX) + 1]
        assert boxed == next(t for t in reversed(continuation[:continuation.index(HEADER)]) if t.startswith(" ="))[2]
        assert continuation.count(THINK_END) == 1 and continuation[-1] == miniature.EOS


def test_the_base_is_cached_and_rebuilt_when_a_setting_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(miniature.WARM_START, "steps", 1)
    monkeypatch.setitem(miniature.WARM_START, "batch", 2)
    path = miniature.load_or_write_base(tmp_path, 0)
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert miniature.load_or_write_base(tmp_path, 0) == path and (path / "model.safetensors").stat().st_mtime_ns == written
    assert miniature.load_or_write_base(tmp_path, 1) != path
    monkeypatch.setitem(miniature.WARM_START, "lr", 1e-3)
    assert miniature.base_path(tmp_path, 0) != path
    assert AutoModelForCausalLM.from_pretrained(path).config.model_type == "qwen2"
