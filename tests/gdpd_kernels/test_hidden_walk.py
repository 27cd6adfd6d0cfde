"""The walk in hidden space gives what the direct walk gives: values, statistics, every gradient."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdpd_kernels as gk
from accuracy import assert_as_accurate, assert_exact
from gdpd_kernels import DenoiserProgram, ops
from gdpd_kernels.hidden_walk import PASSES, HiddenWalk, hidden_walk
from modules import TimeMLP, eager_sample
from problem import ALPHAS, Problem, Result, sample_problem
from programs import ACTIVATIONS, NARROW_EPS, Builder, bottleneck, gendd_head, mlp, normed

FLOAT32 = torch.float32


def walk(problem: Problem, backend: str, walks: HiddenWalk | None) -> Result:
    """The sampler's results and gradients, in hidden space if `walks` is given."""
    program = problem.program
    leaves = {name: x.detach().requires_grad_() for name, x in problem.named() if name not in problem.frozen}
    inputs = {name: leaves.get(name, x) for name, x in problem.named()}
    rows = [inputs[f"r{i}"] for i in range(len(program.rows))]
    tables = [inputs[f"t{i}"] for i in range(len(program.tables))]
    params = [inputs.get(f"p{i}", x) for i, x in enumerate(problem.params)]

    def operator(program: DenoiserProgram, *arguments: object) -> tuple[Tensor, Tensor]:
        *tensors, coefficients, samples = arguments
        name = str(problem.dtype).removeprefix("torch.")
        constants = program.text, list(coefficients), samples, backend, name, ops.SAVE_VALUES
        return torch.ops.gdpd_kernels.reverse_sample(*tensors, *constants)[:2]

    arguments = inputs["z"], inputs.get("alpha"), problem.noise, problem.seed, rows, tables, params
    rest = problem.coefficients, problem.samples
    z_hat, stats = walks.run(operator, *arguments, *rest) if walks else operator(program, *arguments, *rest)
    gradients = torch.autograd.grad(z_hat, list(leaves.values()), problem.grad, allow_unused=True)
    named = zip(leaves.items(), gradients, strict=True)
    found = {f"grad {key}": torch.zeros_like(x) if grad is None else grad for (key, x), grad in named}
    return {"z_hat": z_hat.detach(), "stats": stats.detach()} | found


def assert_same_walk(problem: Problem, backends: Sequence[str] = ("reference", "native")) -> None:
    walks = hidden_walk(problem.program)
    assert walks is not None
    exact = walk(problem, "reference", None)
    for backend in backends:
        assert_exact(walk(problem, backend, walks), exact, limit=1e-10)


def random_program(seed: int) -> DenoiserProgram:
    """A linear layer of z, up to six operations that do not read z, a linear layer; perhaps z added."""
    choose = random.Random(seed)
    widths = [choose.choice((1, 2, 3, 8, 17)) for _ in range(3)]
    features, h1, _ = widths
    table_widths = tuple(choose.choice((features, h1)) for _ in range(choose.randrange(3)))
    b = Builder(features, tables=table_widths, rows=(h1,) * choose.randrange(2), eps=NARROW_EPS)
    start = "z"
    tables = [f"t{i}" for i, width in enumerate(table_widths) if width == features]
    if tables and choose.random() < 0.5:
        start = b.op("add", "z", tables[0])
    x = b.linear(start, h1, bias=choose.random() < 0.7)
    for _ in range(choose.randrange(1, 7)):
        kind = choose.choice(("add", "mul", "linear", "norm", "concat", "slice", *ACTIVATIONS))
        earlier = [n for n in b.width if n not in ("z", start) and b.width[n] == b.width[x]]
        if kind in ("add", "mul"):
            x = b.op(kind, x, choose.choice(earlier))
        elif kind == "linear":
            x = b.linear(x, choose.choice(widths), bias=choose.random() < 0.7)
        elif kind == "norm":
            x = b.norm(choose.choice(("layer_norm", "rms_norm", "batch_norm", "batch_norm_eval")), x)
        elif kind == "concat":
            x = b.concat(x, choose.choice(earlier))
        elif kind == "slice":
            x = b.slice(x, 0, choose.randrange(1, b.width[x] + 1))
        else:
            x = b.activation(kind, x)
    x = b.linear(x, features, bias=choose.random() < 0.7)
    if choose.random() < 0.3:
        x = b.op("add", *choose.choice((("z", x), (x, "z"))))
    return b.done(x)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from(ALPHAS),
    noise=st.booleans(),
    samples=st.sampled_from((1, 1, 2)),
    steps=st.sampled_from((1, 2, 5)),
    window=st.sampled_from(("lower", "full")),
)
def test_any_program_walks_the_same_in_hidden_space(
    seed: int, alpha: str, noise: bool, samples: int, steps: int, window: str
) -> None:
    program = random_program(seed)
    assert_same_walk(sample_problem(program, 5, steps, samples, alpha, noise, window=window, seed=seed % 1000))


def tied(features: int = 6, hidden: int = 4) -> DenoiserProgram:
    """One weight in the first layer and in the middle, the last layer's bias in the middle too."""
    b = Builder(features)
    x = b.linear("z", features, bias=False)
    x = b.op("tanh", b.op("linear", x, params=b.ops[0].params))
    b.linear(x, hidden)
    return b.done(b.linear(f"%{len(b.ops)}", features))


@pytest.mark.parametrize("program", [tied(), mlp(7, 5), mlp(33, 100), gendd_head(12)])
def test_weights_that_others_read_too_stay(program: DenoiserProgram) -> None:
    assert_same_walk(sample_problem(program, batch=9, steps=4, alpha="full", noise=False))


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    frozen = [f"p{i}" for i in range(6)]
    assert_same_walk(sample_problem(mlp(9, 5), batch=9, steps=4, alpha="per sample", frozen=frozen))


def test_products_of_the_outer_layers_are_gone() -> None:
    program = mlp(100, 16)
    walks = hidden_walk(program)
    assert walks is not None
    assert walks.widths == (100, 16, 16)
    assert program.macs == 2 * 100 * 16 + 16 * 16
    assert walks.program.macs == 2 * 16 * 16


@pytest.mark.parametrize("samples", [1, 3])
def test_errors_are_those_of_plain_pytorch(samples: int) -> None:
    program = mlp(100, 40)
    for window in ("lower", "full"):
        problem = sample_problem(program, 65, 10, samples, "per sample", noise=False, window=window)
        exact = walk(problem, "reference", None)
        plain = walk(problem.to(FLOAT32), "reference", None)
        found = walk(problem.to(FLOAT32), "native", hidden_walk(program))
        assert_as_accurate(found, plain, exact, FLOAT32)


def wired(body: str, params: str = "6x6,6,6x6,6") -> DenoiserProgram:
    return DenoiserProgram.parse(f"denoiser z:6 tables:6 rows:6 params:{params}\n{body}")


REFUSED = {
    "z is read twice": "%1 = linear(z, p0, p1)\n%2 = mul(%1, z)\n%3 = linear(%2, p2, p3)\nreturn %3",
    "z is read by no linear layer": "%1 = silu(z)\n%2 = linear(%1, p0, p1)\nreturn %2",
    "z is not read": "%1 = linear(t0, p0, p1)\n%2 = linear(%1, p2, p3)\nreturn %2",
    "one layer alone": "%1 = linear(z, p0, p1)\nreturn %1",
    "one layer alone, z added": "%1 = linear(z, p0, p1)\n%2 = add(z, %1)\nreturn %2",
    "an activation at the end": "%1 = linear(z, p0, p1)\n%2 = tanh(%1)\nreturn %2",
    "a row added to z": "%1 = add(z, r0)\n%2 = linear(%1, p0, p1)\n%3 = linear(%2, p2, p3)\nreturn %3",
    "z itself": "return z",
    "z and z": "%1 = add(z, z)\nreturn %1",
    "z is read by two layers": "%1 = linear(z, p0, p1)\n%2 = linear(z, p2, p3)\n%3 = add(%1, %2)\n"
    "%4 = linear(%3, p0, p1)\nreturn %4",
    "the prediction is read again": "%1 = linear(z, p0, p1)\n%2 = linear(%1, p2, p3)\n%3 = tanh(%2)\n"
    "%4 = batch_norm(%3, -, -, eps=0.1)\nreturn %2",
    "z is added before the end": "%1 = linear(z, p0, p1)\n%2 = linear(%1, p2, p3)\n%3 = add(z, %2)\n"
    "%4 = batch_norm(%3, -, -, eps=0.1)\nreturn %3",
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_cannot_walk_in_hidden_space(name: str) -> None:
    assert hidden_walk(wired(REFUSED[name])) is None


@pytest.mark.parametrize("program", [bottleneck(12), normed(12)])
def test_the_papers_networks_do_not_begin_and_end_in_linear_layers(program: DenoiserProgram) -> None:
    assert hidden_walk(program) is None


# --- inside reverse_sample --------------------------------------------------------------------------------------------


def narrow_inside() -> TimeMLP:
    torch.manual_seed(0)
    return TimeMLP(64, 8).double()


@pytest.fixture
def walks_always(monkeypatch: pytest.MonkeyPatch) -> list[HiddenWalk]:
    """Every walk in hidden space that can be is taken, and noted here."""
    taken: list[HiddenWalk] = []
    run = HiddenWalk.run
    monkeypatch.setattr(HiddenWalk, "saved", lambda *_: 1)
    monkeypatch.setattr(HiddenWalk, "run", lambda self, *arguments: (taken.append(self), run(self, *arguments))[1])
    return taken


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("frozen", [True, False])
def test_reverse_sample_gives_the_same(walks_always: list[HiddenWalk], num_samples: int | None, frozen: bool) -> None:
    net, twin = narrow_inside().requires_grad_(not frozen), narrow_inside()
    z, alpha = torch.randn(9, 64).double(), torch.rand(9).double()
    table = gk.ddim_table(num_inference_steps=4)
    ours = [x.clone().requires_grad_() for x in (z, alpha)]
    theirs = [x.clone().requires_grad_() for x in (z, alpha)]
    found = gk.reverse_sample(net, ours[0], table=table, alpha=ours[1], seed=5, num_samples=num_samples)
    assert len(walks_always) == 1
    expected = eager_sample(twin, theirs[0], table, theirs[1][:, None], seed=5, num_samples=num_samples)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weight = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [*zip(ours, theirs, strict=True)]
    pairs += [] if frozen else [*zip(net.parameters(), twin.parameters(), strict=True)]
    for x, y in pairs:
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)


def test_the_direct_walk_stays_where_rounding_or_noise_is_asked_for(walks_always: list[HiddenWalk]) -> None:
    net, z = narrow_inside().float(), torch.randn(9, 64)
    table = gk.ddim_table(num_inference_steps=4)
    gk.reverse_sample(net, z, table=table, compute_dtype=torch.bfloat16)
    gk.reverse_sample(net, z, table=gk.ddim_table(num_inference_steps=4, eta=0.5), seed=1)
    gk.reverse_sample(net, z, table=table, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gk.reverse_sample(net, z, table=table)
        gk.reverse_sample(net, z, table=table, compute_dtype=torch.float32)
    assert walks_always == []
    gk.reverse_sample(net, z, table=table)
    assert len(walks_always) == 1


def test_the_cost_model_takes_large_calls_of_networks_narrow_inside() -> None:
    narrow, square, wide = (hidden_walk(mlp(n, h)) for n, h in ((256, 64), (100, 100), (100, 256)))
    assert narrow is not None
    assert square is not None
    assert wide is not None
    for computes in PASSES:
        assert narrow.saved(1024, 50, computes) > 0 > narrow.saved(64, 10, computes)
        assert narrow.saved(10**6, 1, computes) < 0  # one step has nothing to save
        assert wide.saved(4096, 50, computes) < 0
    assert square.saved(4096, 50, "forward") > 0 > square.saved(4096, 50, "inputs")
