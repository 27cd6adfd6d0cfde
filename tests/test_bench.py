"""The benchmarks measure what they say: what was refused has no ratio, pages stay whole."""

from __future__ import annotations

import pytest

from bench import demo, figures, methods, release_step, step, tables
from gdpd.distillers import distiller_names
from gdpd.methods import method_title
from gdpd_kernels.benchmark import clock, rivals
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.measure import Measured, measure


def test_a_refused_contender_has_no_ratio(monkeypatch):
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: alpha * z + noise)
    measured = measure(Case("mlp", 3, 7, 2, "forward"), ("eager", "reference"), 0.01)
    assert measured.ratio("eager", "reference") is None
    assert measured.wrong == {"eager"}
    figure = figures.speedup(measured, "a case", "eager", 2.0, "reference")
    assert figure.met is None
    assert "check failed" in figure.value


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
    measured = Measured(Case("paper", 8, 12, 3, "forward"), {"eager": fast, "native": slow})
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


def test_every_method_s_step_is_timed_against_base():
    made = methods.contenders("lstm2-32", 8, 12, 6)
    assert {method_title(name) for name in distiller_names()} <= set(made)
    assert {"Fits, warm-up", "DT2W, warm-up", "GDPD, warm-up"} <= set(made)
    table = methods.rows(clock.interleave({name: made[name] for name in ("Base", "DT2W")}, 0.0))
    assert table[1][2] == "1.00"
    assert float(table[2][2]) > 0


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
