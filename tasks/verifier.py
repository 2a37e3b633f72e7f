r"""The math verifier: whether an answer equals the ground truth. Works when copied alone.

RL finds a grader's false positives, and strings on which it hangs. So an answer is right only if
all of it was understood: every command, letter, word and relation of the box is accounted for.
docs/verifier.md has the conventions where graders disagree.

1. The answer is the last balanced \boxed{}. Spacing, \left, \dfrac and so on mean nothing.
2. Plain numbers compare as exact fractions; a decimal may be rounded to a relative 1e-6.
3. `x =` is dropped if x is a name; every value of a chain must be right, so 203 = 204 is a hedge.
4. A unit of the table is dropped if only one side has one. Any other word is wrong.
5. Lists, points and intervals compare item by item.
6. Formulas must be well formed, in letters and functions that the ground truth has as well.
   math-verify reads them, in processes that can be killed; their values must agree at some points.
"""

import ctypes
import functools
import importlib.util
import itertools
import math
import os
import re
import signal
import sys
import threading
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, suppress
from fractions import Fraction

from loky.backend import get_context
from pebble import ProcessExpired, ProcessPool

MAX_NUMBER_CHARS = 4000  # Python refuses to read integers over 4300 digits
MAX_ANSWER_CHARS, MAX_DEPTH, MAX_ITEMS = 400, 30, 20  # no dataset answer has more
MAX_CACHE = 50_000  # remembered verdicts: the summaries of a rollout repeat the same boxes
TASK_TIMEOUT = 5.0  # seconds for one comparison; ordinary ones take 0.01
WORKER_MEMORY = 2 << 30  # bytes of address space per worker
FAILURES = ("timeouts", "deaths", "exceptions", "invalid_ground_truths")

# ----------------------------------------------------------------------------------- 1: the text

_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...}, or None. Linear time: a text can be all braces."""
    answer, opened = None, []
    for match in _BRACE.finditer(text):
        if match[0] == "}" and opened:
            start = opened.pop()
            if start is not None:  # an enclosing box closes later, so it wins
                answer = text[start : match.end() - 1]
        elif match[0] == "{" or "box" in match[0]:
            opened.append(match.end() if "box" in match[0] else None)
    return answer


_UNICODE = str.maketrans(
    {
        **dict(zip("−–—，（）％０１２３４５６７８９", "---,()%0123456789")),
        **dict(zip("×·π√∞≤≥∪∈±", r"\times \cdot \pi \sqrt \infty \le \ge \cup \in \pm".split())),
        **{"°": r"^\circ ", "²": "^2", "³": "^3", "≈": r"\approx ", "\u200b": "", "\ufeff": ""},
    }
)
# Applied in this order; most with an example. END ends a command's name: \le leaves \left alone.
_REWRITES = [
    (re.compile(pattern.replace("END", r"(?![a-zA-Z])")), new)
    for pattern, new in [
        (r"\\(?:boxed|fbox)(?=\s*\{)|\\!\s*|\*\*\s*$|^\s*\*\*", ""),  # \boxed{5}, 12,\!000, **4**
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)END\.?", ""),  # \left(1, 2\right)
        (r"\{,\}(?=\d{3}(?!\d))", ""),  # (1{,}000, 2)
        (r"(?<!\\)\\[,;: ()\[\]]|(?<!\\)\$|~|\\q?quadEND|\s+", " "),  # \(5\), $5$, 5\ \text{cm}
        (r"\\[dtc]fracEND", r"\\frac"),  # \dfrac{1}{2}
        (r"<=|\\leq(?:slant)?END", r"\\le "),
        (r">=|\\geq(?:slant)?END", r"\\ge "),
        (r"\\(?:mbox|operatorname|math(?:rm|bf)|text(?:rm|bf|it|normal))(?=\s*\{)", r"\\text"),
        (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)END", ","),  # 4 or 6
        (r"(?i)^\s*(?:the )?(?:final )?answer(?: is|:)", ""),  # The answer is 5
        (r"(?i)^\s*(?:\\text\s*\{\s*)?no (?:real )?solutions?\s*\}?\s*$", r"\\emptyset"),
        (r"\\varnothingEND|^\s*\\\{\s*\\\}\s*$", r"\\emptyset"),
        (r"(?:,\s*)?\\text\s*\{\s*,?\s*for (?:all|any|every)\s*\}\s*[a-zA-Z]\s*$", ""),
        (r"(?:\^\s*(?:\\circEND|\{\s*\\circ\s*\})|\\degreeEND)(?:\s*[CF]END)?", r"\\text{ degree}"),
        (r"\\\$(.*?)(?=\s*\)?[ .,;:\\]*$|,\s|[;=])", r"\1\\text{ dollar}"),  # \$36
        (r"\\%|\\text\s*\{\s*percent\s*\}|(?<![a-zA-Z\\])(?:percent|pct)END", "%"),  # 28 percent
        (r"\+\s?-(?=\s*[\d\\a-z])", r"\\pm "),  # +- 7
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z\\])(pi|sqrt|exp|sin|cos|tan|log|ln)END", r"\\\1"),  # -2*pi
        (r"\\exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})", r"e^{\1\2}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\(frac|sqrt)(?:\s+(?=\w)|(?=\d))(\w)", r"\\\1{\2}"),  # \frac12, \sqrt3
        (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),  # \frac{1}2
        (r"\\text\s*\{\s*([\d.,]+)\s*\}", r"\1"),  # \text{42}
        (r"(?:\\\\\s*)?(\\(?:begin|end)\{)[bp](?=matrix)", r"\1p"),  # no row break before \end
        (r"(\.\d*)\\overline\s*\{\s*(\d{1,9})\s*\}", r"\1\2\2\2\2\2\2\2\2\2"),  # 0.1\overline{6}
        (r"(\.\d*?)(\d)\2\2+\s*(?:\.\.\.|\\l?dots)$", r"\1\2\2\2\2\2\2\2\2\2"),  # 0.333...
        (r"_\s*\{\s*\\(?:text\s*\{\s*)?(\w+)\s*\}?\s*\}", r"_{\1}"),  # k_{\text{B}}, R_{\odot}
        (r"_\s*\{\s*(\w)\s*\}(?!\d)", r"_\1"),  # 1011_{2}
        (r"([a-zA-Z])\s*\^\s*(\{[^{}]*\}|\w)\s*_\s*(\{\w+\}|\w)", r"\1_\3^\2"),  # x^2_2
    ]
]
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def normalise(text: str) -> str:
    """One spelling for all that means the same, still LaTeX."""
    text = text.translate(_UNICODE)
    if "\\begin" not in text:  # in a matrix, \\ is a row break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # elsewhere \\sqrt is \sqrt
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    for _ in range(3):  # {5} and ((5)) are 5, but {1,2} is a set and (1,2) a point
        text = text.lstrip().rstrip(" .,;:\\")
        inside = _inside(text, "{(")
        if inside is not None and (len(inside) < 2 or text[0] == "{" and plain_number(text[1:-1])):
            text = text[1:-1]
    return text


def _key(text: str) -> str:
    """Text without formatting. Spaces between digits stay: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text))


def _depths(text: str) -> list[int]:
    return list(itertools.accumulate((char in "([{") - (char in ")]}") for char in text))


def _split(text: str) -> list[str]:
    """The non-blank pieces between commas and semicolons outside of all brackets."""
    outside = zip(text, _depths(text))
    marked = "".join("\0" if depth == 0 and char in ",;" else char for char, depth in outside)
    return [piece.strip() for piece in marked.split("\0") if piece.strip()]


def _inside(text: str, opening: str) -> list[str] | None:
    """The pieces inside one pair of brackets around the whole text; None if there is none."""
    ends = len(text) > 1 and text[0] in opening and text[-1] in ")]}"
    return _split(text[1:-1]) if ends and 0 not in _depths(text)[:-1] else None


# ------------------------------------------------------------------------------ 2: plain numbers

_THOUSANDS = re.compile(  # 1,234 or 1 234; not 1 234/5
    r"(?<![\d.])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+(?! ?/))(?!\d)"
)
_POWER_OF_TEN = re.compile(  # 1.6 \times 10^{-19} or 10^4
    r"(?:(?<=[\d.])\s*(?:\\times|\\cdot|\*|x)\s*|^)10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?$"
)
_FRAC = re.compile(r"\s*\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")
_RATIO = re.compile(r"(?:(\d+) )?(-?\d+) ?/ ?(-?\d+)")  # 7/2 or 3 1/2
_DECIMAL = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")  # no one writes out 1e99999


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """(value, is it a decimal?) of an integer, decimal, fraction or mixed number; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    body = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), body.removesuffix("%"))
    body = _POWER_OF_TEN.sub(lambda match: f"{'' if match.start() else 1}e{match[1]}", body.strip())
    body = _FRAC.sub(r" \1/\2", body).strip()
    if (ratio := _RATIO.fullmatch(body)) and int(ratio[3]):
        return sign * (int(ratio[1] or 0) + Fraction(int(ratio[2]), int(ratio[3]))), False
    return (sign * Fraction(body), not body.isdigit()) if _DECIMAL.fullmatch(body) else None


def _quick(truth: str, box: str) -> bool | None:
    """Rules 1 and 2; None where it takes more."""
    if _key(truth) == _key(box):
        return True
    # 1000,99 is a decimal only against a decimal number; elsewhere it may be a list
    truth, box = (
        re.sub(r"^(-?\d+),(\d\d|\d{4,})$", r"\1.\2", side) if "." in other else side
        for side, other in ((truth, box), (box, truth))
    )
    a, b = plain_number(truth), plain_number(box)
    if a is None or b is None:
        return None
    rounded = (a[1] or b[1]) and a[0].denominator != 1
    factors = {1}  # p% is p and p/100: questions ask for both
    if truth.endswith("%") != box.endswith("%"):
        factors.add(Fraction(1, 100) if box.endswith("%") else 100)
    return any(abs(a[0] - b[0] * f) <= rounded * abs(a[0]) / 10**6 for f in factors)


# ------------------------------------------------------------------- 3 and 4: names, units, words

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|omega|Delta|hbar|ell"
_NAME = re.compile(  # x, V_1, AB, f(2), f^{-1}(x), P(A), |z|, \angle ABC, [ABC], \text{Area}
    rf"""(?:m?\\angle\s*|\\overline\s*|\\Delta\s*)?\{{?(?:[A-Z]{{1,4}}|[a-zA-Z]|\\(?:{_GREEK}))\}}?
    \s*(?:_\w|_\{{[^{{}}]*\}})?\s*(?:(?:\^\{{?-1\}}?)?\([^()=]*\))?
    |\|[a-zA-Z]{{1,2}}\||\[[A-Z]{{3,4}}\]
    |(?:\\text\s*\{{)?\s*(?i:(?:the\ )?(?:area|volume|perimeter|probability|sum|total|answer|ans
    |value|length|width|height|radius|distance|time|speed|cost|max|min|maximum|minimum))\s*\}}?""",
    re.VERBOSE,
)
_UNITS = {  # a name of the unit, singular or plural -> the unit; then things that questions count
    name: names.split()[0]
    for names in re.split(
        r"[,\n]\s*",
        """m meter metre,cm centimeter centimetre,mm millimeter,km kilometer,ft foot feet,
        in inch,yd yard,mi mile,kg kilogram,g gram,mg milligram,lb pound,oz ounce,ton,acre,kcal
        l liter litre,ml milliliter,gallon,s sec second,min minute,h hr hour,day,week,month,yr year
        degree deg,rad radian,dollar usd,cent,euro,yuan,mph,mol,n newton,j joule,kj,w watt,kw,pa,hz
        ev,unit,am,pm,th,st,nd,rd,apple,ball,book,boy,girl,card,car,child children,coin,cookie,cube
        dog,cat,edge,face,game,integer,marble,man men,woman women,number,orange,page,people person
        piece,player,point,side,solution,square,step,student,ticket,tile,time,tree,way,word""",
    )
    for word in names.split()
    for name in (word, word + "s", word + "es")
} | {"per": "/", "/": "/", "^2": "^2", "^3": "^3"}
_SCALES = re.compile(r"dozen|hundred|thousand|million|billion|trillion|half|\bnot\b")
_WORD = r"(?:\\text\s*\{[^{}]*\}|(?<![\\a-zA-Z])[a-zA-Z][a-zA-Z.]+)"
_UNIT = re.compile(rf"\s*(?:{_WORD}|m/s)(?:\s*(?:{_WORD}|/\s*[a-zA-Z]+|\^\s*\{{?[23]\}}?))*$")


def _variables(text: str) -> set[str]:
    """Single letters that stand for something unknown; e and i are numbers."""
    return set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", text))) - set("eiE")


def _is_name(text: str) -> bool:
    """A name, or a point of names in alphabetical order: (y, x) = (3, 4) is not (3, 4)."""
    names = _inside(text, "(") or [text]
    return all(map(_NAME.fullmatch, names)) and names == sorted(names)


def _split_names(text: str) -> tuple[list[str], list[str]]:
    r"""`x = 4 + 1 = 5` -> ([`x`], [`4 + 1`, `5`]): names, and the values of the chain. A rounded
    value is marked: `\sqrt{2} \approx 1.41` -> ([], [`\sqrt{2}`, `≈1.41`])."""
    chain = re.sub(r"\\in(?![a-zA-Z])", "=", re.sub(r"\\approx(?![a-zA-Z])", "=≈", text))
    values, names = [value.strip() for value in chain.split("=")], []
    if not all(values) or len(_split("=".join(values[:-1]))) > 1:
        return [], [text]  # = 5 says nothing; x = 1, y = 2 is a list
    while len(values) > 1 and _is_name(values[0]):
        names.append(re.sub(r"\s", "", values.pop(0)))
        values[0] = values[0].removeprefix("≈")
    return names, values


def _split_unit(text: str, is_truth: bool = False) -> tuple[str, str]:
    r"""`10\text{ cm}^2` -> (`10`, `cm^2`). A single bare letter is a variable (2k, 10m). The ground
    truth may count what is not in the table (12 daps)."""
    match = _UNIT.search(text)
    value = text[: match.start()].strip() if match else ""
    if not value or _words(value) or (len(_split(value)) > 1 and not plain_number(value)):
        return text, ""  # in 1 cm, 2 cm each item has its own
    spelled = re.sub(r"[\s{}]+", " ", _TEXT.sub(r" \1 ", match[0]).lower())
    spelled = re.sub(r"\bsq(?:uare|\.)? ([a-z]+)", r"\1^2", spelled)
    spelled = re.sub(r"\bcubic ([a-z]+)", r"\1^3", spelled)
    names = re.findall(r"[a-z.]+|\^ ?[23]|\S", spelled)
    unit = [_UNITS.get(re.sub("[. ]", "", name), "") for name in names]
    if not all(unit) and not (is_truth and plain_number(value) and not _SCALES.search(spelled)):
        return text, ""
    return value, "".join(unit) if all(unit) else spelled


def _words(text: str) -> str:
    """The letters of an answer in words, or "". One letter A-F is a choice: c or (C) is C."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    match = re.fullmatch(r"\(?\s*([A-Fa-f])\s*\)?|([A-Za-z]{2}[A-Za-z\s.']*)", plain)
    return re.sub(r"[\s.']+", " ", match[1] or match[2]).strip().casefold() if match else ""


# -------------------------------------------------------------------------------------- 5: lists


def _items(text: str) -> tuple[str, list[str]]:
    r"""`(1, 2]` -> ("(]", [1, 2]), `1, 2` -> ("", [1, 2]), `\pm 4` -> ("", [4, -4])."""
    body, brackets = re.sub(r"\\([{}])", r"\1", text), ""
    pieces = [text] if plain_number(text) else _split(text)
    if len(inside := _inside(body, "([{") or "") > 1:
        brackets, pieces = body[0] + body[-1], inside
    items = []
    for item in pieces:
        signs = "+-" if item.count(r"\pm") == 1 and brackets in ("", "{}") else " "
        items += [item.replace(r"\pm", sign).strip().removeprefix("+").strip() for sign in signs]
    return brackets, items


def _equal_lists(brackets: str, truths: list[str], box_brackets: str, boxes: list[str]) -> bool:
    # around a bare list, parentheses or braces mean nothing
    if brackets != box_brackets and {brackets, box_brackets} not in ({"", "()"}, {"", "{}"}):
        return False
    # brackets make the order count; so do names on one side only: x = 1, y = 2 against 1, 2
    names, box_names = ([_split_names(item)[0] for item in items] for items in (truths, boxes))
    several = names[0] != names[-1] or box_names[0] != box_names[-1]
    one_sided = several and any(names) != any(box_names)
    if brackets not in ("", "{}") or one_sided:
        ordered = not one_sided or box_names == sorted(box_names)  # not y = 3, x = 4 for (3, 4)
        return ordered and len(truths) == len(boxes) and all(map(_equal, truths, boxes))
    if max(len(truths), len(boxes)) > MAX_ITEMS:
        return False
    table = [[_equal(truth, box) for box in boxes] for truth in truths]
    return all(map(any, table)) and all(map(any, zip(*table)))


# ------------------------------------------------------------------------------------ 6: formulas

# All that a formula may consist of, by class: number, letter, function, prefix, sign, infix,
# underscore, relation, opening, closing, komma, exclamation mark, bar.
_TOKEN = re.compile(
    rf"""\s*(?:(?P<n>\d+(?:\.\d*)?|\.\d+)
    |(?P<l>\\(?:pi|infty|emptyset|odot|prime|{_GREEK})(?![a-zA-Z])|\\mathbb\{{[A-Z]\}}|[a-zA-Z])
    |(?P<f>\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|binom)(?![a-zA-Z]))
    |(?P<p>\\(?:frac|sqrt|d?dot)(?![a-zA-Z]))|(?P<s>[+-]|\\pm(?![a-zA-Z]))
    |(?P<i>[*/^]|\\(?:cdot|times|div|cup|setminus)(?![a-zA-Z]))|(?P<u>_)
    |(?P<r>[=<>]|\\(?:le|ge|neq?)(?![a-zA-Z]))|(?P<k>,|&|\\\\)|(?P<e>!)|(?P<b>\|)
    |(?P<o>[(\[{{]|\\[{{]|\\lfloor|\\lceil|\\begin\{{pmatrix\}})
    |(?P<c>[)\]}}]|\\[}}]|\\rfloor|\\rceil|\\end\{{pmatrix\}}))""",
    re.VERBOSE,
)
_MALFORMED = re.compile(  # an operator without an operand, (), 5 5, 5_2, ---
    r"(?:^|[oiurksp])[ciurke]|f[crke]|[iurkspf]$|(?<![lf])u|nn|sss"
)
_HEAVY = re.compile(
    r"""\^\s*\{?[-(\s]*(?:\d{5,}|\d{2,}\s*\^|\d\s*\^\s*\{?\s*\d{2,})    # 2^{100000}, 2^{10^9}
    |\^\s*\{\s*\(*\\?\w*\s*\^\s*\{\s*\(*\\?\w*\s*\^                     # x^{x^{x^x}}
    |(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])[^()]*\)\s*\^\s*\{?\s*\d{3,}    # (x+y)^{100}
    |\d{4,}\s*\)*\s*!|!\s*\)*\s*!                                       # 9999!, 3!!
    """,
    re.VERBOSE,
)


def _classes(text: str) -> str:
    """The classes of a formula's tokens, or "" where something in it is not understood."""
    classes, end, depths = "", 0, _depths(text)
    while match := _TOKEN.match(text, end):
        classes, end = classes + match.lastgroup, match.end()
    balanced = min(depths) >= 0 == depths[-1]
    return classes if end == len(text) and balanced and not _MALFORMED.search(classes) else ""


def _equal_formulas(truth: str, box: str) -> bool:
    a, b = _classes(truth), _classes(box)
    if not a or not b or _HEAVY.search(truth + " " + box):
        return False
    # \log_2 8 does not answer where 3 is asked for; but 100! may stand for its many digits
    if set("feb") & set(b) - set(a) and not _variables(truth) and len(truth) < 30:
        return False
    # 4 is not 4x, and x^2 + y^2 = z^2 is not z^2; but 1 < x < 2 is (1, 2)
    is_range = (
        {truth[0], box[0]} & {*"(["} and "=" not in truth + box and (a + b).count("r") in (1, 2)
    )
    strange = _variables(box) - _variables(truth) or (plain_number(box) and _variables(truth))
    same_kind = a.count("r") == b.count("r") and ("=" in truth) == ("=" in box)
    return bool(is_range or (same_kind and not strange)) and _math_verify(truth, box)


def _equal_chains(truth: str, box: str) -> bool:
    """Rule 3, where a side has a name or more than one value."""
    (truth_names, truth_values), (names, values) = _split_names(truth), _split_names(box)
    is_equation = len(truth_values) == 2 and not truth_names and _variables(truth)
    same_names = not truth_names or truth_names == names or (len(values) == 1 and not names)
    if is_equation or not same_names:  # y = 2x + 1 for 2x - y + 1 = 0, 2x = 10 for x = 5
        return _equal_formulas(truth, box)
    value = [value for value in truth_values if value[0] != "≈"][-1]
    for name in names if names != truth_names else ():
        if _words(value) and _words(name):
            return False  # D = C chooses twice
    return all(_equal(value, one) for one in values)


def _equal(truth: str, box: str) -> bool:
    """All rules on normalised text, in a worker."""
    if (verdict := _quick(truth, box)) is not None:
        return verdict
    if not box or len(box) > MAX_ANSWER_CHARS or max(_depths(box)) > MAX_DEPTH:
        return False
    has_order = re.search(r"[<>]|\\[lg]e(?![a-zA-Z])", truth + box)
    if box[0] == "≈":
        return bool(plain_number(box[1:]) and _classes(truth)) and _math_verify(truth, box)
    if any(names or len(values) > 1 for names, values in map(_split_names, (truth, box))):
        # -2 < x < 7 for x \in (-2, 7) is refused by public graders
        return False if r"\in" in truth and has_order else _equal_chains(truth, box)
    (truth_value, truth_unit), (value, unit) = _split_unit(truth, True), _split_unit(box)
    if truth_unit or unit:
        one_sided = not (truth_unit and unit) and "%" not in truth + box
        return (one_sided or truth_unit == unit) and _equal(truth_value, value)
    if all(re.fullmatch(r"\d{1,9}(?: ?: ?\d{1,9})+", side) for side in (truth, box)):
        # 22:42 for 11:21; what is not in lowest terms is a time of day, and 1:3 is not 10:30
        a, b = ([*map(int, side.split(":"))] for side in (truth, box))
        return math.gcd(*a) == 1 and [n * b[0] for n in a] == [n * a[0] for n in b]
    lists = _items(truth), _items(box)
    is_list = [bool(brackets) or len(items) > 1 for brackets, items in lists]
    if all(is_list):
        return _equal_lists(*lists[0], *lists[1])
    if any(is_list) and not has_order:
        return False
    words = _words(truth), _words(box)  # as products of letters, ba would be ab
    if all(words) or any(len(word) > 3 for word in words):
        return words[0] == words[1]
    return _equal_formulas(truth, box)


def _math_verify(truth: str, box: str) -> bool:
    """Whether two formulas are equal, as math-verify reads them; False if it cannot."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, I, N, Rational

    # units=True would drop the s of 2s, and other boxes make it misread bare text
    options = dict(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(**options))]
    boxes = [f"\\boxed{{{text.removeprefix('≈')}}}" for text in (truth, box)]
    read = [parse(text, config, parsing_timeout=None) for text in boxes]  # the parent keeps time
    if not all(read) or isinstance(read[0][0], str) or isinstance(read[1][0], str):
        return False
    a, b = read[0][0], read[1][0]
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    points = [
        {symbol: Rational(start + 3 * k, 5 + 2 * k) for k, symbol in enumerate(symbols)}
        for start in (7, 23, 51, -9)
    ]
    if isinstance(a, Eq) and isinstance(b, Eq):  # 2x = 10 is x = 5 times a constant
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
        a, b = a / a.subs(points[2]), b / b.subs(points[2])
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return verify(*read, allow_set_relation_comp=True, timeout_seconds=None)
    number, rounded = plain_number(truth), "." in truth + box
    rounded = rounded and not (number and number[0].denominator == 1)
    for point in points:
        # it reads i as a variable, so that e^{i\pi} would not be -1
        point |= {symbol: I for symbol in symbols if symbol.name == "i"}
        x, y = (side.doit().subs(point) for side in (a, b))
        difference, size = abs(N(x - y, 30)), max(abs(N(x, 30)), abs(N(y, 30)))
        if point is points[3] and not (N(x).is_real and N(y).is_real):
            continue  # \sqrt{1/n} is meant for n > 0
        if not (difference.is_number and size.is_finite):
            return False
        limit = size * (1e-6 if rounded else 0 if (x - y).is_Rational else 1e-20)
        if box[0] == "≈":
            limit = 0.501 * 10.0 ** -len(box.partition(".")[2])  # to the digits that it has
        if not (difference <= limit or (0 in (x, y) and size < 1e-28)):
            return False
    return True


def _alternatives(ground_truth) -> list[str]:
    """The normalised texts of a str, int, float, or list of these. Empty for an invalid row."""
    if isinstance(ground_truth, (list, tuple)):
        return [text for item in ground_truth for text in _alternatives(item)]
    if isinstance(ground_truth, (int, float)) and abs(ground_truth) < 10**MAX_NUMBER_CHARS:
        ground_truth = str(ground_truth)
    if not isinstance(ground_truth, str):
        return []
    return [text] if (text := normalise(extract_answer(ground_truth) or ground_truth)) else []


def is_valid_ground_truth(ground_truth) -> bool:
    """False for a row that is never rewarded: blank, neither text nor number, or a list of such."""
    return bool(_alternatives(ground_truth))


# ------------------------------------------------------------------------------------ supervision


class Grader(AbstractContextManager):
    """Grades in the background, in processes that can be killed: a string can keep a parser busy
    for hours, in C code, which no exception interrupts.

    `grade(*task)` returns a score or the name of one of FAILURES, within `timeout` seconds. Each of
    the num_workers processes first calls start(*arguments). `stats` counts: graded, and FAILURES.
    """

    def __init__(self, grade, num_workers: int, timeout: float, start, *arguments):
        self.grade, self.num_workers, self.timeout = grade, num_workers, timeout
        self.start, self.arguments = start, arguments
        self.stats = dict.fromkeys(("graded", *FAILURES), 0)
        self._reported, self._pid = dict(self.stats), None
        self._after_fork()

    def _after_fork(self):
        """What each process has for itself: a forked child must not use its parent's pipes."""
        if self._pid != os.getpid():
            self._pid, self._lock, self._known = os.getpid(), threading.RLock(), {}
            self._closed, self._pool = False, None

    def close(self, *_):
        """Kill the processes. What is still pending scores 0.0 and counts as a death."""
        self._after_fork()
        self._closed = True
        if self._pool:
            self._pool.stop()
            self._pool.join()

    __exit__ = close

    def take_stats(self) -> dict[str, int]:
        """The counters since the last call: one batch, for the training log."""
        with self._lock:
            recent = {name: count - self._reported[name] for name, count in self.stats.items()}
            self._reported = dict(self.stats)
        return recent

    def _schedule(self, task: tuple, on_reply, tries: int = 2):
        """Call on_reply(grade(*task), or the failure's name) later, from another thread."""

        def finish(job: Future):
            error = CancelledError() if job.cancelled() else job.exception()
            if error is None or isinstance(error, TimeoutError):
                on_reply("timeouts" if error else job.result())
            elif isinstance(error, ProcessExpired) or tries == 1:
                on_reply("deaths")
            else:  # the pool itself is lost: a process was killed while it held the pool's lock
                self._schedule(task, on_reply, tries=1)

        with self._lock:
            if not self._closed and not (self._pool and self._pool.active):
                # Unlike those of multiprocessing, loky's processes do not import the parent's main
                # module, which under `torchrun train.py` means torch.
                options = dict(initializer=_start_worker, initargs=(self.start, self.arguments))
                self._pool = ProcessPool(self.num_workers, context=get_context("loky"), **options)
            job = None if self._closed else self._pool.schedule(self.grade, task, {}, self.timeout)
        on_reply("deaths") if job is None else job.add_done_callback(finish)

    def _count(self, reply, score: Future):
        with self._lock:
            for name in ("graded", *[reply] * (reply in FAILURES)):
                self.stats[name] += 1
        score.set_result(0.0 if reply in FAILURES else float(reply))


def _start_worker(start, arguments: tuple):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler would wait for the parser to return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    with suppress(Exception):  # the pool would start processes for ever; the tasks will report it
        start(*arguments)


class Verifier(Grader):
    """Grades in the background: `submit` summaries as they arrive, collect the futures later.

    num_workers (int) processes start with the first pair that is not settled by equal text or plain
    numbers; `timeout` (seconds) bounds one pair. ImportError without math-verify.
    """

    def __init__(self, num_workers: int = 2, timeout: float = TASK_TIMEOUT):
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("verifier.py needs math_verify: pip install math-verify")
        super().__init__(_grade, num_workers, timeout, _limit_worker)

    def submit(self, summary: str, ground_truth, question: str = "", **context) -> Future:
        """A future of 0.0 or 1.0, never an error. ground_truth: str, int, float, or a list. The
        rest is for reward functions."""
        self._after_fork()
        box = extract_answer(summary) if isinstance(summary, str) else None
        box = normalise(box) if box and len(box) <= MAX_NUMBER_CHARS else ""
        key, score = (tuple(_alternatives(ground_truth)), box), Future()
        with self._lock:
            if len(self._known) >= MAX_CACHE:
                self._known = {}
            is_new = key not in self._known
            reply = self._known.setdefault(key, Future())  # equal pairs are graded once
        if is_new:
            quick = [_quick(truth, box) for truth in key[0]] if box else [False]
            if not key[0]:
                reply.set_result("invalid_ground_truths")
            elif True in quick or None not in quick:
                reply.set_result(True in quick)
            else:
                self._schedule(key, reply.set_result)
        reply.add_done_callback(lambda done: self._count(done.result(), score))
        return score

    def score(self, pairs) -> list[float]:
        """0.0 or 1.0 for each (summary, ground_truth), in order; waits for all of them."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]


_shared = functools.cache(Verifier)  # the processes end with this one


def is_correct(summary: str, ground_truth) -> bool:
    """Whether the last box is the ground truth. Thread-safe; bounded time; never an error."""
    return _shared().submit(summary, ground_truth).result() == 1.0


def _grade(truths: tuple[str, ...], box: str) -> bool | str:
    try:
        return any(_equal(truth, box) for truth in truths)
    except MemoryError:
        os._exit(1)  # a death: a fresh worker has memory again
    except BaseException:  # math-verify's TimeoutException is not an Exception
        return "exceptions"


def _limit_worker():
    import resource  # absent on Windows, where workers cannot run but the rules can

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parser prints its complaints
    _math_verify("x+1", "1+x")  # loads its parser now, not in the time of the first task
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
