r"""What a text answers, and whether that is right: `extract` and `grade`, by exact rules and without a guess.

* math: the last `\boxed{}`, else `#### 42`, else "the answer is 42", else in the last sentence with a number what
  follows its last "=", else its last number. Numbers are compared as fractions, anything else as a string.
* choice: the last `\boxed{}`, else `#### B` at the end, "the answer is (B)" or "so B is correct", else the lines that
  are an option. A letter in any dress, or the option's own words.
* code: the last closed Python block that defines something. free: the text; its last line may be the answer alone.

Thoughts are cut off first. An unfinished one, a box cut off by the token limit and two answers at once ("5 or 6") are
no answer. In doubt there is none: that costs a right answer now and then, so that no wrong one passes.
Does not know: models, prompts, data sets, how to run a program, and algebra: \sqrt{8} is 2\sqrt{2} only for
`grade(…, verify=True)`, which asks math-verify about what is not a plain number.
"""

import ast
import re
import textwrap
from collections.abc import Mapping
from fractions import Fraction
from typing import Any
from unicodedata import normalize

KINDS = ("math", "choice", "code", "free")
LIMIT = 500  # digits of a number; one beyond is compared as text
_BRACE = re.compile(r"(?s)\\.|[{}]")  # \{ and \} do not count
_ASCII = {
    0xFF01 + i: chr(0x21 + i) for i in range(94)
}  # full-width forms; \d and int() know the digits of all scripts
_ASCII |= dict(zip(map(ord, "−–‐‑﹣×·÷⁄≈“”‘’。"), [*"-----**//=\"\"''", ". "], strict=True))
_ASCII |= {
    ord(half): " " + normalize("NFKC", half).replace("⁄", "/") for half in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}  # 3½ is 3 1/2


def extract(kind: str, text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the answer in `text` in its plain form ("1234", "-1/2", "50%"; "b"; a program), or None if there is none.

    `choices` maps each option's letter to its text; without it the letters are a to j. Raises only on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    thoughts, _, said = text.rpartition("</think>")
    said = said.partition("<think>")[0].strip()
    if kind == "free":
        return said or None
    said = said or thoughts.replace(
        "<think>", " "
    )  # closed and nothing after it: all there is to go by
    if kind == "choice":
        letters = _choice(said, choices)
        return letters.pop() if len(letters) == 1 else None
    return _math(said) if kind == "math" else _program(said)


def grade(
    kind: str, text: str, gold: str, choices: Mapping[str, str] | None = None, verify: bool = False
) -> bool:
    """Return whether the answer in `text` is `gold`. A gold may carry commas, units, a box, or be an option's text.

    A percentage equals its number and its share: 50% is 50 and 0.5. `verify`: expressions that differ as strings are
    compared by math-verify; two plain numbers never are, for it takes 0.333333 for 1/3. Raises ValueError on "code"
    and unknown kinds, ImportError where `verify` is asked for and math-verify is not installed.
    """
    if kind == "code":
        raise ValueError("--kind: code is graded by running its tests, which minimas does not do")
    answer = extract(kind, text, choices)
    if answer is None:
        return False
    if kind == "free":
        last = _ANSWER_LINE.sub("", answer.rpartition("\n")[2])
        return _bare(gold) in {_bare(answer), _bare(last), _bare(_box(answer) or "") or None}
    if kind == "choice":
        return {answer} == _named(gold, choices)
    right = _math(gold) if "####" in gold or _box(gold) else _value(gold)
    if right is None or not _number(answer) or not _number(right):
        same = answer.casefold() == (right or "").casefold()
        return same or (verify and right is not None and _verified(answer, right))
    share = Fraction(100) ** (answer.endswith("%") - right.endswith("%"))
    return Fraction(answer.rstrip("%")) in (value := Fraction(right.rstrip("%")), value * share)


def _verified(answer: str, gold: str) -> bool:
    """Whether math-verify takes two expressions for the same. It hangs on towers of powers."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "verify: found no math-verify, expected it from: pip install math-verify"
        ) from error
    if len(answer) > LIMIT or re.search(r"\^[^+\-=,]*\^|\^\{?-?\d{4}|\d{5}!", answer):
        return False
    return bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))


def _box(text: str) -> str | None:
    r"""What the last box holds: None without one, "" if it was cut off or \boxed{3} or \boxed{5} are offered.

    An empty \boxed{} quotes the instruction.
    """
    last: tuple[int, str] | None = None  # where it starts
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox) ?\{", text))):
        depth, end = 1, box.end()
        while depth and (brace := _BRACE.search(text, end)):
            depth, end = depth + {"{": 1, "}": -1}.get(brace[0], 0), brace.end()
        held = text[box.end() : end - 1]
        if last is not None:
            joined = not depth and re.fullmatch(
                r"[\s$.]*(?:or|and)[\s$]*", text[end : max(end, last[0])][:20]
            )
            return "" if joined and held != last[1] else last[1]
        if depth:
            return ""
        if held.strip():
            last = box.start(), held
    return last[1] if last else None


_TERM = r"(?<=[\d)}\]%]|\b[A-Za-z])"  # stands behind a number, a bracket or a variable, not behind a word
_FRAC = r"(?<![/^])\\[dtc]?frac ?(?:\{ ?(-?\d[\d,.]*) ?\} ?\{ ?(\d[\d,.]*) ?\}|(\d) ?(\d))(?! ?[\\^]|\d)"
_SCALES = ("hundred", "thousand", "million", "billion", "trillion")
_REWRITES: list[
    tuple[str, Any]
] = [  # LaTeX and Markdown to plain text, in order; then a number is one word
    (
        r"[\u2e80-\u9fff]+|</?answer>",
        " ",
    ),  # what stands beside a number without a space: Chinese, Japanese, a tag
    (
        r"(?<=\d)[⁰¹²³⁴-⁹⁻]+",
        lambda power: "^" + normalize("NFKC", power[0]).replace("−", "-"),
    ),  # 10³; but m² is a unit
    (r"\b[A-Z]{2}\\?\$(?=\d)", ""),  # US$18
    (r"(?:\^ ?\{?\\circ\}?|°) ?(?:\\(?:text|mathrm) ?\{ ?[CFK] ?\}|[CFK]\b)?", ""),
    (r"\\!|\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]]|\\?[$€£¥]|(?<!\d)\*\*|\*\*(?!-?\d)|`", ""),
    (r"\{,\}|(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),  # 1{,}234 and 1\,234
    (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r" \1 "),
    (r"(?:\\[\\,;: ]|\\q?quad(?![a-z])|~|[^\S\n])+", " "),
    *(
        (rf"(?<=\d) ?{word}\b", f"*10^{zeros}")
        for word, zeros in zip(_SCALES, (2, 3, 6, 9, 12), strict=True)
    ),
    (r"\*\*|\^\{(-?\d+)\}", r"^\1"),  # 10**3 and 10^{3}
    (r"√ ?(\w+)|\\sqrt ?(\w)", r"\\sqrt{\1\2}"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r" ?(?:\\?%|\bpercent\b)", "%"),
    (r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=10\^)", "*"),
    (r"(?<=[\w)}\]]) ?([*/^]) ?(?=[\w({\\-])", r"\1"),  # 2 * 3
    (_TERM + r" ([-+]) (?=[\d(\\]|[A-Za-z]\b)", r"\1"),  # x + 5
    (_TERM + r" (?=\\[a-z])", ""),  # 2 \sqrt{3}
    (
        rf"(?<=\d) ?(?={_FRAC})|(?<=\d) (?=\d+/\d+(?![\w/^*]))",
        "&",
    ),  # 3\frac{1}{2} and 3 1/2 are 3&1/2
    (_FRAC, r"\1\3/\2\4"),
    (r"(?:\b[Nn]egative|(?<![\d)%] )\b[Mm]inus) (?=\d)", "-"),
    (r"(?:\bnot|\bcannot|n't)(?: be)? -?\d+(?:[.,]\d+)*", ""),  # it is 18, not 5
    (r" ?(?<![<>!])= ?(-(?= ))? ?", r" = \1"),
]
_END = re.compile(r"\n|[.!?](?=\s|$)")  # of a sentence
_ANSWER_IS = (
    r"(?im)\banswer\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])[\s:]*|^[# ]*(?:final )?answer *\n\s*"
)
_TWO = re.compile(
    r"\d\S{0,3} or (?:\w = )?-?\d|[,;] \w = |^[-(]?\d\S* (?:and )?(?:\w = |[-(]?\d|a half)"
)
_FACTOR = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\^-?\d{1,3})?"  # 1,234.5e6^7
_NUMBER = re.compile(  # sign, the 3 of 3&1/2, product, percent, glued unit: 5km, 5/day, but 5x is another product
    rf"([-+]?)(?:(\d+)&(?=\d+/\d+\b))?({_FACTOR}(?:[*/]{_FACTOR})*)(%?)"
    r"(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|am|pm|st|nd|rd|th|/[A-Za-z]{3,})?"
)
_UNIT = re.compile(
    r"(?:(?!(?:or|and|plus|minus|times|over)\b)(?:[A-Za-z]+-)?[A-Za-z]{2,}|[amghsLNJ])(?:/[A-Za-z]+)?(?:\^[23]|[²³])?"
)
_FACTORS = {*_SCALES, "dozen", "half", "pi", "sqrt"}  # no unit, but a part of the number


def _simple(text: str) -> str:
    text = text.translate(_ASCII)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def _math(text: str) -> str | None:
    if (box := _box(text)) is not None:
        return _value(box)
    text = _simple(text)
    if hashes := re.findall(
        r"#### *(?!\d+[.)] )([-+]?[\d.].*)", text
    ):  # not the heading "#### 1. Add"
        return _value(hashes[-1])
    sentence, place = (
        ["", *(part for part in _END.split(text) if re.search(r"\d", part))][-1],
        -1,
    )  # the last number
    for marker in list(re.finditer(_ANSWER_IS, text))[-1:]:
        stated, *rest = re.split(f"({_END.pattern})", text[marker.end() :], maxsplit=1)
        if (
            re.search(r"[\d\\]", stated)
            and rest[:1] != ["?"]
            and not re.search(r"\b(?:wrong|incorrect)\b", stated)
        ):
            sentence, place = re.sub("^- ", "-", stated), 0  # the first one
    two = _TWO.search(sentence)
    if place and " = " in sentence:
        sentence, place = sentence.rpartition(" = ")[2], 0
    words = sentence.split()
    numbers = [
        i
        for i, word in enumerate(words)
        if re.search(r"[\d\\]", word) and words[i + 1 : i + 2] != ["="]
    ]
    if not numbers or two or _TWO.search(sentence):
        return None
    word, after = words[numbers[place]], "".join(words[numbers[place] + 1 :][:1])
    if len(words) == 1 or after.strip(",.").lower() in _FACTORS:  # 2 dozen
        return _value(sentence) if len(words) == 1 else None
    return _number(word.lstrip("(\"'").rstrip(",.;:!?)\"'"))


def _value(text: str) -> str | None:
    """What a box, a gold or a `####` line says: a number with its unit, else an expression without its spaces."""
    left, _, right = (text := _simple(text)).rpartition(" = ")
    if not re.search(r",(?!\d{3})|;|\b(?:and|or)\b", left):  # x = 1, y = 2
        text = right
    text = re.sub("^- ", "-", text.strip(" \n,;:").rstrip("."))
    text = text.replace(" ", "") if re.fullmatch(r"-?\d{1,3}(?: \d{3})+", text) else text
    number, *units = text.split() or [""]
    value = _number(number.strip("()"))
    if value and all(
        _UNIT.fullmatch(unit.strip("()")) and unit.lower() not in _FACTORS for unit in units
    ):
        return value
    return (
        re.sub(r"(?<![A-Za-z])\s+(?!\d)|(?<!\d)\s+(?![A-Za-z])", "", text) or None
    )  # 1 2 is not 12


def _number(word: str) -> str | None:
    """A number in plain form, exactly: "1234", "0.5" if it was a decimal, "-7/2" if it was a fraction, "50%"."""
    found = _NUMBER.fullmatch(word)
    if not found or len(word) > LIMIT:
        return None
    value = Fraction(1)
    try:
        for operator, factor in re.findall(rf"([*/]?)({_FACTOR})", found[3].replace(",", "")):
            base, _, power = factor.partition("^")
            value *= Fraction(base) ** (int(power or 1) * (-1 if operator == "/" else 1))
            if max(value.numerator, value.denominator) > 10**LIMIT:
                return None
    except ZeroDivisionError:
        return None
    value += int(found[2] or 0)
    sign, places = "-" if found[1] == "-" and value else "", value.denominator.bit_length()
    if (
        "/" in found[3] or 10**places % value.denominator
    ):  # a fraction, or a decimal that never ends
        return f"{sign}{value}{found[4]}"
    digits = str(value.numerator * 10**places // value.denominator).zfill(places + 1)
    return sign + f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".") + found[4]


_CHOSEN = (
    r"(?i)\b(?:answer|option|choice)\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])\s*|\b(?:choose|pick|select|must be)\b"
    r"|\b(?:so|thus|hence|therefore)\b,?|#### *(?=[^\n]*\Z)"
)
_NEGATED = re.compile(  # "I would not choose", "the answer can't be"; but not "not A so I choose"
    r"(?i)(?:\bnot|\bnever|\bcannot|n['’]t)\b(?:(?!\b(?:so|but|and|then|thus|hence|because|only)\b)[^.\n;,:]){0,24}$"
)
_ANSWER_LINE = re.compile(
    r"(?i)^[^a-z]*(?:so |thus |therefore,? )?(?:the )?(?:final |correct )?answer(?: is\b|:|\** *:)"
)
_DRESS = r"</?answer>|\\(?:text|math)[a-z]*|\\[()\[\],;! ]|[*_`${}]|\\(?=[%&#])|<\|\w+\|>"
_LETTER = re.compile(  # "the correct option" "(" B ")."
    r"(?:(?:most|likely|probably|the|correct|best|final|answer|option|choice|letter|is)\b:? ?){0,6}"
    r"([(\[]?)([a-z0-9])([)\].:,;!]*)(?=\s|$)"
)
_SECOND = re.compile(
    r"\W*(?:(?:or|and)\W+(?:option )?([a-z0-9])\b|([a-z0-9])(?!\w| \w| \())"
)  # (A) or B; A, B
_REFUSED = re.compile(
    r" ?(?:is|are|was|were|would be|must be|seems)? ?(?:not|never|wrong|incorrect|false|invalid|unlikely|ruled out)\b"
    r"| ?(?:isn't|can't|cannot|doesn't|does not)"
)
_GOES_ON = r"(?:[.;:!](?= )|,? (?:because|since|as|which|due)\b| \()"  # behind an option's words
_IN_BRACKETS = re.compile(r"\(((?:[^()]|\([^()]*\))*)\)")


def _choice(text: str, choices: Mapping[str, str] | None) -> set[str]:
    if (box := _box(text)) is not None:
        return _named(box, choices)
    for marker in reversed(list(re.finditer(_CHOSEN, text))[-1000:]):
        said = text[marker.end() : marker.end() + LIMIT].partition("\n")[0]
        if not _NEGATED.search(text[max(0, marker.start() - 40) : marker.end()]) and (
            letters := _named(said, choices)
        ):
            return letters
    return {
        letter for line in set(text.split("\n")) for letter in _named(line, choices, alone=True)
    }


def _named(text: str, choices: Mapping[str, str] | None, alone: bool = False) -> set[str]:
    """The options that `text` names. Only a dressed letter, "(B)" or "B.", may be followed by words that are not its
    option's, so that "A cat sat" and "I think" name none; `alone`: not even that.
    """
    given = choices or dict.fromkeys("abcdefghij", "")
    options = {str(key).strip().lower(): _bare(str(words)) for key, words in given.items()}
    text = _bare(text)
    if bracketed := _IN_BRACKETS.fullmatch(text):
        text = _bare(bracketed[1])
    if (lead := _LETTER.match(text)) and (key := lead[2]) in options:
        rest = text[lead.end() :]
        words = _bare(rest)
        if bracketed := _IN_BRACKETS.fullmatch(words):
            words = _bare(bracketed[1])
        if not words or words == options[key]:
            return {key}
        if words in options.values() or _REFUSED.match(
            rest
        ):  # the letter of one and the text of another
            return set()
        if second := _SECOND.match(rest):
            return {key, second[1] or second[2]} & options.keys()
        dressed = lead[3] and (not lead[1] or lead[3][0] in ")]")  # "(A mouse" is not
        if re.match(" (?:because|since|is (?:the )?(?:correct|right|best))", rest) or (
            dressed and not alone
        ):
            return {key}
    dressed_words = (text, _bare(re.sub(r"^(?:option|choice|answer)\b", "", text)))
    if said := {key for key, words in options.items() if words and words in dressed_words}:
        return said
    begun = [
        key
        for key, words in options.items()
        if words and re.match(re.escape(words) + _GOES_ON, text)
    ]
    return set() if alone else set(sorted(begun, key=lambda key: len(options[key]))[-1:])


def _bare(text: str) -> str:
    return " ".join(re.sub(_DRESS, "", text.translate(_ASCII)).casefold().split()).strip(
        " .,;:!?\"'"
    )


_FENCE = re.compile(
    r"(?ms)^[^\n`]*```([^\n`]*)\n(.*?)(```|\Z)"
)  # language, program, closing fence or nothing


def _program(text: str) -> str | None:
    """The last closed Python block that defines something, not the usage example after it; without one: a block that
    the token limit cut off, the last block, the text if it is a program, which "yes" is not.
    """
    found = _FENCE.findall(text.replace("\r\n", "\n"))
    python = [
        (code, end)
        for tag, code, end in found
        if tag.strip().lower() in ("", "python", "python3", "py")
    ]
    blocks = [(textwrap.dedent(code).strip("\n"), end) for code, end in python]
    defining = [
        block for block in blocks if re.search(r"(?m)^(?:async +)?(?:def|class) ", block[0])
    ]
    if wanted := [block for block in defining if block[1]] or defining or blocks:
        return wanted[-1][0] or None
    try:  # the parser takes a kilobyte of memory per byte of text
        nodes = ast.parse(text).body if len(text) < 100_000 and "```" not in text else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return (
        None
        if all(isinstance(node, ast.Expr | ast.AnnAssign | ast.Pass) for node in nodes)
        else text.strip("\n")
    )
