"""torch.nn.Module -> DenoiserProgram: capture, the cache of captures, and the captured denoiser that stays live.

`tracing` runs the module, `lowering` reads the trace; here a capture is checked against the module, kept for as long as
the module lives, and found again as long as nothing has changed that the forward pass could depend on.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode, _push_mode

from gdpd_kernels.agreement import check_agreement
from gdpd_kernels.library import is_plain
from gdpd_kernels.lowering import CaptureError, Lowered, lower
from gdpd_kernels.program import DenoiserProgram
from gdpd_kernels.prologue import Prologue
from gdpd_kernels.tracing import Trace, prediction_of, trace
from gdpd_kernels.watch import Reader, Watch, hook_obstacles

__all__ = ["CaptureError", "CapturedDenoiser", "capture"]

_COMPARED = (torch.float32, torch.float64, torch.int64)  # what numpy has too
# Whether a compiler can be handed a module as a constant. Where not, reverse_sample has the module itself compiled.
COMPILES: bool = torch.__version__ >= (2, 13)  # type: ignore[operator]

_KEPT_PER_MODULE = 8  # train and eval mode, with and without a condition, ...
_GUESSES = 6


@dataclass(frozen=True)
class _Recipe:
    """What a capture found out, without any tensor of the module: a compiled graph may keep it."""

    key: tuple[Any, ...]
    lowered: Lowered
    t_per_row: bool
    modes: tuple[tuple[str, bool], ...]
    untracked: dict[int, nn.Module]  # by width, BatchNorms that keep no statistics


class _Plan:
    """A recipe with short ways to the module's tensors. No reference to the module, so that the cache can let go."""

    def __init__(self, module: nn.Module, key: tuple[Any, ...], traced: Trace, lowered: Lowered) -> None:
        modes = tuple((path, submodule.training) for path, submodule in module.named_modules())
        untracked: dict[int, nn.Module] = {
            width: nn.BatchNorm1d(width, affine=False, track_running_stats=False)
            for width in lowered.batch_norms
            if isinstance(width, int)
        }
        self.recipe = _Recipe(key, lowered, traced.t_per_row, modes, untracked)
        self.key = key
        self.watch = Watch(module, traced.touched)
        prologues = lowered.params, lowered.tables, lowered.rows
        # A module that is itself a BatchNorm is looked up at every call, since nothing here may hold on to it.
        found = _batch_norms(module, self.recipe)
        self.batch_norms = None if module in found else found
        self.readers = {prologue: Reader(module, prologue.leaves) for prologue in prologues}
        self.kept: _KeptTables | None = None


def _batch_norms(module: nn.Module, recipe: _Recipe) -> list[nn.Module]:
    return [
        module.get_submodule(place) if isinstance(place, str) else recipe.untracked[place]
        for place in recipe.lowered.batch_norms
    ]


@dataclass(frozen=True)
class _KeptTables:
    """Tables of a frozen module, with copies of what they were made of."""

    steps: tuple[int, ...]
    leaves: list[Tensor]
    tables: list[Tensor]

    def holds(self, steps: tuple[int, ...], leaves: list[Tensor]) -> bool:
        """Whether they are the tables of these steps and tensors. The numbers are compared, not versions: writing to
        `tensor.data` changes no version. By numpy, five times as fast at it as torch.equal."""
        return self.steps == steps and all(
            a.dtype is b.dtype and a.shape == b.shape and bool((a.detach().numpy() == b.numpy()).all())
            for a, b in zip(leaves, self.leaves, strict=True)
        )


class _Failure:
    """A capture that did not succeed, kept so that the next call need not try again."""

    def __init__(self, module: nn.Module, key: tuple[Any, ...], error: CaptureError) -> None:
        self.key = key
        self.watch = Watch(module)
        self.reasons = error.reasons


class CapturedDenoiser:
    """A denoiser as a program, live: every call reads the module's tensors as they are at that moment.

    Made by `capture`. Copies and pickles as its module does; the copy is captured anew.

    Attributes:
        program: the `DenoiserProgram`.
        module: the module itself.
    """

    def __init__(self, module: nn.Module, recipe: _Recipe, plan: _Plan | None = None) -> None:
        self.module = module
        self.program: DenoiserProgram = recipe.lowered.program
        self._recipe = recipe
        self._plan = plan  # None in a compiled graph

    @property
    def batch_norms(self) -> list[nn.Module]:
        """The live BatchNorms in training mode, in the order of the program's batch statistics.

        Where no module keeps the statistics, a BatchNorm that tracks none stands in.
        """
        if self._plan is not None and self._plan.batch_norms is not None and not torch.compiler.is_compiling():
            return self._plan.batch_norms
        return _batch_norms(self.module, self._recipe)

    @property
    def cond_features(self) -> int | None:
        """Width of the condition, None for a denoiser captured without one."""
        width: int | None = self._recipe.key[1]
        return width

    def current(self) -> CapturedDenoiser:
        """This capture while it holds, else a new one of the module as it is now."""
        if self._plan is not None and not torch.compiler.is_compiling() and self._plan.watch.holds():
            return self
        return capture(self.module, *self._recipe.key)

    def parameters_now(self) -> list[Tensor]:
        """The tensors of `program.params`, in order, as differentiable functions of the module's parameters."""
        prologue = self._recipe.lowered.params
        return prologue.run(0, None, self._leaves(prologue))

    def tables(self, timesteps: Tensor) -> list[Tensor]:
        """What depends on the time step alone, for all steps at once.

        Args:
            timesteps: int64 [K].

        Returns:
            a tensor [K, width] for each of `program.tables`, differentiable.
        """
        prologue = self._recipe.lowered.tables
        return self._tables(timesteps, self._leaves(prologue)) if self.program.tables else []

    def tables_of(self, steps: tuple[int, ...], timesteps: Tensor) -> list[Tensor]:
        """`tables`, kept from call to call where no gradient is asked for and the tensors they are made of are equal.

        Args:
            steps: the time steps as numbers.
            timesteps: the same as int64 [K].

        Returns:
            as `tables`; not to be written to.
        """
        prologue = self._recipe.lowered.tables
        if not prologue.keeps or self._plan is None or torch.compiler.is_compiling():
            return self.tables(timesteps)
        leaves = self._leaves(prologue)
        if not (
            timesteps.is_cpu
            and is_plain(timesteps)
            and all(type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype in _COMPARED for x in leaves)
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in leaves))
            and not torch.is_autocast_enabled("cpu")
        ):
            return self._tables(timesteps, leaves)
        kept = self._plan.kept
        if kept is None or not kept.holds(steps, leaves):
            with torch.inference_mode(False), torch.no_grad():
                copies = [leaf.detach().clone() for leaf in leaves]
                kept = _KeptTables(steps, copies, self._tables(timesteps, copies))
            self._plan.kept = kept
        return kept.tables

    def _tables(self, timesteps: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        prologue = self._recipe.lowered.tables
        if self._recipe.t_per_row:
            return prologue.run(timesteps.shape[0], timesteps, leaves)
        return [x.flatten(1) for x in torch.vmap(lambda t: prologue.run(1, t, leaves))(timesteps)]

    def rows(self, cond: Tensor | None) -> list[Tensor]:
        """What depends on the condition alone.

        Args:
            cond: [batch, cond_features], or None for a denoiser without a condition.

        Returns:
            a tensor [batch, width] for each of `program.rows`, differentiable.
        """
        prologue = self._recipe.lowered.rows
        if cond is None or not self.program.rows:
            return []
        return prologue.run(cond.shape[0], cond, self._leaves(prologue))

    def call_module(self, z: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Call the module itself: a prediction [batch, features].

        Args:
            z: [batch, features].
            t: int64 [batch], one and the same time step for all rows where the module takes it as one number.
            cond: [batch, cond_features], or None.
        """
        map_input = self._recipe.key[2]
        given = [z[:, :, None, None] if map_input else z, t if self._recipe.t_per_row else t[0]]
        predicted: Tensor = prediction_of(self.module(*given, *([] if cond is None else [cond])))
        return predicted.flatten(1) if map_input and isinstance(predicted, Tensor) else predicted

    def _leaves(self, prologue: Prologue) -> list[Tensor]:
        # A compiler has to see the way from the module to its tensors; in eager mode the short way is faster.
        if self._plan is None or torch.compiler.is_compiling():
            return [leaf.find(self.module) for leaf in prologue.leaves]
        return self._plan.readers[prologue].read()

    def __repr__(self) -> str:
        return f"CapturedDenoiser({type(self.module).__name__})\n{self.program}"

    def __reduce__(self) -> tuple[Any, ...]:
        return capture, (self.module, *self._recipe.key)


_cache: weakref.WeakKeyDictionary[nn.Module, list[_Plan | _Failure]] = weakref.WeakKeyDictionary()


def capture(
    module: nn.Module,
    features: int | None = None,
    cond_features: int | None = None,
    map_input: bool = False,
) -> CapturedDenoiser:
    """Capture a denoiser as a program that every backend can run.

    The module's forward is run once on tensors without data, in its present mode (train or eval, per submodule), and
    the result is checked against the module on random numbers. Captures are cached; a layer replaced, a mode
    switched, ``.to(...)``, a plain attribute set to another value, a hook are noticed at the next call. A module with
    hooks on its calls is not captured, since a program makes no calls that they could see.

    Args:
        module: ``module(z, t)``, or ``module(z, t, cond)``, with z [batch, features] and t int64 [batch] (or, for
            modules that take no vector there, 0-d), that returns a prediction of z's shape, or an object with the
            prediction as its ``sample``, as models of diffusers do.
        features: width of z; inferred from the layers if None.
        cond_features: width of the condition; None for a denoiser that takes none.
        map_input: z is a 1 × 1 map [batch, features, 1, 1], as in the releases of DiffKD and GDPD.

    Returns:
        the captured denoiser, live: it reads the module's parameters at every use.

    Raises:
        CaptureError: the module cannot be captured; the message names every obstacle with its module path, operation
            and reason.
        TypeError, ValueError: an argument that is no module, or no width.
    """
    key = (features, cond_features, map_input)
    if torch.compiler.is_compiling():
        if not COMPILES:
            raise CaptureError(["torch.compile: before torch 2.13 its graphs take no capture; the module is compiled"])
        return _capture_in_graph(module, key)
    plan = _plan(module, key)
    if isinstance(plan, _Failure):
        raise CaptureError(plan.reasons)
    return CapturedDenoiser(module, plan.recipe, plan)


def _plan(module: nn.Module, key: tuple[Any, ...]) -> _Plan | _Failure:
    """The plan that holds for the module now, from the cache or made."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    kept = _cache.get(module)
    if kept is None:
        kept = _cache.setdefault(module, [])
    for plan in kept:
        if plan.key == key and plan.watch.holds():
            return plan
    plan = _make(module, key)
    if len(kept) >= _KEPT_PER_MODULE:
        changed = kept[-1].watch.differences()
        if changed:
            warnings.warn(
                f"{type(module).__name__} is captured anew again and again, since {', '.join(changed)} changes between "
                "calls; make it a buffer, or do not change it",
                stacklevel=4,
            )
        del kept[0]
    kept.append(plan)
    return plan


def _make(module: nn.Module, key: tuple[Any, ...]) -> _Plan | _Failure:
    features, cond_features, map_input = key
    for name, value in (("features", features), ("cond_features", cond_features)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; a width is an integer of at least 1, or None")
    hooks = hook_obstacles(module)
    if hooks:
        return _Failure(module, key, CaptureError(hooks))
    candidates = [features] if features is not None else list(dict.fromkeys(_widths(module)))[:_GUESSES]
    errors: list[CaptureError] = []
    for width in candidates:
        # Modules that take t as one number for the whole batch fail on a vector.
        for t_per_row in (True, False):
            traced = trace(module, width, cond_features, map_input, t_per_row)
            try:
                plan = _Plan(module, key, traced, lower(traced, width))
                check_agreement(CapturedDenoiser(module, plan.recipe, plan), traced, cond_features, map_input)
                return plan
            except CaptureError as error:
                # Of two failures, the one whose run came to its end says more.
                errors.insert(len(errors) if traced.output is None else 0, error)
            if traced.output is not None:
                break
    if features is None and len(candidates) != 1:
        tried = ", ".join(map(str, candidates)) or "no layer tells it"
        hint = f"the width of z could not be inferred ({tried}); give features=..."
        return _Failure(module, key, CaptureError([hint, *(errors[0].reasons if errors else [])]))
    return _Failure(module, key, errors[0])


def _widths(module: nn.Module) -> Iterator[int]:
    """Guesses of the width of z, best first."""
    own = getattr(module, "features", None)
    if isinstance(own, int) and own > 0:
        yield own
    for submodule in module.modules():
        for name in ("in_features", "in_channels", "num_features", "embedding_dim", "out_features"):
            value = getattr(submodule, name, None)
            if isinstance(value, int):
                yield value


# What compiled graphs refer to: by name, since a compiler can take a text for a constant, but no object.
_in_graphs: dict[str, _Recipe | list[str]] = {}


@contextmanager
def _unseen() -> Iterator[None]:
    """Without the modes by which torch.export follows functions: it would write down a capture's gradient modes."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def _recipe_name(module: nn.Module, features: int | None, cond_features: int | None, map_input: bool) -> str:
    with _unseen():
        plan = _plan(module, (features, cond_features, map_input))
    found = plan.reasons if isinstance(plan, _Failure) else plan.recipe
    if isinstance(found, _Recipe):
        # Worked out beforehand: a compiler cannot look into the lock that guards a cached property.
        program = found.lowered.program
        for name, member in vars(type(program)).items():
            if isinstance(member, cached_property):
                getattr(program, name)
    name = f"{type(module).__name__}{id(found)}"
    _in_graphs[name] = found
    return name


# What torch.compiler.assume_constant_result does, without importing the compiler where nothing is compiled.
_recipe_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _capture_in_graph(module: nn.Module, key: tuple[Any, ...]) -> CapturedDenoiser:
    """Capture while torch.compile traces the caller: what is found is a constant of the graph."""
    recipe = _in_graphs[_recipe_name(module, *key)]
    if isinstance(recipe, list):
        raise CaptureError(recipe)
    # Reading the modes here makes the compiler guard on them.
    for path, training in recipe.modes:
        if module.get_submodule(path).training != training:
            raise CaptureError([f"{path}: its mode changed while it was captured"])
    return CapturedDenoiser(module, recipe)
