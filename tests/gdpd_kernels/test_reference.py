"""The reference says what every operation means: held here to definitions written out in plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdpd_kernels import DenoiserProgram, philox_normal
from gdpd_kernels.backends import reference
from gdpd_kernels.program import KINDS
from problem import prior_problem, sample_problem
from programs import Builder, bottleneck, film, mlp

ROWS, WIDTH = 6, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalised(x: Tensor, dim: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


W, X, Y, B, M, V = normal(WIDTH, WIDTH), normal(ROWS, WIDTH), normal(ROWS, WIDTH, seed=1), *normal(3, WIDTH, seed=2)
V = V.square()
DEFINITIONS: dict[str, tuple[Callable[[], Tensor], list[Tensor], tuple[float, ...]]] = {
    "linear": (lambda: torch.stack([W @ x + B for x in X]), [W, B], ()),
    "batch_norm": (lambda: normalised(X, 0, M, B, 0.1), [M, B], (0.1,)),
    "batch_norm_eval": (lambda: (X - M) / (V + 0.1).sqrt() * W[0] + B, [M, V, W[0], B], (0.1,)),
    "layer_norm": (lambda: normalised(X, 1, M, B, 0.1), [M, B], (0.1,)),
    "rms_norm": (lambda: X / ((X**2).mean(1, keepdim=True) + 0.1).sqrt() * M, [M], (0.1,)),
    "relu": (lambda: X.clamp_min(0), [], ()),
    "leaky_relu": (lambda: X.clamp_min(0) + 0.1 * X.clamp_max(0), [], (0.1,)),
    "silu": (lambda: X / (1 + (-X).exp()), [], ()),
    "gelu": (lambda: X * (1 + torch.erf(X / 2**0.5)) / 2, [], ()),
    "gelu_tanh": (lambda: X / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (X + 0.044715 * X**3))), [], ()),
    "tanh": (lambda: (X.exp() - (-X).exp()) / (X.exp() + (-X).exp()), [], ()),
    "sigmoid": (lambda: 1 / (1 + (-X).exp()), [], ()),
    "elu": (lambda: X.clamp_min(0) + 0.7 * (X.clamp_max(0).exp() - 1), [], (0.7,)),
    "softplus": (lambda: (1 + X.exp()).log(), [], ()),
    "add": (lambda: X + Y, [], ()),
    "mul": (lambda: X * Y, [], ()),
    "affine": (lambda: 2 * X - 1, [], (2.0, -1.0)),
    "slice": (lambda: X[:, 1:3], [], (1, 3)),
    "concat": (lambda: torch.cat([X, Y], 1), [], ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_is_its_definition(kind: str) -> None:
    definition, params, attrs = DEFINITIONS[kind]
    b = Builder(WIDTH, rows=(WIDTH,))
    operands = ("z", "r0") if KINDS[kind].inputs != 1 else ("z",)
    width = {"slice": 2, "concat": 2 * WIDTH}.get(kind, WIDTH)
    x = b.op(kind, *operands, params=tuple(b.param(*p.shape) for p in params), attrs=attrs, width=width)
    # What is not as wide as the state is brought to its width by a matrix that is known.
    back = normal(WIDTH, width, seed=5)
    output = x if width == WIDTH else b.linear(x, WIDTH, bias=False)
    found = reference.denoise(b.done(output), X, [Y], [], [*params, back], torch.float64)
    expected = definition() if width == WIDTH else definition() @ back.T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_every_operation_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(KINDS)


def test_an_operation_without_a_reference_says_so() -> None:
    program = Builder(WIDTH).done("z")
    unknown = type(DenoiserProgram.parse("denoiser z:5 tables:- rows:- params:-\n  %1 = relu(z)\n  return %1").ops[0])
    with pytest.raises(NotImplementedError, match="operation 'plus' has no reference"):
        reference._apply(unknown("plus", ("z",)), [X], [], torch.float64, None)
    assert reference.denoise(program, X, [], [], [], torch.float64) is X


def test_the_start_mixes_without_square_roots() -> None:
    alpha = torch.rand(ROWS, 1).double()
    torch.testing.assert_close(reference.noise_fused_init(X, alpha, Y), alpha * X + (1 - alpha) * Y)
    assert reference.noise_fused_init(X, None, Y) is X


def test_the_loop_is_linear_in_state_and_prediction() -> None:
    seen = []

    def model(z: Tensor, k: int) -> Tensor:
        seen.append((k, z.clone()))
        return Y + k

    found = reference.reverse_loop(model, X, [(2.0, -1.0, 0.0), (0.5, 3.0, 0.25)], lambda k: torch.full_like(X, k))
    first = 2 * X - Y
    torch.testing.assert_close(found, 0.5 * first + 3 * (Y + 1) + 0.25)
    assert [k for k, _ in seen] == [0, 1]
    torch.testing.assert_close(seen[1][1], first)


def test_a_sampler_written_out_step_by_step() -> None:
    problem = sample_problem(mlp(WIDTH, 7), batch=3, steps=2, samples=2, alpha="per sample", noise=False, eta=0.5)
    (w0, b0, w1, b1, w2, b2), (table,), alpha = problem.params, problem.tables, problem.alpha
    assert alpha is not None
    eps = torch.cat([philox_normal(problem.seed, 3, WIDTH, 0, j, torch.float64) for j in range(2)])
    z = alpha.repeat(2, 1) * problem.z.repeat(2, 1) + (1 - alpha.repeat(2, 1)) * eps
    for k in range(2):
        a, b, s = problem.coefficients[3 * k : 3 * k + 3]
        h = torch.nn.functional.silu(z @ w0.T + b0 + table[k])
        h = torch.nn.functional.silu(h @ w1.T + b1)
        noise = torch.cat([philox_normal(problem.seed, 3, WIDTH, k + 1, j, torch.float64) for j in range(2)])
        z = a * z + b * (h @ w2.T + b2) + s * noise
    torch.testing.assert_close(problem.run("reference")["z_hat"], z, rtol=1e-12, atol=1e-13)


def test_batch_statistics_are_mean_and_biased_variance_of_each_step() -> None:
    b = Builder(WIDTH)
    program = b.done(b.norm("batch_norm", "z"))
    problem = sample_problem(program, batch=ROWS, steps=2)
    stats = problem.run("reference")["stats"]
    assert stats.shape == (2, 2 * WIDTH)
    expected = torch.cat([problem.z.mean(0), problem.z.var(0, correction=0)])
    torch.testing.assert_close(stats[0], expected, rtol=1e-12, atol=1e-13)
    assert not torch.equal(stats[0], stats[1])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_written_out(prediction: str) -> None:
    problem = prior_problem(film(WIDTH), batch=4, prediction=prediction, noise=False)
    assert problem.signal is not None
    assert problem.sigma is not None
    signal, sigma = problem.signal[:, None], problem.sigma[:, None]
    noise = philox_normal(problem.seed, 4, WIDTH, dtype=torch.float64)
    z_t = signal * problem.z + sigma * noise
    predicted = reference.denoise(problem.program, z_t, problem.rows, problem.tables, problem.params, torch.float64)
    target = {"eps": noise, "x0": problem.z, "v": signal * noise - sigma * problem.z}[prediction]
    expected = ((predicted - target) ** 2).mean()
    torch.testing.assert_close(problem.run("reference")["loss"], expected, rtol=1e-12, atol=0)


def test_a_low_compute_dtype_rounds_operands_of_products_and_nothing_else() -> None:
    b = Builder(WIDTH)
    program = b.done(b.linear("z", WIDTH))
    x, w, bias = (normal(*shape, seed=7).float() for shape in ((ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,)))
    found = reference.denoise(program, x, [], [], [w, bias], torch.bfloat16)
    torch.testing.assert_close(found, x.bfloat16().float() @ w.bfloat16().float().T + bias)
    assert not torch.equal(found, reference.denoise(program, x, [], [], [w, bias], torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_runs_in_every_floating_dtype(dtype: torch.dtype) -> None:
    problem = sample_problem(bottleneck(WIDTH), batch=9, alpha="full", noise=False)
    exact, found = problem.run("reference"), problem.to(dtype).run("reference")
    error = (found["z_hat"].double() - exact["z_hat"]).norm() / exact["z_hat"].norm()
    assert found["z_hat"].dtype == dtype
    assert error < 100 * torch.finfo(dtype).eps


def test_it_can_be_differentiated_without_the_operators() -> None:
    problem = prior_problem(film(3), batch=4)
    problem.z.requires_grad_()
    loss, stats = reference.prior_loss(
        problem.program, problem.z, problem.noise, None, problem.signal, problem.sigma, problem.rows, problem.tables,
        problem.params, "eps", torch.float64,
    )  # fmt: skip
    assert torch.autograd.grad(loss, problem.z)[0].isfinite().all()
    assert not stats.requires_grad
