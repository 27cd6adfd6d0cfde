"""Programs: text that is read back, widths, and the refusal of everything that is not well formed."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd_kernels import DenoiserProgram, ProgramError
from gdpd_kernels.program import KINDS, Op
from programs import FAMILIES, SIZES, USUAL_EPS, bottleneck, every_operation, families, film, gendd_head, mlp, programs

fixed = settings(derandomize=True, deadline=None, max_examples=60, database=None)

TEXT = """denoiser z:4 tables:4 rows:- params:3x4,3,4x3
  %1 = add(z, t0)
  %2 = linear(%1, p0, p1)
  %3 = leaky_relu(%2, slope=0.1)
  %4 = linear(%3, p2, -)
  return %4"""


@fixed
@given(st.one_of(families(), programs()))
def test_text_is_read_back(program: DenoiserProgram) -> None:
    again = DenoiserProgram.parse(program.text)
    assert again == program
    assert hash(again) == hash(program)
    assert again.text == program.text
    assert again.widths == program.widths


def test_text_is_what_was_read() -> None:
    assert DenoiserProgram.parse(TEXT).text == TEXT


def test_what_is_printed_is_read_back_too() -> None:
    program = DenoiserProgram.parse(TEXT)
    named = copy.copy(program)
    object.__setattr__(named, "names", ("a.weight", "a.bias", "b.weight"))
    printed = str(named)
    assert "[3]" in printed
    assert "a.weight" in printed
    assert DenoiserProgram.parse(printed) == program == named


@fixed
@given(programs())
def test_programs_survive_pickling(program: DenoiserProgram) -> None:
    again = pickle.loads(pickle.dumps(program))
    assert again == program
    assert again.text == program.text


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_well_formed_at_every_size(name: str) -> None:
    for size in SIZES:
        assert FAMILIES[name](size, USUAL_EPS).features == size


def test_every_operation_is_among_the_families() -> None:
    assert {op.kind for op in every_operation(9).ops} == set(KINDS)


def test_what_a_program_costs_and_keeps() -> None:
    program = bottleneck(100)
    assert program.macs == 2 * (2 * 100 * 25 + 25 * 25) + 100 * 100
    assert len(program.batch_norms) == 7
    assert program.stats_width == 2 * (2 * (25 + 25 + 100) + 100)
    assert program.buffer_params == frozenset()
    evaluated = bottleneck(100, norm="batch_norm_eval")
    assert evaluated.batch_norms == ()
    assert evaluated.stats_width == 0
    buffers = [op.param(name) for op in evaluated.ops if op.kind == "batch_norm_eval" for name in ("mean", "var")]
    assert evaluated.buffer_params == frozenset(buffers)
    assert gendd_head(6, 10).widths["r0"] == 10
    assert mlp(6, 9).widths["%1"] == 9


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("denoiser z:4", "denoiser w:4", "line 1: expected 'denoiser z:F tables:.. rows:.. params:..'"),
        ("z:4", "z:0", "z has width 0; a width is at least 1"),
        ("tables:4", "tables:0", "t0 has width 0"),
        ("tables:4", "tables:5", "%1 = add: operands have widths 4 and 5"),
        ("rows:-", "rows:four", "line 1: "),
        ("3x4,3,4x3", "3x0,3,4x3", r"p0 has shape \(3, 0\); parameters have one or two dimensions, all >= 1"),
        ("3x4,3,4x3", "3x4x1,3,4x3", r"p0 has shape \(3, 4, 1\)"),
        ("3x4,3,4x3", "3x4,3", "%4 = linear: p2 does not exist: there are 2 parameters"),
        ("3x4,3,4x3", "4x4,3,4x3", r"%2 = linear: bias has shape \(3,\), expected \[4\]"),
        ("3x4,3,4x3", "3x5,3,4x3", r"%2 = linear: weight has shape \(3, 5\), expected \[out, 4\]"),
        ("3x4,3,4x3", "3,3,4x3", r"%2 = linear: weight has shape \(3,\)"),
        ("add(z, t0)", "add(z)", "%1 = add: takes 2 operand"),
        ("add(z, t0)", "add(z, %4)", "%1 = add: operand %4 is not made before it is used"),
        ("add(z, t0)", "add(z, r0)", "%1 = add: operand r0 is not made before it is used"),
        ("add(z, t0)", "plus(z, t0)", "line 2: unknown operation 'plus'; known are linear, "),
        ("add(z, t0)", "add(z, 3)", r"line 2: cannot read the arguments \(z, 3\)"),
        ("%2 = linear", "%3 = linear", "line 3: expected '%2 = operation"),
        ("linear(%1, p0, p1)", "linear(%1, -, p1)", "%2 = linear: needs its weight"),
        ("linear(%1, p0, p1)", "linear(%1, p0)", r"%2 = linear: takes parameters \(weight, bias\)"),
        ("slope=0.1", "slope=nan", "%3 = leaky_relu: slope is nan; it must be finite"),
        ("slope=0.1", "slope=steep", "line 4: "),
        ("slope=0.1", "scale=0.1", "line 4: "),
        ("leaky_relu(%2, slope=0.1)", "slice(%2, start=0, stop=4)", "%3 = slice: slice 0:4 of width 3"),
        ("leaky_relu(%2, slope=0.1)", "slice(%2, start=2, stop=2)", "%3 = slice: slice 2:2 of width 3"),
        ("leaky_relu(%2, slope=0.1)", "slice(%2, stop=3, start=0)", "line 4: "),
        ("leaky_relu(%2, slope=0.1)", "slice(%2, start=0.5, stop=3)", "line 4: |%3 = slice: "),
        ("leaky_relu(%2, slope=0.1)", "concat()", "line 4: |%3 = concat: takes one or more operand"),
        ("leaky_relu(%2, slope=0.1)", "rms_norm(%2, p1, eps=-1.0)", "%3 = rms_norm: eps is -1.0; it must not be neg"),
        ("leaky_relu(%2, slope=0.1)", "rms_norm(%2, p0, eps=1.0)", r"%3 = rms_norm: weight has shape \(3, 4\)"),
        ("return %4", "return %5", "return %5: no such operand"),
        ("return %4", "return %3", "return %3: the prediction has width 3, the state 4"),
        ("return %4", "%4", "line 6: expected 'return OPERAND'"),
    ],
)
def test_what_is_not_well_formed_is_refused_by_line_and_reason(line: str, instead: str, message: str) -> None:
    assert line in TEXT
    with pytest.raises(ProgramError, match=message):
        DenoiserProgram.parse(TEXT.replace(line, instead, 1))


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "denoiser", "return z"])
def test_next_to_nothing_is_no_program(text: str) -> None:
    with pytest.raises(ProgramError, match="line 1"):
        DenoiserProgram.parse(text)


@fixed
@given(st.sampled_from([TEXT, film(3).text, every_operation(3).text]), st.randoms(use_true_random=False))
def test_damaged_text_is_refused_or_is_another_program(text: str, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(text))
        replacement = chance.choice(["", "-", "p1", "%", "9", "z", ",", "(", "=", "\n", "x", "e", " ", "#"])
        text = text[:at] + replacement + text[at + chance.randrange(3) :]
    try:
        program = DenoiserProgram.parse(text)
    except ProgramError:
        return
    assert DenoiserProgram.parse(program.text) == program


def test_programs_made_by_hand_are_checked_too() -> None:
    with pytest.raises(ProgramError, match="unknown operation; known are linear"):
        DenoiserProgram(2, (), (), (), (Op("plus", ("z",)),), "z")
    with pytest.raises(ProgramError, match="names: 1 names for 0 parameters"):
        DenoiserProgram(2, (), (), (), (), "z", names=("weight",))
    assert DenoiserProgram(2, (), (), (), (), "z").text == "denoiser z:2 tables:- rows:- params:-\n  return z"
