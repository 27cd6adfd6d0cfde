"""Comparisons over data sets: paired runs alone count, what is missing is told, and every export says the same."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from rich.console import Console

from gdpd.cli import main
from gdpd.experiments import ResultsTable
from gdpd.experiments.comparison import compare, find_records, table
from gdpd.experiments.published import PUBLISHED
from gdpd.experiments.results import RECIPE, Result
from gdpd.methods import METHODS
from gdpd.report import build_comparison, comparison_charts, comparison_figures, comparison_tables, svg, template
from gdpd.training.atomic import write_json
from made_comparison import make_records, write_records
from page import Page

SMALL = {"datasets": ("A", "B_1", "C"), "earliness": (0.2, 0.5), "seeds": (1, 2)}


def with_score(record, score):
    return dataclasses.replace(record, metrics={**record.metrics, "auc_prc": score})


def scored(scores: dict[tuple[str, float, str, int], float]):
    """Records with the scores given, by (data set, earliness, method, seed)."""
    [like] = make_records(("A",), (0.2,), ("base",), (1,))
    return [
        dataclasses.replace(
            with_score(like, score),
            config={**like.config, "dataset": dataset, "earliness": share, "method": method, "seed": seed},
        )
        for (dataset, share, method, seed), score in scores.items()
    ]


def test_scores_are_means_over_seeds_then_data_sets_then_ranked() -> None:
    found = compare(
        scored(
            {
                ("A", 0.2, "base", 1): 50, ("A", 0.2, "base", 2): 60, ("A", 0.2, "kd", 1): 70, ("A", 0.2, "kd", 2): 72,
                ("B", 0.2, "base", 1): 90, ("B", 0.2, "base", 2): 90, ("B", 0.2, "kd", 1): 80, ("B", 0.2, "kd", 2): 84,
                ("A", 0.5, "base", 1): 80, ("A", 0.5, "base", 2): 84, ("A", 0.5, "kd", 1): 81, ("A", 0.5, "kd", 2): 83,
                ("B", 0.5, "base", 1): 91, ("B", 0.5, "base", 2): 93, ("B", 0.5, "kd", 1): 95, ("B", 0.5, "kd", 2): 95,
            }
        )
    )  # fmt: skip
    early, late, mean = found.standings()
    assert early.scores.tolist() == [[55, 71], [90, 82]]
    assert early.mean.tolist() == [72.5, 76.5]
    assert early.ranks.tolist() == [1.5, 1.5]
    assert late.scores.tolist() == [[82, 82], [92, 95]]
    assert late.ranks.tolist() == [1.75, 1.25]
    assert late.first_places.tolist() == [0.5, 1.5]
    assert mean.earliness is None
    assert mean.scores.tolist() == [[68.5, 76.5], [91, 88.5]]
    assert (early.teacher, mean.teacher) == (found.teachers.mean(), found.teachers.mean())
    [pair] = found.pairs(late, "kd")
    assert (pair.other, pair.counts) == ("base", (1, 1, 0))
    assert pair.gain.mean == pytest.approx(1.5)
    assert pair.gain.low <= pair.gain.mean <= pair.gain.high
    [turned] = found.pairs(late, "base")
    assert (turned.gain.mean, turned.gain.low, turned.gain.high) == (-pair.gain.mean, -pair.gain.high, -pair.gain.low)
    assert turned.p == pair.p


def test_only_seeds_and_cells_that_all_methods_have_count() -> None:
    records = make_records(**SMALL)
    whole = compare(records)
    assert whole.complete.all()
    assert comparison_tables.coverage(whole)["lacking"] == []
    kept = [
        record
        for record in records
        if not (record.dataset == "C" and record.earliness == 0.5 and record.method == "fits")
        and not (record.dataset == "A" and record.earliness == 0.2 and record.method == "kd" and record.seed == 2)
    ]
    found = compare(kept)
    told = comparison_tables.coverage(found)
    assert (told["runs"], told["of_runs"], told["cells"], told["of_cells"]) == (57, 60, 5, 6)
    assert told["lacking"] == [("C", 0.5, "no run of fits")]
    assert told["unpaired"] == 4 + 8  # the four others of A, seed 2, and those of C at 0.5
    assert found.missing() == {"kd": 1, "fits": 2}
    early, late, mean = found.standings()
    assert (early.datasets, late.datasets, mean.datasets) == (("A", "B_1", "C"), ("A", "B_1"), ("A", "B_1"))
    only_first_seed = compare([record for record in records if record.seed == 1])
    assert np.array_equal(early.scores[0], only_first_seed.standing(0.2).scores[0])
    assert np.array_equal(early.scores[1:], whole.standing(0.2).scores[1:])
    # The mean over earliness keeps to the same seeds at each.
    assert np.array_equal(mean.scores[0], only_first_seed.standing(None).scores[0])


def test_a_run_without_a_finite_score_is_missing_and_named() -> None:
    records = make_records(**SMALL)
    records[3] = with_score(records[3], float("nan"))
    records[8] = with_score(records[8], None)
    found = compare(records)
    assert found.failed == ("A, 20 % read, gendd, seed 1", "A, 20 % read, kd, seed 2")
    assert found.present.sum() == len(records) - 2


def test_costs_are_ratios_over_complete_cells() -> None:
    found = compare(make_records(**SMALL))
    assert found.cost_ratios("peak_memory", "base") == pytest.approx([1 + 9 * k / 380 for k in range(5)])
    assert found.cell_mean("peak_memory") == pytest.approx([380 + 9 * k for k in range(5)])
    assert found.cost_ratios("peak_device_memory", "base") is None


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no run to compare"),
        (make_records(methods=("kd",), **SMALL), "all of the method 'kd'"),
        ([*make_records(**SMALL), make_records(**SMALL)[0]], "are both A, 20 % read, base, seed 1"),
        (scored({("A", 0.2, "base", 1): 101.0, ("A", 0.2, "kd", 1): 50}), "auc_prc 101"),
        (scored({("A", 0.2, "base", 1): 50, ("A", 0.2, "kd", 2): 50}), r"no data set at any earliness .* base 1, kd 1"),
        (scored({("A", 0.2, "base", 1): float("nan"), ("A", 0.2, "kd", 1): 50}), "no data set at any earliness"),
    ],
)
def test_bad_input_is_named(records, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare(records)


def test_an_earliness_that_is_not_there_and_an_unknown_suffix_are_refused(tmp_path) -> None:
    found = compare(make_records(**SMALL))
    with pytest.raises(ValueError, match=r"earliness=0\.3 is not in"):
        found.standing(0.3)
    with pytest.raises(ValueError, match=r"reference='gppd' is not compared \(did you mean 'gdpd'\?\)"):
        build_comparison(make_records(**SMALL), tmp_path / "report.tex", reference="gppd")
    with pytest.raises(ValueError, match="suffix chooses the format"):
        build_comparison(make_records(**SMALL), tmp_path / "report.pdf")


@pytest.fixture(scope="module")
def partial():
    """A grid with a cell, a run and a score missing, a weak teacher, and a data set with an awkward name."""
    records = make_records(("A", "B_1", "C<b>", "D"), (0.2, 0.5), seeds=(1, 2))
    del records[6]
    records = [r for r in records if not (r.dataset == "D" and r.earliness == 0.5 and r.method == "gendd")]
    records[0] = with_score(records[0], float("nan"))
    for record in records:
        if record.dataset == "A" and record.seed == 2:
            record.metrics["teacher"] = {**record.metrics["teacher"], "weak": True}
    return records


@pytest.fixture(scope="module")
def page(partial, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return Page(build_comparison(partial, path, "<script>").read_text())


def test_the_page_stands_alone_and_its_ids_are_unique(page) -> None:
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert not {"script", "img", "iframe", "object", "b"} & set(page.tags)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    # scores, gain, three diagrams, GDPD against three, agreement, KL and calibration
    assert page.tags.count("svg") == 2 + 3 + 3 + 3
    assert not re.search(r"\bnan\b", page.words)


def test_the_page_tells_what_is_missing(page, partial) -> None:
    assert f"{len(partial) - 1} of 80 runs are there, and 7 of 8 cells" in page.words
    assert "Not complete." in page.words
    assert "D, 50 % read: no run of gendd" in page.words
    assert "1 run ended without a finite AUC-PRC and counts as missing" in page.words
    assert "1 teacher is not clearly better than chance" in page.words
    assert "A, seed 2" in page.words


def test_the_page_tells_the_numbers_of_the_statistics(page, partial) -> None:
    found = compare(partial)
    standing = found.standing(0.2)
    place = found.methods.index("gdpd")
    assert f"{standing.mean[place]:.2f} {standing.ranks[place]:.2f} ({standing.first_places[place]:.3g})" in page.words
    for pair in found.pairs(standing, "gdpd"):
        assert f"{pair.gain.mean:+.1f}".replace("-", "−") in page.words
        assert "–".join(map(str, pair.counts)) in page.words
    assert f"{PUBLISHED[0.2]['gdpd'].auc_prc:.1f}" in page.words
    assert "Which 12 sets is unknown" in page.words


def test_the_papers_numbers_stand_beside_its_own_networks_only(tmp_path) -> None:
    records = make_records(**SMALL)
    for record in records:
        record.config["student_model"] = "lstm2-32"
    found = compare(records)
    assert comparison_tables.published_rows(found, records, found.standings()) is None
    found = compare(make_records(**SMALL))
    told = comparison_tables.published_rows(found, make_records(**SMALL), found.standings())
    assert [standing.earliness for standing in told["standings"]] == [0.2]  # the paper has no 0.5, nor their mean
    ranked = [row["cells"][0][0] for row in told["rows"]]
    assert [row["method"] for row in told["rows"]] == ["base", "kd", "fits", "gdpd"]
    # Among four methods, although there are five.
    assert sum(ours.rank for ours in ranked) == pytest.approx(1 + 2 + 3 + 4)
    assert sum(ours.first_places for ours in ranked) == pytest.approx(3)
    three = [record for record in make_records(**SMALL) if record.method != "fits"]
    found = compare(three)
    for row in comparison_tables.published_rows(found, three, found.standings())["rows"]:
        assert row["cells"][0][0].rank is None


def test_at_half_the_paper_s_rank_among_many_stands_beside_ours(tmp_path, page) -> None:
    records = make_records(("A", "B", "C"), (0.5,), ("base", "kd", "fits", "at", "gdpd"), (1,))
    found = compare(records)
    ranks = dict(zip(found.methods, found.standing(0.5).ranks, strict=True))
    mine, best = ranks.pop("gdpd"), min(ranks, key=ranks.get)
    told = Page(build_comparison(records, tmp_path / "r.html").read_text()).words
    assert "its average rank is 2.25 and no other’s is near 4" in told
    title = METHODS[best].title
    assert (
        f"against 4 on 3 data sets, it is {mine:.2f}, and the best of the others, {title}, has {ranks[best]:.2f}"
        in told
    )
    assert "its average rank is 2.25" in page.words
    for record in records:
        record.config["teacher_model"] = "fcn"
    assert "2.25" not in Page(build_comparison(records, tmp_path / "r.html").read_text()).words


@pytest.mark.parametrize(
    ("shape", "charts"),
    [
        ({"datasets": ("A",), "earliness": (0.5,), "seeds": (1,)}, 2 + 0 + 3 + 3),
        ({"datasets": ("A", "B"), "earliness": (0.5,), "seeds": (1,), "methods": ("base", "made-up")}, 2 + 1 + 1 + 3),
    ],
    ids=["one data set, one seed", "two methods, one unknown"],
)
def test_small_comparisons_make_pages_and_tables(tmp_path, shape, charts) -> None:
    records = make_records(**shape)
    made = Page(build_comparison(records, tmp_path / "r.html").read_text())
    assert made.tags.count("svg") == charts
    assert not re.search(r"\bnan\b", made.words)
    check_latex(build_comparison(records, tmp_path / "r.tex").read_text())


def test_averages_of_the_csv_are_those_of_the_page(partial, tmp_path) -> None:
    with build_comparison(partial, tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = compare(partial)
    assert len(rows) == 4 * 2 * 5
    for share in found.earliness:
        standing = found.standing(share)
        for place, method in enumerate(found.methods):
            mine = [row for row in rows if float(row["earliness"]) == share and row["method"] == method and row["rank"]]
            assert tuple(row["dataset"] for row in mine) == standing.datasets
            assert np.mean([float(row["auc_prc"]) for row in mine]) == pytest.approx(standing.mean[place])
            assert np.mean([float(row["rank"]) for row in mine]) == pytest.approx(standing.ranks[place])
            assert sum(float(row["first_place"]) for row in mine) == pytest.approx(standing.first_places[place])
    [lacking] = [r for r in rows if (r["dataset"], r["earliness"], r["method"]) == ("D", "0.5", "gendd")]
    assert (lacking["seeds"], lacking["rank"], lacking["auc_prc"]) == ("0", "", "")


def check_latex(text: str) -> None:
    """Environments nest, braces close, and every row has the columns of its table."""
    open_environments: list[str] = []
    columns = 0
    for line in text.splitlines():
        line = re.sub(r"(?<!\\)%.*", "", line)
        bare = re.sub(r"\\[{}]", "", line)
        assert bare.count("{") == bare.count("}") or "\\caption" in line or not open_environments[1:], line
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", line):
            if kind == "begin":
                open_environments.append(name)
            else:
                assert open_environments.pop() == name
        if "\\begin{tabular}" in line:
            columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", line)[1])
        elif line.rstrip().endswith("\\\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1, line
    assert not open_environments
    whole = re.sub(r"\\[{}]", "", text)
    assert whole.count("{") == whole.count("}")
    assert "nan" not in text


def ours_place(records) -> int:
    return compare(records).methods.index("gdpd")


def test_latex_tables_are_well_formed_and_escaped(partial, tmp_path) -> None:
    text = build_comparison(partial, tmp_path / "tables.tex").read_text()
    check_latex(text)
    assert "gain of GDPD" in text
    assert "gain of Fits" in build_comparison(partial, tmp_path / "tables.tex", reference="fits").read_text()
    assert r"B\_1" in text
    assert text.count("\\begin{tabular}") == text.count("\\bottomrule") == 6
    paper = text[text.index("Beside the paper's numbers") :]
    ours = compare(partial).standing(0.2)
    assert f"GDPD & {ours.mean[ours_place(partial)]:.1f} & {PUBLISHED[0.2]['gdpd'].auc_prc:.1f}" in paper
    assert template.escape_tex(r"a_b&50%#$^~{}\x") == (
        r"a\_b\&50\%\#\$\textasciicircum{}\textasciitilde{}\{\}\textbackslash{}x"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_tables_compile(partial, tmp_path) -> None:
    build_comparison(partial, tmp_path / "tables.tex")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{tables}\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    called = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert called.returncode == 0, called.stdout[-2000:]


def result_of(record) -> Result:
    """A row of a grid's table with the record's scores."""
    given = {name: getattr(record, name) for name in ("dataset", "earliness", "method", "seed")}
    given |= {name: value for name, value in record.metrics.items() if name != "teacher"}
    given |= {"options": {}, "parts": {}, "teacher_auc_prc": record.teacher["auc_prc"], "teacher_p_chance": 0.9}
    blank = {str: "", float: 0.5, int: 1}
    for field in dataclasses.fields(Result):
        kind = next(kind for kind in (str, int, float) if kind.__name__ in str(field.type) or kind is float)
        given.setdefault(field.name, blank[kind])
    return Result(**{field.name: given[field.name] for field in dataclasses.fields(Result)})


def test_a_grids_table_compares_like_its_run_folders(tmp_path) -> None:
    records = make_records(**SMALL)
    grid = tmp_path / "grid"
    with ResultsTable(grid) as made:
        for record in records:
            made.add(result_of(record))
        path = made.export()
    write_json(grid / RECIPE, {"options": records[0].config, "search_score": "auc_prc"})
    runs = write_records(tmp_path / "runs", records)
    of_folders, of_table, of_file = (find_records([where]) for where in (runs, grid, path))
    assert (of_folders[0], of_table[0], of_file[0]) == (False, True, True)
    expected = compare(of_folders[1])
    for _, found in (of_table, of_file):
        compared = compare(found)
        for metric in ("auc_prc", "fidelity", "kl", "calibration_error", "seconds", "peak_memory"):
            assert np.array_equal(compared.values[metric], expected.values[metric]), metric
        assert compared.methods == expected.methods
        assert len(compared.weak_teachers) == 6  # p = 0.9: no better than chance
    with pytest.raises(ValueError, match="are both"):
        compare(find_records([runs, grid])[1])
    assert main(["report", str(path), "--output", str(grid / "cells.csv")]) == 0
    assert (grid / "cells.csv").read_text() == build_comparison(of_folders[1], tmp_path / "cells.csv").read_text()


def test_the_standings_fit_a_terminal_of_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    found = compare(make_records(earliness=(0.2, 0.4, 0.6, 0.8), datasets=("A", "B"), seeds=(1,)))
    console.print(table(found))
    text = console.export_text()
    assert "…" not in text
    standing = found.standing(None)
    assert f"{standing.mean[3]:.2f}" in text
    assert f"{standing.ranks[3]:.2f} ({standing.first_places[3]:.3g})" in text
    assert "8 of 8 cells" in " ".join(text.split())


def test_tables_and_diagrams_of_all_methods_fit_a_page(tmp_path) -> None:
    records = make_records(("A", "B", "C"), (0.5,), tuple(METHODS), (1,))
    text = build_comparison(records, tmp_path / "tables.tex").read_text()
    check_latex(text)
    blocks = re.findall(r"\\begin\{tabular\}\{l(r+)\}\n\\toprule\n( & [^\n]*)", text[text.index("tab:read-50") :])
    assert all(len(columns) <= 8 for columns, _ in blocks)
    told = [name for _, line in blocks for name in line.removesuffix(" \\\\").split(" & ")[1:]]
    assert told[: len(METHODS)] == [title for title, _ in METHODS.values()]
    found = compare(records)
    (standing,) = found.standings()
    drawn = comparison_charts.critical_difference("cd", [*METHODS], ["#010101"] * len(METHODS), standing.test)
    places = [float(x) for x in re.findall(r'<text[^>]*x="([0-9.]+)"[^>]*>\d{1,2}</text>', drawn)]
    assert len(places) > 5
    assert min(b - a for a, b in itertools.pairwise(places)) >= 15


def test_of_many_rivals_the_first_and_the_best_have_charts() -> None:
    found = compare(make_records(("A", "B"), (0.2, 0.5), ("base", "kd", "fits", "at", "gdpd", "gendd"), (1,)))
    standings = found.standings()
    ranks = dict(zip(found.methods, standings[-1].ranks, strict=True))
    shown = comparison_figures._rivals(found, standings, "gdpd")
    assert len(shown) == 3
    assert shown[0] == "base"
    others = set(found.methods) - {"gdpd", *shown}
    assert max(ranks[method] for method in shown[1:]) <= min(ranks[method] for method in others)
    assert comparison_figures._rivals(found, standings, "base")[0] == "kd"


def test_numbers_of_a_column_have_as_many_decimals_and_names_break_between_words() -> None:
    assert template.alike([9.41, 11.0, 16.99]) == ["9.41", "11.00", "16.99"]
    assert template.alike([0.0925, 0.1]) == ["0.0925", "0.1000"]
    assert template.alike([749.2, 1200.0]) == ["749", "1200"]
    assert template.alike([0.0, 0.0]) == ["0.00", "0.00"]
    broken = template.breakable("PickupGestureWiimoteZ_2<b>")
    assert broken == "Pickup<wbr>Gesture<wbr>Wiimote<wbr>Z_<wbr>2&lt;b&gt;"


def test_a_chart_of_gains_shows_the_best_and_the_worst_of_many() -> None:
    found = compare(make_records(tuple(f"D{number:02}" for number in range(50)), (0.2,), ("base", "gdpd"), (1,)))
    named, points = comparison_figures.gains(found, found.standings(), "gdpd", "base")
    assert len(named) == len(points) == comparison_figures._MOST_ROWS
    [standing] = found.standings()
    ordered = np.sort(standing.scores[:, 1] - standing.scores[:, 0])[::-1]
    assert points[:, 0] == pytest.approx(np.concatenate([ordered[:20], ordered[-20:]]))


def test_an_empty_table_is_named(tmp_path) -> None:
    with ResultsTable(tmp_path / "grid") as made:
        made.export()
    write_json(tmp_path / "grid" / RECIPE, {"options": {}, "search_score": "auc_prc"})
    with pytest.raises(ValueError, match="grid has no row yet"):
        find_records([tmp_path / "grid"])


def test_names_at_line_ends_keep_apart_and_near() -> None:
    wanted = np.array([0.0, 1.0, 2.0, 50.0, 55.0])
    placed = comparison_charts.spread(wanted, 10.0)
    assert np.all(np.diff(placed) >= 10 - 1e-9)
    assert placed == pytest.approx([-9, 1, 11, 47.5, 57.5])
    far = np.array([0.0, 20.0])
    assert comparison_charts.spread(far, 10.0) == pytest.approx(far)


def test_every_method_has_a_colour_and_no_two_of_the_first_eleven_share_one() -> None:
    methods = ["base", "kd", "gdpd", *(f"m{number}" for number in range(12))]
    others = svg.other_methods(methods)
    names = [svg.css_name(method, others) for method in methods]
    assert len(set(names[:11])) == 11
    assert names[11] == names[3]
