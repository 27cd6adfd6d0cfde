"""Every option of a run in one frozen dataclass; the CLI, YAML files and `PrefixClassifier` all end here.

A `RunConfig` is checked when it is made, so that what can be refused is refused before any data is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpd.methods import METHODS
from gdpd.options import coerce, keywords, nearest, option


@dataclass(frozen=True)
class RunConfig:
    """Options of one run: one dataset, one seed, one method, one earliness.

    Each field's help line, unit and admissible names stand beside its default; `describe()` lists them.
    Defaults follow the recipe of the GDPD paper's public release (arXiv 2605.11414) unless the help line says
    otherwise.

    Raises:
        ValueError: a value outside its limits, named with the limit and the way out.
        TypeError: a value of a type that the option cannot be read from.
    """

    # -- data ----------------------------------------------------------------------------------------------
    dataset: str = option("GunPoint", "Name of a dataset, or path of a UCR/UEA folder or file.", group="data")
    data_dir: str | None = option(
        None,
        "Folder of UCR/UEA dataset folders searched before the bundled sets.",
        group="data",
        changes_result=False,
    )
    earliness: float = option(
        0.5,
        "Share of the series that the student may read: the first int(earliness * length) steps.",
        unit="fraction of the length, in (0, 1]",
        group="data",
    )
    prefix_mode: str = option(
        "raw",
        "Read the prefix as it is, or stretched back to full length by linear interpolation (as in the release).",
        group="data",
        choices=("raw", "stretch"),
    )
    student_part: str = option(
        "prefix",
        "Which steps of a series the student reads: the first (early classification) or the last. "
        "The teacher reads all.",
        group="data",
        choices=("prefix", "suffix"),
    )
    student_channels: tuple[int, ...] = option(
        (), "Channels that the student reads, from 0 (none given: all). The teacher reads all.", group="data"
    )
    normalisation: str = option(
        "none",
        "Scaling of the inputs: none, per series over its prefix only, or by training statistics.",
        group="data",
        choices=("none", "prefix", "train"),
    )
    resample_to: int | None = option(
        100,
        "Longest series kept as it is; longer ones are resampled to this length (null: never).",
        unit="time steps",
        group="data",
    )
    missing: str = option(
        "error", "What to do with missing values (NaN).", group="data", choices=("error", "interpolate", "forward")
    )
    validation_fraction: float = option(
        0.2,
        "Share of the training series held out, by class, to select on.",
        unit="fraction of the training series, in (0, 0.5]",
        group="data",
    )
    seed: int = option(1, "Seed of the split, the weights, the batch order and the noise.", group="data")

    # -- models --------------------------------------------------------------------------------------------
    teacher_model: str = option("lstm3-100", "Network of the teacher, by name.", group="models")
    student_model: str = option("lstm3-100", "Network of the student, by name.", group="models")
    teacher_options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=keywords("Keyword options of the teacher's network.", group="models")
    )
    student_options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=keywords("Keyword options of the student's network.", group="models")
    )

    # -- method --------------------------------------------------------------------------------------------
    method: str = option(
        "gdpd",
        "Training method of the student: a name, or a class of your own as package.module:Class.",
        group="method",
        choices=tuple(METHODS),
    )
    class_weight: str = option(
        "none",
        "Weights of the classes in every cross-entropy, the teacher's too: none, or balanced "
        "(series / (classes * series of the class), as in scikit-learn).",
        group="method",
        choices=("none", "balanced"),
    )
    loss_ratio: float = option(1.0, "Weight r of every loss beside the cross-entropy.", group="method")
    hinton: bool = option(
        True,
        "GDPD: add Hinton's distillation loss with weight r (in the release, not in the paper's formula).",
        group="method",
    )
    temperature: float = option(2.0, "Temperature of Hinton's distillation loss.", group="method")
    freeze_prior: bool = option(
        False,
        "GDPD: fix denoiser and autoencoder after the warm-up (in the release the denoiser learns on).",
        group="method",
    )
    num_samples: int = option(
        1,
        "GDPD: noise draws per series and step over which the loss is averaged.",
        unit="samples",
        group="method",
    )
    alpha: str | float = option(
        "per_sample",
        "GDPD: mixing weight of the start z = alpha z_short + (1 - alpha) eps: per_sample or "
        "per_dimension (learned), or a fixed number in [0, 1].",
        group="method",
    )
    target_space: str = option(
        "autoencoder",
        "GDPD: space of the prior: a learned code of the teacher's feature, or the feature itself.",
        group="method",
        choices=("autoencoder", "identity"),
    )
    method_options: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=keywords(
            "Further keyword options of the method's class, for methods that have their own.", group="method"
        ),
    )

    # -- prior ---------------------------------------------------------------------------------------------
    denoiser: str = option(
        "bottleneck", "GDPD, DiffKD: network of the prior.", group="prior", choices=("bottleneck", "wide", "mlp")
    )
    denoiser_options: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=keywords("Keyword options of the denoiser, such as norm, blocks, reduction or hidden.", group="prior"),
    )
    num_train_timesteps: int = option(1000, "Length T of the diffusion.", unit="time steps", group="prior")
    num_inference_steps: int = option(5, "Steps K of the reverse sampler.", unit="steps", group="prior")
    window: str = option(
        "lower",
        "Walk the whole grid of K steps, or the lower half of a grid of 2K.",
        group="prior",
        choices=("full", "lower"),
    )
    beta_schedule: str = option(
        "linear", "Noise schedule.", group="prior", choices=("linear", "scaled_linear", "cosine", "flow")
    )
    beta_start: float = option(1e-4, "First beta of the linear schedules.", group="prior")
    beta_end: float = option(0.02, "Last beta of the linear schedules.", group="prior")
    eta: float = option(0.0, "Noise of the sampler's steps: 0 is DDIM, 1 ancestral.", group="prior")
    backend: str = option("auto", "Backend of the sampler (see `gdpd info`).", group="prior")

    # -- training ------------------------------------------------------------------------------------------
    epochs: int = option(600, "Epochs of the student, warm-up included.", unit="epochs", group="training")
    warmup_epochs: int | None = option(
        None,
        "Epochs of the first stage, of methods that have one (null: half of all). GDPD: the prior is learned; "
        "Fits: the hint; DT2W: cross-entropy alone.",
        unit="epochs",
        group="training",
    )
    teacher_epochs: int = option(300, "Epochs of the teacher.", unit="epochs", group="training")
    batch_size: int = option(
        64,
        "Series per step; a last batch of a single series joins the one before.",
        unit="series",
        group="training",
    )
    learning_rate: float = option(1e-3, "Learning rate of Adam at the start.", group="training")
    weight_decay: float = option(1e-5, "L2 penalty of Adam.", group="training")
    lr_schedule: str = option(
        "constant",
        "Learning rate per epoch: constant, times lr_gamma at each milestone, or half a cosine.",
        group="training",
        choices=("constant", "multistep", "cosine"),
    )
    lr_milestones: tuple[int, ...] = option(
        (), "Epochs at which lr_schedule=multistep lowers the rate.", unit="epochs", group="training"
    )
    lr_gamma: float = option(0.5, "Factor of lr_schedule=multistep.", group="training")
    gradient_clip: float | None = option(
        1.0,
        "Largest l2 norm of the whole gradient (null: not clipped, as in the release).",
        group="training",
    )
    selection: str = option(
        "best_val",
        "Weights kept: best on validation data (after the warm-up), those of the last epoch, or the average "
        "over the last average_epochs.",
        group="training",
        choices=("best_val", "last", "average"),
    )
    selection_metric: str = option(
        "ce",
        "What selection=best_val compares: cross-entropy, AUC-PRC or accuracy (ties: cross-entropy).",
        group="training",
        choices=("ce", "auc_prc", "accuracy"),
    )
    average_epochs: int = option(20, "Epochs that selection=average averages over.", unit="epochs", group="training")
    teacher_candidates: int = option(
        1,
        "Teachers trained from different starts; the best on validation data is kept.",
        unit="teachers",
        group="training",
    )
    teacher_retries: int = option(
        2,
        "Further teachers tried while the best is not clearly better than chance.",
        unit="teachers",
        group="training",
    )
    weak_teacher: str = option(
        "warn",
        "What to do when the best teacher is not clearly better than chance.",
        group="training",
        choices=("warn", "error"),
        changes_result=False,
    )

    # -- machine -------------------------------------------------------------------------------------------
    accelerator: str = option("cpu", "Lightning Fabric's accelerator: cpu, cuda, auto.", group="machine")
    devices: int = option(1, "Devices to train on.", unit="devices", group="machine")
    strategy: str = option(
        "auto",
        "Lightning Fabric's strategy (ddp where there are several devices).",
        group="machine",
        choices=("auto", "ddp"),
    )
    precision: str = option(
        "32-true",
        "Precision of training: float32, bfloat16 where it is safe, or float64.",
        group="machine",
        choices=("32-true", "bf16-mixed", "64-true"),
    )
    flush_denormal: bool = option(
        True,
        "Flush subnormal floats to zero in every compute thread (they slow LSTM training on CPUs).",
        group="machine",
    )
    graph_step: bool = option(
        False,
        "Record the training step as a CUDA graph and replay it (accelerator=cuda, one device).",
        group="machine",
    )
    teacher_dir: str | None = option(
        None,
        "Folder in which trained teachers are shared between runs (null: none shared).",
        group="machine",
        changes_result=False,
    )
    teacher_memory: int = option(
        256,
        "Largest size at which what the teacher makes of the training set is kept in memory; above, it is a "
        "memory-mapped file in teacher_dir, or a temporary one.",
        unit="MiB",
        group="machine",
        changes_result=False,
    )
    checkpoint_every: int = option(
        20, "Epochs between checkpoints.", unit="epochs", group="machine", changes_result=False
    )
    clean_checkpoints: bool = option(
        True, "Delete the checkpoints of a run that has ended well.", group="machine", changes_result=False
    )
    tensorboard: bool = option(False, "Write TensorBoard event files too.", group="machine", changes_result=False)

    def __post_init__(self) -> None:
        for name, hint in _type_hints(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, coerce(name, getattr(self, name), hint))
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            own_class = field.name == "method" and ":" in value
            if choices and value not in choices and not own_class:
                raise ValueError(
                    f"{field.name}={value!r} is not known{nearest(value, choices)}. One of: {', '.join(choices)}."
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        check_earliness(self.earliness)
        if not 0.0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} is outside (0, 0.5]. "
                "Selection needs validation series; the usual share is 0.2."
            )
        for name in (
            "num_samples",
            "num_train_timesteps",
            "num_inference_steps",
            "epochs",
            "teacher_epochs",
            "batch_size",
            "average_epochs",
            "teacher_candidates",
            "devices",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1. Give a whole number of at least 1.")
        for name in ("loss_ratio", "weight_decay", "eta", "teacher_retries", "teacher_memory"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number of at least 0.")
        for name in ("learning_rate", "temperature", "lr_gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number above 0.")
        if self.resample_to is not None and self.resample_to < 2:
            raise ValueError(f"resample_to={self.resample_to} is below 2. Give at least 2 time steps, or null.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip={self.gradient_clip} is not above 0. Give a norm, or null for none.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is outside 0..2**32-1. Give a whole number in that range.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end}: needed is 0 < beta_start <= beta_end < 1."
            )
        grid = self.num_inference_steps * (2 if self.window == "lower" else 1)
        if grid > self.num_train_timesteps:
            most = self.num_train_timesteps * self.num_inference_steps // grid
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} with window={self.window!r} needs a grid of "
                f"{grid} steps, more than num_train_timesteps={self.num_train_timesteps}. Lower "
                f"num_inference_steps to at most {most}, or use a longer diffusion."
            )
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} is outside 0..{self.epochs - 1}: at least one of the "
                f"{self.epochs} epochs must follow the warm-up."
            )
        if isinstance(self.alpha, str):
            if self.alpha not in ("per_sample", "per_dimension"):
                raise ValueError(
                    f"alpha={self.alpha!r} is not known{nearest(self.alpha, _ALPHAS)}. "
                    "One of: per_sample, per_dimension, or a number in [0, 1]."
                )
        elif not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]. It is the share of z_short in the start.")
        if min(self.student_channels, default=0) < 0 or len(set(self.student_channels)) < len(self.student_channels):
            raise ValueError(
                f"student_channels={self.student_channels} holds a channel below 0, or one twice. Count from 0."
            )
        if self.student_part == "suffix" and self.method_options.get("align") == "steps":
            raise ValueError(
                "align='steps' compares step i of the student with step i of the teacher, which are of other times "
                "with student_part='suffix'. Use align='stretch'."
            )
        if any(m < 1 for m in self.lr_milestones):
            raise ValueError(f"lr_milestones={self.lr_milestones} holds an epoch below 1.")

    @property
    def warmup(self) -> int:
        """Number of warm-up epochs that `warmup_epochs` stands for (half of all, when it is null)."""
        return self.epochs // 2 if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain values that JSON and YAML can hold (tuples become lists)."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> RunConfig:
        """A configuration from a mapping of option names to values; what is left out keeps its default.

        Raises:
            ValueError: an unknown key, with the nearest known one; or a value outside its limits.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = [str(key) for key in options if key not in names]
        if unknown:
            told = "; ".join(f"{key!r}{nearest(key, names)}" for key in unknown)
            raise ValueError(f"unknown option {told}. `gdpd distill --help` lists every option.")
        return cls(**options)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> RunConfig:
        """A configuration from a YAML file of `option: value` lines; keyword arguments win over the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not YAML, or not a mapping; an unknown key; a value outside its limits.
        """
        import yaml

        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        read = {} if read is None else read
        if not isinstance(read, dict):
            raise ValueError(f"{path} holds a {type(read).__name__}, not lines of the form 'option: value'.")
        try:
            return cls.from_dict({**read, **overrides})
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error

    def replace(self, **changes: Any) -> RunConfig:
        """The same configuration with some options changed (unknown keys are errors)."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Options that change results and differ: name -> (value here, value in `other`)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            f.name: (mine[f.name], theirs[f.name])
            for f in dataclasses.fields(self)
            if f.metadata["changes_result"] and mine[f.name] != theirs[f.name]
        }

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """One row per option: name, type (as written), default, unit, help, group, choices, changes_result."""
        rows = []
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else {}
            row = {"name": field.name, "type": str(field.type), "default": default}
            told = ("unit", "help", "group", "choices", "changes_result")
            rows.append({**row, **{k: field.metadata[k] for k in told}})
        return rows


_ALPHAS = ("per_sample", "per_dimension")


@functools.cache  # a grid makes thousands of configurations
def _type_hints(of: type) -> dict[str, Any]:
    return typing.get_type_hints(of)


def check_earliness(earliness: float) -> None:
    """Raise ValueError unless `earliness` is in (0, 1]."""
    if not 0.0 < earliness <= 1.0:
        raise ValueError(
            f"earliness={earliness} is outside (0, 1]. It is the share of the series that the student "
            "reads: 0.2 for the first fifth, 1 for all of it."
        )
