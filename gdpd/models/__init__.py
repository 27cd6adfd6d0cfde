"""Networks for teachers and students: each a feature extractor and a linear head, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdpd.models.base import Classifier
from gdpd.models.fcn import FCN
from gdpd.models.inception import Inception
from gdpd.models.lstm import LSTM, LSTMClassifier, set_forget_bias
from gdpd.models.resnet import ResNet
from gdpd.models.wrap import WrappedClassifier, wrap_model
from gdpd.registry import build

__all__ = [
    "FCN",
    "LSTM",
    "Classifier",
    "Inception",
    "LSTMClassifier",
    "ResNet",
    "WrappedClassifier",
    "build_model",
    "model_names",
    "set_forget_bias",
    "wrap_model",
]

_REGISTRY: dict[str, tuple[Callable[..., Classifier], dict[str, Any]]] = {
    "lstm3-100": (LSTMClassifier, {"layers": 3, "hidden": 100}),
    "lstm2-32": (LSTMClassifier, {"layers": 2, "hidden": 32}),
    "lstm": (LSTMClassifier, {}),
    "inception": (Inception, {}),
    "fcn": (FCN, {}),
    "resnet": (ResNet, {}),
}


def model_names() -> list[str]:
    """Names that `build_model` takes."""
    return list(_REGISTRY)


def build_model(name: str, *, in_channels: int, num_classes: int, **options: Any) -> Classifier:
    """A network by name.

    ``"lstm3-100"`` and ``"lstm2-32"`` (METHOD 1.5), ``"lstm"`` of any size, ``"inception"``, ``"fcn"``, ``"resnet"``.

    Args:
        name: one of `model_names`.
        in_channels: channels of the series, 1 or more.
        num_classes: number of classes, 2 or more.
        **options: further arguments of the class, such as ``forget_bias=1.0`` or ``pooling="mean"``.

    Returns:
        A `Classifier`: ``model(x [batch, channels, time], lengths) -> (feature, logits)``.

    Raises:
        ValueError: unknown name or option (the nearest is suggested), or an option out of range.
    """
    return build("model", name, _REGISTRY, options, in_channels=in_channels, num_classes=num_classes)
