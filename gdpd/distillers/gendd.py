"""GenDD: generative distribution distillation (arXiv 2507.14503), a diffusion head conditioned on the student."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.denoisers import AdaLNDenoiser
from gdpd.distillers.base import Batch, Distiller, class_logits, taught
from gdpd.embedded import EmbeddedHead, embed_tokens
from gdpd.guidance import GuidedDenoiser
from gdpd.models import Classifier
from gdpd.options import nearest
from gdpd.probe import LinearProbe
from gdpd.tokens import token_split
from gdpd.variance import LearnedRange, ancestral_sample
from gdpd_kernels.ranges import span

TARGETS = ("labels", "soft", "means", "none")
VARIANCES = ("learned", "posterior")


class GenDD(Distiller):
    """A diffusion head learns the teacher's feature given the student's, and the student's feature learns through it.

    With f the teacher's feature, c = LayerNorm(z_short), w_y the teacher classifier's row of class y:

    - x0 = (1 - s) f + s w_y, cut in tokens; (c, x0) mixed with those of another series, with one share for the batch;
    - every token, `repeats` times, with t and noise of its own: the head's MSE of the noise plus, for the variance, the
      variational term; gradients reach the student through c;
    - a linear probe reads the detached feature, standardised, and learns by cross-entropy (`gdpd.probe`). Every call of
      `loss` writes it, with the standardisation folded in, into the student's own head: what is deployed is the plain
      student, and no sampler runs.

    loss = CE(probe(stop(z_short)), y) + r (MSE_noise + variational term). Without labels the probe learns what the
    teacher's classifier says: CE(probe(stop(z_short)), softmax(teacher logits)).

    For a loop of your own, `prepare(teacher, z_long, y)` comes before the first step.

    Args:
        student: the network to train, a `gdpd.models.Classifier`.
        teacher_dim: width D of the teacher's feature.
        loss_ratio: r.
        contraction: s, in [0, 1]; the paper's are 0.7 to 0.9.
        target: what the features are drawn to: "labels" (w_y), "soft" (the mean of the w under the teacher's
            probabilities), "means" (the class's mean teacher feature), "none" (s = 0).
        labelled: False reads no labels: it asks for target="none" or "soft", and the probe learns the teacher's
            probabilities. The paper's has no probe then, and classifies by `sample`, which works as ever.
        two_stage: diffusion loss alone for the first `warmup_epochs`, then the probe alone on a student that is held
            still; otherwise both together.
        warmup_epochs: of `two_stage`.
        token_width: width of a token; None: as `gdpd.tokens.token_split` finds it.
        pad_tokens: fill up the last token with zeros where the width does not divide D.
        mixup: parameter of the Beta distribution that the share of the mix is drawn from; 0 does not mix.
        repeats: how often a token is repeated in a step (the paper's 10 to 50 cost the head 10 to 50 times as much).
        drop_condition: share of the rows whose condition is dropped.
        hidden, blocks: size of the head (the paper's 1024 and 3 are for ImageNet).
        variance: "learned" (between its bounds, by the variational term) or "posterior" (fixed; the loss is then
            `gdpd_kernels.prior_loss`, and the sampler `gdpd_kernels.reverse_sample`).
        normalise: divide the targets by one number, their root mean square over the training set, and multiply samples
            by it. The paper diffuses them as they are.
        num_train_timesteps: T, on a cosine schedule.
        sampling_steps: steps of `sample`.
        timestep_spacing: how these lie on the T steps, as in `gdpd_kernels.ddim_table`.
        guidance: of `sample`.
        num_samples: samples that `sample` averages.
        backend: backend of the operators.

    Raises:
        ValueError: an option outside its limits.
    """

    teacher_weight: Tensor
    teacher_bias: Tensor
    contracted_to: Tensor
    scale: Tensor
    alphas_cumprod: Tensor

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        loss_ratio: float = 1.0,
        contraction: float = 0.7,
        target: str = "labels",
        labelled: bool = True,
        two_stage: bool = False,
        warmup_epochs: int = 0,
        token_width: int | None = None,
        pad_tokens: bool = False,
        mixup: float = 1.0,
        repeats: int = 1,
        drop_condition: float = 0.2,
        hidden: int = 128,
        blocks: int = 3,
        variance: str = "learned",
        normalise: bool = True,
        num_train_timesteps: int = 1000,
        sampling_steps: int = 64,
        timestep_spacing: str = "leading",
        guidance: float = 2.0,
        num_samples: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(student, loss_ratio=loss_ratio, warmup_epochs=warmup_epochs if two_stage else 0)
        for name, value, known in (("target", target, TARGETS), ("variance", variance, VARIANCES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known{nearest(value, known)}. One of: {', '.join(known)}.")
        for name, share in (("contraction", contraction), ("drop_condition", drop_condition)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is outside [0, 1].")
        for name, count in (("repeats", repeats), ("num_samples", num_samples)):
            if count < 1:
                raise ValueError(f"{name}={count} is below 1.")
        if not mixup >= 0:
            raise ValueError(f"mixup={mixup} is not a number of at least 0. 0 does not mix.")
        if not labelled and target in ("labels", "means"):
            raise ValueError(f"target={target!r} reads labels, and labelled=False. Use target='none' or 'soft'.")
        self.contraction = 0.0 if target == "none" else contraction
        self.target = target
        self.labelled = labelled
        self.two_stage = two_stage
        self.mixup = mixup
        self.repeats = repeats
        self.drop_condition = drop_condition
        self.variance = variance
        self.normalise = normalise
        self.num_samples = num_samples
        self.backend = backend
        self.prepared = False
        self.tokens = token_split(teacher_dim, token_width, pad_tokens)
        self.norm = nn.LayerNorm(student.feature_dim)
        self.probe = LinearProbe(student.feature_dim, student.num_classes)
        head = AdaLNDenoiser(
            self.tokens.width,
            student.feature_dim,
            self.tokens.tokens,
            hidden,
            blocks,
            num_train_timesteps=num_train_timesteps,
        )
        self.denoiser = GuidedDenoiser(head, guidance)
        self._embedded: tuple[EmbeddedHead] | None = None
        alphas_cumprod = gk.alphas_cumprod("cosine", num_train_timesteps)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.learned_range = LearnedRange(alphas_cumprod) if variance == "learned" else None
        self.table = gk.ddim_table(
            num_train_timesteps, sampling_steps, "cosine", eta=1.0, timestep_spacing=timestep_spacing
        )
        classes = student.num_classes
        self.register_buffer("teacher_weight", torch.zeros(classes, teacher_dim))
        self.register_buffer("teacher_bias", torch.zeros(classes))
        self.register_buffer("contracted_to", torch.zeros(classes, teacher_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def prepare(self, teacher: Classifier, z_long: Tensor, y: Tensor) -> None:
        """Take the teacher's classifier, what each class is drawn to, and the scale of the targets.

        Raises:
            ValueError: a teacher of other classes, or features of another width, than the method was made for.
        """
        weight, bias = teacher.head.weight, teacher.head.bias
        if weight.shape != self.teacher_weight.shape:
            raise ValueError(
                f"the teacher's classifier is {list(weight.shape)} and this method was made for "
                f"{list(self.teacher_weight.shape)} ([classes, teacher_dim])."
            )
        self.teacher_weight.copy_(weight)
        self.teacher_bias.copy_(torch.zeros_like(self.teacher_bias) if bias is None else bias)
        self.contracted_to.copy_(class_means(z_long, y, len(weight)) if self.target == "means" else weight)
        if self.normalise:
            features = z_long.to(self.scale)
            logits = F.linear(features, self.teacher_weight, self.teacher_bias)
            targets = self.contracted(features, y.to(self.scale.device), logits)
            self.scale.copy_(targets.square().mean().sqrt().clamp_min(1e-6))
        self.prepared = True

    def contracted(self, z_long: Tensor, y: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Distribution contraction: x0 = (1 - s) f + s w, [batch, D], of teacher features f [batch, D].

        w is the row of `contracted_to` of class y, or for target "soft" its mean under softmax(teacher_logits).
        """
        if not self.contraction:
            return z_long
        if self.target == "soft":
            if teacher_logits is None:
                raise ValueError("batch.teacher_logits is None, and target='soft' reads them. Fill them in.")
            drawn_to = teacher_logits.softmax(dim=1) @ self.contracted_to
        else:
            drawn_to = self.contracted_to[y]
        return (1 - self.contraction) * z_long + self.contraction * drawn_to

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `batch` in epoch `epoch`, counted from 0; see the class.

        Raises:
            RuntimeError: `prepare` was not called.
            ValueError: z_long or teacher_logits missing or of the wrong shape.
        """
        learning = not self.two_stage or epoch < self.warmup_epochs
        if self.two_stage:
            self._move_student(learning)
        with span("student"):
            z_short, _ = self.student(batch.x_prefix, batch.lengths)
        losses: dict[str, Tensor] = {}
        if learning:
            with span("prior"):
                losses = self._diffusion_losses(z_short, batch)
        terms = [self.loss_ratio * loss for loss in losses.values()]
        with span("losses"):
            probe = self._probe_loss(z_short.detach(), batch)
            self.probe.fold_into(self.student.head)
        if not self.two_stage or not learning:
            terms.extend(probe.values())
        parts = {**losses, **probe}
        return functools.reduce(torch.add, terms), {name: part.detach() for name, part in parts.items()}

    def _probe_loss(self, feature: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the probe, "ce" with the labels, "probe" with the teacher's probabilities."""
        logits = self.probe(feature)
        if self.labelled:
            return {"ce": self.cross_entropy(logits, batch.y)}
        return {"probe": F.cross_entropy(logits, class_logits(batch, logits).to(logits.dtype).softmax(dim=1))}

    def _diffusion_losses(self, z_short: Tensor, batch: Batch) -> dict[str, Tensor]:
        x0 = self.contracted(self._teacher_features(batch), batch.y, batch.teacher_logits) / self.scale
        c = self.norm(z_short)
        if self.mixup:
            share = _beta(self.mixup, c)
            other = torch.randperm(len(c), device=c.device)
            c, x0 = (share * x + (1 - share) * x[other] for x in (c, x0))
        rows = self.tokens.split(x0.to(c.dtype)).repeat(self.repeats, 1)
        dropped = torch.rand(len(rows), device=c.device) < self.drop_condition
        dropped = dropped.view(self.repeats, len(c), self.tokens.tokens)
        given = embed_tokens(self.denoiser.head, c, self.denoiser.no_condition, dropped)
        t = torch.randint(len(self.alphas_cumprod), (len(rows),), device=rows.device)
        noise = torch.randn_like(rows)
        if self.learned_range is None:
            loss = gk.prior_loss(
                self.embedded_head, rows, alphas_cumprod=self.alphas_cumprod, timesteps=t, noise=noise, cond=given,
                backend=self.backend,
            )  # fmt: skip
            return {"noise": loss}
        alpha_bar = self.alphas_cumprod[t][:, None]
        z_t = alpha_bar.sqrt().to(rows.dtype) * rows + (1 - alpha_bar).sqrt().to(rows.dtype) * noise
        state = F.pad(z_t, (0, self.tokens.width))
        predicted, v = gk.denoise(self.embedded_head, state, t, cond=given, backend=self.backend).chunk(2, dim=1)
        return {
            "noise": F.mse_loss(predicted, noise),
            "variational": self.learned_range.variational_term(noise, predicted, v, t),
        }

    @property
    def embedded_head(self) -> EmbeddedHead:
        """The head over embedded conditions, always the same object for the same head: what the kernels know it by."""
        if self._embedded is None or self._embedded[0].head is not self.denoiser.head:
            # In a tuple, so that the head's weights are not in this module's state twice.
            self._embedded = (EmbeddedHead(self.denoiser.head, self.variance == "learned"),)
        return self._embedded[0]

    def _teacher_features(self, batch: Batch) -> Tensor:
        if not self.prepared:
            raise RuntimeError("GenDD knows nothing of the teacher. Call prepare(teacher, z_long, y) before training.")
        return taught(batch, "z_long", self.tokens.features)

    def _move_student(self, moves: bool) -> None:
        """Let the student's features learn, or hold them still: parameters and the statistics of its BatchNorms."""
        self.student.requires_grad_(moves)
        self.student.train(moves and self.training)

    @torch.no_grad()
    def sample(
        self, x_prefix: Tensor, lengths: Tensor | None = None, *, seed: int | None = None, variance: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher features drawn for some prefixes, and what the teacher's classifier says to them.

        Ancestral steps with guidance, the mean of `num_samples` draws. With variance "posterior" this is
        `gdpd_kernels.reverse_sample` with eta = 1; the predicted variance is no table of numbers, so with "learned" the
        steps are taken one by one. Nothing of the module changes.

        Args:
            x_prefix: [batch, channels, time].
            lengths: int64 [batch], or None.
            seed: of the noise; torch's generator if None.
            variance: "posterior" samples with the fixed variance, and so by the operator, whatever was learned; None:
                as the head was trained.

        Returns:
            (z_hat [batch, D], logits [batch, classes]).

        Raises:
            ValueError: "learned" of a head that has learned none, or an unknown name.
        """
        variance = self.variance if variance is None else variance
        if variance not in ("posterior", self.variance):
            raise ValueError(f"variance={variance!r}: this head samples with {self.variance!r}, or with 'posterior'.")
        training = self.student.training
        self.student.eval()
        c = self.norm(self.student(x_prefix, lengths)[0])
        self.student.train(training)
        cond = self.denoiser.head.condition_tokens(c)
        key = torch.randint(-(2**63), 2**63 - 1, ()) if seed is None else seed
        start = c.new_zeros(len(cond), self.tokens.width)
        if variance == "posterior":
            drawn = gk.reverse_sample(
                self.denoiser, start, table=self.table, alpha=0.0, cond=cond, seed=key, num_samples=self.num_samples,
                backend=self.backend,
            )  # fmt: skip
        else:
            draws = [self._ancestral(start, cond, key, sample) for sample in range(self.num_samples)]
            drawn = torch.stack(draws)
        z_hat = self.tokens.join(drawn.mean(dim=0)) * self.scale
        return z_hat, F.linear(z_hat, self.teacher_weight, self.teacher_bias)

    def _ancestral(self, like: Tensor, cond: Tensor, key: int | Tensor, sample: int) -> Tensor:
        """One draw with the learned variance, from the noise that the operator would draw."""
        rows, width = like.shape

        def draw(step: int) -> Tensor:
            return gk.philox_normal(key, rows, width, step, sample, like.dtype, like.device)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return self.denoiser.noise_and_variance(z, t, cond)

        return ancestral_sample(predict, draw(0), self.table, lambda k: draw(k + 1))


def class_means(features: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean of the rows of each class, [classes, D]; zeros for a class without rows."""
    labels = y.to(features.device)
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=classes).clamp_min(1)[:, None]


def _beta(concentration: float, like: Tensor) -> Tensor:
    """One draw of Beta(a, a), on the device of `like`; Beta(1, 1) is uniform."""
    if concentration == 1:
        return torch.rand((), device=like.device, dtype=like.dtype)
    both = like.new_full((2,), concentration)
    return torch.distributions.Beta(both[0], both[1], validate_args=False).sample()
