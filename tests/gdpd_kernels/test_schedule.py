"""The DDIM table: agreement with diffusers, the closed-form step, and what is refused."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd_kernels.schedule import DDIMTable, alphas_cumprod, ddim_table, make_betas

THEIR_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def their_scheduler(*, prediction: str = "eps", **options: object) -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=THEIR_PREDICTION[prediction], **options)
    # In float64 the comparison is of formulas; what float32 does to a schedule is compared apart.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = (
        torch.tensor(1.0, dtype=torch.float64) if scheduler.config.set_alpha_to_one else scheduler.alphas_cumprod[0]
    )
    return scheduler


def assert_same_walk(table: DDIMTable, scheduler: DDIMScheduler, timesteps: list[int], eta: float) -> None:
    """Each step of the table moves random z, pred and noise as the scheduler's step does."""
    assert list(table.timesteps) == timesteps
    generator = torch.Generator().manual_seed(1)
    for t, (a, b, s) in zip(table.timesteps, table.coefficients, strict=True):
        z, pred, noise = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
        theirs = scheduler.step(pred, t, z, eta=eta, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(a * z + b * pred + s * noise, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", sorted(THEIR_SCHEDULE))
def test_betas_and_alpha_bar_agree_with_diffusers(schedule: str) -> None:
    theirs = DDIMScheduler(num_train_timesteps=777, beta_schedule=THEIR_SCHEDULE[schedule])
    betas = make_betas(schedule, 777)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=1e-5, atol=1e-9)
    # diffusers multiplies 777 factors in float32, which the last entries of the cosine schedule show.
    torch.testing.assert_close(alphas_cumprod(schedule, 777).float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(THEIR_SCHEDULE)),
    prediction=st.sampled_from(sorted(THEIR_PREDICTION)),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    set_alpha_to_one=st.booleans(),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps=st.integers(1, 60),
    total=st.integers(120, 1000),
)
def test_stride_rule_agrees_with_diffusers_on_every_shared_setting(
    schedule: str, prediction: str, eta: float, set_alpha_to_one: bool, spacing: str, steps: int, total: int
) -> None:
    scheduler = their_scheduler(
        num_train_timesteps=total,
        beta_schedule=THEIR_SCHEDULE[schedule],
        prediction=prediction,
        set_alpha_to_one=set_alpha_to_one,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.tolist()
    table = ddim_table(
        num_inference_steps=steps,
        alphas_cumprod=scheduler.alphas_cumprod,
        timestep_spacing=spacing,
        eta=eta,
        prediction=prediction,
        set_alpha_to_one=set_alpha_to_one,
        previous="stride",
    )
    # np.arange over a fractional stride can yield one entry too many in diffusers; what it adds is t = -1.
    assert_same_walk(table, scheduler, theirs[:steps], eta)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 50),
    total=st.integers(100, 1000),
    offset=st.integers(0, 1),
    eta=st.sampled_from([0.0, 1.0]),
    set_alpha_to_one=st.booleans(),
)
def test_next_rule_agrees_with_diffusers_on_leading_grids(
    steps: int, total: int, offset: int, eta: float, set_alpha_to_one: bool
) -> None:
    scheduler = their_scheduler(num_train_timesteps=total, steps_offset=offset, set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(steps)
    table = ddim_table(
        num_inference_steps=steps,
        alphas_cumprod=scheduler.alphas_cumprod,
        steps_offset=offset,
        eta=eta,
        set_alpha_to_one=set_alpha_to_one,
    )
    assert_same_walk(table, scheduler, scheduler.timesteps.tolist(), eta)


@pytest.mark.parametrize("prediction", sorted(THEIR_PREDICTION))
@pytest.mark.parametrize("schedule", sorted(THEIR_SCHEDULE))
def test_named_schedules_agree_with_diffusers_to_float32(schedule: str, prediction: str) -> None:
    scheduler = their_scheduler(beta_schedule=THEIR_SCHEDULE[schedule], prediction=prediction)
    scheduler.set_timesteps(10)
    table = ddim_table(1000, 10, schedule, prediction=prediction)
    theirs = ddim_table(num_inference_steps=10, alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)
    torch.testing.assert_close(torch.tensor(table.flat), torch.tensor(theirs.flat), rtol=1e-3, atol=1e-5)


def test_lower_window_is_the_second_half_of_diffusers_double_grid() -> None:
    scheduler = their_scheduler()
    scheduler.set_timesteps(10)
    table = ddim_table(num_inference_steps=5, window="lower", alphas_cumprod=scheduler.alphas_cumprod)
    assert table.timesteps == (400, 300, 200, 100, 0)
    assert table.alpha_bar_prev[-1] == 1.0
    assert_same_walk(table, scheduler, scheduler.timesteps.tolist()[5:], 0.0)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sets(st.integers(0, 999), min_size=1, max_size=20),
    prediction=st.sampled_from(["eps", "x0", "v"]),
    schedule=st.sampled_from(["linear", "scaled_linear", "cosine"]),
)
def test_a_perfect_prediction_lands_on_the_clean_sample(grid: set[int], prediction: str, schedule: str) -> None:
    walked = sorted(grid, reverse=True)
    table = ddim_table(timesteps=walked, beta_schedule=schedule, prediction=prediction)
    x0, eps = 0.7, -1.3
    z = math.sqrt(table.alpha_bar[0]) * x0 + math.sqrt(1 - table.alpha_bar[0]) * eps
    for k, (a, b, _) in enumerate(table.coefficients):
        signal, noise = math.sqrt(table.alpha_bar[k]), math.sqrt(1 - table.alpha_bar[k])
        z = a * z + b * {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]
        # With the exact prediction the walk stays on the line between x0 and eps at each level.
        level = table.alpha_bar_prev[k]
        assert z == pytest.approx(math.sqrt(level) * x0 + math.sqrt(1 - level) * eps, rel=1e-6, abs=1e-6)
    assert z == pytest.approx(x0, abs=1e-6)


def test_uneven_list_steps_to_its_next_entry_and_ends_at_one() -> None:
    levels = alphas_cumprod()
    table = ddim_table(timesteps=torch.tensor([900, 37, 5]))
    assert table.alpha_bar == tuple(levels[[900, 37, 5]].tolist())
    assert table.alpha_bar_prev == (*levels[[37, 5]].tolist(), 1.0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_part_of_a_grid_walked_with_the_grids_stride_is_that_part_of_the_table(spacing: str) -> None:
    whole = ddim_table(num_inference_steps=14, timestep_spacing=spacing, previous="stride")
    part = ddim_table(timesteps=whole.timesteps[7:], previous=1000 // 14)
    assert part.coefficients == whole.coefficients[7:]


def test_aliases_name_the_same_table() -> None:
    assert ddim_table(prediction="v_prediction") == ddim_table(prediction="v")
    assert ddim_table(beta_schedule="squaredcos_cap_v2") == ddim_table(beta_schedule="cosine")


def test_table_is_hashable_picklable_and_flat() -> None:
    table = ddim_table(num_inference_steps=4, eta=0.5)
    assert pickle.loads(pickle.dumps(table)) == table
    assert len({table, ddim_table(num_inference_steps=4, eta=0.5)}) == 1
    assert len(table) == 4
    assert table.flat[3:6] == table.coefficients[1]
    assert table.stochastic
    assert not ddim_table().stochastic


def test_what_is_worked_out_beforehand_follows_the_coefficients() -> None:
    still = DDIMTable((3, 0), ((1.0, 0.5, 0.0), (0.9, 0.1, 0.0)))
    drawn = replace(still, coefficients=((1.0, 0.5, 0.0), (0.8, 0.1, 0.2)))
    assert (still.stochastic, drawn.stochastic) == (False, True)
    assert drawn.flat == (1.0, 0.5, 0.0, 0.8, 0.1, 0.2)
    assert replace(drawn, coefficients=still.coefficients) == still
    assert "_flat" not in repr(still)


def test_defaults_are_five_steps_of_a_thousand() -> None:
    assert ddim_table().timesteps == (800, 600, 400, 200, 0)
    assert ddim_table(alphas_cumprod=alphas_cumprod("cosine", 50)).timesteps == (40, 30, 20, 10, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_inference_steps": 501, "window": "lower"}, "at most 500"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"window": "upper"}, "window is 'upper'; known: 'full', 'lower'"),
        ({"beta_schedule": "sigmoid"}, "schedule is 'sigmoid'"),
        ({"prediction": "score"}, "prediction is 'score'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"previous": "t-1"}, "previous is 't-1'"),
        ({"previous": 0}, "previous is 0"),
        ({"previous": True}, "previous is True"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"eta": 3.0}, "use an eta of at most 1"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [10, 20]}, "descend strictly: entry 1 is 20 after 10"),
        ({"timesteps": [10, 10]}, "descend strictly"),
        ({"timesteps": [1000, 0]}, "t = 1000, outside 0 .. 999"),
        ({"timesteps": [10, -1]}, "t = -1"),
        ({"timesteps": [10, 0], "num_inference_steps": 3}, "give one of the two"),
        ({"timesteps": [10, 0], "window": "lower"}, "drop window"),
        ({"alphas_cumprod": [0.9, 0.5], "num_train_timesteps": 3}, "give one of the two"),
        ({"alphas_cumprod": [[0.9]]}, r"shape \(1, 1\)"),
        ({"alphas_cumprod": [0.9, float("nan")]}, "outside"),
        ({"alphas_cumprod": [0.5, 0.9], "num_inference_steps": 2}, "rises with t"),
        ({"alphas_cumprod": [0.9, 0.0], "num_inference_steps": 2}, "alpha_bar is 0 at t = 1"),
        (
            {"alphas_cumprod": [1.0, 0.5], "num_inference_steps": 2, "prediction": "x0"},
            "alpha_bar is 1 at t = 0",
        ),
        ({"steps_offset": 300}, "outside 0 .. 999"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim_table(**options)  # type: ignore[arg-type]


def test_zero_terminal_level_is_fine_for_v_prediction() -> None:
    table = ddim_table(alphas_cumprod=[0.9, 0.0], num_inference_steps=2, prediction="v", eta=1.0)
    assert all(math.isfinite(value) for value in table.flat)


def test_hand_made_table_is_checked() -> None:
    assert len(DDIMTable((3, 0), ((1.0, 0.5, 0.0), (0.9, 0.1, 0.0)))) == 2
    with pytest.raises(ValueError, match="coefficients has 1 entries for 2 timesteps"):
        DDIMTable((3, 0), ((1.0, 0.5, 0.0),))
    with pytest.raises(ValueError, match=r"coefficients\[0\]"):
        DDIMTable((0,), ((1.0, float("inf"), 0.0),))
    with pytest.raises(ValueError, match="empty"):
        DDIMTable((), ())
