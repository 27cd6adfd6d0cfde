"""The command line: options come from RunConfig, bad input is one line and exit code 2, start-up is quick."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gdpd.cli import main
from gdpd.cli.app import app
from gdpd.cli.options import run_config
from gdpd.config import RunConfig
from made_comparison import make_records, write_records
from made_runs import make_grid, make_run


def commands():
    return typer.main.get_command(app).commands


def options_of(command):
    return [p for p in commands()[command].params if getattr(p, "param_type_name", "") == "option"]


@pytest.fixture
def runs_seen(monkeypatch):
    """Stands in for training: notes the configuration and leaves a finished run in the folder."""
    import gdpd.training

    seen = []

    def run(config, folder, *, resume=False, progress=None):
        seen.append({"config": config, "folder": folder, "resume": resume, "progress": progress})
        made = make_run(folder.parent / "made", **config.to_dict())
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
        return {}

    monkeypatch.setattr(gdpd.training, "run", run)
    return seen


def line_on_stderr(capsys):
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("command", ["distill", "evaluate", "datasets", "bench", "info", "report", "demo", "version"])
def test_every_option_has_help_and_a_default(command):
    assert commands()[command].help
    for option in options_of(command):
        assert option.help, option.name
        if option.name != "help":
            assert option.default is not None or option.show_default, f"{command} {option.name} shows no default"


def test_distill_has_one_option_per_field_of_the_configuration():
    names = {option.name for option in options_of("distill")}
    assert {row["name"] for row in RunConfig.describe()} <= names


def test_units_stand_in_the_help():
    helps = {option.name: option.help for option in options_of("distill")}
    for row in RunConfig.describe():
        if row["unit"]:
            assert row["unit"] in helps[row["name"]]


def test_help_needs_neither_torch_nor_numpy():
    code = "import sys, gdpd.cli as c; c.main(['distill', '--help']); print({'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_a_plain_install_is_told_what_the_command_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)  # as if it were not installed
    assert main(["info"]) == 2
    assert 'pip install "gdpd-kernels[cli]"' in line_on_stderr(capsys)


def test_given_options_and_only_those_reach_the_run(runs_seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "--earliness", "0.2", "--epochs", "7", "--resample-to", "null", "--no-hinton", "--quiet"]
    arguments += ["--student-options", "{hidden: 16, layers: 1}", "--alpha", "0.3", "--lr-milestones", "[2, 5]"]
    assert main(arguments) == 0
    expected = RunConfig(
        earliness=0.2, epochs=7, resample_to=None, hinton=False, student_options={"hidden": 16, "layers": 1},
        alpha=0.3, lr_milestones=(2, 5),
    )  # fmt: skip
    assert runs_seen[0]["config"] == expected
    assert runs_seen[0]["folder"] == Path("runs/GunPoint-e0.2-gdpd-s1")
    assert runs_seen[0]["progress"] is None
    assert (tmp_path / "runs/GunPoint-e0.2-gdpd-s1/report.html").is_file()


def test_options_win_over_the_yaml_file_and_the_file_over_defaults(runs_seen, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("earliness: 0.3\nepochs: 9\nlearning_rate: 1e-2\n")
    arguments = ["distill", "--config", str(file), "--epochs", "5", "--folder", str(tmp_path / "r"), "--no-report"]
    assert main(arguments) == 0
    config = runs_seen[0]["config"]
    assert (config.earliness, config.epochs, config.learning_rate) == (0.3, 5, 0.01)
    assert not (tmp_path / "r" / "report.html").exists()
    assert "AUC-PRC" in capsys.readouterr().out


def test_resume_reaches_the_run(runs_seen, tmp_path):
    assert main(["distill", "--resume", "--no-report", "--folder", str(tmp_path / "r")]) == 0
    assert runs_seen[0]["resume"] is True


def test_a_run_resumed_by_its_folder_keeps_its_options(runs_seen, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RunConfig(dataset="Wafer", epochs=9).to_dict()))
    assert main(["distill", "--resume", "--no-report", "--quiet", "--folder", str(folder)]) == 0
    assert runs_seen[0]["config"] == RunConfig(dataset="Wafer", epochs=9)


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("earlines: 0.3\n")
    assert main(["distill", "--config", str(file)]) == 2
    line = line_on_stderr(capsys)
    assert "'earlines'" in line
    assert "did you mean 'earliness'" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "--earliness", "1.5"], ["earliness", "1.5", "(0, 1]"]),
        (["distill", "--earliness", "soon"], ["earliness", "soon"]),
        (["distill", "--epochs", "0"], ["epochs", "0", "at least 1"]),
        (["distill", "--method", "gdpp"], ["gdpp", "did you mean 'gdpd'"]),
        (["distill", "--student-options", "{hidden: 3"], ["student_options"]),
        (["distill", "--config", "absent.yaml"], ["gdpd: absent.yaml: No such file or directory"]),
        (["distill", "--dataset", "GunPoit"], ["'GunPoit'. Names close to it: GunPoint."]),
        (["grid", "absent.yaml"], ["absent.yaml is not a file", "docs/grids.md"]),
        (["grid", ".", "--workers", "1"], [". is not a file"]),
        (["distill", "--earlines", "0.5"], ["--earlines", "--earliness", "gdpd distill --help"]),
        (["destill"], ["destill", "distill"]),
        (["evaluate"], ["folder"]),
        (["evaluate", "absent"], ["absent"]),
        (["report", "absent"], ["absent"]),
        (["demo", "--seeds", "99"], ["seeds", "99"]),
        (["demo", "--workers", "-1"], ["workers", "-1"]),
        (["datasets", "--data-dir", "absent"], ["absent"]),
        (["bench", "--device", "gpu"], ["gpu", "cpu, cuda or cuda:INDEX"]),
        (["bench", "--case", "small"], ["small", "paper-64x100-5-trainable"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    line = line_on_stderr(capsys)
    assert line.startswith("gdpd: ")
    for word in words:
        assert word in line


def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("- earliness\n")
    assert main(["distill", "--config", str(file)]) == 2
    assert "run.yaml" in line_on_stderr(capsys)


@pytest.mark.parametrize("traceback", [False, True])
def test_traceback_only_on_request(traceback, monkeypatch, capsys):
    if traceback:
        monkeypatch.setenv("GDPD_TRACEBACK", "1")
        with pytest.raises(ValueError, match="earliness"):
            main(["distill", "--earliness", "2"])
    else:
        assert main(["distill", "--earliness", "2"]) == 2


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
def test_interruption_and_a_full_disk_are_one_line(error, code, monkeypatch, capsys):
    import gdpd.training

    def run(*_, **__):
        raise error

    monkeypatch.setattr(gdpd.training, "run", run)
    assert main(["distill", "--quiet"]) == code
    line_on_stderr(capsys)


def test_a_defect_keeps_its_traceback(monkeypatch):
    import gdpd.training

    def run(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(gdpd.training, "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["distill", "--quiet"])


def test_warnings_are_one_line_each(monkeypatch, tmp_path, capsys):
    import warnings

    import gdpd.data

    def listing(_):
        warnings.warn("two\n  lines", UserWarning, stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
        return []

    monkeypatch.setattr(gdpd.data, "list_datasets", listing)
    assert main(["datasets"]) == 0
    assert line_on_stderr(capsys) == "gdpd: warning: two lines"


def test_evaluate_shows_student_beside_teacher(monkeypatch, tmp_path, capsys):
    import gdpd.training

    metrics = {"auc_prc": 71.25, "fidelity": 0.5, "teacher": {"auc_prc": 98.5, "candidate": 0}}
    asked = []
    monkeypatch.setattr(gdpd.training, "evaluate", lambda folder, data_dir: asked.append((folder, data_dir)) or metrics)
    assert main(["evaluate", str(tmp_path), "--data-dir", "elsewhere"]) == 0
    assert asked == [(tmp_path, "elsewhere")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["score", "student", "teacher"], ["auc_prc", "71.2500", "98.5000"], ["fidelity", "0.5000"]]
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics


def test_a_demo_with_failed_runs_exits_with_1(monkeypatch, tmp_path):
    from gdpd.experiments import demo

    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: False)
    assert main(["demo", "--folder", str(tmp_path)]) == 1


def test_datasets_lists_the_bundled_sets(capsys):
    assert main(["datasets"]) == 0
    assert "GunPoint" in capsys.readouterr().out
    assert main(["datasets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["GunPoint"]["n_train"] == 50
    assert rows["ItalyPowerDemand"]["length"] == 24


def test_report_prints_the_table_and_writes_one_page(tmp_path, capsys):
    make_grid(tmp_path, seeds=(1,))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html"), "--title", "My runs"]) == 0
    assert "ItalyPowerDemand" in capsys.readouterr().out
    assert "<title>My runs</title>" in (tmp_path / "page.html").read_text()


def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    arguments = ["--case", "mlp-3x7-2-forward", "--contender", "eager", "--contender", "reference", "--seconds", "0"]
    assert main(["bench", *arguments, "--json", str(tmp_path / "b.json")]) == 0
    assert "| mlp-3x7-2-forward | eager |" in capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["cases"][0]["results"]["reference"]["time"]["samples"] >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_bench_exits_with_1_when_a_contender_of_the_library_is_wrong(monkeypatch, tmp_path):
    from gdpd_kernels.benchmark import check

    monkeypatch.setattr(check, "check", lambda *_: check.Verdict(False, "wrong"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--case", "mlp-3x7-2-forward", "--contender", "reference", "--json", ""]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments, capsys):
    from gdpd import __version__

    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == f"gdpd {__version__}"


def test_info_names_every_backend(capsys):
    import gdpd_kernels as gk

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for backend in gk.backends():
        assert backend["name"] in out


def test_run_config_reads_null_and_numbers_from_the_shell():
    config = run_config(None, {"resample_to": "null", "gradient_clip": "0.5", "alpha": "per_dimension"})
    assert (config.resample_to, config.gradient_clip, config.alpha) == (None, 0.5, "per_dimension")


def test_report_compares_methods_from_three_data_sets_on(tmp_path, capsys):
    records = make_records(("A", "B", "C"), (0.2,), ("base", "gdpd"), (1,))
    runs = write_records(tmp_path / "runs", records)
    outputs = [tmp_path / name for name in ("page.html", "cells.csv", "tables.tex")]
    assert main(["report", str(runs), *(word for path in outputs for word in ("--output", str(path)))]) == 0
    told = capsys.readouterr().out
    assert "3 of 3 cells have all methods" in " ".join(told.split())
    assert "GDPD" in told
    page, cells, tables = (path.read_text() for path in outputs)
    assert "How the methods stand" in page
    assert cells.startswith("dataset,earliness,method,seeds,rank,first_place,auc_prc,")
    assert r"\toprule" in tables


def test_report_leaves_out_a_method_that_has_just_begun(tmp_path, capsys):
    records = [
        *make_records(("A", "B", "C"), (0.2,), ("base", "gdpd"), (1, 2)),
        *make_records(("A",), (0.2,), ("gendd",), (1,)),
    ]
    runs = write_records(tmp_path / "runs", records)
    asked = ["report", str(runs), "--output", str(tmp_path / "cells.csv")]
    assert main(asked) == 0
    assert "1 of 3 cells have all methods" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--method", "base", "--method", "gdpd"]) == 0
    assert "3 of 3 cells have all methods" in " ".join(capsys.readouterr().out.split())
    assert "gendd" not in (tmp_path / "cells.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "--output", "cells.csv"], ["cells.csv", "--comparison"]),
        (["--reference", "base"], ["reference=base", "--comparison"]),
        (["--method", "base"], ["method=base", "--comparison"]),
        (["--comparison", "--method", "gppd"], ["method='gppd'", "did you mean 'gdpd'?", "base, gdpd have"]),
        (["--comparison", "--output", "report.pdf"], ["report.pdf", ".html, .tex, .csv"]),
    ],
)
def test_report_refuses_what_it_cannot_write(tmp_path, capsys, arguments, words):
    runs = write_records(tmp_path / "runs", make_records(("A",), (0.2,), ("base", "gdpd"), (1,)))
    assert main(["report", str(runs), *arguments]) == 2
    told = line_on_stderr(capsys)
    assert all(word in told for word in words), told


def test_report_compares_nothing_with_one_method(tmp_path, capsys):
    runs = write_records(tmp_path / "runs", make_records(("A", "B"), (0.2,), ("kd",), (1,)))
    assert main(["report", str(runs), "--comparison"]) == 2
    assert "all of the method 'kd'" in line_on_stderr(capsys)
