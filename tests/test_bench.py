"""The benchmarks measure what they say: rivals compute one function, wrong results are refused, pages stay whole."""

from __future__ import annotations

import pytest
import torch

from bench import cases, check, clock, demo, figures, release_step, rivals, step, tables
from bench.cases import Case

SMALL = [Case("paper", 8, 12, 3, mode) for mode in cases.MODES] + [Case("mlp", 3, 7, 2, mode) for mode in cases.MODES]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["release", "eager"])
def test_rivals_compute_the_reference_in_float64(case, how):
    if cases.unavailable(how, case):
        pytest.skip(cases.unavailable(how, case))
    exact = cases.prepare(case, "reference", dtype=torch.float64)()
    found = [rivals.centre(tensor) for tensor in cases.prepare(case, how, dtype=torch.float64)()]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    largest = max(float(tensor.abs().max()) for tensor in exact)
    for mine, theirs in zip(found, exact, strict=True):
        # The release keeps alpha_bar in float32.
        assert (mine - theirs).abs().max() < (1e-5 if how == "release" else 1e-11) * largest


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    case = SMALL[-1]
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: alpha * z + noise)
    assert not check.check(Case(case.network, 3, 7, 2, "forward"), "eager").ok


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: z * float("nan"))
    assert not check.check(Case("mlp", 3, 7, 2, "forward"), "eager").ok


def test_a_refused_contender_has_no_ratio(monkeypatch):
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: alpha * z + noise)
    measured = figures.measure(Case("mlp", 3, 7, 2, "forward"), ("eager", "reference"), 0.01)
    assert measured.ratio("eager", "reference") is None
    assert measured.wrong == {"eager"}
    figure = figures.speedup(measured, "a case", "eager", 2.0, "reference")
    assert figure.met is None
    assert "check failed" in figure.value


@pytest.mark.parametrize("case", [*SMALL, *figures.TIMED], ids=lambda case: case.name)
def test_names_lead_back_to_cases(case):
    assert Case.parse(case.name) == case


def test_a_name_that_is_no_case_is_refused_with_an_example():
    with pytest.raises(ValueError, match="paper-64x100-5-trainable"):
        Case.parse("paper-64-100")


def test_unknown_contenders_are_named():
    with pytest.raises(ValueError, match=r"'fast'.*known: release"):
        rivals.contender("fast", cases.denoiser(SMALL[0]), 3)


def test_the_grid_is_the_whole_product_without_single_rows_of_batchnorm():
    combinations = len(cases.BATCHES) * len(cases.WIDTHS) * len(cases.STEPS) * len(cases.MODES)
    assert len(cases.full_grid()) == 2 * combinations - combinations // len(cases.BATCHES)


def test_operations_are_counted_by_hand():
    case = Case("mlp", 5, 7, 3, "trainable")
    assert case.flops == 3 * 2 * 5 * 3 * (7 * 256 + 256 * 256 + 256 * 7)


def test_contenders_are_timed_in_turn():
    order = []
    timed = clock.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert set(timed) == {"a", "b"}
    assert timed["a"].low <= timed["a"].median <= timed["a"].high
    samples = "".join(order[6:])  # after the warm-up
    assert samples.count("ab") == timed["a"].samples == timed["b"].samples


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin x -->\nold\n<!-- end x -->\nafter\n")
    tables.write_between_markers(page, "x", r"| \1 |")
    assert page.read_text() == "before\n<!-- begin x -->\n\n| \\1 |\n\n<!-- end x -->\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(ValueError, match="begin x"):
        tables.write_between_markers(page, "x", "new")
    assert page.read_text() == "text\n"


def test_slower_than_a_rival_is_listed_as_a_loss():
    fast, slow = clock.Timing(1.0, 0.9, 1.1, 5), clock.Timing(2.0, 1.9, 2.1, 5)
    measured = figures.Measured(SMALL[0], {"eager": fast, "native": slow})
    assert [row[1] for row in tables.losses([measured])[1:]] == ["eager"]
    assert "**loss** 0.50×" in tables.grid([measured], None)[1]


def test_the_release_s_step_has_the_loss_and_gradients_of_ours():
    theirs, ours, error = step.Steps(step.StepCase("lstm2-32", 8, 12)).losses()
    assert abs(theirs - ours) < 1e-9 * theirs
    assert error < 1e-6


def test_steps_that_are_not_the_same_are_not_timed(monkeypatch):
    monkeypatch.setattr(release_step, "release_sample", lambda module, z, *_: z)
    with pytest.raises(RuntimeError, match="not the same step"):
        step.measure(step.StepCase("lstm2-32", 8, 12), 0.0)


def test_every_step_is_timed_and_its_target_told():
    timings = step.measure(step.StepCase("lstm2-32", 8, 12), 0.0)
    assert set(timings) == {*step.HOWS, "gdpd, first stage"}
    header, row, large = step.rows({step.StepCase("lstm2-32", 8, 12): timings, step.StepCase(): timings})
    assert len(header) == len(row)
    assert "target" not in " ".join(row)
    assert "target 4×" in " ".join(large)


def test_the_demo_s_table_is_the_ratio_of_medians():
    rows = demo.rows({"before": [(60.0, 90.0), (70.0, 80.0), (80.0, 70.0)], "now": [(40.0, 20.0)]})
    assert [row[-1] for row in rows] == ["ratio", "1.75× (target 2×: missed)", "4.00×"]


def test_a_demo_that_fails_is_not_timed(tmp_path):
    with pytest.raises(RuntimeError, match="seeds=9"):
        demo.run_demo(demo.ROOT, 9)
    with pytest.raises(SystemExit):
        demo.main(["--before", str(tmp_path)])
