"""Noise schedules and the DDIM coefficient table, in float64 on the host, before any sampling starts.

One unclipped DDIM step is linear, ``z' = a z + b pred + s noise``, whatever the network predicts. Everything
that depends on the schedule, the grid of steps, eta and the kind of prediction is folded here into one triple
``(a, b, s)`` a step, so that no kernel knows of betas.

Notation: ``beta_t`` the variances of the forward process, ``alpha_bar_t = prod (1 - beta_i, i <= t)``, ``t``
a training time step in ``0 .. num_train_timesteps - 1``, ``k`` an index into the walked grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "cosine",
    "squaredcos_cap_v2": "cosine",
    "flow": "flow",
}
_PREDICTIONS = {"eps": "eps", "epsilon": "eps", "x0": "x0", "sample": "x0", "v": "v", "v_prediction": "v"}
_WINDOWS = ("full", "lower")
_SPACINGS = ("leading", "trailing", "linspace")
_PREVIOUS = ("next", "stride")
_DEFAULT_TRAIN_TIMESTEPS = 1000
_DEFAULT_INFERENCE_STEPS = 5
_MAX_COSINE_BETA = 0.999


@dataclass(frozen=True)
class DDIMTable:
    """The steps of one reverse process and their coefficients; hashable and picklable.

    Step ``k`` of ``len(table)`` runs the denoiser at ``timesteps[k]`` and updates
    ``z' = a_k z + b_k pred + s_k noise`` with ``(a_k, b_k, s_k) = coefficients[k]``; ``pred`` is the raw
    output of the network. Build one with `ddim_table`.

    Attributes:
        timesteps: training time steps in walked (descending) order, K of them.
        coefficients: ``(a, b, s)`` a step, float64.
        prediction: what the network predicts: ``"eps"``, ``"x0"`` or ``"v"``; already folded in ``a`` and
            ``b``.
        eta: stochasticity, 0 for DDIM.
        alpha_bar: alpha_bar at each step.
        alpha_bar_prev: alpha_bar where each step lands.
    """

    timesteps: tuple[int, ...]
    coefficients: tuple[tuple[float, float, float], ...]
    prediction: str = "eps"
    eta: float = 0.0
    alpha_bar: tuple[float, ...] = ()
    alpha_bar_prev: tuple[float, ...] = ()
    _flat: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _stochastic: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if steps < 1:
            raise ValueError("timesteps is empty: a DDIM table needs at least one step")
        for name in ("coefficients", "alpha_bar", "alpha_bar_prev"):
            length = len(getattr(self, name))
            if length != steps and not (length == 0 and name != "coefficients"):
                raise ValueError(f"{name} has {length} entries for {steps} timesteps; give one entry a step")
        for k, triple in enumerate(self.coefficients):
            if len(triple) != 3 or not all(math.isfinite(value) for value in triple):
                raise ValueError(f"coefficients[{k}] is {triple}; expected three finite numbers (a, b, s)")
        # Every call of the sampler asks for these two.
        object.__setattr__(self, "_flat", tuple(itertools.chain.from_iterable(self.coefficients)))
        object.__setattr__(self, "_stochastic", any(triple[2] != 0.0 for triple in self.coefficients))

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def flat(self) -> tuple[float, ...]:
        """The 3 K coefficients in a row: ``(a_0, b_0, s_0, a_1, b_1, s_1, ...)``."""
        return self._flat

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise (some ``s_k`` is not zero)."""
        return self._stochastic


def make_betas(
    schedule: str = "linear",
    num_train_timesteps: int = _DEFAULT_TRAIN_TIMESTEPS,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """Variances of the forward process, one a training time step.

    Args:
        schedule: ``"linear"`` (Ho et al. 2020, arXiv 2006.11239, section 4), ``"scaled_linear"`` (linear in
            the square root, as in latent diffusion) or ``"cosine"`` (Nichol and Dhariwal 2021, arXiv
            2102.09672, eq. 17; ``beta_start`` and ``beta_end`` play no part). ``"squaredcos_cap_v2"``,
            diffusers' name of the cosine schedule, is understood too.
        num_train_timesteps: T, the length of the forward process.
        beta_start: first variance, in (0, 1).
        beta_end: last variance, in (0, 1), not below ``beta_start``.

    Returns:
        float64 tensor [T].

    Raises:
        ValueError: unknown schedule, T < 1 or variances out of range.
    """
    kind = _lookup("schedule", schedule, _SCHEDULES)
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1")
    if kind == "cosine":
        return torch.tensor(_cosine_betas(num_train_timesteps), dtype=torch.float64)
    if kind == "flow":
        return torch.tensor(_flow_betas(num_train_timesteps), dtype=torch.float64)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(f"beta_start is {beta_start} and beta_end {beta_end}; needed: 0 < beta_start <= beta_end < 1")
    if kind == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
    return root**2


def alphas_cumprod(
    schedule: str = "linear",
    num_train_timesteps: int = _DEFAULT_TRAIN_TIMESTEPS,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """alpha_bar of a schedule: float64 tensor [T], the running product of ``1 - beta``.

    Arguments and errors are those of `make_betas`.
    """
    return torch.cumprod(1.0 - make_betas(schedule, num_train_timesteps, beta_start, beta_end), dim=0)


def ddim_table(
    num_train_timesteps: int | None = None,
    num_inference_steps: int | None = None,
    beta_schedule: str = "linear",
    window: str = "full",
    eta: float = 0.0,
    prediction: str = "eps",
    timesteps: Sequence[int] | Tensor | None = None,
    alphas_cumprod: Sequence[float] | Tensor | None = None,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    previous: str | int = "next",
) -> DDIMTable:
    """Coefficients of the unclipped DDIM update (Song et al. 2021, arXiv 2010.02502, eqs. 12 and 16).

    Every step lands on the next entry of the walked grid, the last one on alpha_bar = 1. On the evenly spaced
    grids (``"leading"``, and ``"trailing"`` where n divides T) that is what diffusers' ``DDIMScheduler``
    does. On uneven grids and on lists given by the caller, diffusers lands on ``t - T // n`` instead, off its
    own grid; ``previous="stride"`` reproduces that.

    Args:
        num_train_timesteps: T, length of the forward process; 1000 unless ``alphas_cumprod`` says otherwise.
        num_inference_steps: n, steps walked; 5 unless ``timesteps`` says otherwise.
        beta_schedule: ``"linear"``, ``"scaled_linear"``, ``"cosine"`` or ``"flow"``; see `make_betas`.
        window: ``"full"``: all n entries of a grid of n; ``"lower"``: the lower half of a grid of 2 n (the
            start is taken to be half denoised, as in DiffKD and GDPD: n = 5 gives 400, 300, 200, 100, 0).
        eta: 0 for DDIM, 1 for DDPM-like sampling with noise at each step.
        prediction: what the network puts out: ``"eps"`` (noise), ``"x0"`` (clean sample) or ``"v"``
            (velocity, Salimans and Ho 2022, arXiv 2202.00512); diffusers' names of the three are understood
            too.
        timesteps: the walked grid itself, strictly descending, instead of ``num_inference_steps`` and
            ``window``.
        alphas_cumprod: alpha_bar [T] instead of ``beta_schedule``, ``beta_start`` and ``beta_end``.
        beta_start: first variance of the schedule.
        beta_end: last variance of the schedule.
        timestep_spacing: ``"leading"``, ``"trailing"`` or ``"linspace"`` (Lin et al. 2024, arXiv 2305.08891,
            table 2).
        steps_offset: added to each entry of a ``"leading"`` grid.
        set_alpha_to_one: the last step lands on alpha_bar = 1; if False, on alpha_bar of training step 0.
        previous: where a step lands: ``"next"`` entry of the grid, or ``"stride"``: training step t - T//n,
            and as the last step does where that is negative. An integer is a stride of so many training steps, for
            a list that is a part of a longer grid.

    Returns:
        A `DDIMTable` with K = ``num_inference_steps`` (or ``len(timesteps)``) steps.

    Raises:
        ValueError: an argument out of range, arguments that contradict each other, or a step whose
            coefficients are not finite (noise prediction at alpha_bar = 0, x0 prediction at alpha_bar = 1).
    """
    _lookup("window", window, {name: name for name in _WINDOWS})
    if isinstance(previous, str):
        _lookup("previous", previous, {name: name for name in _PREVIOUS})
    elif isinstance(previous, bool) or not isinstance(previous, int) or previous < 1:
        raise ValueError(f"previous is {previous!r}; known: 'next', 'stride', or a stride of at least 1 training step")
    kind = _lookup("prediction", prediction, _PREDICTIONS)
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(f"eta is {eta}; it must be a finite number, 0 (deterministic) or more")
    alpha_bar = _alpha_bar(alphas_cumprod, num_train_timesteps, beta_schedule, beta_start, beta_end)
    if timesteps is None:
        steps = _DEFAULT_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
        grid = _grid(len(alpha_bar), steps, window, timestep_spacing, steps_offset)
        stride = len(alpha_bar) // (2 * steps if window == "lower" else steps)
    else:
        grid = [int(t) for t in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]
        if num_inference_steps is not None and num_inference_steps != len(grid):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps} but timesteps has {len(grid)} entries; "
                "give one of the two"
            )
        if window != "full":
            raise ValueError(f"window is {window!r} but timesteps is given; the list is walked as it is, drop window")
        stride = len(alpha_bar) // max(len(grid), 1)
    _check_grid(grid, len(alpha_bar))
    if isinstance(previous, int):
        stride = previous

    final = 1.0 if set_alpha_to_one else alpha_bar[0]
    here = [alpha_bar[t] for t in grid]
    if previous == "next":
        landing = [*here[1:], final]
    else:
        landing = [alpha_bar[t - stride] if t >= stride else final for t in grid]
    coefficients = tuple(_update(t, ab, ab_prev, eta, kind) for t, ab, ab_prev in zip(grid, here, landing, strict=True))
    return DDIMTable(tuple(grid), coefficients, kind, float(eta), tuple(here), tuple(landing))


def _update(t: int, ab: float, ab_prev: float, eta: float, prediction: str) -> tuple[float, float, float]:
    """(a, b, s) of one step from alpha_bar ``ab`` to ``ab_prev``: arXiv 2010.02502, eqs. 12 and 16."""
    if ab_prev < ab:
        raise ValueError(
            f"alpha_bar rises with t: {ab_prev} where the step at t = {t} lands, {ab} at t itself; "
            "give a non-increasing alphas_cumprod"
        )
    variance = (1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev) if ab < 1 else 0.0
    s = eta * math.sqrt(max(variance, 0.0))
    direction = 1 - ab_prev - s * s
    # For eta <= 1 the bound holds exactly, so what is below zero there is rounding.
    if direction < 0 and eta > 1:
        raise ValueError(
            f"eta is {eta}: at t = {t} the added noise (variance {s * s:.3g}) exceeds the noise of the "
            f"target level ({1 - ab_prev:.3g}); use an eta of at most 1"
        )
    to_eps = math.sqrt(max(direction, 0.0))
    to_x0 = math.sqrt(ab_prev)
    signal, noise = math.sqrt(ab), math.sqrt(1 - ab)
    # x0 = x_z z + x_p pred and eps = e_z z + e_p pred, for each kind of prediction.
    if prediction == "eps":
        if ab == 0.0:
            raise ValueError(
                f"alpha_bar is 0 at t = {t}: noise prediction cannot be turned into x0 there; "
                "use v prediction, or a schedule that ends above 0"
            )
        x_z, x_p, e_z, e_p = 1 / signal, -noise / signal, 0.0, 1.0
    elif prediction == "x0":
        if ab == 1.0:
            raise ValueError(
                f"alpha_bar is 1 at t = {t}: x0 prediction cannot be turned into noise there; leave that step out"
            )
        x_z, x_p, e_z, e_p = 0.0, 1.0, 1 / noise, -signal / noise
    else:
        x_z, x_p, e_z, e_p = signal, -noise, noise, signal
    return to_x0 * x_z + to_eps * e_z, to_x0 * x_p + to_eps * e_p, s


def _grid(num_train_timesteps: int, steps: int, window: str, spacing: str, offset: int) -> list[int]:
    """The walked training steps, descending: a grid of ``steps``, or the lower half of one twice as long."""
    _lookup("timestep_spacing", spacing, {name: name for name in _SPACINGS})
    if steps < 1:
        raise ValueError(f"num_inference_steps is {steps}; it must be at least 1")
    size = 2 * steps if window == "lower" else steps
    if size > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {steps}: a {window} window needs a grid of {size} steps, "
            f"more than the {num_train_timesteps} training steps; ask for at most "
            f"{num_train_timesteps // (size // steps)}"
        )
    # numpy's own ranges: where a fractional stride meets a half, they round as diffusers does.
    if spacing == "leading":
        grid = np.arange(size) * (num_train_timesteps // size) + offset
    elif spacing == "trailing":
        # A fractional stride can make arange one entry too long; the excess is t = -1.
        down = np.arange(num_train_timesteps, 0, -num_train_timesteps / size)[:size]
        grid = np.round(down[::-1]) - 1
    else:
        grid = np.round(np.linspace(0, num_train_timesteps - 1, size))
    return [int(t) for t in grid[:steps][::-1]]


def _check_grid(grid: list[int], num_train_timesteps: int) -> None:
    if not grid:
        raise ValueError("timesteps is empty: the sampler needs at least one step")
    for k, t in enumerate(grid):
        if not 0 <= t < num_train_timesteps:
            raise ValueError(
                f"step {k} is at t = {t}, outside 0 .. {num_train_timesteps - 1}, the training steps of the schedule"
            )
        if k and t >= grid[k - 1]:
            raise ValueError(
                f"timesteps must descend strictly: entry {k} is {t} after {grid[k - 1]}; "
                "sort them from noise to data and drop repeats"
            )


def _alpha_bar(
    given: Sequence[float] | Tensor | None,
    num_train_timesteps: int | None,
    beta_schedule: str,
    beta_start: float,
    beta_end: float,
) -> list[float]:
    """alpha_bar [T] as Python floats, from the caller's values or from the named schedule."""
    if given is None:
        steps = _DEFAULT_TRAIN_TIMESTEPS if num_train_timesteps is None else num_train_timesteps
        return alphas_cumprod(beta_schedule, steps, beta_start, beta_end).tolist()
    values = torch.as_tensor(given).detach().to("cpu", torch.float64)
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"alphas_cumprod has shape {tuple(values.shape)}; expected [num_train_timesteps]")
    if num_train_timesteps is not None and num_train_timesteps != values.numel():
        raise ValueError(
            f"num_train_timesteps is {num_train_timesteps} but alphas_cumprod has {values.numel()} entries; "
            "give one of the two"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("alphas_cumprod holds values outside [0, 1] (or NaN); it must be a product of 1 - beta")
    return values.tolist()


def _cosine_betas(steps: int) -> list[float]:
    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level((i + 1) / steps) / level(i / steps), _MAX_COSINE_BETA) for i in range(steps)]


def _flow_betas(steps: int) -> list[float]:
    def level(tau: float) -> float:
        return (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)

    return [1 - level((i + 1) / steps) / level(i / steps) for i in range(steps)]


def _lookup(argument: str, value: str, known: dict[str, str]) -> str:
    if value not in known:
        raise ValueError(f"{argument} is {value!r}; known: {', '.join(map(repr, known))}")
    return known[value]
