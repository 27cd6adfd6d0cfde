"""RunConfig: what it reads, what it refuses, and that every option is documented."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpd.config import RunConfig


def test_every_option_has_help_and_a_default() -> None:
    rows = RunConfig.describe()
    assert [row["name"] for row in rows] == [field.name for field in dataclasses.fields(RunConfig)]
    for row in rows:
        assert row["help"].endswith("."), row["name"]
        assert row["group"] in {"data", "models", "method", "prior", "training", "machine"}
        if row["choices"]:
            assert row["default"] in row["choices"]


def test_dictionary_round_trip_survives_json() -> None:
    config = RunConfig(earliness=0.2, lr_milestones=(3, 5), alpha=0.3, student_options={"width": 4})
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(st.floats(0.001, 1.0), st.integers(1, 100), st.sampled_from(["full", "lower"]))
def test_admissible_numbers_are_kept_as_given(earliness: float, steps: int, window: str) -> None:
    config = RunConfig(earliness=earliness, num_inference_steps=steps, window=window)
    assert (config.earliness, config.num_inference_steps, config.window) == (earliness, steps, window)


@given(st.one_of(st.floats(max_value=0.0), st.floats(min_value=1.0, exclude_min=True)))
def test_earliness_outside_its_interval_is_refused(earliness: float) -> None:
    with pytest.raises(ValueError, match=r"earliness=.* outside \(0, 1\]"):
        RunConfig(earliness=earliness)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
        (
            {"num_inference_steps": 501},
            "grid of 1002 steps, more than num_train_timesteps=1000.* at most 500",
        ),
        ({"num_inference_steps": 1001, "window": "full"}, "at most 1000"),
        ({"num_samples": 0}, "num_samples=0 is below 1"),
        ({"epochs": 0}, "epochs=0 is below 1"),
        ({"epochs": 10, "warmup_epochs": 10}, "warmup_epochs=10 is outside 0..9"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not a finite number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"loss_ratio": -1}, "loss_ratio=-1.0"),
        ({"validation_fraction": 0.0}, r"validation_fraction=0.0 is outside \(0, 0.5\]"),
        ({"validation_fraction": 0.6}, "validation_fraction=0.6"),
        ({"alpha": "per_sampel"}, "did you mean 'per_sample'"),
        ({"alpha": 1.5}, r"alpha=1.5 is outside \[0, 1\]"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"resample_to": 1}, "resample_to=1 is below 2"),
        ({"gradient_clip": 0}, "gradient_clip=0.0 is not above 0"),
        ({"beta_start": 0.03}, "beta_start=0.03"),
        ({"lr_milestones": [0]}, "below 1"),
        ({"window": "upper"}, r"window='upper' is not known.* One of: full, lower"),
        ({"method": "gdpp"}, "did you mean 'gdpd'"),
    ],
)
def test_values_outside_their_limits_are_named_with_the_limit(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RunConfig(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 1.5}, r"epochs=1.5 cannot be read as int"),
        ({"epochs": True}, "epochs=True"),
        ({"hinton": "perhaps"}, "hinton='perhaps' cannot be read as bool"),
        ({"earliness": "half"}, "earliness='half' cannot be read as float"),
        ({"earliness": float("nan")}, "earliness=nan"),
        ({"teacher_options": [1]}, "teacher_options"),
        ({"gradient_clip": "many"}, "float or null"),
        ({"dataset": 3}, "dataset=3 cannot be read as str"),
    ],
)
def test_values_of_the_wrong_type_are_refused(options: dict, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        RunConfig(**options)


def test_strings_from_a_shell_are_read_as_the_option_s_type() -> None:
    config = RunConfig.from_dict(
        {"epochs": "12", "learning_rate": "1e-3", "hinton": "false", "alpha": "0.5", "resample_to": "null"}
    )
    assert (config.epochs, config.learning_rate, config.hinton, config.alpha) == (12, 1e-3, False, 0.5)
    assert config.resample_to is None


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'earlines' \(did you mean 'earliness'\?\)"):
        RunConfig.from_dict({"earlines": 0.5})


def test_yaml_stands_for_options_and_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dataset: ItalyPowerDemand\nlearning_rate: 1e-2\nlr_milestones: [5, 9]\nresample_to: null\n")
    config = RunConfig.from_yaml(path, earliness=0.2, learning_rate=0.5)
    assert config.dataset == "ItalyPowerDemand"
    assert config.learning_rate == 0.5
    assert config.lr_milestones == (5, 9)
    assert config.resample_to is None
    assert config.earliness == 0.2


@pytest.mark.parametrize(
    ("text", "told"),
    [("earlines: 1", "did you mean 'earliness'"), ("- 1\n- 2", "holds a list"), ("a: [", "not valid YAML")],
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"run.yaml.*{told}"):
        RunConfig.from_yaml(path)


def test_empty_yaml_is_the_default_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert RunConfig.from_yaml(path) == RunConfig()


def test_differences_name_only_options_that_change_results() -> None:
    one = RunConfig(seed=1, checkpoint_every=5)
    other = one.replace(seed=2, checkpoint_every=9)
    assert one.differences(other) == {"seed": (1, 2)}


def test_warmup_is_half_of_the_epochs_unless_given() -> None:
    assert RunConfig(epochs=7).warmup == 3
    assert RunConfig(epochs=7, warmup_epochs=0).warmup == 0


def test_import_of_gdpd_is_light() -> None:
    heavy = "['torch', 'sklearn', 'aeon', 'lightning_fabric', 'matplotlib', 'typer']"
    code = f"import gdpd, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_attribute_of_the_package_lists_what_there_is() -> None:
    import gdpd

    with pytest.raises(AttributeError, match="has no attribute 'Prefix'; it has PrefixClassifier"):
        _ = gdpd.Prefix
    assert gdpd.RunConfig is RunConfig


def test_a_missing_extra_is_named_where_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import gdpd

    monkeypatch.delitem(sys.modules, "gdpd.classifier", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"gdpd\.PrefixClassifier needs sklearn.*gdpd-kernels\[train\]"):
        _ = gdpd.PrefixClassifier
