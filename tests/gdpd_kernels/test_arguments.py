"""Bad arguments of the public functions raise before anything runs, with the argument's name and what is expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdpd_kernels import BackendError, DDIMTable, alphas_cumprod, capture, ddim_table, prior_loss, reverse_sample
from modules import COND, FEATURES, ConditionalHead, PaperDenoiser, RawCondition, TimeMLP, Uncapturable

TABLE = ddim_table(num_inference_steps=2)
BATCH = 5

pytestmark = pytest.mark.filterwarnings("ignore::gdpd_kernels.BackendFallback")


def normal(*shape: int, **form: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**form)


def sample(**changed: Any) -> Tensor:
    given: dict[str, Any] = {"denoiser": TimeMLP(), "z_short": normal(BATCH, FEATURES), "table": TABLE} | changed
    return reverse_sample(given.pop("denoiser"), given.pop("z_short"), **given)


def loss(**changed: Any) -> Tensor:
    given: dict[str, Any] = {
        "denoiser": TimeMLP(),
        "z_long": normal(BATCH, FEATURES),
        "alphas_cumprod": alphas_cumprod(),
    }
    given |= changed
    return prior_loss(given.pop("denoiser"), given.pop("z_long"), **given)


def state(call: Any) -> str:
    return "z_short" if call is sample else "z_long"


both = pytest.mark.parametrize("call", [sample, loss])


def test_what_the_bad_calls_are_changed_from_is_good() -> None:
    assert sample().isfinite().all()
    assert loss().isfinite()


@both
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1.0]], TypeError, r"{}: expected a tensor \[batch, features\], got list"),
        (torch.zeros(6), ValueError, r"{} has shape \(6,\), torch.float32; expected floating \[batch, features\]"),
        (torch.zeros(2, 3, 6), ValueError, r"{} has shape \(2, 3, 6\)"),
        (torch.zeros(5, 6, dtype=torch.int64), ValueError, r"{} has shape \(5, 6\), torch.int64"),
        (torch.zeros(5, 6, dtype=torch.complex64), ValueError, r"{} has shape \(5, 6\), torch.complex64"),
        (torch.zeros(0, 6), ValueError, r"{} has shape \(0, 6\); batch and features must be at least 1"),
        (torch.zeros(5, 0), ValueError, r"{} has shape \(5, 0\); batch and features must be at least 1"),
        (torch.eye(6).to_sparse(), ValueError, r"{} is laid out as torch.sparse_coo; expected a dense tensor"),
    ],
)
def test_states(call: Any, bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.format(state(call))):
        call(**{state(call): bad})


@both
def test_the_state_has_to_fit_the_denoiser(call: Any) -> None:
    captured = capture(TimeMLP())
    with pytest.raises(ValueError, match=f"the state has 7 features, the denoiser takes {FEATURES}"):
        call(denoiser=captured, **{state(call): normal(BATCH, 7)})
    with pytest.raises(
        ValueError, match=r"parameter inner.weight is torch.float32 on cpu, the state torch.float64 .*\.to\("
    ):
        call(**{state(call): normal(BATCH, FEATURES).double()})
    with pytest.raises(ValueError, match=r"parameter inner.weight is torch.float32 on cpu, the state .* on meta"):
        call(**{state(call): normal(BATCH, FEATURES, device="meta")})


@both
def test_parameters_whose_data_were_exchanged(call: Any) -> None:
    module = TimeMLP()
    call(denoiser=module)
    module.inner.weight.data = torch.zeros(9, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"params has shape \[9, 3\]|cannot be multiplied"):
        call(denoiser=module)


@pytest.mark.parametrize("bad", [TimeMLP, lambda z, t: z, None, "mlp"])
def test_denoisers(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"denoiser: expected an nn.Module or what capture\(\)"):
        sample(denoiser=bad)


def test_a_denoiser_that_returns_something_else() -> None:
    class Other(nn.Module):
        def __init__(self, returned: Any) -> None:
            super().__init__()
            self.returned = returned

        def forward(self, z: Tensor, t: Tensor) -> Any:
            return self.returned(z.sort(-1).values)

    for returned, got in ((lambda z: z[:, 1:], r"\(5, 5\)"), (lambda z: (z, z), "tuple"), (lambda z: None, "NoneType")):
        with pytest.raises(ValueError, match=rf"denoiser: returned {got}; expected a prediction of shape \(5, 6\)"):
            sample(denoiser=Other(returned))


# --- the sampler's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 5, [(1.0, 0.0, 0.0)], torch.zeros(2, 3)])
def test_tables(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"table: expected a DDIMTable from ddim_table\(...\), got"):
        sample(table=bad)


def test_tables_without_steps_or_with_coefficients_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        ddim_table(num_inference_steps=0)
    with pytest.raises(ValueError, match="timesteps is empty"):
        DDIMTable((), ())
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"coefficients\[1\] is .* expected three finite numbers"):
            DDIMTable((9, 3), ((1.0, 0.0, 0.0), (1.0, value, 0.0)))


def test_time_steps_beyond_the_denoisers_embedding() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.linear = nn.Embedding(100, FEATURES), nn.Linear(FEATURES, FEATURES)

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return self.linear(z + self.time(t))

    with pytest.raises(ValueError, match="timesteps: the denoiser has no embedding of time step 500"):
        sample(denoiser=Short())
    with pytest.raises(ValueError, match="timesteps: the denoiser has no embedding of time step 999"):
        loss(denoiser=Short(), timesteps=torch.tensor([1, 2, 999, 3, 4]))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (-0.1, ValueError, r"alpha is -0.1; a mixing weight lies in \[0, 1\]"),
        (1.5, ValueError, r"alpha is 1.5; a mixing weight lies in \[0, 1\]"),
        (float("nan"), ValueError, r"alpha is nan; a mixing weight lies in \[0, 1\]"),
        ("half", TypeError, "alpha: expected None, a number or a tensor, got str"),
        ([0.1, 0.2], TypeError, "alpha: expected None, a number or a tensor, got list"),
        (torch.ones(BATCH, dtype=torch.int64), ValueError, "alpha is torch.int64 on cpu; expected a floating tensor"),
        (torch.ones(BATCH, device="meta"), ValueError, "alpha is torch.float32 on meta; expected .* z_short's cpu"),
        (torch.ones(4), ValueError, r"alpha has shape \(4,\); expected a number, \[6\], \[5\] or \[5, 6\]"),
        (torch.ones(6, 5), ValueError, r"alpha has shape \(6, 5\)"),
        (torch.ones(1, 5, 6), ValueError, r"alpha has shape \(1, 5, 6\)"),
        (torch.ones(0), ValueError, r"alpha has shape \(0,\)"),
    ],
)
def test_alphas(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(alpha=bad)


def test_an_alpha_that_could_be_per_sample_or_per_feature() -> None:
    z = normal(FEATURES, FEATURES)
    with pytest.raises(ValueError, match=r"per sample or per feature\? Pass \[6, 1\] or \[1, 6\]"):
        sample(z_short=z, alpha=torch.ones(FEATURES))
    sample(z_short=z, alpha=torch.ones(FEATURES, 1))
    sample(z_short=z, alpha=torch.ones(1, FEATURES))


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "2"])
def test_num_samples(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"num_samples is .*; it must be None or an integer of at least 1"):
        sample(num_samples=bad)


# --- noise, seed, condition -----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (0.0, TypeError, "noise: expected a tensor .* got float"),
        (torch.zeros(6), ValueError, r"noise has shape \(6,\), .*; expected floating \[5, 6\] on cpu"),
        (torch.zeros(1, 5, 6), ValueError, r"noise has shape \(1, 5, 6\)"),
        (torch.zeros(5, 6, dtype=torch.int32), ValueError, "noise has shape .*, torch.int32 on cpu; expected floating"),
        (torch.zeros(5, 6, device="meta"), ValueError, "noise has shape .*, torch.float32 on meta"),
        (torch.zeros(5, 6, requires_grad=True), ValueError, r"noise requires grad, .* pass noise.detach\(\)"),
    ],
)
def test_noises(call: Any, bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(noise=bad)


def test_noise_of_samples() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \(5, 6\), .*; expected floating \[2, 5, 6\]"):
        sample(noise=torch.zeros(5, 6), num_samples=2)


@both
@pytest.mark.parametrize(
    "bad", [2**64, -(2**63) - 1, 1.0, True, "0", torch.tensor(0.0), torch.tensor([1, 2]), torch.tensor(1).int()]
)
def test_seeds(call: Any, bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"seed (is .*expected an integer of 64 bits|has .*expected an int or one int64)"
    ):
        call(seed=bad, **({"alpha": 0.5} if call is sample else {}))


@both
@pytest.mark.parametrize("module", [ConditionalHead, RawCondition])
def test_conditions(call: Any, module: Any) -> None:
    width = COND if module is ConditionalHead else FEATURES
    denoiser, cond = module(), normal(BATCH, width)
    call(denoiser=denoiser, cond=cond)
    for bad, error, message in (
        ([0.0], TypeError, "cond: expected a tensor .* got list"),
        (cond[0], ValueError, rf"cond has shape \({width},\) on cpu; expected \[5, width\] on cpu"),
        (cond[1:], ValueError, rf"cond has shape \(4, {width}\)"),
        (cond.to("meta"), ValueError, "cond has shape .* on meta"),
        (cond.double(), ValueError, r"cond is torch.float64, the state torch.float32; pass cond.to\(torch.float32\)"),
        (cond.long(), ValueError, "cond is torch.int64, the state torch.float32"),
    ):
        with pytest.raises(error, match=message):
            call(denoiser=denoiser, cond=bad)
    captured = capture(denoiser, cond_features=width)
    with pytest.raises(
        ValueError, match=f"cond: the denoiser was captured with a condition of width {width}, but none"
    ):
        call(denoiser=captured)
    with pytest.raises(ValueError, match=f"cond has width {width + 1}, the denoiser was captured with {width}"):
        call(denoiser=captured, cond=normal(BATCH, width + 1))
    with pytest.raises(ValueError, match="cond: the denoiser was captured without a condition"):
        call(denoiser=capture(TimeMLP()), cond=cond)


@both
def test_a_condition_that_is_missing_or_too_much(call: Any) -> None:
    with pytest.raises(TypeError, match="cond"):
        call(denoiser=ConditionalHead())
    with pytest.raises(TypeError, match="positional argument"):
        call(cond=normal(BATCH, COND))


# --- the loss's own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (list(range(BATCH)), TypeError, "timesteps: expected a tensor .* got list"),
        (torch.zeros(BATCH), ValueError, r"timesteps has shape \(5,\), torch.float32 on cpu; expected int64 \[5\]"),
        (torch.ones(BATCH, dtype=torch.bool), ValueError, r"timesteps has shape \(5,\), torch.bool"),
        (torch.tensor(3), ValueError, r"timesteps has shape \(\), torch.int64"),
        (torch.arange(4), ValueError, r"timesteps has shape \(4,\), torch.int64"),
        (torch.tensor([0, 1, 2, 3, 1000]), ValueError, "timesteps has values from 0 to 1000; expected 0 to 999"),
        (torch.tensor([0, 1, 2, 3, -1]), ValueError, "timesteps has values from -1 to 3; expected 0 to 999"),
    ],
)
def test_timesteps(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(timesteps=bad)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([0.5] * 10, TypeError, "alphas_cumprod: expected a tensor .* got list"),
        (torch.tensor(0.5), ValueError, r"alphas_cumprod has shape \(\), torch.float32; expected floating \[T\]"),
        (torch.full((2, 5), 0.5), ValueError, r"alphas_cumprod has shape \(2, 5\)"),
        (torch.ones(10, dtype=torch.int64), ValueError, r"alphas_cumprod has shape \(10,\), torch.int64"),
        (torch.ones(0), ValueError, r"alphas_cumprod has shape \(0,\)"),
        (torch.full((10,), 1.5), ValueError, "alphas_cumprod has values from 1.5 to 1.5; expected 0 to 1"),
        (torch.full((10,), -0.5), ValueError, "alphas_cumprod has values from -0.5 to -0.5; expected 0 to 1"),
        (torch.full((10,), torch.nan), ValueError, "alphas_cumprod has values from nan to nan; expected 0 to 1"),
    ],
)
def test_alphas_cumprod(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(alphas_cumprod=bad)


def test_predictions() -> None:
    with pytest.raises(ValueError, match="prediction is 'epsilon'; it must be 'eps', 'x0' or 'v'"):
        loss(prediction="epsilon")


# --- batches, precision, backends -----------------------------------------------------------------------------------


@both
def test_one_row_with_batch_norm(call: Any) -> None:
    z = normal(1, FEATURES)
    with pytest.raises(ValueError, match=r"batch: BatchNorm in training mode .* at least 2 rows, got 1; .*eval\(\)"):
        call(denoiser=PaperDenoiser(), **{state(call): z})
    call(denoiser=PaperDenoiser().eval(), **{state(call): z})
    sample(denoiser=PaperDenoiser(), z_short=z, num_samples=2)


@both
@pytest.mark.parametrize("bad", [torch.float64, torch.int8, torch.complex64, "bfloat16"])
def test_compute_dtypes(call: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"compute_dtype is .*; it must be a floating dtype no wider than"):
        call(compute_dtype=bad)


@both
def test_backends(call: Any) -> None:
    with pytest.raises(ValueError, match="backend: 'cuda13' is not known; known are 'auto', 'native'"):
        call(backend="cuda13")
    with pytest.raises(ValueError, match="backend: None is not known"):
        call(backend=None)
    with pytest.raises(BackendError, match=r"backend 'native' cannot run this call:\n.* torch.bfloat16; it takes"):
        call(denoiser=TimeMLP().bfloat16(), backend="native", **{state(call): normal(BATCH, FEATURES).bfloat16()})
    with pytest.raises(BackendError, match=r"(?s)backend 'native' cannot run this denoiser: .*sort"):
        call(denoiser=Uncapturable(), backend="native")


def test_widths_that_are_only_guessed_leave_no_trace_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    assert capture(TimeMLP()).program.features == FEATURES
    assert capfd.readouterr().err == ""
