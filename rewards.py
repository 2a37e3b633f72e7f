"""Is the answer right, and what does a segment of thinking earn? (SPEC sections 3 and 9)

A verifier for reinforcement learning has two enemies: a policy that learns what the grader wrongly rewards,
and a string that never lets the grader finish. So the short rules below decide what they can decide exactly,
refuse what only looks like an answer, and leave the rest to math-verify, which runs in killable processes.

The rules, in order (`_equal`; the first that decides, decides):

1. A gold that is None or blank is an invalid row: never rewarded, counted.
2. The answer is the last balanced \\boxed{}; none, blank or oversized: wrong.
3. Both sides are normalised (`normalise`): spacing, wrappers, \\dfrac, unicode; then head `x =` and units.
4. Lists, tuples, sets, intervals and \\pm are compared item by item.
5. Two plain numbers are compared as exact fractions, and nothing else is asked.
6. Equal strings are right; words are equal or wrong.
7. Guards: hostile shapes, restated problems, other brackets, other bases, other words are wrong.
8. math-verify compares what is left, in a supervised process.

Conventions where graders disagree (each row has a test in tests/test_rewards.py of the same number):

| # | case | verdict | reason |
|---|---|---|---|
| 1 | order of a bare list or {set}; repeats | ignored | "find all solutions" has no order |
| 2 | order inside ( ) and [ ] | matters | a tuple or interval is another object when swapped |
| 3 | [a,b] for (a,b); {a,b} for (a,b) | wrong | closed is not open, a set is not a point |
| 4 | a,b for (a,b) | right, in that order | forgotten parentheses lose nothing |
| 5 | 2/4 or 0.5 for 1/2, 6/3 for 2 | right | same value; an unreduced fraction is not a reward hole |
| 6 | p% against p or p/100 | right | questions ask for both forms; one box states only one of them |
| 7 | unit missing on one side | right | the question fixes the unit |
| 8 | different units or words on both sides | wrong | 5 cm is not 5 m |
| 9 | decimals | relative 1e-6, gold no integer | an absolute tolerance rewards 0.0 for 1e-19 |
| 10 | 5! or a sum for 120, sin/log for a number | wrong | it restates the question instead of answering it |
| 11 | x = 5 for 5; the last item of x = .. = .. | right | the head names the unknown, only the last value counts |
| 12 | 203 = 204 for 204; 4 or 6 for 4 | wrong | two values are a hedge |
| 13 | base subscript differs or is missing | wrong | 1011_2 is not 1011 |
| 14 | 1,22 is 1.22; 1,000 and 1\\,000 are 1000 | right | one comma with other than three digits is a decimal comma |
| 15 | choice letter: c or (C) for C | right | one letter is a choice, its dress is not |
| 16 | ab for ba | wrong | letters alone are a word, else `neve` is `even` |
| 17 | a:b for c:d | equal strings after scaling is not tried | ratios and clock times look alike |
| 18 | no box, or text outside of the box | wrong | the format rule; reading more lets a policy hedge |
"""

import atexit
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future
from fractions import Fraction

MAX_NUMBER_CHARS = 4000     # Python refuses integers over 4300 digits
MAX_ANSWER_CHARS = 400      # no dataset gold is longer; parsers are super-linear in length
MAX_ITEMS = 20              # lists compare every item with every item
MAX_DEPTH = 30              # parsers recurse; real answers nest less than ten deep
RELATIVE_TOLERANCE = Fraction(1, 10**6)
TASK_TIMEOUT = 3.0          # seconds for one comparison; real ones take about 0.01
WORKER_MEMORY = 2 << 30     # bytes of address space for one worker
LOUD_FAILURE_SHARE = 0.02   # above this share of failed gradings in a batch, training should say so
FAILURES = ("timeouts", "deaths", "exceptions", "invalid_golds", "unparsable_golds")


# ---------------------------------------------------------------------------------------------------------
# Reading: the box, and a normal form of what stands in it
# ---------------------------------------------------------------------------------------------------------

_BRACES = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ALL_BRACES = re.compile(r"\\+(?:boxed|fbox)\s*\{|[{}]")


def extract_answer(summary: str) -> str | None:
    """Content of the last balanced \\boxed{...}, or None. Linear: a summary can be a megabyte of braces.

    \\{ and \\} are no braces to TeX; if no box closes that way (\\boxed{204\\}), they are counted as braces.
    """
    return _last_box(_BRACES, summary) or _last_box(_ALL_BRACES, summary)


def _last_box(braces, summary: str) -> str | None:
    stack, answer = [], None
    for match in braces.finditer(summary):
        token = match.group()
        if token == "{":
            stack.append(None)
        elif token == "}":
            start = stack.pop() if stack else None
            if start is not None:           # an enclosing box closes later, so it wins over the one inside
                answer = summary[start:match.start()]
        elif token.endswith("{") and "box" in token:
            stack.append(match.end())
    return answer


_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "°": r"^\circ ", "π": r"\pi ",
    "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "±": r"\pm ", "≈": r"\approx ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "’": "'", "′": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "",
    "，": ",", "（": "(", "）": ")", "％": "%", "＝": "=", "．": ".", "－": "-",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
})

# (pattern, replacement), applied in this order. Each line removes one freedom of writing that has no meaning.
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\+(?=boxed|fbox)", r"\\"), (r"\\(?:boxed|fbox)(?=\s*\{)", ""),
    (r"(?<!\\)\\n(?![a-zA-Z])", " "),                                          # a literal backslash-n from sloppy JSON
    (r"^\\[\[(]|\\[\])]$", ""), (r"\\?\$", ""),                         # display math, dollars of both kinds
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\.?", ""),
    (r"\{,\}", ","), (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:le|leq|leqslant)(?![a-zA-Z])", r"\\le "), (r"\\(?:ge|geq|geqslant)(?![a-zA-Z])", r"\\ge "),
    (r"\\(?:text|mbox|textrm)\s*\{\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])", ","),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?:\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF](?![a-zA-Z])))?", " "),
    (r"\\(?:degree|deg)(?![a-zA-Z])|(?<![a-zA-Z\\{])(?:degrees?|dollars?)(?![a-zA-Z])", " "),
    (r"\\(?:text|mathrm|mbox)\s*\{\s*(?:degrees?|dollars?)\s*\}", " "),
    (r"\\%|(?<![a-zA-Z\\])(?:percent|pct)(?![a-zA-Z])|\\text\s*\{\s*percent\s*\}", "%"),
    (r"\\(frac|sqrt)(?:\s+(?=\w)|(?=\d))(\w)", r"\\\1{\2}"), (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"_\s*\{\s*\\(?:text|mathrm|rm|odot|oplus)?\s*\{?\s*([a-zA-Z]+)\s*\}?\s*\}", r"_{\1}"), (r"_\s*\{\s*\\odot\s*\}", "_{sun}"),
    (r"\\(?:mathbf|boldsymbol|bm|vec)\s*\{\s*(\w)\s*\}", r"\1"), (r"\\mathbb\s*R(?![a-zA-Z])|\\R(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"), (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"(?i)^\s*(?:\\text\s*\{)?\s*(?:the\s+)?(?:final\s+)?(?:answer|ans)\s*(?:is\s*:?|:|=)\s*\}?", ""),
    (r"(^|[(\[{,=])\s*\+", r"\1"), (r"\s+", " "),
]]
_TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|mathit|rm|bf|operatorname)\s*\{([^{}]*)\}")


def normalise(text: str) -> str:
    """One spelling for what typesets the same. Still LaTeX: math-verify reads the result."""
    text = text.translate(_UNICODE)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)     # \\sqrt from a doubly escaped source; a row break in matrices
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.rstrip(" .,;:\\").lstrip()
    while _wrapped(text, "{", "}") and len(_split(text[1:-1], ",;")) < 2:     # {5} is 5, {1,2} a set
        text = text[1:-1].strip()
    return text


def _wrapped(text: str, opening: str, closing: str) -> bool:
    """Does the first character open a bracket that only the last one closes?"""
    if len(text) < 2 or text[0] not in opening or text[-1] not in closing:
        return False
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


_UNIT_NAMES = ("cm mm km nm ft in lb lbs oz kg mg hr hrs min sec ms mph kph mi yd pm am Hz kHz MHz GHz eV keV MeV GeV kJ kW mol rad dB "
               "mL ml kN Pa kPa atm km/h m/s ft/s").split()
_UNIT = re.compile(
    r"(?<=[\d})])\s*(?:(?P<text>\\(?:text|mbox|textrm|mathrm|textbf)\s*\{[^{}]*\})|"
    r"(?P<bare>(?:%s|[a-zA-Z]{4,}(?:\s+[a-zA-Z]+)*)(?![a-zA-Z])))\s*(?:\^\s*\{?-?\d\}?)?\s*$" % "|".join(_UNIT_NAMES))


def _split_unit(text: str) -> tuple[str, str]:
    """`10\\text{ cm}^2` -> (`10`, `cm^2`). One bare letter is a variable, not a unit (2k, 10m)."""
    match = _UNIT.search(text)
    if match is None or re.search(r"\\$", text[:match.start()]):
        return text, ""
    unit = re.sub(r"\\[a-z]+|[{}\s]", "", match.group()).rstrip(".").lower()
    return text[:match.start()].strip(), re.sub(r"(?<=\w\w)s\b", "", unit)


# ---------------------------------------------------------------------------------------------------------
# Plain numbers
# ---------------------------------------------------------------------------------------------------------

_INTEGER = r"(?:\d{1,3}(?:[, ] ?\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}?\.\d+|{_INTEGER}\.?)"
_POWER = r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?|[eE](?P<e>[+-]?\d+))"
_DECIMAL_COMMA = re.compile(r"-?\d+,(?:\d\d|\d{4,})")
_PLAIN = [re.compile(pattern) for pattern in (
    rf"(?P<value>{_DECIMAL}){_POWER}?",
    r"(?P<value>\d*\.\d*)\\overline\s*\{\s*(?P<repeat>\d+)\s*\}",
    rf"(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?{_INTEGER})\s*\}}\s*\{{\s*(?P<bottom>-?{_INTEGER})\s*\}}",
    rf"(?:(?P<whole>\d+) )?(?P<top>{_INTEGER})\s*/\s*(?P<bottom>{_INTEGER})",
    r"10\^\{?(?P<power>[+-]?\d+)\}?",
)]


def _integer(digits: str) -> int:
    return int(re.sub(r"[, ]", "", digits))


def plain_number(text: str) -> tuple[Fraction, bool, bool] | None:
    """(value, written as a decimal?, percent?) of an integer, decimal, scientific number or fraction; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    percent = text.endswith("%")
    text = text.rstrip("% ")
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").strip() if text[:1] in "+-" and text[1:2] not in "+-" else text
    for pattern in _PLAIN:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        parts = match.groupdict()
        exponent = int(parts.get("power") or parts.get("e") or 0) if len(parts.get("power") or parts.get("e") or "") < 6 else 10**6
        if abs(exponent) > MAX_NUMBER_CHARS:
            return None
        if parts.get("top"):
            bottom = _integer(parts["bottom"])
            if bottom == 0:
                return None
            value, decimal = int(parts["whole"] or 0) + Fraction(_integer(parts["top"]), bottom), False
        else:
            digits = parts.get("value") or "1"
            value = Fraction(re.sub(r"[, ]", "", digits).rstrip(".") or 0) * Fraction(10) ** exponent
            if repeat := parts.get("repeat"):
                places = len(digits.partition(".")[2])
                value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10**places)
            decimal = "." in digits or exponent != 0
        return sign * value, decimal, percent
    return None


def _same_number(gold: tuple, box: tuple) -> bool:
    (a, a_decimal, a_percent), (b, b_decimal, b_percent) = gold, box
    tolerance = RELATIVE_TOLERANCE * abs(a) if (a_decimal or b_decimal) and a.denominator != 1 else 0
    readings = [b] + ([b * 100, b / 100] if a_percent != b_percent else [])
    if a_percent != b_percent:      # p% is p/100; the sign may also have been left out
        readings = [b, b / 100] if b_percent else [b, b * 100]
    return any(abs(a - reading) <= tolerance for reading in readings)


# ---------------------------------------------------------------------------------------------------------
# Structure, guards, and the verdict
# ---------------------------------------------------------------------------------------------------------

_SYMBOL = r"(?:\\text\s*\{[^{}]*\}|\\?[a-zA-Z]+)(?:'|_\w|_\{[^{}]*\}|\^\{[^{}]*\})*"
_NAME = re.compile(rf"{_SYMBOL}(?:\s*{_SYMBOL})?(?:\s*\([^()=]*\))?(?:\s*:\s*{_SYMBOL})?|\([a-zA-Z](?:_\w)?(?:\s*,\s*[a-zA-Z](?:_\w)?)+\)")
_NOT_A_NAME = re.compile(r"\\(?:a?(?:rc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|sqrt|frac|lim|sum|prod|int|pm|infty)(?![a-zA-Z])")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|ne|neq|lt|gt)(?![a-zA-Z])")


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not _NOT_A_NAME.search(text)


def _split(text: str, separators: str) -> list[str]:
    """Split at the separators outside of all brackets; blank pieces are dropped."""
    items, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in separators and depth == 0:
            items.append(text[start:position])
            start = position + 1
    return [item.strip() for item in [*items, text[start:]] if item.strip()]


def _is_equation(text: str) -> bool:
    return len(_split(text, "=")) > 1


def _split_head(text: str) -> tuple[str, str]:
    """`f(x) = 4 + 1 = 5` -> (`f(x)`, `5`): what is named, and the last value of the chain."""
    if len(_split(text, ",;")) > 1:         # x = 1, y = 2 is a list of heads
        return "", text
    exact = text.rpartition("\\approx")[0].strip()
    if exact and not _is_name(exact):       # \sqrt{2} \approx 1.414: the exact form is the answer
        text = exact
    if _ORDER.search(text):
        return "", text
    parts = _split(re.sub(r"\\(?:approx|in)(?![a-zA-Z])", "=", text), "=")
    if len(parts) > 1 and _is_name(parts[0]):
        return re.sub(r"\s", "", [part for part in parts[:-1] if _is_name(part)][-1]), parts[-1]
    if len(parts) > 1 and not re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", "=".join(parts))):
        values = {number[0] for number in map(plain_number, parts) if number}
        if len(values) < 2:                 # 2 + 2 = 4 states its value; 203 = 204 hedges
            return "", parts[-1]
    return "", text


def _items(text: str) -> tuple[str, list[str]]:
    """(brackets, items): `(1, 2]` -> ("(]", [1, 2]); a bare list has brackets ""; a single thing is one item."""
    body = re.sub(r"\\([{}])", r"\1", text)
    if _wrapped(body, "([{", ")]}"):
        inner = _split(body[1:-1], ",;")
        if len(inner) > 1 or body[0] == "{":
            return body[0] + body[-1], inner
    items = []
    for item in _split(text, ",;"):
        if item.count("\\pm") == 1 and "\\mp" not in item:
            items += [item.replace("\\pm", sign).removeprefix("+").strip() for sign in "+-"]
        else:
            items.append(item)
    return "", items


def _equal_lists(gold, box, compare) -> bool:
    (gold_brackets, gold_items), (box_brackets, box_items) = gold, box
    if gold_brackets != box_brackets and {gold_brackets, box_brackets} not in ({"", "()"}, {"", "{}"}):
        return False
    if max(len(gold_items), len(box_items)) > MAX_ITEMS:
        return False
    names = [{_split_head(item)[0] for item in items} for items in (gold_items, box_items)]
    # brackets give an order; so do names on one side only: x = 1, y = 2 against 1, 2
    if gold_brackets not in ("", "{}") or (gold_brackets == "" and len(names[0]) > 1 and names[1] == {""}):
        return len(gold_items) == len(box_items) and all(_equal(*pair, compare) for pair in zip(gold_items, box_items))
    return (all(any(_equal(a, b, compare) for b in box_items) for a in gold_items)
            and all(any(_equal(a, b, compare) for a in gold_items) for b in box_items))


def _words(text: str) -> str:
    """The letters of an answer in words, else "". One letter is a choice, with or without parentheses: (C)."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    if choice := re.fullmatch(r"\(?\s*([A-Fa-f])\s*\)?\.?", plain):
        return choice[1].upper()
    return re.sub(r"[\s.'-]+", "", plain).casefold() if re.fullmatch(r"[A-Za-z][A-Za-z\s.'-]*[A-Za-z.]", plain) else ""


_RESTATES = re.compile(r"(?<!\{)\\(?:sum|prod|i*nt|oint|lim|[dt]?binom|choose|gcd|lcm|[bp]?mod|lfloor|lceil|max|min|det)(?![a-zA-Z])|!")
_FUNCTIONS = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp)h?(?![a-zA-Z])")
_EXPONENT = re.compile(r"(?P<base>[)}\]]?)\s*\^\s*\{?\s*[-(]*\s*(?P<low>\d+)(?:\s*\^\s*\{?\s*(?P<high>\d+))?")
_BASE = re.compile(r"\d_\{?\s*(\w+)")


def _variables(text: str) -> set[str]:
    """Bare letters that name something; math-verify takes some of them for units (2m, 5s)."""
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", text))) - set("eiE")


def _heavy(text: str) -> bool:
    """Power towers, huge exponents, huge or double factorials: valid LaTeX that takes minutes to evaluate."""
    if re.search(r"\^\s*\{?[^{}^]*\^\s*\{?[^{}^]*\^|\d{4,}\s*\)*\s*!|!\s*\)*\s*!|-\s*-\s*-", text):
        return True
    digits = [(len(m["low"]) * int(m["high"] or 1) if len(m["high"] or "") < 4 else 10**4, m) for m in _EXPONENT.finditer(text)]
    return any(size > 4 or (m["base"] and int(m["low"]) > 60 and _variables(text)) for size, m in digits)


def _refused(gold: str, box: str) -> bool:
    """Rule 7: shapes that are no answer to this gold, or that only cost time."""
    depths = list(itertools.accumulate((char in "([{") - (char in ")]}") for char in box))
    sentences = [sorted(part.strip().casefold() for part in _TEXT.findall(side) if len(part.strip()) > 1) for side in (gold, box)]
    return (
        max(depths, default=0) > MAX_DEPTH
        or _heavy(box) or _heavy(gold)
        or bool(_RESTATES.search(box) and not _RESTATES.search(gold))
        or bool(plain_number(gold) and (_FUNCTIONS.search(box) or _variables(box)))
        or bool(plain_number(box) and _variables(gold))
        or _BASE.findall(gold) != _BASE.findall(box)
        or _is_equation(gold) != _is_equation(box)      # an equation is not a value: x^2 + y^2 = z^2 for z^2
        or sentences[0] != sentences[1]
    )


def _key(text: str) -> str:
    """Text without formatting, for equality of strings. A space between digits stays: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text))


def _equal(gold: str, box: str, compare) -> bool:
    """Rules 4 to 8 on normalised text. `compare` is math-verify in a worker, and raises `_Undecided` in the parent."""
    if _key(gold) == _key(box):
        return True
    numbers = [plain_number(gold), plain_number(box)]
    for side, text in enumerate((gold, box)):       # a decimal comma only where the other side is one decimal number
        if _DECIMAL_COMMA.fullmatch(text) and numbers[1 - side] and numbers[1 - side][1]:
            numbers[side] = plain_number(text.replace(",", "."))
    if all(numbers):
        return _same_number(*numbers)
    if len(box) > MAX_ANSWER_CHARS:
        return False

    gold_list, box_list = _items(gold), _items(box)
    lists = [bool(brackets) or len(items) > 1 for brackets, items in (gold_list, box_list)]
    (gold_name, gold_value), (box_name, box_value) = _split_head(gold), _split_head(box)
    named_apart = gold_name and box_name and gold_name != box_name      # x = 1 against y = 1 stay equations
    if (gold_value, box_value) != (gold, box) and not (named_apart or _is_equation(gold_value) or _is_equation(box_value)):
        return _equal(gold_value, box_value, compare)
    if all(lists):
        return _equal_lists(gold_list, box_list, compare)
    if any(lists) and any(numbers):
        return False

    (gold_value, gold_unit), (box_value, box_unit) = _split_unit(gold), _split_unit(box)
    if gold_unit or box_unit:
        return (not (gold_unit and box_unit) or gold_unit == box_unit) and _equal(gold_value, box_value, compare)
    words = _words(gold), _words(box)
    if all(words) or any(len(word) > 3 for word in words):
        return words[0] == words[1]
    if _refused(gold, box):
        return False
    return compare(gold, box)


# ---------------------------------------------------------------------------------------------------------
# Golds
# ---------------------------------------------------------------------------------------------------------

def _golds(ground_truth) -> list[str]:
    """The normalised alternatives of a gold: str, int, float or a list of them. Empty: the row is invalid."""
    if isinstance(ground_truth, (list, tuple)):
        return [text for item in ground_truth for text in _golds(item)]
    if isinstance(ground_truth, float) and ground_truth.is_integer():
        ground_truth = int(ground_truth)        # 142.0 in a JSON file is the integer 142
    if isinstance(ground_truth, (int, float)) and abs(ground_truth) < 10**300:
        ground_truth = repr(ground_truth)
    if not isinstance(ground_truth, str):
        return []
    boxed = extract_answer(ground_truth)
    text = normalise(ground_truth if boxed is None else boxed) if len(ground_truth) <= 10**5 else ""
    return [text] if text else []


def is_valid_gold(ground_truth) -> bool:
    """False for a row that can never be rewarded: None, blank, or a list of those."""
    return bool(_golds(ground_truth))


# ---------------------------------------------------------------------------------------------------------
# Supervision: parent -> grader process (this file as a script) -> pebble's workers
#
# multiprocessing children import the parent's main module: under `torchrun train.py` that is torch and CUDA
# in every worker. So the parent only starts this file with subprocess (fork + exec, safe from any thread and
# with CUDA up) and talks to it in lines. That process is small, its workers come from a fork server with
# math-verify loaded, and all of them go when the pipe from the parent closes, however the parent ended.
# ---------------------------------------------------------------------------------------------------------

class _Undecided(Exception):
    """The rules need math-verify."""


def _no_worker(gold, box):
    raise _Undecided


class Verifier:
    """Grades in the background: submit summaries as they arrive, collect at the end of the rollout.

    `stats` counts gradings: graded, fast (decided without math-verify) and one counter per kind of failure.
    """

    def __init__(self, num_workers: int = 2, timeout: float = TASK_TIMEOUT):
        for module in ("math_verify", "pebble"):
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"rewards.py needs {module}: pip install math-verify pebble")
        self.num_workers, self.timeout = num_workers, timeout
        self.stats = dict.fromkeys(("graded", "fast", *FAILURES), 0)
        self._taken = dict(self.stats)
        self._reset()

    def _reset(self):
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        self._process, self._pending, self._cache, self._next_id = None, {}, {}, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, summary: str, ground_truth) -> Future:
        """A future of 0.0 or 1.0 that never raises."""
        if self._pid != os.getpid():        # a forked child must not talk into its parent's pipe
            self._reset()
        future = Future()
        golds = _golds(ground_truth)
        box = extract_answer(summary) if isinstance(summary, str) else None
        if not golds:
            self._finish(future, "invalid_golds")
        elif box is None or len(box) > MAX_NUMBER_CHARS or not normalise(box):
            self._finish(future, "wrong", fast=True)
        else:
            self._submit(future, tuple(golds), normalise(box))
        return future

    def _submit(self, future, golds, box):
        key = (golds, box)
        with self._lock:
            known = self._cache.get(key)
            if isinstance(known, list):         # the same question is being graded: wait for that one
                known.append(future)
                return
            if known is None:
                self._cache[key] = [future]
        if known is not None:
            return self._finish(future, known, fast=True)
        try:
            verdict = "right" if any(_equal(gold, box, _no_worker) for gold in golds) else "wrong"
        except _Undecided:
            return self._send(key)
        except RecursionError:
            verdict = "wrong"
        self._settle(key, verdict, fast=True)

    def score(self, pairs) -> list[float]:
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def take_stats(self) -> dict:
        """The counters since the last call: one batch for the training log."""
        with self._lock:
            fresh = {name: count - self._taken[name] for name, count in self.stats.items()}
            self._taken = dict(self.stats)
        return fresh

    def _finish(self, future, verdict, fast=False):
        with self._lock:
            self.stats["graded"] += 1
            self.stats["fast"] += fast
            if verdict in FAILURES:
                self.stats[verdict] += 1
        if not future.done():
            future.set_result(float(verdict == "right"))

    def _settle(self, key, verdict, fast=False):
        with self._lock:
            waiting = self._cache.get(key)
            if not isinstance(waiting, list):
                return
            if len(self._cache) > 200_000:
                self._cache = {k: v for k, v in self._cache.items() if isinstance(v, list)}
            self._cache[key] = verdict
        for future in waiting:
            self._finish(future, verdict, fast)

    def _send(self, key, attempt=0):
        with self._lock:
            if self._closed:
                return self._settle(key, "deaths")
            if self._process is None:
                self._start()
            self._next_id += 1
            self._pending[self._next_id] = key, attempt
            line = json.dumps([self._next_id, *key]) + "\n"
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except OSError:
                pass        # the reader sees the end of the process and settles what is pending

    def _start(self):
        command = [sys.executable, os.path.abspath(__file__), str(self.num_workers), str(self.timeout)]
        # own session: Ctrl-C reaches the parent only; fixed hash seed: sympy's order, so the same verdict every run
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"})
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process):
        for line in process.stdout:
            number, verdict = line.split()
            with self._lock:
                key, _ = self._pending.pop(int(number), (None, 0))
            if key is not None:
                self._settle(key, verdict)
        with self._lock:                        # the grader process is gone: closed, or killed from outside
            lost, self._pending = self._pending, {}
            self._process = None if self._process is process else self._process
        process.wait()
        for key, attempt in lost.values():
            if attempt or self._closed:
                self._settle(key, "deaths")
            else:
                self._send(key, attempt + 1)

    def close(self):
        with self._lock:
            process, self._closed = self._process, True
        if process is None or self._pid != os.getpid():
            return
        try:
            process.stdin.close()
            process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()


def failure_share(stats: dict) -> float:
    """Share of gradings that failed for a reason other than a wrong answer."""
    return sum(stats[name] for name in FAILURES) / max(stats["graded"], 1)


_shared, _shared_lock = None, threading.Lock()


def is_correct(summary: str, ground_truth) -> bool:
    """Is the last box of the summary the ground truth (or one of a list)? Any thread, bounded time, no exception."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close)
    return _shared.submit(summary, ground_truth).result() == 1.0


# ---------------------------------------------------------------------------------------------------------
# The grader process and its workers
# ---------------------------------------------------------------------------------------------------------

def _init_worker():
    import ctypes
    import logging
    import resource
    import signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG: go when the fork server goes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # pebble's handler is Python: a stuck C loop never runs it
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)                      # parsers print; descriptor 1 would be the parent's pipe
    logging.disable(logging.CRITICAL)


def _close(gold, box) -> bool:
    """math-verify compares to 6 or 15 absolute decimals, which makes all tiny numbers equal: ask for relative closeness.

    Expressions with symbols are compared at one arbitrary point. Sets, relations and matrices keep the verdict.
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


def _with_imaginary_unit(parsed):
    from sympy import Expr, I
    if not parsed or not isinstance(parsed[0], Expr) or not any(symbol.name == "i" for symbol in parsed[0].free_symbols):
        return parsed[0] if parsed and isinstance(parsed[0], Expr) else None
    return parsed[0].subs({symbol: I for symbol in parsed[0].free_symbols if symbol.name == "i"})


def _grade(golds, box) -> str:
    """Runs in a worker. Returns a word, never a parsed object: printing or pickling one can hang."""
    from math_verify import parse, verify
    unparsable = 0

    def compare(gold, box):
        nonlocal unparsable
        # alarms off (pebble keeps the time); the gold must be boxed or it is misread
        parsed = [parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, box)]
        unparsable += not parsed[0]
        if verify(*parsed, timeout_seconds=None):
            return _close(parsed[0][0], parsed[1][0])
        imaginary = [_with_imaginary_unit(side) for side in parsed]     # math-verify reads i as a variable
        return None not in imaginary and verify(*imaginary, timeout_seconds=None)

    try:
        if any(_equal(gold, box, compare) for gold in golds):
            return "right"
        return "unparsable_golds" if unparsable else "wrong"
    except MemoryError:
        os._exit(1)         # a bloated worker is not worth keeping
    except BaseException:
        return "exceptions"


def _serve(num_workers: int, timeout: float):
    """The grader process: read [id, golds, box] lines, let pebble grade them, write `id verdict` lines."""
    import multiprocessing
    import select
    from concurrent.futures import TimeoutError
    from pebble import ProcessPool

    replies, parent, lock = os.dup(1), os.getppid(), threading.Lock()
    os.dup2(2, 1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["math_verify", "pebble"])
    pool = ProcessPool(num_workers, initializer=_init_worker, context=context)

    def reply(number, future):
        error = future.exception()
        verdict = future.result() if error is None else "timeouts" if isinstance(error, TimeoutError) else "deaths"
        with lock:
            os.write(replies, f"{number} {verdict}\n".encode())

    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        if os.getppid() != parent:          # a sibling may have inherited the pipe, so its end may stay open
            break
        chunk = os.read(0, 1 << 16) if ready else None
        if chunk == b"":
            break
        *lines, buffer = (buffer + (chunk or b"")).split(b"\n")
        for line in lines:
            number, golds, box = json.loads(line)
            pool.schedule(_grade, args=(golds, box), timeout=timeout).add_done_callback(
                lambda future, number=number: reply(number, future))
    pool.stop()
    pool.join()


# ---------------------------------------------------------------------------------------------------------
# From scores to returns. Only tensor methods: this file must not import torch
# ---------------------------------------------------------------------------------------------------------

def has_one_think_end(thinking: str, appended: str, summary: str, think_end: str = "</think>") -> bool:
    """SPEC 3, the format rule: the text holds exactly one </think>, its own or the appended one."""
    return (thinking + appended + summary).count(think_end) == 1


def mean_rewards(scores):
    """SPEC 3: r_j = mean over the A summaries at budget j.   [B, G, M, A] -> [B, G, M]"""
    return scores.mean(dim=-1)


def cumulative_returns(rewards, probs):
    """SPEC 3: R_j = Σ_{k≥j} P_k r_k.   rewards [B, G, M], probs [M] -> [B, G, M]"""
    weighted = rewards * rewards.new_tensor([float(prob) for prob in probs])
    return weighted.flip(-1).cumsum(-1).flip(-1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
