r"""Find the answer in a generated text and compare it with the gold answer: `extract` and `grade`.

The rules are tried in this order; the first one that finds something decides.

* math: the last `\boxed{}`; `#### 42`; "the answer is 42"; the last sentence with a number: there
  the result of an equation ("3 * 6 = 18"), else the number in its last clause. Numbers are compared
  exactly, as fractions; expressions as strings.
* choice: the last `\boxed{}` that names an option; the last "#### B" at the end, "the answer is
  (B)", "I choose B" or "so B is correct"; a line that is an option. An option is named by its
  letter or by its own words.
* code: the last closed Python block that parses and defines something other than tests and
  examples, with the blocks it is connected to.
* free: the text after the thoughts. Its last line may state the answer alone.

Text inside `<think>` is ignored. A truncated box or thought, two answers ("5 or 6", "18 to 20"), a
question, an inequality and an equation that states no value ("2x = 10") are not an answer. The
rules prefer a missed right answer to an accepted wrong one. Does not know: models, prompts, data
sets, running programs, and algebra. `grade(…, verify=True)` asks math-verify whether two different
expressions are equal.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Mapping
from decimal import Context
from fractions import Fraction
from itertools import islice
from unicodedata import normalize

KINDS = ("math", "choice", "code", "free")
Choices = Mapping[str, str] | None  # each option's letter and text
LIMIT = 500  # digits of a number; a longer one is compared as text


def extract(kind: str, text: str, choices: Choices = None) -> str | None:
    """Return the answer in `text` in plain form ("1234", "-1/2", "50%"; "b"; a program), or None if
    there is none.

    `choices` maps each option's letter to its text; without it the letters are a to j.
    Raises ValueError if the kind is unknown, and for no text.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    thoughts, _, said = text.rpartition("</think>")
    said = said.partition("<think>")[0].strip()
    if kind == "free":
        return said or None
    said = said or thoughts.replace("<think>", " ")  # nothing follows the thoughts
    if kind == "choice":
        letters = _choice(said, choices)
        return letters.pop() if len(letters) == 1 else None
    return _math(said) if kind == "math" else _program(said)


def grade(kind: str, text: str, gold: str, choices: Choices = None, verify: bool = False) -> bool:
    """Return whether the answer in `text` is `gold`.

    `gold` may carry commas, units, a box or GSM8K's whole solution, or be an option's text. A
    percentage equals its number and its share: 50% is 50 and 0.5. `verify` lets math-verify compare
    expressions that differ as strings; two plain numbers are always compared exactly.
    Raises ValueError if the kind is "code" or unknown, ImportError if `verify` needs math-verify
    and it is missing.
    """
    if kind == "code":
        raise ValueError("--kind: code is graded by running its tests, which minimas does not do")
    answer = extract(kind, text, choices)
    if answer is None:
        return False
    if kind == "free":
        last = re.sub(_ANSWER_LINE, r"\1", answer.rpartition("\n")[2])
        return _whole(gold) in map(_whole, (answer, last, _box(answer)[0] or answer))
    if kind == "choice":
        return {answer} == _named(gold, choices)
    right = _math(gold) if re.search(r"####|\\f?box", gold) else _value(gold)
    variables = set(re.findall(_VARIABLE_IS, f"{text}\0{gold}"))
    if right is None or len(variables) > 1:  # x = 5 is not y = 5
        return False
    if _number(answer) and _number(right):
        number, value = (Fraction(word.rstrip("%")) for word in (answer, right))
        shares = answer.endswith("%") - right.endswith("%")
        return number in (value, value * Fraction(100) ** shares)
    return answer == right or (verify and _verified(answer, right))


# math-verify misreads equations, ratios, "…" and words, compares decimals by rounding, takes x for
# X, and hangs on towers of powers and on long texts.
_NOT_VERIFIED = r"""(?x) [=:<>;A-Z] | \. | \\[lc]?dots | (?<![\\A-Za-z])[A-Za-z]{2,}
    | \^[^+\-=,]*\^ | \^\{?-?\d{4} | \d{5}! | .{999}"""


def _verified(answer: str, gold: str) -> bool:
    """Whether math-verify takes gold / answer for 1. It would take the difference of two tiny
    numbers for 0.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "verify: found no math-verify, expected it from: pip install math-verify"
        ) from error
    if re.search(_NOT_VERIFIED, f"{answer},{gold}"):
        return False
    quotient = re.sub(r"\^(-?\d+)", r"^{\1}", rf"$\frac{{{gold}}}{{{answer}}}$")
    return bool(verify(parse("$1$"), parse(quotient)))


# -- text ------------------------------------------------------------------------------------------

_ASCII = str.maketrans("−–‐‑—×·÷⁄≈“”‘’、【】「」", '-----**//=""\'\',[]""')
# The number separators of typographers; 10³ is 10^3, 3½ is 3 1/2.
_UNICODE = {
    "(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))": ",",
    "[⁰¹²³⁴-⁹⁻]+": r"^\g<0>",
    "(?=[¼-¾⅐-⅞])": " ",
    "[负負]|マイナス": "-",
    "。": ". ",
}
_FONT = r"""(?x: \\(?:text|math|m?box|emph|underline|bf|rm|bm|boldsymbol|displaystyle|[lL]arge)
    [a-z]* (?![A-Za-z]))"""
_HELD = r"(?:\\.|[^{}\\])*+"
for _depth in range(5):  # braces in braces
    _HELD = rf"(?:\\.|[^{{}}\\]|\{{{_HELD}\}})*+"
_OPENED = r"\\(?:boxed|fbox) ?\{(?!\s*\})"
# A box that is only a part of the answer: after another one, "18 or", "-" or "2"; before "or 20",
# "x", "^2", "million".
_PART = rf"""(?xs) (?: \A({_HELD})\}} [^\w=]* (?:text\w*\W*)?
        (?:(?!(?:then|but|so|no|now|wait)\b)[a-z]+[^\w=]*)? (?:(?:and|to)\b[^\w=]*)?
        (?:\w+\ *=\ *)? \$?@\{{(?!\1\}})
      | (?:\bor[\s$}}]*(?:\w+\ *=\ *)?|[\d)=$]\s*-\s*|[+/×÷^]\s*|\w\s*\*\s*|-|\d) \$?@\{{ )
    | @\{{{_HELD}\}} (?: [a-zA-Z](?![a-zA-Z])
      | [ $.,;(]*(?:\\text\w*\{{)?\ *(?:or|possibly|maybe|perhaps)\b[\s$}}]*[\d\\]
      | [ $]* (?: \^(?!\{{?\\circ) | [-+/*×÷]\ ?(?:[\d(\\]|[a-zA-Z]\b)
        | \\(?:pi|sqrt|frac|times|cdot|div) | (?:hundred|thousand|[a-z]+illion|dozen)\b ))"""
_ANSWER = r"""(?x: (?<![A-Za-z]) (?:answer|ans\b|respuesta|r[ée]ponse|antwort|resposta|risposta
    |ответ|jawaban|cevap|đáp\ án|câu\ trả\ lời|الإجابة|الجواب|उत्तर|答[案え]?|正解|정?답)
    (?!\ (?:choices|options)))"""
_IS = r"""(?x: (?:\b(?:is|was|be|es|est|ist|lautet|adalah|là|é|è)\b|(?<=nswer)'s\b|[是为為は은→➜]
    |[-=]>|[:=]|\ -\ )[\s:]*)"""


def _plain(text: str) -> str:
    """Digits, letters and signs in ASCII where they have such a form, as full-width ones have."""
    return normalize("NFKC", _rewritten(text, _UNICODE)).translate(_ASCII)


def _rewritten(text: str, rules: Mapping[str, str]) -> str:
    """The text after replacing each pattern in turn."""
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text


def _box(text: str) -> tuple[str | None, str]:
    r"""What the last box holds, and the text after it.

    None and the text without a box; "" and "" if it is cut off or a part of the answer. An empty
    \boxed{} quotes the instruction.
    """
    parts = re.split(_OPENED, text)
    if len(parts) == 1:
        return None, text
    box = re.match(rf"(?s)({_HELD})\}}(.*)", parts[-1])
    if not box or re.search(_PART, f"{parts[-2]}@{{{parts[-1]}"):
        return "", ""
    return box[1], box[2]


# -- math ------------------------------------------------------------------------------------------

# After a number, a bracket or a variable, not after a word.
_TERM = r"(?:(?<=[\d)}\]%])|(?<=\b[A-Za-z])|(?<=\d[A-Za-z]))(?<!'s)"
_FRAC = r"""(?x: (?<![/^])\\[dtc]?frac\ ?
    (?:\{\ ?(-?\d[\d,.]*)\ ?\}\ ?\{\ ?(\d[\d,.]*)\ ?\}|(\d)\ ?(\d)) (?!\ ?[\\^]|\d))"""
# From LaTeX and Markdown to plain text, in this order. After it a number is one word.
_REWRITES = {
    # Currency: US$18; degrees; delimiters; **18** and *18*, but 2**3.
    r"""(?x) \b(?:[A-Z]{1,2}\\?\$|Rs\.?\ ?)(?=\d) | \\?[$¢-¥\u20a0-\u20bf]
    | (?:\^\ ?\{?\\circ\}?|°)\ ?(?:\\(?:text|mathrm)\ ?\{\ ?[CFK]\ ?\}|[CFK]\b)?
    | \\! | \\(?:left|right)(?![a-z]) | \\[()\[\]] | ` | __ | (?<!\d)\*\* | \*\*(?!-?\d)
    | (?<![\w*)}])\*(?=[^\s*]) | (?<=[^\s*])\*(?![\w*({\\ -])""": "",
    # 1,234, 1{,}234, 1\,234 and 1'234; but not 0,123 and 1234,567
    r"(?<!\d{4})(?<!\b0)(?<=\d)(?:,|\{,\}|\\,|['_])(?=\d{3}(?!\d))": "",
    rf"{_FONT} ?\{{([^{{}}]*)\}}": r" \1 ",
    # Chinese, Japanese and Korean stand next to a number; but 5万 is not 5.
    rf"""(?x) {_FONT} | (?:\\[\\,;:\ ]|\\q?quad(?![a-z])|~|[^\S\n])+ | </?[a-z]+>|<\|\w+\|>
    | (?:(?<!\d)(?<!\d\ )|(?![万萬亿億兆千百十半点點打ダ만억조천백십]))
      [\u2e80-\u9fff\uac00-\ud7a3]+""": " ",
    r"\A(-?\d{1,3}) (\d{3})(?: (\d{3}))?\.?\Z": r"\1\2\3",  # 12 345
    r"(?<=\d) ?hundreds?\b": "e2",
    r"(?<=\d) ?thousands?\b": "e3",
    r"(?<=\d) ?millions?\b": "e6",
    r"(?<=\d) ?billions?\b": "e9",
    r"(?<=\d) ?trillions?\b": "e12",
    r"\*\*|\^\{(-?\d+)\}": r"^\1",  # 10**3 and 10^{3}
    r"√ ?(\w+)|\\sqrt ?(\w)": r"\\sqrt{\1\2}",
    r"\\[dtc]frac(?![a-z])": r"\\frac",
    r" ?(?:\\?%|\bper ?cent\b)": "%",
    r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=10\^)|(?<=[\d%]) x (?=\d)": "*",
    r"(?<=[\w)}\]]) ?([*/^]) ?(?=[\w({\\-])": r"\1",  # 2 * 3
    r"(?<=\d)\*10\^(?=-?\d)": "e",  # 2*10^3
    # x + 5, 2 \sqrt{3}
    rf"{_TERM} (?:([-+]) (?=[\d(\\]|[A-Za-z]\b)|(?=\\[a-z]))": r"\1",
    # 3\frac{1}{2} and 3 1/2 are 3&1/2
    rf"(?<=\d) ?(?={_FRAC})|(?<=\d) (?=\d+/\d+(?![\w^*]))": "&",
    _FRAC: r"\1\3/\2\4",
    # An arrow before the answer. It is not 5 but 18. I doubt that it is 5. If it is 5, …
    r"""(?imx) ^\ *=>\ *
    | (?: (?:\bnot|\bcannot|n't|\brather\ than|\binstead\ of)(?:\ be|\ equal(?:\ to)?)?
      | (?:\b(?:doubt|suppose|assum(?:e|ing)|imagine|pretend|let(?:'s|\ us)\ say|if|unless|whether
          |unlikely|impossible|deny|(?:false|wrong|not\ true|not\ the\ case)\ (?:to|that|answer)
          |nobody|no\ one)|(?:\bnot|n't)\ (?:think|believe))\b [^,;:.=\n\d]{0,40}? )
      \ -?\d+(?:[.,]\d+)*(?:,?\ but(?=\ [-\d]))?""": "",
    r" ?(?:(?<![<>!])=|\\approx(?![a-z])) ?": " = ",
    # "minus 5"; "- 5" alone is no list
    r"""(?x) (?:\b[Nn]egative|(?<![\d)%]\ )\b[Mm]inus)\ (?=\d) | \A\s*-\ (?=\S+\s*\Z)
    | (?<=\b(?:is|be|'s)\ )-\ (?=\d) | (?<=(?:are|was)\ )-\ (?=\d) | (?<=[:=]\ )-\ (?=\d)""": "-",
    r"(?<=\d )([ckm]?m|ft|units)\^[23]\b": r"\1",  # 18 m^2: the 2 is no number
}
_END = r"\n|(?<=[.!?])\s(?!=)"  # of a sentence
_ANSWER_IS = rf"""(?xim) (?:{_ANSWER} [^\n.:=]{{0,40}}? {_IS} | ^[#\ ]*(?:final\ )?answer\ *\n\s*)
    (?=([^\n]{{0,200}}[\d\\][^\n]{{0,200}}))  # a value, and neither a question nor refuted
    (?!(?:[^\n.?]|\.\d){{0,200}}(?:\?|\b(?:wrong|incorrect)\b))"""
_NAME_IS = r"[A-Za-z]\S{0,20} = "
# What follows the answer; not ", or 43", "(base 8)", "; 43".
_ASIDE = rf"""(?xi: (?! [,;]\ ?[-+]?\d | \W*(?:in\ )?(?:base|mod|hex|octal|binary)
      | \W*(?!(?:because|since|as|so|which)\b)(?:\w+\ ){{0,2}}?(?:or|and|but|also|possibly|maybe
        |perhaps|could|might|alternatively)\b[^.\n]{{0,40}}?\d )
    (?: ,(?!\ ?(?-x:{_NAME_IS})) | !\Z | ; | \ \( | \ -\  | \ (?:because|since|as|so|which)\b ))"""
# "Wait, that's wrong. It is 8."
_TAKEN_BACK = r"""(?xi) (?<=[.!?}$*\n,;-])\ ?
      (?: (?:oh,?\ )?(?:no,?\ )?wait|oh|oops|hmm+|sorry|apolog\w+|hold\ on|actually|in\ fact
      |(?:scratch|strike)\ that|i\ take\ \w+\ back|i\ mean|make\ that|correction|edit:
      |my\ (?:mistake|bad|error)|on\ second\ thought|rather(?!\ than)|no(?=[,.!])
      |let\ me\ (?:re|double|correct|fix)\w*|i\ (?:made\ an?|was\ wrong|mis\w+|forgot)
      |(?:that|it|this)(?:'s|\ is|\ was)\ (?:wrong|incorrect|a\ mistake|not\ (?:right|correct))
      |(?:that|it|this)\ (?:is|was)n't\ (?:right|correct) )\b
    | (?<=[.!?\n])\ ?(?:but|however|although|except|or|maybe|perhaps|possibly|alternatively
      |otherwise)\b(?=[^.\n]{0,100}\d)"""
_CLAUSE = r"""(?x) \b[a-z]{1,20}\ [a-z]{1,20}[,;:]\  | [,;:]\ (?![-+]?\d)
    | \b(?:then|because|[Ss]tep\ \d+(?=:))\b | \b(?:is|are|was|equals)\ (?=[-+]?\d)"""
# "18 in 3 days" without an equation: is it 3?
_DOUBTFUL = r"""(?x) \ (?:in|from|for|at|per|on|of|after|every|each|within|while|and|when)[ ]
    (?:\w+\ ){0,2}\S*\d\S*\D*\Z"""
_LATER = r"""(?x) (\b\d\S{0,30}(?:\ [A-Za-z]+,?){0,9}?)
    \ (?:in(?!\ (?:base|hex|oct|bin))|for|at(?!\ (?:the\ )?(?:least|most))|per(?!\ mil)|on|with
    |after|every|each|out\ of(?!\ \d)|so|which|because|since)\b (?!.*\b(?:and|or|but)\b).*"""
# 2 dozen, 5 to ten, 2 and a half, 5 squared
_COUNT = r"""(?:(?:a\ )?half|a\ quarter|do(?:[zc]en|uzaine)\w*|d[uú]tzend|score|gross|grand|pi|sqrt
    |hundreds?|hunderte?|thousands?|thou|tausende?|tusen\w*|duizend|mil|mille|mila|tys\w*|ribu|nghìn
    |ngàn|(?:m|b|tr|quadr|quint|sext)(?:ill[ij]?[oóõ]|il[ijy][oóõ]|ilh[ãõ])\w*|milliard\w*|bn|mn|mio
    |mln|mrd|juta|triệu|lakhs?|lacs?|crores?|two|three|four|five|six|seven|eight|nine|tens?|zero
    |squared|cubed|doubled|tripled|halved|factorial|alpha|beta|gamma|theta|lambda|phi|omega
    |(?-i:[xyz]{2,3})|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred
      |thousand|[a-z]+illion)ths?|thirds?|quarters|halves|(?:in\ )?(?:base|hex|octal|binary)[a-z]*
    |mod|below|per\ ?mill?e?)\b"""
# Two numbers, an equation, an inequality, a question; a word before the number that makes it an
# operand, a bound or an exception ("ten times 5", "up to 5"); a variable or a word of another
# script after it; a refuted number.
_UNCLEAR = rf"""(?xi) \b(?:or|maybe|perhaps|possibly)\b | [<>≠≤≥±≡] | !=|\ =\  | \+/- | \?\W*\Z
    | \\(?:[gln]eq?|pm|equiv)(?![a-z]) | \bat\ (?:the\ )?(?:least|most)\b | \d\ +[:∶]
    | \b(?: (?!(?:total|average|mean|amount|profit|loss|price|cost|value|sum|speed|rate|score
        |distance|length|height|area|volume|weight|age|balance|change|discount)\ )[^\W_]+\ of
      |absolute\ value\ of|than|half|twice|thrice|double|triple|quadruple|squared?|cubed?|root|power
      |log|ln|exp|sqrt|mod|modulo|gcd|lcm|abs|ceil|floor|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?
      |below|under|over|above|beyond|within|near|exceed\w*|least|most|minimum|maximum|max
      |as\ \w+\ as|(?<!add\ )(?<!adds\ )(?<!comes\ )(?<!sums\ )up\ to|to\ the|added\ to
      |never|not|neither|nor|hardly|barely|scarcely|rarely|seldom|(?:any|every|no)thing\ but
      |but|except|excluding|barring|besides|without|until|from|and|plus|minus|times|point|choose
      |less|(?:divided|multiplied|divisible)\ by|step|question|problem|{_COUNT}|one|eleven|twelve
      |[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty )\ [^\w\s]*\d
    | \d[^\s\d]{{0,3}}[ ]
      (?:(?!(?:in|for|at|per|on|with|after|is|are|was|equals|makes|gives)\b)[a-z]+,?\ )?
      (?:(?:and|to|to\ the|by|plus|minus|times|through|up\ to|of|over|divided\ by|vs\.?|point
        |[-~&])\ )?
      (?:[-+(~]*\d|{_COUNT}|(?<=and\ |lus\ |nus\ )(?:an?|one)\b)
    | \d\ (?-i:(?![mghsLNJ]\b|a\ [a-z])[A-Za-z]\b(?!')|[^\W\d_A-Za-zÀ-ɏ])
    | \d\S{{0,20}}\ (?:isn't|wasn't|cannot|can't|(?:is|was)\ (?:not|wrong|incorrect|false)\b)"""
# x = 1, y = 2
_TWO_VALUES = rf"{_NAME_IS}[^=]*?(?:[,;]|\b(?:and|or|when|if|where|for|at|with)\b) ?\b{_NAME_IS}"
_BREAK = r"""(?x) [,;→⇒] | :(?![A-Za-z]\b) | \\(?:Rightarrow|rightarrow|implies|to)(?![a-z])
    | \b(?:so|then|thus|hence|therefore|gives|means|get|have|that|is|are|was|if|since|because)\b"""
# x_1, f(3), (in dollars)
_INDEX = r"""(?x) _\{[^{}]*\} | _\w | (?<=\b[A-Za-z])\d+\b | (?<=\b[f-hCEPSTV])\([^()]*\)
    | (?<=[a-z]\ )\((?:[a-z]{2,}\ ?)+\) | \bm(?=\\angle)"""
_OPERATOR = r"""(?x) [+*^!|:(){}\[\]<>≤≥≠±√] | /(?![A-Za-z]) | (?<![A-Za-z])- | -(?![A-Za-z])
    | (?<=\w)\ x\ (?=\d) | (?<=\d)x(?=\d) | (?<=[\d%])\ of\b | \\(?:sum|prod|int|lim)
    | (?<![A-Za-z])(?:frac|sqrt|binom|div|(?i:half|twice|double|triple|third|quarter|square[ds]?
      |cube[ds]?|root|log|ln|sin|cos|tan|mod|plus|minus|negative|times|over|divided|percent
      |reciprocal|(?:more|less)\ than)|(?:two|three|four|five|six|seven|eight|nine|ten)(?=\ [a-z]\b)
      |[xyz]{2,3}|ab|bc|ac|abc|mn|pq)\b"""
# Such as x and theta, and the x of 5x; but neither "a" nor times as in 2 x 3 nor a unit: 5g, 5km.
_VARIABLE = r"""(?x) (?<![A-Za-z\\'])(?!I\b|[aA]\ \w|x\ ?\d|(?<=\d)[gL]\b|(?<=\d\ )[gL]\b)
      [A-Za-z](?![A-Za-z'])
    | (?<=\d)(?!(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|hrs?|mins?|mph|am|pm|st|nd|rd|th)\b)[A-Za-z]{2,}
    | \b(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)\b"""
_VARIABLE_IS = r"\b([A-Za-z]) *= *[^=\n\0]*(?:\0|\Z)"
_EXACT = Context(prec=5 * LIMIT)  # digits, enough for every decimal that `_number` accepts
_DECIMAL = r"(?:\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
# Sign, the 3 of 3&1/2, power, divisor, percent, attached unit: 5km, 5/day, not 5x.
_NUMBER = rf"""(?x) (?=.{{1,{LIMIT}}}\Z) ([-+]?) (?:(\d+)&(?=\d+/\d+\b))? ({_DECIMAL})
    (?:\^(\d{{1,3}}|(?<=\b10\^)-\d{{1,3}}))? (?:/(?=\S*[1-9])({_DECIMAL}))? (%?)
    (?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|am|pm|st|nd|rd|th|[gL]|/[A-Za-z]{{3,}})?"""
_UNIT = rf"""(?xi) \(? (?:(?!(?:or|and|to|plus|minus|times|over|more|less|{_COUNT})\b)
    (?:[a-z]+-)?[a-z]{{2,}}|(?-i:[amghsLNJ])) (?:[/*][a-z]+)* (?:\^[23])? \)?"""


def _math(text: str) -> str | None:
    text = re.split(_TAKEN_BACK, text)[-1]
    held, _ = _box(text)
    if held is not None:
        return _value(held)
    text = _rewritten(_plain(text), _REWRITES)
    if hashes := re.findall(r"#### *(?!\d+[.)] )([-+]?[\d.].*)", text):  # not "#### 1. Add"
        return _value(hashes[-1])
    said = re.findall(_ANSWER_IS, text)
    clause = re.split(f"{_END}|{_ASIDE}", said[-1])[0] if said else _last(_END, text)
    answer = _result(clause)
    stated = said or answer != clause
    answer = re.sub(_LATER, r"\1", answer) if stated else _last(_CLAUSE, clause)
    if re.search(_UNCLEAR, answer):
        return None
    numbers = re.findall(r"(?<!\S)[(\"']*+(\S*(?:\d|\\[a-z])\S*)", answer)
    if numbers == answer.split():
        return _value(answer)
    if not numbers or (len(numbers) > 1 and (stated or re.search(_DOUBTFUL, answer))):
        return None
    return _number(numbers[-1].rstrip(",.;:!?)\"'"))


def _last(separator: str, text: str) -> str:
    """The last part with a digit."""
    return "".join(re.findall(r"(?m)^.*\d.*", re.sub(separator, "\n", text))[-1:])


def _result(text: str) -> str:
    """The right side of an equation whose left side is a name or arithmetic; else the text."""
    left, _, right = text.rpartition(" = ")
    chain = re.split(_BREAK, left)[-1].split(" = ")
    return right if all(map(_states, chain)) and not re.search(_TWO_VALUES, text) else text


def _states(left: str) -> bool:
    """Whether the left side of an equation is a name or arithmetic without variables."""
    left = re.sub(_INDEX, "", left)
    variables = re.findall(_VARIABLE, left)
    if not re.search(r"\d", left):
        return len(variables) < 2 and not re.search(_OPERATOR, left)
    return not variables and all(
        re.search(r"\d|pi\b|^\W*$", term) for term in re.split(_OPERATOR, left)
    )


def _value(text: str) -> str | None:
    """What a box, a gold or a `####` line says: a number with its unit, else an expression
    without its spaces.
    """
    text = _result(_rewritten(_plain(text), _REWRITES)).rstrip(" \n,;:.")
    text = re.sub(r"^[A-Za-z ]+(?::| is) *(?=-?[\d.])", "", text)
    number, *units = text.split() or [""]
    value = _number(number.strip("(){}"))
    if value and all(re.fullmatch(_UNIT, unit) for unit in units):
        return value
    text = re.sub(r"(?<!\\)\b(?:[A-Z][a-z]+|NO|[A-Z]{3,})\b", lambda word: word[0].lower(), text)
    # The space in "1 2" and "no solution" means something.
    return re.sub(r"(?<![A-Za-z])\s+(?!\d)|(?<!\d)\s+(?![A-Za-z])", "", text) or None


def _number(word: str) -> str | None:
    """A number in plain form, "1234", "0.5" for a decimal, "-7/2" for a fraction, "50%"."""
    found = re.fullmatch(_NUMBER, word)
    if not found:
        return None
    sign, whole, base, power, divisor, percent = found.groups("")
    value = Fraction(base) ** int(power or 1) / Fraction(divisor or 1) + int(whole or 0)
    if max(value.numerator, value.denominator) > 10**LIMIT:
        return None
    decimal = _EXACT.divide(value.numerator, value.denominator).normalize(_EXACT)
    plain = str(value) if divisor else f"{decimal:f}"
    return f"{'-' if sign == '-' and value else ''}{plain}{percent}"


# -- choice ----------------------------------------------------------------------------------------

_CHOSEN = rf"""(?ix) (?: {_ANSWER}
      (?:(?!\ \(?(?-i:[A-J])\b)[^\n.:=]){{0,40}}?(?:{_IS}|(?<=[案え])(?=\W*[选選]))
    | ^[#\ *]*(?:final\ )?answer[*\ ]*\n\s*
    | \b(?:(?:correct|right|best|final|my)\ (?:option|choice)|selected)\W*[:=]
    | \b(?:option|choice|statement|solution|opci[óo]n|alternativa)
      (?:\ \w{{2,}}){{0,3}}\ (?:is|was|be|es|é)\b
    | \b(?:choose|pick|select|go(?:ing)?\ with|opt\ for|(?:must|has\ to)\ be)\b
    | (?<=[,;.]\ )(?=\(?(?-i:[A-J])\)?\ is\ (?:the\ )?(?:correct|right)\b) | 而是
    | [选選](?:[择擇]|[项項]\W*[是为為])? | \#{{4}}\ *(?=[^\n]*\Z)
    | (?P<weak>\b(?:so|thus|hence|therefore|think|believe|guess|say|it's|it\ is)\b,?) )
    (?=(?P<said>.{{0,500}}))"""
# "I would not choose", "the answer can't be"; but not "not A so I choose"
_NEGATED = r"""(?xi) (?:\b(?:not|never|cannot|doubt|false|wrong|incorrect|worst|least|unlikely|if
      |suppose|(?:any|every)thing\ but)|n't)\b
      (?:(?!\b(?:so|but|and|then|thus|hence|because|only)\b)[^.\n;,:]){0,24}$
    | \b(?:no|não|non)\ (?:es|é|è)\s*$ | 不\w{0,3}\s*$"""
_ANSWER_LINE = r"""(?xi) ^[^a-z]*(?:so\ |thus\ |therefore,?\ )?(?:the\ )?(?:final\ |correct\ )?
    answer(?:\ is\b:?|:|\**\ *:)\**(.*[^*\n])?\**$"""
_DRESS = rf"""(?x) ^\s*(?:-|>|\#{{1,3}})\ +(?=\W*[A-Za-z]) | </?[a-z]{{1,6}}> | {_FONT}
    | \\[()\[\]!] | [*_`${{}}] | \\(?=[%&#]) | <\|\w+\|>"""
_AROUND = " .,;:!\"'\n"
# Markup and quotes at both ends, a bracket around all of it, the sign of a currency, the full stop.
_WHOLE = rf"""(?sx) \A(?:</?[a-z]{{1,6}}>|{_FONT}|\\[(\[]|[*_`${{"'])++ (.*?)
      (?<![\ .,;:!*_`$}}"'])[\ .,;:!]*+(?:</[a-z]{{1,6}}>|\\[)\]]|[*_`$}}"'])+[.,;:!]*\Z
    | \A\(((?:[^()]|\([^()]*\))*)\)\Z | \A\\?\$(?=\.?\d[^$]*\Z) | <\|\w+\|> | \\(?=[%&#])"""
# Up to six words as in "the correct option (B).", then the letter and what closes it.
_LETTER = r"""(?x) (?:(?:it|it's|that|is|most|likely|probably|definitely|clearly|therefore|thus|the
      |correct|right|best|final|answer|ans|option|choice|letter|la|le|l'|die|would|must|should|be
      |opci[óo]n|a\ letra|lettre)\b[:.]?\ ? | [选選][项項择擇]?\ ? | not\ \(?\w\)?,?\ but\ ){0,6}
    [(\["']*([a-z0-9])([)\]"'.:,;!]*(?:\ -(?=\ ))?)(?![!-~])"""
# because …; but not C
_AFFIRMED = r"""(?x: \ ?(?:because|since|as(?!\ well|\ is)|porque|parce|weil|denn|因[为為]|です
      |번?(?:입니다|이다|다)|选项|不[选選是]|而不|是?正[确確]
      |(?:is|would\ be|must\ be)\ (?:indeed\ |clearly\ )?
      (?:the\ (?:only\ )?)?(?:correct|right|best|answer)\b)
    | \W*(?:but\ |and\ )?(?:not|rather\ than|instead\ of|as\ opposed\ to|over)\ (?:option\ )?
      \(?[a-z0-9]\b(?!\ \w))"""
# A second letter, as in "(A) or B" and "A, B".
_SECOND = r"""(?x) \W*((?:(?:or|and|maybe|perhaps|possibly|o|ou|oder|e|y|und|et|no|option)\W+
    |[和或与與及跟]\W*)+)? ([a-z0-9])(?(1)\b|(?![\w-]|\.\d|\ (?!(?:or|and)\b)[\w(]))"""
_REFUSED = r"""(?x) \W*(?:but\ |which\ |and\ )?(?:it\ |this\ |that\ )?
    (?:is|are|was|were|would\ be|must\ be|seems)?\ ?(?:clearly\ |also\ |the\ |an?\ )?
    (?:not|never|wrong|incorrect|false|invalid|unlikely|ruled\ out|isn't|can't|cannot|doesn't)\b"""
_GOES_ON = r"(?:[.;:!](?= )|,? (?:because|since|as|which|due)\b| \((?!\w\)))"  # after its words


def _choice(text: str, choices: Choices) -> set[str]:
    held, text = _box(text)
    if held and (letters := _named(held, choices)):
        return letters
    text = _plain(text)
    for marker in reversed(list(re.finditer(_CHOSEN, text))[-300:]):
        letters = _named(marker["said"], choices, ".:,;!" if marker["weak"] else ")].:,;!")
        if letters and not re.search(_NEGATED, text[: marker.end()][-99:]):
            return letters
    return {letter for line in set(text.split("\n")) for letter in _named(line, choices, "")}


def _named(text: str, choices: Choices, ends: str = ")].:,;!") -> set[str]:
    """The options that `text` names; all of them for "A or B".

    A letter that one of `ends` follows may go on with words that are not its option's: "(B) as it
    is", but not "A cat sat". Without `ends`, the text must be an option.
    """
    given = choices or dict.fromkeys("abcdefghij", "")
    options = {str(key).strip().lower(): _bare(str(words)) for key, words in given.items()}
    text = _bare(text)
    lead = re.match(_LETTER, text)
    if lead and lead[1] in options:
        key = lead[1]
        rest = text[lead.end() :]
        words = _bare(rest)
        if words in ("", options[key]) or re.match(_AFFIRMED, rest):
            return {key}
        if re.match(_SECOND, rest):
            return set(options)
        refused = words in options.values() or re.match(_REFUSED, rest)  # (A) the text of B
        if set(lead[2]) & set(ends) and not refused:
            return {key}
    goes_on = _GOES_ON if ends else "$"
    said = {
        key: len(words)
        for key, words in options.items()
        if words
        and re.match(
            rf"(?:(?:option|choice|answer)\b[^\w-]*)?(?:\(?{re.escape(key)}\W+)?"
            rf"{re.escape(words)}\)?(?:$|{goes_on}"
            rf"|,? (?:option |choice |i\.e\.,? )?\(?{re.escape(key)}(?:\)|$)"
            rf"|,? (?:not|rather than|instead of|while|whereas)\b|{_AFFIRMED})",
            text,
        )
    }
    return {key for key in said if said[key] == max(said.values())}


def _whole(text: str) -> str:
    """Text without case, repeated spaces, and the markup and punctuation around all of it."""
    text = " ".join(_plain(text).casefold().split()).rstrip(" .,;:!")
    return re.sub(_WHOLE, r"\1\2", text)


def _bare(text: str) -> str:
    """Text without LaTeX, Markdown, case, spaces and punctuation around it, and without brackets
    around all of it.
    """
    text = re.sub(_DRESS, "", re.sub(r"\\[,;: ]|~", " ", _plain(text)))
    return _whole(text.strip(_AROUND)).strip(_AROUND)


# -- code ------------------------------------------------------------------------------------------

# Models also put a fence after other text. What a Markdown block holds is Markdown.
_FENCE = r"""(?mx) ^(?:(?:[\ \t>*+-]|\d+[.)])*+|[^\n`~]*(?=[`~]+\ *\w*\ *\n))
    (`{3,}+(?=[^\n`]*\n)|~{3,}+)(?!\ *(?:markdown|md)\b)[\ {.]*(\w*).*\n"""
_STATEMENT = r"""(?mx) ^\ *(?:(?:async|def|class|import|from|for|while|if|with|try|return)\b
    |@|[\w\ ,.]+=)"""
_NOT_EXAMPLE = r"""(?x: (?!.*TestCase|check\(candidate
    |(?i:_?test|main\b|\w*tests?\b|(?:run_?)?(?:example|demo|usage))))"""
# A solution is more than a signature with a docstring, "..." or "pass" as its body.
_SOLUTION = rf"""(?mx) ^(?:(?:async\ +)?def|class)\ +{_NOT_EXAMPLE}
      (?!\w+\ *(?:\((?:[^()]|\([^()]{{0,200}}\)){{0,500}}+\))?[^\n]*?:\s*
        (?:r?(\"{{3}}|'{{3}})[\s\S]*?\1\s*)?(?:\#.*\s*)*
        (?:\.\.\.|pass\b|raise\ NotImplemented.*)?\s*(?:\Z|^\S))
    | ^\w+\ *=\ *lambda\b"""
# What functions, classes, imports, constants and lambdas are called.
_DEFINED = rf"""(?mx) ^(?:(?:async\ +)?(?:def|class)\ +{_NOT_EXAMPLE} | (?:from\ .*)?import\ +\(?\s*
    | (?=[A-Z_\d]+\b[^=\n]*=|\w+\ *(?::[^=\n]*)?=\ *(?:[\d\[{{("'-]|[\w.]+\ *(?:$|\[|\|)
        |(?:lambda|re|math|collections|functools|typing|set|dict|list|tuple|frozenset|range|float
          |int|str|defaultdict|deque|Counter|namedtuple|partial|TypeVar|NewType)\b)))
    ([\w\ ,]+(?:\n\ [\w\ ,]+)*)"""


def _program(text: str) -> str | None:
    """The last closed Python block that parses and defines something other than tests and examples,
    and the blocks it is connected to.

    Without one: a block that the token limit cut off, the last block, or the text itself if it is a
    program.
    """
    blocks = _blocks(re.sub(r"(?m)\r(?=\n)|^ {0,3}> ?(?!>)", "", text))  # also in a block quote
    if not blocks:
        return text.strip("\n") if re.search(_STATEMENT, text) and _parses(text) else None
    program = max(
        reversed(blocks), key=lambda block: (bool(re.search(_SOLUTION, block)), _parses(block))
    )
    for earlier in reversed(blocks[: blocks.index(program)]):
        shared = set(re.findall(r"\w+", program)).intersection(re.findall(r"\w+", earlier))
        names = _names(earlier)
        linked = shared & (names ^ _names(program))
        # An example uses the program; a helper is used by it, or defines something else too.
        if re.search(_SOLUTION, earlier) if linked - names else linked or "import *" in earlier:
            program = f"{earlier}\n\n{program}"
    return program or None


def _blocks(text: str) -> list[str]:
    """The Python blocks of Markdown text. One that is not closed is the first: any other is better.

    The closing fence is at least as long as the opening one. A fence where the program would break
    off is part of it, as in a docstring.
    """
    blocks: list[str] = []
    position = 0
    while opening := re.compile(_FENCE).search(text, position):
        start = opening.end()
        closing = re.compile(rf"(?m)^[ \t]*{opening[1]}[`~]* *$|(?<=[^\s`~]){opening[1]} *$|\Z")
        ends = list(islice(closing.finditer(text, start), 15))
        end = next((end for end in ends if _parses(text[start : end.start()])), ends[0])
        if re.fullmatch("(?i)(?:i?py(?:thon)?3?)?", opening[2]):
            program = textwrap.dedent(text[start : end.start()]).strip("\n")
            blocks.insert(len(blocks) if end[0] else 0, program)
        position = end.end()
    return blocks


def _parses(program: str) -> bool:
    try:  # the parser takes a kilobyte of memory per byte of text
        with warnings.catch_warnings(action="ignore"):
            return len(program) < 100_000 and bool(ast.parse(textwrap.dedent(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _names(program: str) -> set[str]:
    """What a program defines and imports."""
    return set(re.findall(r"\w+", " ".join(re.findall(_DEFINED, program))))
