"""`DDIMPipeline`, in the place of the class of that name in DiffKD-style trainers: one import is all that changes.

Trainers of that family keep features as maps [batch, C, H, W] and walk diffusers' DDIM scheduler over them. Maps of one
pixel, which is what pooled features are, go to the fused operator; larger maps walk the same steps one by one.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import gdpd_kernels as gk
from gdpd_kernels.backends import reference
from gdpd_kernels.library import transformed
from gdpd_kernels.tracing import prediction_of


class DDIMPipeline:
    """The reverse process of a DiffKD-style trainer (arXiv 2305.15712), with gradients, as one operation.

    Starts at ``alpha feat + (1 - alpha) eps`` with ``alpha = noise_adapter(feat)`` (at `feat` itself without an
    adapter) and walks the lower half of a grid of twice as many steps, unclipped. eps is drawn as
    ``torch.randn((batch_size, *shape))``, so a loop written out gives the same from the same random state.

    The model is read at every call as it is then: new weights, train and eval mode, frozen parameters, layers replaced.
    BatchNorms in training mode use and update their statistics as if the model had been called at every step. A model
    with hooks, or one that cannot be captured, runs itself, step by step; so do maps of more than one pixel. Either is
    told once, as a `gdpd_kernels.BackendFallback` warning.

    Args:
        model: the denoiser, ``model(z [batch, C, H, W], t)`` with t int64, 0-d or [batch], that returns a prediction of
            z's shape (or an object with it as its ``sample``).
        scheduler: has ``alphas_cumprod`` [T], ``num_train_timesteps`` (or ``config.num_train_timesteps``) and
            ``set_timesteps(n)``, which sets ``timesteps``, in the manner of diffusers' ``DDIMScheduler``. Its
            ``prediction_type`` is followed; ``clip_sample`` and ``thresholding`` have to be off.
        noise_adapter: ``noise_adapter(feat)`` returns one mixing weight alpha per sample, of any shape with `batch`
            elements. None: the reverse process starts at `feat`.
        solver: "ddim", the only one.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a scheduler outside this contract, by attribute.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Any],
        scheduler: Any,
        noise_adapter: Callable[[Tensor], Tensor] | None = None,
        solver: str = "ddim",
    ) -> None:
        if solver != "ddim":
            raise ValueError(f"solver is {solver!r}; only 'ddim' is there")
        for name, value in (("model", model), ("noise_adapter", noise_adapter)):
            if not callable(value) and not (name == "noise_adapter" and value is None):
                raise TypeError(f"{name}: expected a module or function, got {type(value).__name__}")
        _check_scheduler(scheduler)
        self.model = model
        self.scheduler = scheduler
        self.noise_adapter = noise_adapter
        self.solver = solver
        self._enroll()

    def _enroll(self) -> None:
        self._tables: dict[tuple[Any, ...], tuple[Tensor, gk.DDIMTable]] = {}
        self._name = f"pipeline{next(_numbers)}"
        _pipelines[self._name] = self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_tables", "_name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enroll()

    def __call__(
        self,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        shape: Sequence[int],
        feat: Tensor,
        generator: torch.Generator | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 5,
        proj: Any = None,
    ) -> Tensor:
        """The denoised features.

        Args:
            batch_size, device, dtype, shape: those of `feat`, shape without the batch: (C, H, W). `dtype` is that of
                the start's noise.
            feat: what is denoised, [batch, C, H, W], floating.
            generator: draws the noise; torch's default generator if None.
            eta: 0 for DDIM; above, each step adds noise. The fused operator draws that noise itself, from a key that
                `generator` gives: it is not the noise of a loop.
            num_inference_steps: n; the lower n steps of a grid of 2 n are walked.
            proj: not used, as in the trainers that pass it: they apply their projection to the result.

        Returns:
            [batch, C, H, W], differentiable in `feat`, the adapter's weights and the model's parameters; in the
            dtype of `feat` (float32 under autocast).

        Raises:
            TypeError, ValueError: an argument that does not fit, by name.
        """
        _check_call(batch_size, device, dtype, shape, feat, num_inference_steps)
        feat = feat.to(torch.promote_types(feat.dtype, dtype))
        alpha = eps = None
        if self.noise_adapter is not None:
            eps = _randn(feat, dtype, generator)
            alpha = _per_sample(self.noise_adapter(feat), feat)
        if torch.compiler.is_compiling():
            # Constants of the graph, also where all numbers are to be dynamic.
            steps = operator.index(num_inference_steps)
            table = _of_graphs[_table_name(f"{self._name} {steps} {0 if eta == 0 else eta}")]
        else:
            table = self.table(num_inference_steps, eta)
        captured = self._captured(feat)
        if captured is None:
            return self._loop(feat, alpha, eps, table, generator)
        z_hat = gk.reverse_sample(
            captured,
            feat.flatten(1),
            table=table,
            alpha=alpha,
            noise=None if eps is None else eps.flatten(1),
            seed=_seed(generator, feat.device) if table.stochastic else None,
        )
        return z_hat.view(feat.shape)

    def table(self, num_inference_steps: int = 5, eta: float = 0.0) -> gk.DDIMTable:
        """The steps that are walked, with their coefficients; sets the scheduler's ``timesteps``, as a loop would.

        Raises:
            ValueError: the scheduler gives steps, or has attributes, outside the contract; the message names them.
        """
        steps = 2 * num_inference_steps
        self.scheduler.set_timesteps(steps)
        given = getattr(self.scheduler, "timesteps", None)
        if given is None or len(given) != steps:
            got = "none" if given is None else str(len(given))
            raise ValueError(f"scheduler: set_timesteps({steps}) has to set {steps} timesteps; it set {got}")
        walked = tuple(map(int, given[num_inference_steps:]))
        alphas = self.scheduler.alphas_cumprod
        prediction = _option(self.scheduler, "prediction_type", "epsilon")
        to_one = _lands_on_one(self.scheduler)
        key = walked, float(eta), prediction, to_one
        kept = self._tables.get(key)
        if kept is None or not torch.equal(kept[0], alphas):
            _check_scheduler(self.scheduler)
            table = gk.ddim_table(
                timesteps=walked,
                alphas_cumprod=alphas,
                eta=eta,
                prediction=prediction,
                set_alpha_to_one=to_one,
                previous=max(1, len(alphas) // steps),
            )
            self._tables[key] = kept = alphas.detach().clone(), table
        return kept[1]

    def _captured(self, feat: Tensor) -> gk.CapturedDenoiser | None:
        """The model as a program, or None where it has to run itself."""
        batch, channels, height, width = feat.shape
        if height != 1 or width != 1:
            _note(f"feat is a map of {height} × {width} pixels and only maps of 1 × 1 are fused")
        elif not isinstance(self.model, torch.nn.Module):
            _note(f"model is a {type(self.model).__name__} and only an nn.Module can be captured")
        elif batch < 1:
            _note("feat has no rows")
        elif transformed():
            _note("a transform of torch.func (vmap, grad, jvp, ...) or forward mode is active")
        else:
            try:
                return gk.capture(self.model, features=operator.index(channels), map_input=True)
            except gk.CaptureError as error:
                _note(str(error))
        return None

    def _loop(
        self,
        feat: Tensor,
        alpha: Tensor | None,
        eps: Tensor | None,
        table: gk.DDIMTable,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The reverse process as it would be written out: K calls of the model, each followed by a DDIM update."""
        z = feat if alpha is None or eps is None else reference.noise_fused_init(feat, alpha[:, :, None, None], eps)

        def model(z: Tensor, k: int) -> Tensor:
            predicted = prediction_of(self.model(z, torch.tensor(table.timesteps[k], device=z.device)))
            if not isinstance(predicted, Tensor) or predicted.shape != z.shape:
                got = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
                raise ValueError(f"model: returned {got}; expected a prediction of shape {tuple(z.shape)}")
            return predicted

        def step_noise(_k: int) -> Tensor:
            return _randn(z, z.dtype, generator)

        return reference.reverse_loop(model, z, table.coefficients, step_noise)


_numbers = itertools.count()
_pipelines: weakref.WeakValueDictionary[str, DDIMPipeline] = weakref.WeakValueDictionary()
_of_graphs: dict[str, gk.DDIMTable] = {}  # what compiled graphs refer to, by a text that they can take for a constant


def _table_name(asked: str) -> str:
    """The steps, worked out while a graph is traced: schedulers count them with numpy, which no graph should hold.

    `asked` is the pipeline's name, the number of steps and eta, in one text.
    """
    pipeline, steps, eta = asked.split()
    _of_graphs[asked] = _pipelines[pipeline].table(int(steps), float(eta))
    return asked


# What torch.compiler.assume_constant_result does, without importing the compiler where nothing is compiled.
_table_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _note(reason: str) -> None:
    if not torch.compiler.is_compiling():  # which no warning would get out of
        _note_once(reason)


@cache
def _note_once(reason: str) -> None:
    warnings.warn(f"running the model itself, step by step: {reason}", gk.BackendFallback, stacklevel=5)


def _seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def _randn(like: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.compile cannot trace generator=None with a dynamic batch
        return torch.randn(like.shape, device=like.device, dtype=dtype)
    return torch.randn(like.shape, device=like.device, dtype=dtype, generator=generator)


def _per_sample(alpha: Any, feat: Tensor) -> Tensor:
    """The adapter's weights as [batch, 1]."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"noise_adapter: returned {type(alpha).__name__}; expected a tensor, one weight per sample")
    if alpha.numel() != len(feat) or not alpha.is_floating_point():
        raise ValueError(
            f"noise_adapter: returned shape {tuple(alpha.shape)}, {alpha.dtype}; expected one floating weight for each "
            f"of {len(feat)} samples"
        )
    return alpha.reshape(-1, 1)


def _check_call(batch_size: Any, device: Any, dtype: Any, shape: Any, feat: Any, num_inference_steps: Any) -> None:
    if not isinstance(feat, Tensor):
        raise TypeError(f"feat: expected a tensor [batch, C, H, W], got {type(feat).__name__}")
    if feat.dim() != 4 or not feat.is_floating_point():
        raise ValueError(
            f"feat has shape {tuple(feat.shape)}, {feat.dtype}; expected floating [batch, C, H, W] "
            "(vectors: feat[:, :, None, None])"
        )
    if batch_size != feat.shape[0]:
        raise ValueError(f"batch_size is {batch_size!r}, feat has {feat.shape[0]} rows; pass feat.shape[0]")
    if tuple(shape) != tuple(feat.shape[1:]):
        raise ValueError(f"shape is {tuple(shape)}, feat has {tuple(feat.shape[1:])} per sample; pass feat.shape[1:]")
    asked = torch.device(device)
    if asked.type != feat.device.type or asked.index not in (None, feat.device.index):
        raise ValueError(f"device is {asked}, feat is on {feat.device}; pass feat.device")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a floating torch dtype, such as feat.dtype")
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}; expected an integer of at least 1")


def _option(scheduler: Any, name: str, default: Any) -> Any:
    """A setting of the scheduler: of its configuration if it is there, else of itself."""
    config = getattr(scheduler, "config", {})
    if not isinstance(config, dict):
        config = vars(config)
    return config[name] if name in config else getattr(scheduler, name, default)


def _check_scheduler(scheduler: Any) -> None:
    missing = [name for name in ("alphas_cumprod", "set_timesteps") if not hasattr(scheduler, name)]
    if missing:
        raise TypeError(
            f"scheduler: {type(scheduler).__name__} has no {' and no '.join(missing)}; expected one like diffusers' "
            "DDIMScheduler"
        )
    alphas = scheduler.alphas_cumprod
    if not isinstance(alphas, Tensor) or alphas.dim() != 1:
        raise TypeError("scheduler: alphas_cumprod has to be a tensor [num_train_timesteps]")
    steps = _option(scheduler, "num_train_timesteps", None)
    if steps != len(alphas):
        raise ValueError(
            f"scheduler: num_train_timesteps is {steps!r}, but alphas_cumprod has {len(alphas)} entries; they have to "
            "be the same"
        )
    for name in ("clip_sample", "thresholding"):
        if _option(scheduler, name, False):
            raise ValueError(
                f"scheduler: {name} is on, but features have no bounds to clip at and the fused steps are linear; "
                f"make the scheduler with {name}=False"
            )


def _lands_on_one(scheduler: Any) -> bool:
    """Whether the last step lands on alpha_bar = 1, or on that of training step 0."""
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    if final != 1.0 and not math.isclose(final, float(scheduler.alphas_cumprod[0]), rel_tol=1e-6):
        raise ValueError(
            f"scheduler: final_alpha_cumprod is {final}; expected 1 (set_alpha_to_one=True) or alphas_cumprod[0]"
        )
    return final == 1.0
