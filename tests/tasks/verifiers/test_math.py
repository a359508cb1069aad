r"""MATH, `fixed`: distinct values are never equal, and equal spellings always are."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.tasks.verifiers import Graders, fault_of_truth, grade
from smoltulu.tasks.verifiers.math import grade_text


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(1) as graders:
        yield graders


def quick(answer: str, ground_truth: str) -> bool | None:
    """What the text says, without a worker."""
    verdict = grade_text(rf"so \boxed{{{answer}}}.", ground_truth)
    return None if verdict is None else verdict.outcome == "right"


@pytest.mark.parametrize(
    ("answer", "ground_truth", "equal"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\boxed{\frac{1}{2}}", True),
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\frac1{72}", r"\frac{1}{72}", True),
        ("1/2", r"\frac12", True),
        ("-1/2", r"-\frac{1}{2}", True),
        (r"\frac{-1}{2}", r"-\frac12", True),
        ("0.5", ".5", True),
        ("5", ".5", False),
        ("14", ".14", False),
        ("1,000", "1000", True),
        (r"1{,}000", "1000", True),
        (r"1\,000", "1,000", True),
        ("4.0", "4", True),
        ("5.", "5", True),
        ("12", "1,2", False),
        ("1 2", "12", None),
        ("-21", "-2,1", False),
        ("1,23", "123", False),
        ("0,123", "123", False),
        ("2,1", "1,2", True),
        ("1,1,2", "1,2", False),
        (r"\{1, 2\}", "2,1", True),
        ("(1,2)", "(2,1)", False),
        ("(1, 2)", r"\left(1,2\right)", True),
        ("(1,234)", "1234", False),
        ("(1,2)", "[1,2]", False),
        ("[1,2)", "[1,2]", False),
        (r"(-\infty,2)", "x<2", True),
        (r"x \le 2", r"(-\infty,2]", True),
        (r"x \le 2", r"(-\infty,2)", False),
        (r"1 < x \le 3", "(1,3]", True),
        (r"x \in [1,2]", "[1,2]", True),
        (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)", True),
        ("x<1 or x>2", r"x>2\text{ or x<1}", True),
        (r"x<1 \text{ and } x>2", r"(-\infty,1)\cup(2,\infty)", False),
        (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(2,\infty)", False),
        ("(x,y)=(1,2)", "(1,2)", True),
        ("(x, y) = (2, 1)", "(1,2)", False),
        ("(y,x)=(1,2)", "(x,y)=(1,2)", False),
        ("=3", "3", True),
        ("=3", "4", False),
        ("1e5", "100000", True),
        ("2e-05", "0.00002", True),
        ("1.5×10^-5", "0.000015", True),
        ("10^-5", "0.00001", True),
        ("10⁻⁵", "0.00001", True),
        ("2**3", "8", True),
        ("3½", r"\frac72", True),
        ("⅔", r"\frac23", True),
        ("2x²", "2x^2", True),
        ("√2", r"\sqrt2", True),
        ("√16", "4", True),
        (r"3^\circ\text{C}", "3", True),
        (r"3^\circ\text{C}", r"3^\circ C", True),
        (r"3^\circ\text{C}", r"3^\circ\text{F}", False),
        (r"3^\circ\text{C}", r"3^\circ", False),
        ("3<x<5", "(3,5)", True),
        ("2<x", r"(2,\infty)", True),
        ("2<x", r"[2,\infty)", False),
        ("x<=2", r"(-\infty,2]", True),
        ("5>x>=3", "[3,5)", True),
        ("on", "no", False),
        ("Tom", "Mot", False),
        ("1/2(4)", "2", True),
        (r"(2,3]\cup(-\infty,1)", r"(-\infty,1)\cup(2,3]", True),
        (r"(-\infty,1)\cup(2,3)", r"(-\infty,1)\cup(2,3]", False),
        ("x = 5", "5", True),
        ("x=5", "x = 5", True),
        ("y=5", "x=5", False),
        ("x=1, x=2", "1,2", True),
        ("5=12", "12", False),
        ("2+3=5", "5", True),
        (r"5\text{ cm}", "5", True),
        ("5 cm", r"5\,\mathrm{cm}", True),
        (r"5 \text{ centimeters}", r"5\text{ cm}", True),
        (r"5\text{ cm}", r"5\text{ m}", False),
        (r"5\text{ cm}^2", r"5\text{ square centimeters}", True),
        (r"5\text{ cm}^2", r"5\text{ cm}", False),
        (r"6\text{ cm}", "5", False),
        (r"(3,4)\text{ cm}", "(3,4)", True),
        (r"\$5", "5", True),
        ("5 dollars", r"\$5", True),
        ("5 cents", r"\$5", False),
        (r"50\%", "50", True),
        (r"50\%", "0.5", False),
        (r"90^\circ", "90", True),
        (r"90^{\circ}", r"90\text{ degrees}", True),
        ("12_8", "12", False),
        ("12_{8}", "12_8", True),
        ("12_8", "12_9", False),
        (r"12_{\text{8}}", "12_8", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"\sqrt{16}", "4", True),
        (r"3\frac12", "3.5", True),
        ("3 1/2", r"\frac72", True),
        (r"0.\overline{3}", r"\frac13", True),
        ("0.333333", r"\frac13", False),
        ("0.33", r"\frac13", False),
        (r"2 \times 10^3", "2000", True),
        ("1+11", "12", True),
        (r"\text{(B)}", "B", True),
        ("(B)", r"\textbf{(B)}", True),
        (r"\text{B}", "A", None),
        ("Evelyn", r"\text{evelyn}", True),
        (r"\text{Evelyn}", r"\text{Briana}", False),
        (r"1 \pm \sqrt2", r"1-\sqrt2, 1+\sqrt2", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        (r"3, 5, \text{ and } 7", "7,5,3", True),
        ("-5", "−5", True),
        (r"\left\{ 1 \right\}", "1", False),
        (r"5\text{ million}", "5000000", True),
        (r"5\text{ million}", "5", False),
        (r"\$5 million", r"\$5,000,000", True),
        (r"5^{\text{th}}", "5", True),
        ("5th", r"5^\text{th}", True),
        ("5 apples", r"5\text{ apples}", True),
        (r"3\text{, 4}", "3", False),
        (r"3\text{ or more}", "3", False),
        ("3 or more", r"3\text{ or more}", True),
        ("3 thirds", "3", False),
        (r"3\text{ (mod 7)}", r"3\text{ (mod 9)}", False),
        (r"x=3\text{ or x=4}", "3", False),
        (r"x=3\text{ or x=4}", "4, 3", True),
        (r"A\text{ or B}", "A", False),
        (r"2\text{ hours}", r"2\text{ hours and 45 minutes}", False),
        (r"3:30\text{ a.m.}", r"3:30\text{ am}", True),
        (r"3:30\text{ a.m.}", r"3:30\text{ p.m.}", False),
        (r"\text{1:03 PM}", r"1:03\text{ p.m.}", True),
        (r"\text{4:30 p.m.}", "4:30 pm", True),
        ("4:30", "4:30 pm", True),
        ("4:30 am", r"\text{4:30 PM}", False),
        (r"4\text{ a.m.}, 3\text{ p.m.}", r"4\text{ p.m.}, 3\text{ a.m.}", False),
        (r"10\text{ north}", r"10\text{ south}", False),
        (r"5\text{ km/h}", r"5\text{ mph}", False),
        (r"5\text{ miles per hour}", r"5\text{ mph}", True),
        (r"5\text{ km/h}", "5", True),
        ("5 apples", r"5\text{ oranges}", False),
        (r"65 \text{ children tickets }", "65", True),
        (r"5\text{x}", "5", None),
        ("3s^2", "3", None),
        ("5 m", "5", None),
        (r"5\text{ m}", "5", True),
        ("5cm", "5", True),
        (r"3s^2\text{ cm}", "3s^2", True),
        ("2ab", "2", None),
        ("2:3", "2", False),
        ("2:3", "2:5", False),
        ("5E3", "5000", True),
        ("sqrt(3)", r"\sqrt3", True),
        (r"\emptyset", r"\varnothing", True),
        ("x+y", "x+y=1", False),
        ("1,234, 5", "1234, 5", True),
        ("1,234,5", "1,234, 5", False),
        ("(1,250, 0)", "(1250, 0)", True),
        ("((1,234), 5)", "(1234, 5)", False),
        ("10,000,000", "10000000", True),
        ("1000,234", "1000234", False),
        ("100,200", "200, 100", True),
        ("200, 100", "100,200", True),
        ("x=100,200", "200, 100", True),
        (r"\{100,200\}", "100,200", True),
        ("1,100,200", "1, 100, 200", True),
        ("100,200", "100, 300", False),
        ("100,200", "100200, 5", False),
        ("100,200", "(100, 200)", False),
        ("100,200", "200,100", False),
        ("٣", "3", None),
    ],
)  # fmt: skip
def test_what_the_text_says(answer: str, ground_truth: str, equal: bool | None) -> None:
    assert quick(answer, ground_truth) is equal


@pytest.mark.parametrize(
    ("answer", "ground_truth", "equal"),
    [
        ("1+x", "x+1", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("0.5x", r"\frac{x}{2}", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}", True),
        (r"(\sqrt2+\sqrt3)^2", r"5+2\sqrt6", True),
        (r"\sqrt{x^2}", "x", False),
        ("x+y", "2x", False),
        ("y", "x", False),
        (r"2\pi", "6.283185307179586", False),
        (r"\frac{1+i}{2}", r"\frac12+\frac i2", True),
        ("i^2", "-1", True),
        ("y = 2x+3", "2x - y + 3 = 0", True),
        ("2x+2y=2", "x+y=1", True),
        ("x+y=1", "x+y=2", False),
        ("٣", "3", False),
        ("A", "a", False),
        ("X", "x", False),
        (r"\Delta", r"\delta", False),
        ("f'(x)", "f(x)", False),
        ("5'", "5", False),
        (r"5\text{x}", "5", False),
        ("3s^2", "3", False),
        ("5 m", "5", False),
        (r"0.333\ldots", "0.333", False),
        ("1.5.2", "1", False),
        ("10 000", "0", False),
        ("sin(x)", r"\sin x", True),
        ("2^{2005}+1", "2^{2005}", False),
        (r"2^{2005}+\sqrt2", "2^{2005}", False),
        (r"\frac{2}{2004!}", r"\frac{1}{2004!}", False),
        (r"(x, \frac{2x}{4})", r"(x, \frac{x}{2})", True),
        (r"\{y, x+1\}", "1+x, y", True),
        (r"\binom52", "10", True),
        ("5!", "120", True),
        ("1 2", "12", False),
        (r"(1, \sqrt{8})", r"(1, 2\sqrt2)", True),
        (r"(\sqrt8, 1)", r"(1, 2\sqrt2)", False),
        ("x<y", "x>y", False),
        ("x^-1", r"\frac1x", True),
        ("x^-1", "x-1", False),
        ("2√3", r"\sqrt{12}", True),
        ("√(x+1)", r"\sqrt{1+x}", True),
        ("2e-5", "0.00002", False),
        ("2e-5", "-5+2e", True),
        ("CAB", "BAC", False),
        (r"\triangle ABC", r"\triangle BCA", False),
        ("AB+CD", "CD+AB", True),
        ("AB+CD", "BA+CD", False),
        ("ab", "ba", True),
        (r"1/2\pi", r"\frac{\pi}{2}", True),
        (r"1/2\pi", r"\frac{1}{2\pi}", False),
        (r"1/(2\pi)", r"\frac{1}{2\pi}", True),
        ("0.5/2x", "0.25x", True),
        ("1/2^3x", r"\frac{x}{8}", True),
        ("x^1/2", r"\frac{x}{2}", True),
    ],
)
def test_what_values_say(graders: Graders, answer: str, ground_truth: str, equal: bool) -> None:
    assert quick(answer, ground_truth) is None
    assert graders.grade("math", rf"\boxed{{{answer}}}", ground_truth).score == float(equal)


@pytest.mark.parametrize("power", ["x^{{{}}}", "x^{}"])
@pytest.mark.parametrize("degree", [5, 21])
def test_a_long_sum_of_powers_is_read(graders: Graders, power: str, degree: int) -> None:
    """Powers beside each other do not nest; powers in powers do."""
    terms = [f"{number}{power.format(number)}" for number in range(2, degree + 1)]
    truth = "+".join(terms)
    assert graders.grade("math", "\\boxed{" + "+".join(terms[::-1]) + "}", truth).score == 1.0
    assert graders.grade("math", "\\boxed{" + "+".join(terms[:0:-1]) + "}", truth).score == 0.0
    tower = "x^{" * 25 + "2" + "}" * 25
    assert graders.grade("math", f"\\boxed{{{tower}+1}}", f"1+{tower}").score == 0.0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("ABCDEFG", min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_names_of_points_keep_their_order(graders: Graders, name: str, rng: random.Random) -> None:
    other = "".join(rng.sample(name, len(name)))
    for form in ("{}", "\\triangle {}", "2{}", "\\overline{{{}}}"):
        score = graders.grade("math", f"\\boxed{{{form.format(other)}}}", form.format(name)).score
        assert score == float(other == name)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"\boxed{3} no, \boxed{4}", 1.0),
        (r"\boxed{4} no, \boxed{3}", 0.0),
        ("Final Answer: The final answer is $4$. I hope it is correct.", 1.0),
        (r"Final Answer: The final answer is $\boxed{4}$. I hope it is correct.", 1.0),
        (r"\boxed{4} Final Answer: The final answer is 5. I hope it is correct.", 0.0),
        ("the value is $5$ or $ 4 $", 1.0),
        ("the value is $$4$$", 1.0),
        (r"the value is \( 4 \)", 1.0),
        (r"the value is \[ 4 \]", 1.0),
        (r"\boxed 4", 1.0),
        (r"\fbox{4}", 1.0),
        (r"\boxed{\text{so } 4}", 0.0),
        ("4", 1.0),
        (r"\boxed{4", 0.0),  # cut off
        (r"\boxed{}", 0.0),
        ("", 0.0),
        ("$$", 0.0),
        ("It is 4, I think.\nYes.", 0.0),  # nothing marks it
    ],
)
def test_where_the_answer_stands(graders: Graders, completion: str, score: float) -> None:
    assert graders.grade("math", completion, "4").score == score


@pytest.mark.parametrize(
    ("truth", "fault"),
    [
        ("", "empty"),
        ("{", "braces do not close"),
        (r"\boxed{4", "no answer|is empty"),
        ("[]", "empty"),
        ('["4", " "]', "empty"),
        ("$$", "no answer"),
        ("1" * 2_000, "longer than"),
        ("(" * 500, None),
        ("(" * 50 + "1" + ")" * 50, "nested too deeply"),
        ('["4", "5"]', None),
        ("[1,2]", None),
    ],
)
def test_ground_truths_that_cannot_be_graded(truth: str, fault: str | None) -> None:
    found = fault_of_truth("math", truth)
    assert (found is None) == (fault is None), found
    if fault is not None and found is not None:
        assert any(part in found for part in fault.split("|"))


def test_any_of_a_list_is_right() -> None:
    assert quick("5", r'["4", "5"]') is True
    assert quick("6", r'["4", "5"]') is False
    assert quick(r"\frac12", r'["\\frac{1}{2}"]') is True
    assert quick("[1,2]", "[1,2]") is True
    assert quick("1", "[1,2]") is False


@pytest.mark.parametrize(
    ("completion", "truth", "is_right"),
    [
        (r"Compute $\dbinom{22}{19}$.", "1540", False),
        (r"Simplify $\frac{6}{4}$.", r"\frac{3}{2}", False),
        ("Find $3+4$.", "7", False),
        ("Find $9-2$.", "7", False),
        ("$3+4$", "7", True),
        (r"\boxed{3+4}", "7", True),
        (r"The answer is $\frac32$.", r"\dfrac{3}{2}", True),
        (r"so $x=-\frac{1}{2}$", r"-\frac12", True),
        ("It is $0.5$", r"\frac12", True),
        ("It is $(-1, -2)$", "(-1,-2)", True),
    ],
)
def test_a_question_that_is_repeated_is_no_answer(completion: str, truth: str, is_right: bool) -> None:
    """Without a mark the last formula may be the one to work out: it counts as it is spelled, not by its value."""
    assert grade("math", completion, truth).outcome == ("right" if is_right else "wrong")
