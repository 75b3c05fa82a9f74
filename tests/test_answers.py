r"""Check that right answers pass and wrong answers fail. Each test names the bug it prevents.

"The authors" are those of LatentMAS. Their scoring was run for this list: `\boxed{1,234}` became 1
and so matched the gold answer "1", `\boxed{\text{A}}` became `\text{a`, `18.00` was not 18, and a
usage example replaced the program.
"""

import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimas.answers import KINDS, extract, grade

from .processes import within

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OPTIONS = {
    "a": "Hemolytic uremic syndrome",
    "b": "Oral ulcers",
    "c": "Continue methimazole",
    "d": "Discontinue methimazole, start propylthiouracil",
}


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cases() -> list[dict[str, Any]]:
    """Return the lines of answers.jsonl.

    Each has `text` and `kind`, and may have `choices` and `verify`. It also has either `answer`, or
    `gold` and `correct`.
    """
    lines = Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


EXTRACTED = [case for case in cases() if "answer" in case]
GRADED = [case for case in cases() if "gold" in case]


def text_of(case: dict[str, Any]) -> str:
    return str(case["text"])


@pytest.mark.parametrize("case", EXTRACTED, ids=text_of)
def test_the_intended_answer_is_extracted(case: dict[str, Any]) -> None:
    r"""Each line has a form of answer that models generate and that graders have misread.

    The authors compare `(b)`, `\text{b` and `b. oral ulcers` with "b" as strings. They take the
    last ```python block, which is often a usage example, and ignore blocks without a language.
    """
    text, answer, choices = case["text"], case["answer"], case.get("choices")
    assert extract(case["kind"], text, choices) == answer
    if case["kind"] == "choice":
        capital = {letter.upper(): words for letter, words in choices.items()}
        assert extract("choice", text, capital) == answer
        for gold in choices:
            assert grade("choice", text, gold, choices) == (gold.lower() == answer)


@pytest.mark.parametrize("case", GRADED, ids=text_of)
def test_right_answers_pass_and_wrong_answers_fail(case: dict[str, Any]) -> None:
    """Each wrong one passed in some grader, mostly because only a part of the number was read."""
    if case.get("verify"):
        pytest.importorskip("math_verify")
    found = grade(
        case["kind"], case["text"], case["gold"], case.get("choices"), case.get("verify", False)
    )
    assert found == case["correct"]


def test_a_number_longer_than_the_limit_is_compared_as_text() -> None:
    """Python refuses to convert more than 4,300 digits."""
    assert grade("math", "7" * 5000, "7" * 5000)
    assert not grade("math", "7" * 5000, "7" * 4999)


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [lambda kind: extract(kind, "1"), lambda kind: grade(kind, "1", "1")]
)
def test_an_unknown_kind_is_refused_by_name(call: Any) -> None:
    """With a typo such as "maths", a whole run would be graded as wrong."""
    with pytest.raises(
        ValueError, match="--kind: found 'maths', expected math, choice, code or free"
    ):
        call("maths")


def test_code_is_not_graded_by_its_text() -> None:
    """Programs that differ only in a space are equal, so only tests can decide."""
    with pytest.raises(ValueError, match="running its tests"):
        grade("code", "x = 1", "x = 1")


@given(
    st.sampled_from(KINDS),
    st.text() | st.from_regex(r"[\\{}$#*_`<>/.,^=()0-9a-dA-D\n -]{0,60}", fullmatch=True),
)
@example("math", r"\boxed{")
@example("math", "0^-1 1/0 1e5^9 9^999999")
@example("math", "\udcff \x00 ²³⁻ ⁻ ½¾ ①")
@example("code", "x = \x00")
@example("code", "(" * 5000)
@example("code", "-" * 50_000 + "1")
@settings(max_examples=200, deadline=None)
def test_no_text_raises_an_error(kind: str, text: str) -> None:
    """One unusual output must not end a long run."""
    extract(kind, text)
    extract(kind, text, OPTIONS)
    if kind != "code":
        grade(kind, text, text, OPTIONS)


REPEATED = (
    "1| |1 |1, |1 / |1*|9^|= |a|answer to |The answer is |(A) |A\n|A. is\n|\\boxed{|\\boxed{}"
    "|\\text{|\\frac{1}{|wait |, no, |if |*x|'.|def f(|def f(a): ...\n|> |- |``` a\n"
    "|{|`|"
    "```python\n|```a|```\nx=1\n|<think>|</think>|٣é|#### 1\n|\n|$|-|.|choose |is |1 or |"
    "so |√|½|°C|#### a\n|((|\\boxed{1} or |**|_|\\|(|not |,|'|x = |1 in |答案是"
).split("|")


@pytest.mark.parametrize("letters", [8_000, pytest.param(80_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["", "1 ", "The answer is ", "\\boxed{"])
def test_repetitive_text_is_graded_within_seconds(start: str, letters: int) -> None:
    """A pattern that backtracks would hang on a model that repeats itself for 8,000 letters.

    At ten times the length, quadratic work takes a hundred times as long.
    """
    for part in REPEATED:
        text = start + part * (letters // len(part)) + "`"
        for kind in KINDS:
            with within(20):
                extract(kind, text, OPTIONS)


def test_the_body_of_a_function_keeps_its_indentation() -> None:
    """A base model goes on after the question's header. Only the first line lost its spaces."""
    body = "    total = a + b\n    if total:\n        return total\n    return 0"
    assert extract("code", body) == "total = a + b\nif total:\n    return total\nreturn 0"
    assert extract("code", f"<think>hm</think>\n\n{body}\n\n") == extract("code", body)


def test_marks_of_files_and_templates_are_not_code() -> None:
    """Both gave a SyntaxError in a right program."""
    block = "```python\n\ufeffdef f():\n    return 1\n```<|im_end|>"
    assert extract("code", block) == "def f():\n    return 1"


@pytest.mark.parametrize("part", ["1, 2 = 3. The answer is (B).\n"])
def test_a_megabyte_is_graded_within_seconds(part: str) -> None:
    """At this size, even a small quadratic part would take an hour."""
    text = part * (10**6 // len(part))
    with within():
        extract("math", text)
        extract("choice", text, OPTIONS)
        extract("code", text)


# -- thoughts --------------------------------------------------------------------------------------


def test_free_text_starts_after_the_thoughts() -> None:
    """Otherwise an exact match would compare the gold answer with the reasoning."""
    assert extract("free", "<think>hm</think>\n The Eiffel  Tower \n") == "The Eiffel  Tower"
    assert extract("free", "<think>hm</think>\n") is None
    assert extract("free", " \n") is None
    assert grade("free", "<think>hm</think> the eiffel\ntower ", "The  Eiffel Tower")
    assert not grade("free", "The Eiffel Towers", "The Eiffel Tower")
    assert not grade("free", "", "")
    for text in ("The Eiffel Tower.", "**The Eiffel Tower**",
                 "It is in Paris.\n\nThe answer is the Eiffel Tower.",
                 "Final answer: The Eiffel Tower", r"So \boxed{The Eiffel Tower}."):  # fmt: skip
        assert grade("free", text, "The Eiffel Tower"), text
    assert not grade("free", "The Eiffel Tower\nIt is in Paris.", "The Eiffel Tower")
    assert not grade("free", "The answer is not the Eiffel Tower.", "The Eiffel Tower")


def test_signs_inside_free_text_are_kept() -> None:
    """Only markup around the whole text may be ignored. Otherwise ".5" passes for "5"."""
    pairs = ".5 5,2*3 23,a_b ab,x_1 x1,!x x,~x x,x<y>z xz,x* x,_x x,#5 5,<a> a,a*b* ab".split(",")
    for text, gold in map(str.split, pairs):
        assert not grade("free", text, gold), text
        assert not grade("free", gold, text), text
    for text in ("`x_1`", "**x_1**.", "_x_1_", "$x_1$", '"x_1"', "\\text{x_1}", "X_1!",
                 "<b>x_1</b>", "**Answer:** x_1", "**Answer: x_1**", 'The answer is: "x_1".',
                 "\\(x_1\\)", "\\boxed{\\text{x_1}}", "(x_1)"):  # fmt: skip
        assert grade("free", text, "x_1"), text
    assert grade("free", "$5", "5")


# -- math ------------------------------------------------------------------------------------------

FORMATS = [
    "{}",
    " {}",
    r"\boxed{{{}}}",
    r"\boxed{{ {} \text{{ apples}}}}",
    r"\boxed{{\text{{{} dollars}}}}",
    r"$\boxed{{x = {}}}$",
    "#### {}",
    "The answer is {}.",
    "**Answer:** {}",
    "So she has 3 + 4 = {} apples in 2 days.",
    "First 7, then 12.5; in the end {} km.",
    "<think> 3 and 4</think> {}",
]


@given(
    st.integers(-(10**15), 10**15),
    st.integers(0, 3),
    st.sampled_from(FORMATS),
    st.sampled_from(["-", "\u2212"]),
)
def test_an_integer_is_extracted_from_every_format(
    number: int, zeros: int, template: str, minus: str
) -> None:
    """Commas, decimals and words around a number must not change it.

    A neighbouring number is another number.
    """
    written = (f"{number:,}" + "." * bool(zeros) + "0" * zeros).replace("-", minus)
    text = template.format(written)
    assert extract("math", text) == str(number)
    for gold in (str(number), f"{number:,}", f"{number}.0"):
        assert grade("math", text, gold)
    assert not grade("math", text, str(number + 1))
    assert not grade("math", text, str(-number - 1))
    assert not grade("math", text, f"{number}.01")


@given(
    st.integers(-999, 999),
    st.integers(1, 999),
    st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}"]),
)
def test_a_fraction_is_compared_exactly(top: int, bottom: int, form: str) -> None:
    """With floats, 0.1 + 0.2 would be wrong and 0.333 would be right."""
    text = rf"\boxed{{{form.format(top, bottom)}}}"
    value = Fraction(top, bottom)
    assert extract("math", text) == str(value)
    assert grade("math", text, f"{top * 7}/{bottom * 7}")
    assert not grade("math", text, str(value + Fraction(1, 10**9)))


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=4))
def test_a_decimal_is_not_turned_into_a_fraction(number: Any) -> None:
    """A record with 5/2 for a generated 2.50 is hard to read."""
    answer = extract("math", f"{number:,f}")
    assert answer is not None and "/" not in answer and "," not in answer
    assert Fraction(answer) == Fraction(number)


@given(
    st.sampled_from(
        [
            case["answer"]
            for case in EXTRACTED
            if case["kind"] == "math" and re.fullmatch(r"[-0-9./%]+", case["answer"] or "")
        ]
    )
)
def test_extracting_an_extracted_number_changes_nothing(answer: str) -> None:
    """Grading a record again starts from the stored answer, and must find the same one."""
    for template in ("{}", r"\boxed{{{}}}", "The answer is {}."):
        assert extract("math", template.format(answer)) == answer


@pytest.mark.parametrize(
    "text",
    [
        "1e999999999",
        "10^999999999",
        "9^9^9^9",
        "2^-999999999",
        "1e99*" * 60 + "1",
        "9" * 5000,
        "1/3^400",
    ],
)
def test_a_huge_exponent_is_not_computed(text: str) -> None:
    """1e999999999 as an integer takes a gigabyte, and math-verify hangs on towers of powers.

    See torchtitan 4442.
    """
    with within(30):
        assert not grade("math", rf"\boxed{{{text}}}", "1")


# After each of these openings, the number is the whole answer.
OPENINGS = ("The answer is ", "Answer: ", "So it is ")


def passing(texts: str, openings: tuple[str, ...] = ("",)) -> list[str]:
    """Return the texts that pass for 42, each on one line after each opening."""
    lines = (opening + text for text in texts.strip().split("\n") for opening in openings)
    return [line for line in lines if grade("math", line.replace("⏎", "\n"), "42")]


def test_an_answer_with_two_numbers_does_not_pass() -> None:
    """Otherwise a model that gives two numbers would be right with either of them."""
    texts = """
42, or 43 if the dog counts
42 (or 43)
42; 43
42, possibly 43
42 (perhaps 43)
42, although it could be 43
42, and then 43
42 pairs, or 84 socks"""
    assert passing(texts, (*OPENINGS, "")) == []
    assert passing("\\boxed{42} (or 43)\n\\boxed{42}; possibly 43") == []
    valid = (
        "The answer is 42, which is 6 times 7.\nThe answer is 42 (forty-two).\nIt is 42, not 43."
    )
    assert len(passing(valid)) == 3


def test_a_retracted_number_does_not_pass() -> None:
    """The first number passed although the next sentence corrected it."""
    texts = """
42. Wait, that's wrong. It is 43.
42. Actually, it should be 43.
42. But I forgot the tax, so 43.
42. Hold on, the tax is missing: 43.
42. My mistake, it is 43.
42. That is not right.
42. Let me recompute: 40 + 3 = 43.
42. Or maybe 43.
42... no, 43"""
    assert passing(texts, (*OPENINGS, "")) == []
    assert passing("#### 42⏎Wait, the answer is 43.\n\\boxed{42}. Oops, it is 43.") == []
    assert grade("math", "The answer is 41. Sorry, it is 42.", "42")
    assert grade("math", "\\boxed{41}. Wait, I made a mistake. The answer is 42.", "42")
    for text in ("The answer is 42. I checked it 3 times.", "Wait, let me see. The answer is 42.",
                 "The answer is 42. However, prices may change.", "Actually, 42."):  # fmt: skip
        assert grade("math", text, "42"), text


def test_an_operand_does_not_pass() -> None:
    """ "A third of 42" passed as 42, because the words of an operation were ignored."""
    texts = """
a third of 42
two thirds of 42
an eighth of 42
the reciprocal of 42
the factorial of 42
a multiple of 42
cos 42
arctan 42
e to the 42
ten plus 42
five times 42
eleven minus 42
a dozen and 42
one hundred and 42
seventy 42
42 plus one
42 and a third
42 over two
42 doubled"""
    assert passing(texts, (*OPENINGS, "")) == []
    assert extract("math", "The answer is two and 1/2") is None
    valid = """
The total comes to 42.
It adds up to 42.
They spent a total of $42.
an average speed of 42 km/h
The least common multiple is 42.
One third is 42."""
    assert len(passing(valid)) == 6


def test_a_factor_is_not_taken_for_a_unit() -> None:
    """ "12 dozens" passed as 12, because every word after a number was taken for a unit."""
    texts = """
42 dozens
42 tens
42 twelfths
42 thirteenths
42 mil
42 grand
$42 M
42 B
$42 k
42 π
42 x
42 i
42 theta
42 in base 8
42 (base 8)
42만
42억
42 만
42 लाख
42 тысячи
42 миллиона
42 Millionen
42 Tausend
42 millones
42 milhões
42 mille
42 mila
42 juta
42 Dutzend"""
    assert passing(texts, (*OPENINGS, "")) == []
    assert passing("42 thousands\n$42 millions\n42 hundreds") == []
    assert grade("math", "She earned $3 millions.", "3000000")
    valid = (
        "42 miles\n42 milligrams\n42 months\n42 pillows\n42 m\n$42 a week\n42 años\n42個\n42 teeth"
    )
    assert len(passing(valid)) == 9


def test_a_ratio_with_spaces_does_not_pass_as_its_last_number() -> None:
    """ "3 : 4" passed as 4."""
    assert passing("So the ratio is 3 : 42.\nThe ratio of cats to dogs is 42 : 5.") == []


def test_a_bound_an_exception_or_a_supposition_does_not_pass() -> None:
    """ "More than 42" was refused, but "at least 42" passed."""
    texts = """
at least 42
at most 42
up to 42
exceeding 42
a maximum of 42
as many as 42
42 at most
all but 42
any number except 42
excluding 42
besides 42
unlikely to be 42
hardly 42"""
    assert passing(texts, (*OPENINGS, "")) == []
    sentences = """
I doubt the answer is 42.
I doubt it is 42.
Suppose the answer is 42.
If the answer is 42, then we fail.
Let's say the answer is 42.
I don't think the answer is 42.
It is impossible that it is 42.
The answer is not equal to 42."""
    assert passing(sentences) == []
    assert grade("math", "If 3 are eaten, 42 remain.", "42")
    assert grade("math", "Not 41 but 42", "42")


def test_an_exclamation_mark_or_an_arrow_is_not_an_operator() -> None:
    """ "So the answer is 42!" was read as a factorial, and "=> 42" as an inequality."""
    valid = "So the answer is 42!\n=> 42\n\\boxed{m\\angle A = 42^\\circ}"
    assert len(passing(valid)) == 3
    assert passing("\\boxed{42!}") == []


# -- choice ----------------------------------------------------------------------------------------


def test_a_letter_is_extracted_without_options() -> None:
    """In the files of GPQA, the options are inside the question."""
    for text in (
        "C",
        r"\boxed{\text{C}}",
        "The answer is (C).",
        r"\boxed{(C) 10 m/s}",
        "The correct option is C",
    ):
        assert extract("choice", text) == "c"
        assert grade("choice", text, "C") and not grade("choice", text, "B")
    for text in ("I think so", "A cat sat", "A or B", "no idea"):
        assert extract("choice", text) is None


def test_the_gold_answer_may_be_a_letter_in_either_case_or_the_text_of_an_option() -> None:
    """The gold answers of MedQA are texts, those of ARC upper-case letters."""
    for gold in ("b", "B", "(B)", "Oral ulcers", "oral ulcers", "B. Oral ulcers"):
        assert grade("choice", "(B)", gold, OPTIONS)
        assert not grade("choice", "(A)", gold, OPTIONS)
    assert not grade("choice", "E", "E", OPTIONS)


def test_options_may_have_numbers_as_labels() -> None:
    """Some rows of ARC have the labels 1 to 4.

    A number that is the text of an option means that option, unless it is also a label.
    """
    numbered = {"1": "gas", "2": "solid", "3": "liquid", "4": "plasma"}
    for text in ("2", "(2)", r"\boxed{2}", "The answer is 2.", "Answer: 2) solid", "solid"):
        assert extract("choice", text, numbered) == "2"
    assert extract("choice", "The answer is 2.5", numbered) is None
    assert extract("choice", "5", numbered) is None
    assert extract("choice", r"\boxed{13}", {"a": "6", "b": "7", "c": "13", "d": "19"}) == "c"


def test_a_part_of_an_option_is_not_that_option() -> None:
    """ "discontinue" contains "continue", so matching substrings would find the wrong option."""
    assert extract("choice", r"\boxed{Discontinue methimazole}", OPTIONS) is None
    assert extract("choice", "The answer is kilometer.", {"a": "meter", "b": "kilometer"}) == "b"
    assert extract("choice", "The answer is 10 meters.", {"a": "10", "b": "20"}) is None
    assert extract("choice", "The answer is 10.5 meters.", {"a": "10", "b": "20"}) is None
    assert (
        extract(
            "choice", "The answer is iron deficiency. It", {"a": "iron", "b": "iron deficiency"}
        )
        == "b"
    )
    assert (
        extract(
            "choice", "The answer is (A tiger hunts).", {"a": "A cat sits", "b": "A tiger hunts"}
        )
        == "b"
    )


CITIES = {"A": "Paris", "B": "London", "C": "Berlin", "D": "12"}


@pytest.mark.parametrize(
    "text",
    [
        "(B) London is correct.",
        "London is the correct answer.",
        "The answer is London, not Paris.",
        "The answer is London rather than Berlin.",
        "The answer is B (London), while A is Paris.",
        "A is incorrect, B is correct.",
        "It has to be B.",
        "The solution is B.",
        "The answer's B.",
        "- B",
        "> B",
        "### B",
        "答案不是A，而是B",
        "选B不选A",
    ],
)
def test_an_option_is_extracted_from_ordinary_sentences(text: str) -> None:
    """Right answers in sentences counted as no answer."""
    assert extract("choice", text, CITIES) == "b"


def test_an_option_and_its_letter_may_come_in_either_order() -> None:
    """ "12, option D" counted as no answer."""
    assert extract("choice", "So the answer is 12, option D.", CITIES) == "d"
    assert extract("choice", "- A\n- B", CITIES) is None
    for text in ("B is incorrect.", "The answer is not B, and C is wrong.", "- 5"):
        assert extract("choice", text, CITIES) is None, text


# -- on the data sets ------------------------------------------------------------------------------


def test_every_gsm8k_solution_is_right_and_the_next_one_is_wrong() -> None:
    """A grader that rejects gold solutions cannot compare methods."""
    data = rows("gsm8k_test")
    for row, other in zip(data, data[1:] + data[:1], strict=True):
        gold, wrong = row["answer"], other["answer"]
        for text in (
            row["solution"],
            f"<think>{other['solution']}</think>{row['solution']}",
            rf"\boxed{{{int(gold):,}}}",
        ):
            assert grade("math", text, gold), row["id"]
            assert grade("math", text, row["solution"]), row["id"]
            assert grade("math", text, wrong) == (int(gold) == int(wrong)), row["id"]


def test_the_last_line_of_a_gsm8k_solution_has_its_answer() -> None:
    """Units, multiplication signs and names on the left hid one result in twenty."""
    data = rows("gsm8k_test")[:200]
    right = 0
    for row in data:
        solution = re.sub(r"<<.*?>>", "", row["solution"].partition("####")[0])
        right += grade("math", solution.strip().rpartition("\n")[2], row["answer"])
    assert right >= 195


def test_every_aime_answer_is_right_with_and_without_leading_zeros() -> None:
    """AIME uses the form 073. The authors call int() on a text that may not be an integer."""
    data = rows("aime2024")
    for row, other in zip(data, data[1:] + data[:1], strict=True):
        for text in (rf"$\boxed{{{int(row['answer']):03d}}}$", f"The answer is {row['answer']}."):
            assert grade("math", text, row["answer"])
            assert grade("math", text, other["answer"]) == (
                int(row["answer"]) == int(other["answer"])
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy_test", "arc_challenge_test", "medqa"])
def test_every_option_of_every_row_is_extracted_as_itself(name: str) -> None:
    """Options can contain other options, be numbers, or end with a full stop."""
    for row in rows(name):
        choices = row["choices"]
        for letter, words in choices.items():
            big = letter.upper()
            for text in (
                big,
                f"({letter})",
                f"{big}. {words}",
                f"The answer is ({big}) {words}",
                f"The answer is {big}.",
                rf"\boxed{{{big}}}",
                rf"\boxed{{\text{{{big}. {words}}}}}",
                rf"\boxed{{{words}}}",
                f"The answer is: {words}",
                f"{' '.join(choices.values())}\n\nThe correct option is **{big}**.",
            ):
                assert extract("choice", text, choices) == letter, (row["id"], text)
                assert grade("choice", text, row["answer"], choices) == (letter == row["answer"])
                assert grade("choice", text, choices[row["answer"]], choices) == (
                    letter == row["answer"]
                )


def test_a_repeated_question_is_not_an_answer() -> None:
    """A model that only repeats the question and its options must not be right by chance."""
    data = rows("arc_easy_test") + rows("medqa")
    found = 0
    for row in data:
        options = "\n".join(
            f"{letter.upper()}. {words}" for letter, words in row["choices"].items()
        )
        found += extract("choice", f"{row['question']}\n{options}", row["choices"]) is not None
    assert found == 0


INC = "def inc(a):\n    return a + 1"


def fenced(*programs: str) -> str:
    return "\nText.\n".join(f"```python\n{program}\n```" for program in programs)


@pytest.mark.parametrize(
    "helper",
    [
        "step = 1",
        "Number = int",
        "from operator import *",
        "Pair = tuple[int, int]",
        "words = {'a': 1}",
    ],
)
def test_a_block_that_only_assigns_is_kept_before_the_solution(helper: str) -> None:
    """A right solution ended in a NameError, because the block before it was left out."""
    used = helper.split(" = ")[0] if "=" in helper else "add"
    program = f"def inc(a):\n    return [a, {used}]"
    assert extract("code", fenced(helper, program)) == f"{helper}\n\n{program}"


@pytest.mark.parametrize(
    "example", ["result = inc(1)", "x = 5\nprint(inc(x))", "import math\ninc(2)"]
)
def test_an_example_before_the_solution_is_left_out(example: str) -> None:
    """It would run before the function that it calls is defined."""
    program = "import math\ndef inc(x):\n    result = x + 1\n    return result"
    assert extract("code", fenced(example, program)) == program


@pytest.mark.parametrize(
    "stub",
    [
        "def inc(a: int) -> int: ...",
        "def inc(a):\n    pass",
        'def inc(a):\n    """Add one."""',
        "def inc(\n    a: int,\n) -> int:\n    '''Add: one.'''\n    ...",
        "def inc(a):\n    # TODO\n    raise NotImplementedError",
    ],
)
def test_a_stub_does_not_replace_the_solution(stub: str) -> None:
    """An interface that was repeated at the end replaced the function that has a body."""
    assert extract("code", fenced(INC, stub)) == INC
    assert extract("code", fenced(stub, INC)) == INC
    assert extract("code", fenced(stub)) == stub


def test_code_fences_are_parsed_as_in_commonmark() -> None:
    """Code was cut off at fences in sentences, lists, quotes and docstrings with examples."""
    assert extract("code", f"Use ``` for code.\n{fenced(INC)}") == INC
    tabs = "\n\t".join(fenced(INC).split("\n"))
    assert extract("code", f"- Solution:\n\n\t{tabs}\n") == INC
    quoted = "\n> ".join(fenced(INC).split("\n"))
    assert extract("code", f"Said:\n\n> {quoted}\n") == INC
    example = "    ```\n    inc(1)\n    ```\n"
    program = f'def inc(a):\n    """Add.\n\n{example * 4}    """\n    return a + 1'
    assert extract("code", fenced(program)) == program
    program = 'def inc(a):\n    """Add.\n\n>>> inc(1)\n2\n    """\n    return a + 1'
    assert extract("code", fenced(program)) == program


MATH_FORMATS = r"""
{}|{}.|\boxed{{{}}}|$\boxed{{{}}}$|
\[ \boxed{{ {} }} \]|\boxed{{\text{{{}}}}}|\boxed{{x = {}}}|#### {}|
The answer is {}.|**Answer: {}**|Answer: ${}$|
x = {}|= {}|So it is **{}**.|The final answer is \({}\).|
<think>1 or 2</think>The answer is {}
"""
CHOICE_FORMATS = r"""
{}|{}.|({})|**{}**|#### {}|
\boxed{{{}}}|\boxed{{\text{{{}}}}}|The answer is \(\boxed{{{}}}\).|The answer is {}.|
Answer: {}|The correct answer is **{}**.|
The correct option is ({}).|Final Answer: ({})|I choose {}.|Option {}|So, {}|
So the answer is option {}|The best answer is {} because it is right.|<think>a or b</think>{}
"""


def split_formats(text: str) -> list[str]:
    return text.strip().replace("|\n", "|").split("|")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k_test", "aime2024"])
def test_every_gold_number_is_right_in_every_format_and_its_neighbours_are_wrong(name: str) -> None:
    r"""One model generates \boxed{1,234}, another **1234.00**.

    The format must not decide which model is better.
    """
    for row in rows(name):
        gold, value = row["answer"], int(row["answer"])
        for template in split_formats(MATH_FORMATS):
            for form in (gold, f"{value:,}", f"{value:,}.00", f"${value}"):
                assert grade("math", template.format(form), gold), (row["id"], template, form)
            for form in (
                str(value + 1),
                str(value - 1),
                f"-{value}" if value else "1",
                f"{value}1",
                f"{value}.5",
            ):
                assert not grade("math", template.format(form), gold), (row["id"], template, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy_test", "arc_challenge_test", "medqa"])
def test_every_gold_option_is_right_in_every_format_and_the_others_are_wrong(name: str) -> None:
    """ "(A mouse runs)" is not a letter. The text of an option in brackets means that option."""
    for row in rows(name):
        choices, gold = row["choices"], row["answer"]
        for letter, words in choices.items():
            if letter != gold and words.strip(" .").lower() == choices[gold].strip(" .").lower():
                continue
            for template in split_formats(CHOICE_FORMATS):
                for form in (
                    letter,
                    letter.upper(),
                    words,
                    f"{letter.upper()}. {words}",
                    f"({letter}) {words}",
                ):
                    assert grade("choice", template.format(form), gold, choices) == (
                        letter == gold
                    ), (
                        row["id"],
                        template,
                        form,
                    )


# -- math-verify -----------------------------------------------------------------------------------


def test_math_verify_is_called_only_for_expressions_and_only_on_demand() -> None:
    """It accepts 0.333333 for 1/3, so a run must record whether it was used."""
    pytest.importorskip("math_verify")
    assert not grade("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    assert grade("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}", verify=True)


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^9}}x", "9^9^9^9x", "x^{99999}", "99999!x", "x" * 600, "\\frac{", "}{", "x=="],
)
def test_math_verify_gets_no_expression_that_makes_it_hang(answer: str) -> None:
    """It hangs on towers of powers, where no alarm can be set (torchtitan 4442)."""
    pytest.importorskip("math_verify")
    with within(30):
        assert not grade("math", rf"\boxed{{{answer}}}", r"2\sqrt{2}", verify=True)


def test_a_missing_math_verify_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grading without math-verify must not need it."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not grade("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    assert grade("math", "18", "18", verify=True)
    with pytest.raises(ImportError, match="pip install math-verify"):
        grade("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}", verify=True)


def test_random_letters_score_at_chance() -> None:
    """This is a control of the grader: random letters must be right as often as chance predicts."""
    draw = random.Random(0)
    data = rows("arc_challenge_test")
    right = sum(
        grade(
            "choice",
            draw.choice(["{}", "({})", r"\boxed{{{}}}"]).format(draw.choice("ABCD")),
            row["answer"],
            row["choices"],
        )
        for row in data * 20
    )
    assert 0.21 < right / (20 * len(data)) < 0.29


def test_the_texts_of_options_may_be_numbers() -> None:
    """With `"choices": {"A": 6, "B": 7}`, the row was answered, but grading it raised an error."""
    choices = {"A": 6, "B": 7}
    assert extract("choice", "The answer is (B).", choices) == "b"  # type: ignore[arg-type]
    assert grade("choice", "\\boxed{7}", "B", choices)  # type: ignore[arg-type]
