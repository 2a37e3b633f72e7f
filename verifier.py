r"""Is the answer right, and what does a segment of thinking earn? (SPEC sections 3 and 9)

A verifier for reinforcement learning has two enemies: a policy that finds what the grader wrongly rewards, and a
string that never lets the grader finish. So a short list of rules decides what can be decided exactly and refuses what
only looks like an answer; math-verify judges the rest, in processes that can be killed.

The rules, in order; the first that decides, decides:

1. A gold that is None or blank is an invalid row: never rewarded, counted (`_golds`).
2. The answer is the last balanced \boxed{}; none, blank or oversized is wrong (`extract_answer`).
3. Both sides lose what has no meaning: spacing, \left, \dfrac, unicode, final periods (`normalise`). Equal text is right.
4. Two plain numbers are compared as exact fractions, and nothing else is asked (`plain_number`).
5. `x =` in front is dropped (`_split_head`); lists, tuples and intervals are compared item by item (`_equal_lists`).
6. A unit is dropped when the other side has none (`_split_unit`); words are the same words or wrong (`_words`).
7. Hostile shapes, restated questions, other bases, stray variables and sentences are wrong (`_refused`).
8. math-verify compares what is left, and must also agree to a relative 1e-6 (`_math_verify`).

Conventions, where graders disagree. tests/test_rewards.py has the cases of each row under the same number.

|  # | case                                             | verdict      | reason                                          |
|----|--------------------------------------------------|--------------|-------------------------------------------------|
|  1 | order and repeats in a bare list or a {set}      | ignored      | "find all solutions" has no order               |
|  2 | order in (a,b), or in x=1, y=2 against 1, 2      | matters      | a swapped point is another point                |
|  3 | [a,b] or {a,b} for (a,b); a<x<b for (a,b)        | wrong        | closed is not open; the notation was asked for  |
|  4 | a,b for (a,b) in order; (a,b) for a,b            | right        | parentheses around a list carry no value        |
|  5 | 2/4, 0.5 or 50/100 for 1/2; 10^4 for 10000       | right        | the value counts; reducing is no reward hole    |
|  6 | p% for p, and for p/100                          | right        | questions ask for either; one box states one    |
|  7 | a unit on one side only                          | right        | the question fixes it; one bare letter is none  |
|  8 | different units or words                         | wrong        | 5 cm is not 5 m                                 |
|  9 | a decimal against a non-integer gold             | 1e-6 relative| absolute tolerance rewards 0.0 for 1e-19        |
| 10 | a decimal against an integer gold                | exact        | integers need no rounding                       |
| 11 | \sum, \binom, n!, \sin, \log for a number        | wrong        | it restates the question                        |
| 12 | x = 5, or x = 2+3 = 5, for 5                     | right        | only the last value of a chain counts           |
| 13 | 203 = 204 for 204; 4 or 6 for 4; \pm 4 for 4     | wrong        | two values are a hedge                          |
| 14 | another, or no, base subscript                   | wrong        | 1011_2 is not 1011                              |
| 15 | 1,000 and 1\,000 are 1000; 1,22 for 1.22         | right        | a decimal comma only against one decimal number |
| 16 | c, (C) or \text{C} for the choice C              | right        | one letter A-F is a choice, its dress is not    |
| 17 | ba for ab, neve for even                         | wrong        | letters alone are a word, not a product         |
| 18 | 22:42 for 11:21                                  | right        | a ratio is its quotient                         |
| 19 | no box; text after the last box                  | wrong;unread | reading the whole summary lets a policy hedge   |
"""

import atexit
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from fractions import Fraction

MAX_NUMBER_CHARS = 4000     # Python refuses to read integers over 4300 digits
MAX_ANSWER_CHARS = 400      # no dataset gold is longer, and parsing time grows faster than length
MAX_DEPTH = 30              # parsers recurse; real answers nest less than ten deep
MAX_ITEMS = 20              # unordered lists compare every item with every item
MAX_CACHE = 50_000          # remembered verdicts; a rollout repeats the same boxes many times
RELATIVE_TOLERANCE = Fraction(1, 10**6)
TASK_TIMEOUT = 5.0          # seconds for one comparison; ordinary ones take 0.01, and ten times that on a busy machine
WORKER_MEMORY = 2 << 30     # bytes of address space per worker
FAILURES = ("timeouts", "deaths", "exceptions", "unparsable_golds", "invalid_golds")
LOUD_FAILURE_SHARE = 0.02   # above this share of failed gradings in a batch, training should say so


# ------------------------------------------------------------------------------------------------ reading the box

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ALL_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|[{}]")


def extract_answer(summary: str) -> str | None:
    r"""Content of the last balanced \boxed{...}, or None. Linear: a summary can be a megabyte of braces.

    \{ and \} are no braces to TeX. If no box closes that way, as in \boxed{204\}, they are counted as braces.
    """
    return _last_box(_BRACES, summary) or _last_box(_ALL_BRACES, summary)


def _last_box(braces: re.Pattern, summary: str) -> str | None:
    stack, answer = [], None
    for match in braces.finditer(summary):
        token = match.group()
        if token == "}":
            start = stack.pop() if stack else None
            if start is not None:       # an enclosing box closes later, so it wins over the one inside
                answer = summary[start:match.start()]
        elif token[-1] == "{" and token != r"\{":
            stack.append(match.end() if "box" in token else None)
    return answer


_UNICODE = str.maketrans({
    **dict(zip("−–—－", "----")), **dict(zip("，（）％＝．", ",()%=.")), **dict(zip("’′", "''")),
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    **dict.fromkeys("\u00a0\u2009\u202f", " "), **dict.fromkeys("\u200b\u200c\u200d\ufeff", ""),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "°": r"^\circ ", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
})
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")

# Applied in this order; each line removes a freedom of writing that has no meaning. (?!\w) ends a command's name.
_REWRITES = [(re.compile(pattern.replace("END", "(?![a-zA-Z])")), replacement) for pattern, replacement in [
    (r"\\{1,2}(?:boxed|fbox)(?=\s*\{)", ""), (r"\\(?:mbox|textrm|textbf|textit|textnormal)(?=\s*\{)", r"\\text"),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),                                     # math delimiters, dollar amounts
    (r"(?<!\\)\\nEND", " "),                                                    # a line break escaped twice
    (r"\\!\s*|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)END\.?", ""),
    (r"\{,\}", ","), (r"(?<!\\)\\[,;:> ]|~|\\q?quadEND", " "),
    (r"\\[dtc]fracEND", r"\\frac"), (r"\\varnothingEND", r"\\emptyset"), (r"\\(?:mathbb\s*)?REND", r"\\mathbb{R}"),
    (r"\\(?:leq|leqslant)END", r"\\le"), (r"\\(?:geq|geqslant)END", r"\\ge"), (r"\\neqEND", r"\\ne"),
    (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)END", ","),
    (r"(?i)^\s*(?:\\text\s*\{)?\s*(?:the\s+)?(?:final\s+)?(?:answer|ans)\s*(?:is\s*:?|:|=)\s*\}?", ""),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circEND)(?:\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF]END))?|\\degreeEND", " "),
    (r"\\(?:text|mathrm)\s*\{\s*(?:degrees?|dollars?)\s*\}|(?<![a-zA-Z\\{])(?:degrees?|dollars?)END", " "),
    (r"\\%|\\text\s*\{\s*(?:percent|pct)\s*\}|(?<![a-zA-Z\\])(?:percent|pct)END", "%"),
    (r"\\(frac|sqrt)(?:\s+(?=\w)|(?=\d))(\w)", r"\\\1{\2}"), (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\(?:mathbf|boldsymbol|bm|vec)\s*\{\s*(\w)\s*\}", r"\1"),
    (r"_\s*\{\s*\\(?:text|mathrm)\s*\{\s*(\w+)\s*\}\s*\}", r"_{\1}"), (r"_\s*\{\s*\\(odot|oplus)\s*\}", r"_{\1}"),
    (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"), (r"(^|[(\[{,=])\s*\+", r"\1"), (r"\s+", " "),
]]


def normalise(text: str) -> str:
    """One spelling for what means the same. Still LaTeX, because math-verify reads it."""
    text = re.sub(r"\s+", " ", text.translate(_UNICODE))
    if "\\begin" not in text:                               # in a matrix, \\ is a row break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)     # elsewhere, \\sqrt is \sqrt escaped twice
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.rstrip(" .,;:\\").lstrip()
    while _enclosed(text, "{") and len(_split(text[1:-1], ",;")) < 2:     # {5} is 5, but {1,2} is a set
        text = text[1:-1].rstrip(" .,;:\\").lstrip()
    return text


def _enclosed(text: str, opening: str) -> bool:
    """Does the first character open a bracket that only the last character closes?"""
    if len(text) < 2 or text[0] not in opening or text[-1] not in ")]}":
        return False
    return 0 not in _depths(text)[:-1]


def _depths(text: str) -> list[int]:
    return list(itertools.accumulate((char in "([{") - (char in ")]}") for char in text))


def _split(text: str, separators: str) -> list[str]:
    """The non-blank pieces between separators that stand outside of all brackets."""
    cuts = [position for position, depth in enumerate(_depths(text)) if depth == 0 and text[position] in separators]
    pieces = [text[start:end] for start, end in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(text)])]
    return [piece.strip() for piece in pieces if piece.strip()]


# ------------------------------------------------------------------------------------------------- plain numbers

_INTEGER = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)"
_TIMES_POWER = r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?"
_PLAIN = [re.compile(pattern) for pattern in (
    rf"(?P<value>{_INTEGER}?\.\d+|{_INTEGER}\.?)(?:{_TIMES_POWER}|[eE](?P<e>[+-]?\d+))?",       # 1,000.5 or 1.6e-19
    r"10\s*\^\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?",
    r"(?P<value>\d*\.\d*)\\overline\s*\{\s*(?P<repeat>\d+)\s*\}",
    rf"(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?{_INTEGER})\s*\}}\s*\{{\s*(?P<bottom>-?{_INTEGER})\s*\}}",
    rf"(?:(?P<whole>\d+) )?(?P<top>{_INTEGER})\s*/\s*(?P<bottom>{_INTEGER})",                   # 7/2 or 3 1/2
)]
_DECIMAL_COMMA = re.compile(r"-?\d+,(?:\d\d|\d{4,})")


def plain_number(text: str) -> tuple[Fraction, bool, bool] | None:
    """(value, written as a decimal?, percent?) of an integer, decimal, scientific number or fraction; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    body = text.rstrip("% ")
    sign, body = (-1, body[1:].lstrip()) if body.startswith("-") else (1, body)
    match = next(filter(None, (pattern.fullmatch(body) for pattern in _PLAIN)), None)
    if match is None:
        return None
    part = {name: re.sub("[, ]", "", digits) for name, digits in match.groupdict().items() if digits}
    exponent = part.get("power") or part.get("e") or "0"
    if len(exponent) > 5 or abs(int(exponent)) > MAX_NUMBER_CHARS or int(part.get("bottom", 1)) == 0:
        return None             # 10^{999999999} is a plain number that no machine should write out
    if "top" in part:
        value = int(part.get("whole", 0)) + Fraction(int(part["top"]), int(part["bottom"]))
    else:
        digits = part.get("value", "1").rstrip(".") or "0"
        value = Fraction(digits) * Fraction(10) ** int(exponent)
        if repeat := part.get("repeat"):
            value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(digits.partition(".")[2]))
    return sign * value, "." in part.get("value", "") or exponent != "0", text.endswith("%")


def _same_number(gold: tuple, box: tuple) -> bool:
    (a, a_decimal, a_percent), (b, b_decimal, b_percent) = gold, box
    rounded = (a_decimal or b_decimal) and a.denominator != 1
    readings = [b] if a_percent == b_percent else [b, b / 100 if b_percent else b * 100]
    return any(abs(a - reading) <= (RELATIVE_TOLERANCE * abs(a) if rounded else 0) for reading in readings)


# ---------------------------------------------------------------------------- structure: heads, lists, units, words

_SYMBOL = r"(?:\\text\s*\{[^{}]*\}|\\?[a-zA-Z]+)(?:'|_\w|_\{[^{}]*\}|\^\{[^{}]*\})*"
_NAME = re.compile(rf"{_SYMBOL}(?:\s*{_SYMBOL})?(?:\s*\([^()=]*\))?(?:\s*:\s*{_SYMBOL})?"       # f(x), V_1 : V_2, \angle A
                   r"|\([a-zA-Z](?:_\w)?(?:\s*,\s*[a-zA-Z](?:_\w)?)+\)")                        # (x, y)
_NOT_A_NAME = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|sqrt|frac|lim|sum|prod|int|pm|infty|pi)(?![a-zA-Z])")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")
_UNITS = ("cm mm km nm ft in lb lbs oz kg mg hr hrs min sec ms mph kph mi yd pm am th st nd rd mol rad dB Hz kHz MHz GHz "
          "eV keV MeV GeV kJ kW mL ml kN Pa kPa atm m/s km/h ft/s").split()
_UNIT = re.compile(r"(?:(?<=[\d})])|(?<=\\pi))\s*(?:\\(?:text|mathrm)\s*\{[^{}]*\}|(?<![\\a-zA-Z])(?:%s|[a-zA-Z]{4,}(?:\s+[a-zA-Z]+)*)(?![a-zA-Z]))"
                   r"\s*(?:\^\s*\{?-?\d\}?)?$" % "|".join(_UNITS))


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not _NOT_A_NAME.search(text)


def _is_equation(text: str) -> bool:
    return len(_split(text, "=")) > 1


def _split_head(text: str) -> tuple[str, str]:
    r"""`f(x) = 4 + 1 = 5` -> (`f(x)`, `5`): what is named, and the last value of the chain."""
    if len(_split(text, ",;")) > 1:         # x = 1, y = 2 is a list, with a head in each item
        return "", text
    exact = text.rpartition(r"\approx")[0].strip()
    if exact and not _is_name(exact):       # \sqrt{2} \approx 1.414: the exact form is the answer
        text = exact
    parts = _split(re.sub(r"\\(?:approx|in)(?![a-zA-Z])", "=", text), "=")
    if len(parts) < 2 or _ORDER.search(text):
        return "", text
    if _is_name(parts[0]):
        return re.sub(r"\s", "", [part for part in parts[:-1] if _is_name(part)][-1]), parts[-1]
    values = {number[0] / (100 if number[2] else 1) for number in map(plain_number, parts) if number}
    hedged = len(values) > 1                # 2 + 2 = 4 states its value, 203 = 204 states two
    return "", text if hedged or _variables("=".join(parts)) else parts[-1]


def _items(text: str) -> tuple[str, list[str]]:
    r"""(brackets, items): `(1, 2]` -> ("(]", [1, 2]). A bare list has brackets "", a single thing is its one item."""
    body = re.sub(r"\\([{}])", r"\1", text)
    if _enclosed(body, "([{"):
        inner = _split(body[1:-1], ",;")
        if len(inner) > 1 or body[0] == "{":
            return body[0] + body[-1], inner
    items = []
    for item in _split(text, ",;"):
        both = item.count(r"\pm") == 1 and r"\mp" not in item
        items += [item.replace(r"\pm", sign).removeprefix("+").strip() for sign in "+-"] if both else [item]
    return "", items


def _equal_lists(gold: tuple, box: tuple, compare) -> bool:
    (gold_brackets, gold_items), (box_brackets, box_items) = gold, box
    if gold_brackets != box_brackets and {gold_brackets, box_brackets} not in ({"", "()"}, {"", "{}"}):
        return False
    if max(len(gold_items), len(box_items)) > MAX_ITEMS:
        return False
    names = [{_split_head(item)[0] for item in items} for items in (gold_items, box_items)]
    # brackets give an order; so do names on one side only: x = 1, y = 2 against 1, 2
    if gold_brackets not in ("", "{}") or (len(names[0]) > 1 and names[1] == {""}):
        return len(gold_items) == len(box_items) and all(_equal(*pair, compare) for pair in zip(gold_items, box_items))
    return (all(any(_equal(a, b, compare) for b in box_items) for a in gold_items)
            and all(any(_equal(a, b, compare) for a in gold_items) for b in box_items))


def _split_unit(text: str) -> tuple[str, str]:
    r"""`10\text{ cm}^2` -> (`10`, `cm^2`). One bare letter is a variable (2k, 10m)."""
    match = _UNIT.search(text)
    if match is None or not text[:match.start()].strip():
        return text, ""
    unit = re.sub(r"\\[a-z]+|[{}\s.]", "", match.group()).lower()
    return text[:match.start()].strip(), re.sub(r"(?<=\w\w)s\b", "", unit)


def _words(text: str) -> str:
    """The letters of an answer in words, else "". One letter A-F is a choice, with or without parentheses."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    if choice := re.fullmatch(r"\(?\s*([A-Fa-f])\s*\)?", plain):
        return choice[1].upper()
    return re.sub(r"[\s.'-]+", "", plain).casefold() if re.fullmatch(r"[A-Za-z][A-Za-z\s.'-]*[A-Za-z.]", plain) else ""


# ------------------------------------------------------------------------------------------- guards and the verdict

_RESTATES = re.compile(r"(?<!\{)\\(?:sum|prod|i*nt|oint|lim|[dt]?binom|choose|gcd|lcm|[bp]?mod|lfloor|lceil|max|min|det)(?![a-zA-Z])|!")
_FUNCTIONS = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|Gamma)h?(?![a-zA-Z])")
_TOWER = re.compile(r"\^\s*\{\s*\(*\\?\w*\s*\^\s*\{\s*\(*\\?\w*\s*\^|\d{4,}\s*\)*\s*!|!\s*\)*\s*!|-\s*-\s*-")
_EXPONENT = re.compile(r"(?P<base>[)}\]]?)\s*\^\s*\{?\s*[-(]*\s*(?P<low>\d+)(?:\s*\^\s*\{?\s*(?P<high>\d+))?")
_BASE = re.compile(r"\d_\{?\s*(\w+)")


def _variables(text: str) -> set[str]:
    """Bare letters that name something. math-verify takes some of them for units (2m, 5s)."""
    return set(re.findall("[a-zA-Z]", re.sub(r"\\(?:begin|end|mathbb)\s*\{\w*\}|\\[a-zA-Z]+", " ", text))) - set("eiE")


def _heavy(text: str) -> bool:
    """Valid LaTeX that takes minutes to evaluate: towers, exponents from 10^4, big factorials, (x+1)^{100}."""
    for match in _EXPONENT.finditer(text):
        low, high = match["low"], match["high"] or "1"
        if len(high) > 3 or len(low) * int(high) > 4 or (match["base"] and int(low) > 60 and re.search(r"(?<!\\)\b[a-z]\b", text)):
            return True
    return bool(_TOWER.search(text))


def _refused(gold: str, box: str) -> bool:
    """Rule 7: shapes that are no answer to this gold, or that only cost time."""
    sentences = [sorted(part.strip().casefold() for part in _TEXT.findall(side) if len(part.strip()) > 1) for side in (gold, box)]
    return (
        _heavy(box) or _heavy(gold)
        or bool(_RESTATES.search(box) and not _RESTATES.search(gold))
        or bool(plain_number(gold) and _FUNCTIONS.search(box))
        or bool(_variables(box) and not _variables(gold))
        or bool(plain_number(box) and _variables(gold))
        or _is_equation(gold) != _is_equation(box)          # x^2 + y^2 = z^2 is not z^2
        or _BASE.findall(gold) != _BASE.findall(box)
        or sentences[0] != sentences[1]                     # \text{not } 4, or 1 \text{ if } x > 0
    )


def _key(text: str) -> str:
    """Text without formatting. A space between digits stays: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text))


def _equal(gold: str, box: str, compare) -> bool:
    """Rules 3 to 8 on normalised text. `compare` is math-verify in a worker; in the parent it raises `_Undecided`."""
    if _key(gold) == _key(box):
        return True
    numbers = [plain_number(gold), plain_number(box)]
    for side, text in enumerate((gold, box)):
        if _DECIMAL_COMMA.fullmatch(text) and numbers[1 - side] and numbers[1 - side][1]:
            numbers[side] = plain_number(text.replace(",", "."))
    if all(numbers):
        return _same_number(*numbers)
    if len(box) > MAX_ANSWER_CHARS or max(_depths(box), default=0) > MAX_DEPTH:
        return False

    (gold_name, gold_value), (box_name, box_value) = _split_head(gold), _split_head(box)
    other_name = gold_name and box_name and gold_name != box_name       # x = 1 against y = 1 stay equations
    if (gold_value, box_value) != (gold, box) and not (other_name or _is_equation(gold_value) or _is_equation(box_value)):
        return _equal(gold_value, box_value, compare)
    lists = _items(gold), _items(box)
    is_list = [bool(brackets) or len(items) > 1 for brackets, items in lists]
    if all(is_list):
        return _equal_lists(*lists, compare)
    if any(is_list) and any(numbers):
        return False

    (gold_value, gold_unit), (box_value, box_unit) = _split_unit(gold), _split_unit(box)
    if gold_unit or box_unit:
        return (not (gold_unit and box_unit) or gold_unit == box_unit) and _equal(gold_value, box_value, compare)
    words = _words(gold), _words(box)
    if all(words) or any(len(word) > 3 for word in words):
        return words[0] == words[1]
    return not _refused(gold, box) and compare(gold, box)


# ------------------------------------------------------------------------------------- golds, and math-verify itself

def _golds(ground_truth) -> list[str]:
    """The normalised alternatives of a gold: str, int, float, or a list of them. Empty for an invalid row."""
    if isinstance(ground_truth, (list, tuple)):
        return [text for item in ground_truth for text in _golds(item)]
    if isinstance(ground_truth, float) and ground_truth.is_integer():
        ground_truth = int(ground_truth)                    # 142.0 in a JSON file is the integer 142
    if isinstance(ground_truth, (int, float)) and abs(ground_truth) < 10**MAX_NUMBER_CHARS:
        ground_truth = repr(ground_truth)
    if not isinstance(ground_truth, str):
        return []
    box = extract_answer(ground_truth)
    return [text] if (text := normalise(ground_truth if box is None else box)) else []


def is_valid_ground_truth(ground_truth) -> bool:
    """False for a row that can never be rewarded: None, blank, or a list of such."""
    return bool(_golds(ground_truth))


class _Undecided(Exception):
    """The rules need math-verify."""


class _UnparsableGold(Exception):
    """math-verify cannot read the gold, so nothing but equal text could ever be right."""


def _in_parent(gold: str, box: str) -> bool:
    raise _Undecided


def _math_verify(gold: str, box: str) -> bool:
    """Rule 8, in a worker. Alarms off, since pebble keeps the time; both sides boxed, or a gold is misread."""
    from math_verify import parse, verify
    from sympy import Expr, I
    a, b = ([side for side in parse(f"\\boxed{{{text}}}", parsing_timeout=None) if not isinstance(side, str)] for text in (gold, box))
    if not a:
        raise _UnparsableGold
    if not b:
        return False
    if verify(a, b, timeout_seconds=None):
        return _close(a[0], b[0])
    if isinstance(a[0], Expr) and isinstance(b[0], Expr) and re.search(r"(?<![a-zA-Z])i(?![a-zA-Z])", gold + box):
        # math-verify reads i as a variable, so e^{i\pi} is not -1 to it
        a, b = (side[0].subs({symbol: I for symbol in side[0].free_symbols if symbol.name == "i"}) for side in (a, b))
        return verify(a, b, timeout_seconds=None)
    return False


def _close(gold, box) -> bool:
    """math-verify compares to 6 or 15 absolute decimals, which makes all tiny numbers equal: ask for relative closeness.

    Expressions are compared at one arbitrary point. Sets, relations and matrices keep the verdict.
    """
    from sympy import Expr, N, Rational
    if not (isinstance(gold, Expr) and isinstance(box, Expr)):
        return True
    symbols = sorted(gold.free_symbols | box.free_symbols, key=lambda symbol: symbol.name)
    point = {symbol: Rational(7 + 3 * k, 5 + 2 * k) for k, symbol in enumerate(symbols)}
    a, b = (N(side.doit().subs(point)) for side in (gold, box))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return True
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= 1e-6 * size if a and b else size < 1e-30)


# ---------------------------------------------------------------------------------------------------- supervision
#
# parent -> grader process (this file, run as a script) -> pebble's fork server -> workers
#
# Children of multiprocessing import the parent's main module, which under `torchrun train.py` means torch in every worker,
# seconds per restart and no room under a memory limit. So the parent starts this file with subprocess (fork and exec at
# once: safe with threads and CUDA) and they exchange lines. All of it goes when the parent's pipe closes, however it ended.

class Verifier:
    """Grades in the background: `submit` summaries as they arrive, collect the futures at the end of the rollout.

    `stats` counts gradings: graded, fast (without math-verify, or remembered), and one counter per kind of failure.
    The processes start with the first pair that needs math-verify.
    """

    def __init__(self, num_workers: int = 2, timeout: float = TASK_TIMEOUT):
        for module in ("math_verify", "pebble"):
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"verifier.py needs {module}: pip install math-verify pebble")
        self.num_workers, self.timeout = num_workers, timeout
        self.stats = dict.fromkeys(("graded", "fast", *FAILURES), 0)
        self._taken, self._cache = dict(self.stats), {}
        self._reset()

    def _reset(self):
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        self._process, self._pending, self._ids = None, {}, itertools.count()
        self._cache = {key: verdict for key, verdict in self._cache.items() if isinstance(verdict, str)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, summary: str, ground_truth) -> Future:
        """A future of 0.0 or 1.0 that never raises."""
        if self._pid != os.getpid():        # a forked child must not talk into its parent's pipe
            self._reset()
        future = Future()
        box = extract_answer(summary) if isinstance(summary, str) else None
        golds, box = tuple(_golds(ground_truth)), normalise(box) if box and len(box) <= MAX_NUMBER_CHARS else ""
        if not golds or not box:
            self._finish(future, "wrong" if golds else "invalid_golds", fast=True)
            return future
        with self._lock:                    # the cache holds a verdict, or the futures that wait for it
            known = self._cache.setdefault((golds, box), [])
            if isinstance(known, list):
                known.append(future)
        if isinstance(known, str):
            self._finish(future, known, fast=True)
        elif known[0] is future:
            self._decide((golds, box))
        return future

    def score(self, pairs) -> list[float]:
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def take_stats(self) -> dict[str, int]:
        """The counters since the last call: one batch, for the training log."""
        with self._lock:
            fresh = {name: count - self._taken[name] for name, count in self.stats.items()}
            self._taken = dict(self.stats)
        return fresh

    def close(self):
        """Stop the processes. What is still pending counts as a death."""
        with self._lock:
            process, self._closed = self._process, True
        if process is None or self._pid != os.getpid():
            return
        try:
            process.stdin.close()
            process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()                  # its workers and fork server follow

    def _decide(self, key):
        golds, box = key
        try:
            verdict = "right" if any(_equal(gold, box, _in_parent) for gold in golds) else "wrong"
        except _Undecided:
            return self._send(key)
        except Exception:
            verdict = "exceptions"          # a fault in the rules: a counted 0, so that training hears of it
        self._settle(key, verdict, fast=True)

    def _settle(self, key, verdict: str, fast: bool = False):
        with self._lock:
            waiting = self._cache.pop(key)
            if len(self._cache) >= MAX_CACHE:
                self._cache = {k: v for k, v in self._cache.items() if isinstance(v, list)}
            self._cache[key] = verdict      # failures too: the same hostile string costs its seconds only once
        for future in waiting:
            self._finish(future, verdict, fast)

    def _finish(self, future: Future, verdict: str, fast: bool):
        with self._lock:
            self.stats["graded"] += 1
            self.stats["fast"] += fast
            if verdict in FAILURES:
                self.stats[verdict] += 1
        future.set_result(float(verdict == "right"))

    def _send(self, key, attempt: int = 0):
        with self._lock:
            if self._closed:
                return self._settle(key, "deaths")
            if self._process is None:
                self._start()
            number = next(self._ids)
            self._pending[number] = key, attempt
            try:
                self._process.stdin.write(json.dumps([number, *key]) + "\n")
                self._process.stdin.flush()
            except OSError:
                pass                        # it just died; `_read` is about to see that and to send again

    def _start(self):
        command = [sys.executable, os.path.abspath(__file__), str(self.num_workers), str(self.timeout)]
        # a session of its own, because Ctrl-C is for the parent; one hash seed, because sympy's verdicts depend on set order
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         start_new_session=True, env={**os.environ, "PYTHONHASHSEED": "0"})
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process):
        for line in process.stdout:
            number, verdict = line.split()
            with self._lock:
                key, _ = self._pending.pop(int(number))
            self._settle(key, verdict)
        process.wait()                      # the grader process is gone: closed, or killed from outside
        with self._lock:
            lost, self._pending, self._process = self._pending, {}, None
        for key, attempt in lost.values():
            self._send(key, attempt + 1) if attempt == 0 else self._settle(key, "deaths")


def failure_share(stats: dict) -> float:
    """Share of the gradings that scored 0 for another reason than a wrong answer."""
    return sum(stats[name] for name in FAILURES) / max(stats["graded"], 1)


_shared, _shared_lock = None, threading.Lock()


def is_correct(summary: str, ground_truth) -> bool:
    """Is the last box of the summary the ground truth, or one of a list? From any thread, in bounded time, no exception."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close)
    return _shared.submit(summary, ground_truth).result() == 1.0


def _init_worker():
    import ctypes
    import logging
    import resource
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # pebble's handler is Python, which a long C loop never runs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: go when the fork server goes
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)                      # the parser prints its complaints
    logging.disable(logging.CRITICAL)


def _grade(golds: list[str], box: str, timeout: float) -> str:
    """One pair in a worker. Returns a word, never a parsed object: printing or pickling one can hang."""
    # pebble keeps the time; should pebble be killed, the kernel ends a stuck worker, even one in a long C loop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(timeout) + 3)
    unparsable = []

    def compare(gold, box):
        try:
            return _math_verify(gold, box)
        except _UnparsableGold:
            unparsable.append(gold)                         # another item or alternative may still decide
            return False

    try:
        right = any(_equal(gold, box, compare) for gold in golds)
        return "right" if right else "unparsable_golds" if unparsable else "wrong"
    except MemoryError:
        os._exit(1)                                         # a death: this worker is full, a fresh one is not
    except BaseException:                                   # math-verify's own TimeoutException is no Exception
        return "exceptions"
    finally:
        signal.alarm(0)


def _serve(num_workers: int, timeout: float):
    """The grader process: lines `[number, golds, box]` in, lines `number verdict` out, pebble in between."""
    import multiprocessing
    import select
    from concurrent.futures import TimeoutError

    from pebble import ProcessPool

    replies, parent, lock, open_tasks, last_reply = os.dup(1), os.getppid(), threading.Lock(), set(), time.monotonic()
    os.dup2(2, 1)
    context = multiprocessing.get_context("forkserver")     # restarts in a fraction of a second, math-verify loaded
    context.set_forkserver_preload(["math_verify", "pebble"])
    pool = ProcessPool(num_workers, initializer=_init_worker, context=context)

    def reply(number, future):
        nonlocal last_reply
        error = future.exception()
        verdict = future.result() if error is None else "timeouts" if isinstance(error, TimeoutError) else "deaths"
        with lock:
            open_tasks.discard(number)
            last_reply = time.monotonic()
            os.write(replies, f"{number} {verdict}\n".encode())

    buffer = b""
    while os.getppid() == parent:           # checked every second: a sibling may have inherited the pipe and keep it open
        if open_tasks and time.monotonic() - last_reply > 10 * timeout + 30:
            os._exit(1)                     # the pool itself is stuck; the parent starts another
        if not select.select([0], [], [], 1.0)[0]:
            continue
        if not (chunk := os.read(0, 1 << 16)):
            break
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            number, golds, box = json.loads(line)
            if not open_tasks:
                last_reply = time.monotonic()
            open_tasks.add(number)
            future = pool.schedule(_grade, args=(golds, box, timeout), timeout=timeout)
            future.add_done_callback(lambda future, number=number: reply(number, future))
    pool.stop()
    pool.join()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
