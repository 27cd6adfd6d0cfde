"""One call of an operator with everything it takes, drawn from a seed, to be run on any backend in any precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from gdpd_kernels import ops
from gdpd_kernels.program import KINDS, DenoiserProgram
from gdpd_kernels.schedule import ddim_table
from programs import NARROW_EPS, USUAL_EPS

Result = dict[str, Tensor]
ALPHAS = ("none", "number", "per feature", "per sample", "full")


@dataclass(frozen=True)
class Problem:
    """Arguments of `reverse_sample`, or of `prior_loss` where `signal` is given."""

    program: DenoiserProgram
    z: Tensor  # z_short or z_long [batch, features]
    alpha: Tensor | None
    noise: Tensor | None
    seed: Tensor
    rows: list[Tensor]
    tables: list[Tensor]
    params: list[Tensor]
    grad: Tensor  # of the loss with respect to the result
    coefficients: tuple[float, ...] = ()
    samples: int = 1
    signal: Tensor | None = None
    sigma: Tensor | None = None
    prediction: str = "eps"
    frozen: frozenset[str] = field(default=frozenset())  # names that take no gradient

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every input that may take a gradient."""
        yield "z", self.z
        if self.alpha is not None:
            yield "alpha", self.alpha
        yield from ((f"r{i}", x) for i, x in enumerate(self.rows))
        yield from ((f"t{i}", x) for i, x in enumerate(self.tables))
        yield from ((f"p{i}", x) for i, x in enumerate(self.params) if i not in self.program.buffer_params)

    def map(self, f: object) -> Problem:
        """The same with `f` of every floating tensor."""
        assert callable(f)

        def each(x: Tensor | None) -> Tensor | None:
            return None if x is None else f(x)

        changed = {name: each(getattr(self, name)) for name in ("z", "alpha", "noise", "grad", "signal", "sigma")}
        lists = {name: [f(x) for x in getattr(self, name)] for name in ("rows", "tables", "params")}
        return replace(self, **changed, **lists)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda x: x.to(dtype))

    def run(
        self,
        backend: str,
        compute_dtype: torch.dtype | None = None,
        save: int = ops.SAVE_VALUES,
        create_graph: bool = False,
    ) -> Result:
        """The operator's results and, as "grad NAME", the gradients of everything that is not frozen."""
        name = str(compute_dtype or self.dtype).removeprefix("torch.")
        leaves = {key: x.detach().requires_grad_() for key, x in self.named() if key not in self.frozen}
        inputs = {key: leaves.get(key, x) for key, x in self.named()}
        rows = [inputs[f"r{i}"] for i in range(len(self.rows))]
        tables = [inputs[f"t{i}"] for i in range(len(self.tables))]
        params = [inputs.get(f"p{i}", x) for i, x in enumerate(self.params)]
        if self.signal is None:
            value, stats, _ = torch.ops.gdpd_kernels.reverse_sample(
                inputs["z"], inputs.get("alpha"), self.noise, self.seed, rows, tables, params, self.program.text,
                list(self.coefficients), self.samples, backend, name, save,
            )  # fmt: skip
            result = {"z_hat": value.detach(), "stats": stats}
        else:
            wanted = [i for i, x in enumerate([inputs["z"], *rows, *tables, *params]) if x.requires_grad]
            value, stats, _ = torch.ops.gdpd_kernels.prior_loss(
                inputs["z"], self.noise, self.seed, self.signal, self.sigma, rows, tables, params, self.program.text,
                self.prediction, backend, name, wanted,
            )  # fmt: skip
            result = {"loss": value.detach(), "stats": stats}
        if leaves:
            grads = torch.autograd.grad(value, list(leaves.values()), self.grad, create_graph=create_graph)
            result |= {f"grad {key}": grad for key, grad in zip(leaves, grads, strict=True)}
        return result


def draw_parameters(program: DenoiserProgram, generator: torch.Generator) -> list[Tensor]:
    """Parameters of a usual size, in float64 but representable in float32."""
    roles = dict.fromkeys(range(len(program.params)), "bias")
    for op in program.ops:
        for name in ("weight", "var"):
            if name in KINDS[op.kind].params and (index := op.param(name)) is not None:
                roles[index] = "scale"
    found = []
    for index, shape in enumerate(program.params):
        x = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            x = x / shape[-1] ** 0.5
        else:
            x = 1 + 0.2 * x.clamp(-3, 3) if roles[index] == "scale" else 0.3 * x
        found.append(x.double())
    return found


def sample_problem(
    program: DenoiserProgram,
    batch: int = 5,
    steps: int = 3,
    samples: int = 1,
    alpha: str = "none",
    noise: bool = True,
    eta: float = 0.0,
    window: str = "lower",
    seed: int = 0,
    frozen: Sequence[str] = (),
) -> Problem:
    """A call of `reverse_sample` in float64, with numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    features = program.features
    shapes = {
        "number": (1, 1),
        "per feature": (1, features),
        "per sample": (batch, 1),
        "full": (batch, features),
    }
    return Problem(
        program=program,
        z=normal(batch, features),
        alpha=None if alpha == "none" else torch.rand(shapes[alpha], generator=generator).double(),
        noise=normal(samples, batch, features) if noise else None,
        seed=torch.tensor(seed * 7919 + 2**40),
        rows=[normal(batch, width) for width in program.rows],
        tables=[normal(steps, width) for width in program.tables],
        params=draw_parameters(program, generator),
        grad=normal(samples * batch, features),
        coefficients=ddim_table(num_inference_steps=steps, window=window, eta=eta).flat,
        samples=samples,
        frozen=frozenset(frozen),
    )


def prior_problem(
    program: DenoiserProgram,
    batch: int = 5,
    prediction: str = "eps",
    noise: bool = True,
    seed: int = 0,
    frozen: Sequence[str] = (),
) -> Problem:
    """A call of `prior_loss` in float64, with numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    signal = torch.rand(batch, generator=generator)
    return Problem(
        program=program,
        z=normal(batch, program.features),
        alpha=None,
        noise=normal(batch, program.features) if noise else None,
        seed=torch.tensor(seed * 7919 - 2**40),
        rows=[normal(batch, width) for width in program.rows],
        tables=[normal(batch, width) for width in program.tables],
        params=draw_parameters(program, generator),
        grad=torch.tensor(1.7).double(),
        signal=signal.double(),
        sigma=(1 - signal**2).sqrt().double(),
        prediction=prediction,
        frozen=frozenset(frozen),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    programs: Callable[[float], st.SearchStrategy[DenoiserProgram]],
    batches: Sequence[int] = (1, 2, 31, 33, 100, 257),
) -> Problem:
    """Calls of either operator, with a program from a strategy that is told the eps of norms."""
    batch, seed = draw(st.sampled_from(batches)), draw(st.integers(0, 1000))
    program = draw(programs(NARROW_EPS if batch <= 2 else USUAL_EPS))
    if draw(st.integers(0, 3)) == 0:
        batch = max(batch, 2) if program.batch_norms else batch
        return prior_problem(program, batch, draw(st.sampled_from(("eps", "x0", "v"))), draw(st.booleans()), seed)
    samples = draw(st.sampled_from((1, 1, 1, 2, 3)))
    if program.batch_norms and samples * batch < 2:
        batch = 2
    return sample_problem(
        program,
        batch,
        steps=draw(st.sampled_from((1, 2, 5))),
        samples=samples,
        alpha=draw(st.sampled_from(ALPHAS)),
        noise=draw(st.booleans()),
        eta=draw(st.sampled_from((0.0, 0.0, 0.7))),
        window=draw(st.sampled_from(("lower", "full"))),
        seed=seed,
    )
