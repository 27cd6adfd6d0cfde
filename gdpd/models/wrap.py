"""`wrap_model`: any user `nn.Module` as a `Classifier`, by naming the layer whose output is the feature."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from gdpd.models.base import Classifier

LAYOUTS = ("channels_first", "channels_last", "flat")
SEQUENCE_LAYOUTS = ("channels_first", "channels_last")


class WrappedClassifier(Classifier):
    """A user's network behind the `Classifier` interface; made by `wrap_model`.

    The feature is caught by a forward hook on the feature layer and the logits by one on the head. Hooks live for
    the length of one forward, so that copies and pickles of the model carry none.
    """

    def __init__(
        self,
        module: nn.Module,
        feature_layer: str,
        head_layer: str,
        *,
        in_channels: int,
        layout: str,
        pass_lengths: bool,
        sequence_layer: str | None = None,
        sequence_layout: str = "channels_first",
        sequence_dim: int | None = None,
    ) -> None:
        head = module.get_submodule(head_layer)
        if not isinstance(head, nn.Linear):
            raise ValueError(f"head layer {head_layer!r} is a {type(head).__name__}; it must be an nn.Linear")
        super().__init__(in_channels, head.out_features, head.in_features)
        self.module = module
        self.feature_layer = feature_layer
        self.head_layer = head_layer
        self.layout = layout
        self.pass_lengths = pass_lengths
        self.sequence_layer = sequence_layer
        self.sequence_layout = sequence_layout
        self.sequence_dim = self.feature_dim if sequence_dim is None else sequence_dim
        self._checked_modes: set[bool] = set()  # a dropout before the head shows in training mode only

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The head inside the user's module: not registered a second time, so that state dicts hold it once."""
        head = self.module.get_submodule(self.head_layer)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"layer {self.head_layer!r} of the wrapped module is no longer an nn.Linear")
        return head

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Feature ``[batch, feature_dim]`` of ``x`` ``[batch, in_channels, time]``."""
        self._check_input(x, lengths)
        return self._run(x, lengths)[0]

    def forward(self, x: Tensor, lengths: Tensor | None = None, *, sequence: bool = False) -> tuple[Tensor, ...]:
        """As `Classifier.forward`; the user's module runs once, its own return value is not used.

        Raises:
            ValueError: wrong shapes; the feature layer or the head did not run exactly once; the head's input is
                not the feature layer's output (checked at the first forward in training and in eval mode); padded
                series for a module that takes no lengths; ``sequence`` without a ``sequence_layer``, or with one that
                puts out something else.
        """
        self._check_input(x, lengths)
        if not sequence:
            return self._run(x, lengths)
        if self.sequence_layer is None:
            raise ValueError(
                f"this method reads the hidden sequence of {type(self.module).__name__}, and wrap_model was not told "
                "which layer puts it out: give sequence_layer and sequence_layout"
            )
        caught: list[Any] = []
        layer = self.module.get_submodule(self.sequence_layer)
        handle = layer.register_forward_hook(lambda _module, _args, output: caught.append(output))
        try:
            feature, logits = self._run(x, lengths)
        finally:
            handle.remove()
        return feature, logits, self._one_sequence(caught, x, lengths)

    def _one_sequence(self, caught: list[Any], x: Tensor, lengths: Tensor | None) -> Tensor:
        layer = f"sequence layer {self.sequence_layer!r}"
        if len(caught) != 1:
            raise ValueError(f"{layer} ran {len(caught)} times in one forward; name a layer that runs exactly once")
        value = caught[0][0] if isinstance(caught[0], tuple) else caught[0]  # an LSTM returns (outputs, states)
        expected = [len(x), x.shape[2], self.sequence_dim]
        if isinstance(value, Tensor) and value.ndim == 3 and self.sequence_layout == "channels_first":
            value = value.transpose(1, 2)
        if not isinstance(value, Tensor) or list(value.shape) != expected:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{layer}, read as {self.sequence_layout}, gives {got}; expected [batch, time, sequence_dim] = "
                f"{expected}. Name a layer that keeps all steps, its sequence_layout and its width sequence_dim"
            )
        if lengths is None:
            return value
        steps = torch.arange(x.shape[2], device=x.device)
        return value.where((steps < lengths.to(x.device).unsqueeze(1)).unsqueeze(2), 0)

    def _run(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if lengths is not None and not self.pass_lengths and bool((lengths != x.shape[2]).any()):
            raise ValueError(
                f"some series are shorter than the {x.shape[2]} steps of x and the wrapped module takes no lengths, so "
                "it would read padding as data. Stretch the prefixes (mode='stretch') and equalise the lengths, or "
                "wrap with pass_lengths=True a module with forward(x, lengths)"
            )
        features: list[Any] = []
        heads: list[tuple[Tensor, Tensor]] = []
        handles = [
            self.module.get_submodule(self.feature_layer).register_forward_hook(
                lambda _module, _args, output: features.append(output)
            ),
            self.head.register_forward_hook(lambda _module, args, output: heads.append((args[0], output))),
        ]
        try:
            inputs = {"channels_first": x, "channels_last": x.transpose(1, 2), "flat": x.flatten(1)}[self.layout]
            if self.pass_lengths:
                self.module(inputs, lengths)
            else:
                self.module(inputs)
        finally:
            for handle in handles:
                handle.remove()
        feature = self._one_feature(features, len(x))
        if len(heads) != 1:
            raise ValueError(
                f"head layer {self.head_layer!r} ran {len(heads)} times in one forward; it must run exactly once"
            )
        head_input, logits = heads[0]
        if self.training not in self._checked_modes:
            self._check_head_reads(feature, head_input)
            self._checked_modes.add(self.training)
        return feature, logits

    def _one_feature(self, captured: list[Any], batch: int) -> Tensor:
        layer = f"feature layer {self.feature_layer!r}"
        if len(captured) != 1:
            raise ValueError(f"{layer} ran {len(captured)} times in one forward; name a layer that runs exactly once")
        value = captured[0]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{layer} returns a {type(value).__name__}, not a tensor (an LSTM returns a tuple); name a layer that "
                "returns the feature itself: put an nn.Identity() where the feature is and name that"
            )
        if value.shape[0] != batch or value[0].numel() != self.feature_dim:
            raise ValueError(
                f"{layer} returns shape {list(value.shape)}; head {self.head_layer!r} takes [{batch}, "
                f"{self.feature_dim}]. Name a layer after the pooling over time, or another head_layer"
            )
        return value.flatten(1)  # [batch, channels, 1] of a pooling layer is a feature as well

    def _check_head_reads(self, feature: Tensor, head_input: Tensor) -> None:
        with torch.no_grad():
            same = feature.shape == head_input.shape and bool(torch.equal(feature, head_input))
        if not same:
            raise ValueError(
                f"head {self.head_layer!r} does not read the output of feature layer {self.feature_layer!r}: something "
                "acts in between (an activation, a dropout, another layer), so head(feature) would not be the model's "
                "logits. Name the last layer before the head as feature_layer, or put an nn.Identity() there, by name "
                f"(layers: {_some(_names(self.module))})"
            )


def wrap_model(
    module: nn.Module,
    feature_layer: str,
    head_layer: str | None = None,
    *,
    in_channels: int = 1,
    layout: str = "channels_first",
    pass_lengths: bool = False,
    sequence_layer: str | None = None,
    sequence_layout: str = "channels_first",
    sequence_dim: int | None = None,
) -> WrappedClassifier:
    """Use any network as teacher or student.

    ``wrap_model(net, "pool")`` captures the output of ``net.pool`` as the feature; the first ``nn.Linear``
    registered after it is the head. Whether the head really reads the feature is checked at the first forward.

    Args:
        module: the network; its parameters are used, not copied.
        feature_layer: dotted name of the layer that puts out the feature, as in ``named_modules()``; its output is
            ``[batch, feature_dim]`` or ``[batch, feature_dim, 1]``.
        head_layer: dotted name of the ``nn.Linear`` head; found when None.
        in_channels: channels of the input.
        layout: what the module takes: ``"channels_first"`` ``[batch, channels, time]``, ``"channels_last"``
            ``[batch, time, channels]``, ``"flat"`` ``[batch, channels × time]``.
        pass_lengths: call ``module(x, lengths)``, lengths int64 ``[batch]`` or None.
        sequence_layer: dotted name of the layer whose output (of an LSTM: the first of it) is the hidden sequence, one
            step for each of the input, for methods that compare sequences; None for none.
        sequence_layout: ``"channels_first"`` ``[batch, width, time]`` or ``"channels_last"`` ``[batch, time, width]``.
        sequence_dim: that width; the feature's when None.

    Returns:
        A `Classifier` with ``feature_dim`` and ``num_classes`` read off the head.

    Raises:
        ValueError: no layer of that name (close names are suggested), no Linear after it, a head that is no
            Linear, an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    if sequence_layout not in SEQUENCE_LAYOUTS:
        told = ", ".join(map(repr, SEQUENCE_LAYOUTS))
        raise ValueError(f"sequence_layout={sequence_layout!r} is not one of {told}")
    names = _names(module)
    for kind, name in (
        ("feature_layer", feature_layer),
        ("head_layer", head_layer),
        ("sequence_layer", sequence_layer),
    ):
        if name is not None and name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(
                f"{kind}={name!r} is not a layer of {type(module).__name__}{hint} (layers: {_some(names)})"
            )
    if head_layer is None:
        head_layer = _linear_after(module, feature_layer)
    return WrappedClassifier(
        module, feature_layer, head_layer, in_channels=in_channels, layout=layout, pass_lengths=pass_lengths,
        sequence_layer=sequence_layer, sequence_layout=sequence_layout, sequence_dim=sequence_dim,
    )  # fmt: skip


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _linear_after(module: nn.Module, feature_layer: str) -> str:
    names = _names(module)
    linears = [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]
    for name in names[names.index(feature_layer) + 1 :]:
        if name in linears and not name.startswith(f"{feature_layer}."):
            return name
    raise ValueError(
        f"no nn.Linear is registered after feature layer {feature_layer!r} of {type(module).__name__}; name the head "
        f"with head_layer (Linear layers: {_some(linears) or 'none'})"
    )
