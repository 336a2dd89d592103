"""Known answers of the extraction rules."""

from decimal import Decimal

import pytest

from drlora_jax.evaluation.answers import last_number, option_of, strict_number, without_notes

NUMBERS = [  # text, strict, flexible
    ("#### 18", "18", "18"),
    ("She sells 9 * 2 = $18 a day.\n#### 18", "18", "18"),
    ("####18", "18", "18"),
    ("#### $18", "18", "18"),
    ("#### 18.", "18", "18"),
    ("#### 18.0", "18", "18"),
    ("#### 18.50", "18.5", "18.5"),
    ("#### 1,234", "1234", "1234"),
    ("#### 1,234,567", "1234567", "1234567"),
    ("#### $1,234.50", "1234.5", "1234.5"),
    ("#### -5", "-5", "-5"),
    ("#### - 5", "-5", "-5"),
    ("#### -$5", "-5", "-5"),
    ("#### $-5", "-5", "-5"),
    ("#### \u22125", "-5", "-5"),
    ("#### 0", "0", "0"),
    ("#### .5", "0.5", "0.5"),
    ("#### 70%", "70", "70"),
    ("#### 18 dollars", "18", "18"),
    ("#### 18\n\nQuestion: next one? 7", "18", "7"),
    ("#### 18 #### 19", "18", "19"),
    ("####\n18", "18", "18"),
    ("#### the answer is 18", None, "18"),
    ("####", None, None),
    ("", None, None),
    ("no number here", None, None),
    ("The answer is 18", None, "18"),
    ("The answer is 18.", None, "18"),
    ("The answer is $18.00.", None, "18"),
    ("The answer is **18**.", None, "18"),
    ("The answer is \\boxed{18}", None, "18"),
    ("16 - 3 - 4 = 9", None, "9"),
    ("so we compute 16-3", None, "3"),
    ("(2)-3", None, "3"),
    ("it is -3", None, "-3"),
    ("it is (-3)", None, "-3"),
    ("it fell by -$3", None, "-3"),
    ("x=-3", None, "-3"),
    ("a loss of -1,000.25 dollars", None, "-1000.25"),
    ("3/4", None, "4"),
    ("10:30", None, "30"),
    ("2,", None, "2"),
    ("1, 2, 3", None, "3"),
    ("12 apples and 7 pears", None, "7"),
    ("...", None, None),
    ("$", None, None),
    ("1.", None, "1"),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS)
def test_numbers_of_texts(text, strict, flexible):
    for found, wanted in ((strict_number(text), strict), (last_number(text), flexible)):
        assert found == (None if wanted is None else Decimal(wanted))


def test_many_cases():
    assert len(NUMBERS) >= 40


def test_notes_are_taken_out():
    text = "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 clips.\n#### 72"
    assert without_notes(text) == "48/2 = 24 clips.\n48+24 = 72 clips.\n#### 72"


ANSWERS = ("answer1", "answer2", "answer3")


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("the correct answer is answer2", ANSWERS, "answer2"),
        ("answer3", ANSWERS, "answer3"),
        ("Answer1.", ANSWERS, "answer1"),
        ("answer1 or answer2", ANSWERS, "answer1"),
        ("answer12", ANSWERS, None),
        ("answer4", ANSWERS, None),
        ("the second one", ANSWERS, None),
        ("the correct answer is true", ("true", "false"), "true"),
        ("untrue", ("true", "false"), None),
        ("FALSE, not true", ("true", "false"), "false"),
        ("", ("true", "false"), None),
    ],
)
def test_options_of_texts(text, options, wanted):
    assert option_of(text, options) == wanted
