"""Classifiers: shapes, padding that must not matter, the LSTM's options, and the registry."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gdpd_kernels as gk
from gdpd.models import (
    FCN,
    LSTM,
    Classifier,
    Inception,
    LSTMClassifier,
    ResNet,
    build_model,
    model_names,
    set_forget_bias,
)

SMALL: dict[str, dict[str, Any]] = {
    "lstm": {"hidden": 7, "layers": 2},
    "inception": {"channels": 4, "blocks": 3, "kernel_sizes": (9, 5)},
    "fcn": {"widths": (6, 8, 5)},
    "resnet": {"widths": (6, 6)},
}


@pytest.mark.parametrize("name", model_names())
def test_every_model_gives_feature_and_logits(name: str) -> None:
    model = build_model(name, in_channels=2, num_classes=5)
    feature, logits = model(torch.randn(3, 2, 20))
    assert feature.shape == (3, model.feature_dim)
    assert logits.shape == (3, 5)
    assert isinstance(model.head, nn.Linear)
    assert model.head.in_features == model.feature_dim
    torch.testing.assert_close(model.classify(feature), logits)


def test_named_sizes_are_those_of_the_papers() -> None:
    teacher = build_model("lstm3-100", in_channels=1, num_classes=2)
    assert isinstance(teacher, LSTMClassifier)
    assert (teacher.lstm.num_layers, teacher.lstm.hidden_size, teacher.pooling) == (3, 100, "last")
    student = build_model("lstm2-32", in_channels=1, num_classes=2)
    assert isinstance(student, LSTMClassifier)
    assert (student.lstm.num_layers, student.lstm.hidden_size) == (2, 32)
    inception = build_model("inception", in_channels=1, num_classes=2)
    assert isinstance(inception, Inception)
    assert (len(inception.blocks), len(inception.shortcuts), inception.feature_dim) == (6, 2, 128)
    convolutions = (8 * 1 + 1) * 128 + (5 * 128 + 1) * 256 + (3 * 256 + 1) * 128
    norms, head = 2 * (128 + 256 + 128), (128 + 1) * 2
    assert sum(p.numel() for p in FCN(1, 2).parameters()) == convolutions + norms + head
    resnet = ResNet(1, 2)
    assert resnet.feature_dim == 128
    assert len(resnet.blocks) == 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_neither_outputs_nor_gradients(name: str, channels: int, training: bool) -> None:
    torch.manual_seed(0)
    model = build_model(name, in_channels=channels, num_classes=3, **SMALL[name]).double().train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lengths = torch.tensor([11, 4, 1, 9])
    x = torch.randn(4, channels, 11, dtype=torch.float64)
    x = x * (torch.arange(11) < lengths[:, None])[:, None, :]
    results = []
    for width, rubbish in ((11, 0.0), (16, 0.0), (16, 1e3)):
        model.load_state_dict(state)
        model.zero_grad()
        padded = torch.full((4, channels, width), rubbish, dtype=torch.float64)
        padded[:, :, :11] = x.where((torch.arange(11) < lengths[:, None])[:, None, :], rubbish)
        feature, logits = model(padded, lengths)
        logits.square().sum().backward()
        buffers = [b.clone() for b in model.buffers()]
        results.append((feature, logits, *[p.grad.clone() for p in model.parameters() if p.grad is not None], *buffers))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_full_lengths_are_the_same_as_no_lengths_and_a_padded_row_as_the_row_alone(name: str) -> None:
    torch.manual_seed(1)
    model = build_model(name, in_channels=2, num_classes=3, **SMALL[name]).eval()
    x = torch.randn(3, 2, 12)
    torch.testing.assert_close(model(x), model(x, torch.full((3,), 12)))
    padded = model(x, torch.tensor([12, 5, 8]))[1]
    torch.testing.assert_close(padded[1:2], model(x[1:2, :, :5])[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5, 8])])
@pytest.mark.parametrize("name", [*SMALL, "lstm-mean", "lstm-max"])
def test_the_hidden_sequence_comes_of_the_same_run_and_is_zero_past_the_end(
    name: str, lengths: torch.Tensor | None
) -> None:
    torch.manual_seed(1)
    family, _, pooling = name.partition("-")
    options = {**SMALL[family], **({"pooling": pooling} if pooling else {})}
    model = build_model(family, in_channels=2, num_classes=3, **options).double().eval()
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    feature, logits, sequence = model(x, lengths, sequence=True)
    torch.testing.assert_close((feature, logits), model(x, lengths))
    assert sequence.shape == (3, 12, model.sequence_dim)
    for i, end in enumerate([12, 12, 12] if lengths is None else lengths.tolist()):
        assert not sequence[i, end:].any()
        steps = sequence[i, :end]
        if family == "lstm":
            pooled = {"": steps[-1], "mean": steps.mean(0), "max": steps.amax(0)}[pooling]
        else:
            pooled = steps.mean(0)
        torch.testing.assert_close(feature[i], pooled)


def test_a_network_without_a_sequence_says_so() -> None:
    class Flat(Classifier):
        """Features alone."""

        def features(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            return x.mean(2)

    with pytest.raises(ValueError, match=r"Flat has no hidden sequence.*features_and_sequence"):
        Flat(2, 3, 2)(torch.randn(1, 2, 4), sequence=True)


@pytest.mark.parametrize("name", SMALL)
def test_training_one_step_moves_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, in_channels=2, num_classes=3, **SMALL[name])
    loss = torch.nn.functional.cross_entropy(model(torch.randn(6, 2, 15))[1], torch.tensor([0, 1, 2, 0, 1, 2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@given(st.sampled_from(["last", "mean", "max"]), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_lstm_pooling_is_over_the_valid_steps_only(pooling: str, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = LSTMClassifier(2, 3, hidden=4, layers=2, pooling=pooling)
    x, lengths = torch.randn(batch, 2, 9), torch.randint(1, 10, (batch,))
    feature, _ = model(x, lengths)
    for i, length in enumerate(lengths.tolist()):
        outputs = model.lstm(x[i : i + 1, :, :length].transpose(1, 2))[0][0]
        expected = {"last": outputs[-1], "mean": outputs.mean(0), "max": outputs.amax(0)}[pooling]
        torch.testing.assert_close(feature[i], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x)[0], model(x, torch.full((batch,), 9))[0])


def first_step_gradient(length: int, **options: Any) -> float:
    torch.manual_seed(0)
    model = build_model("lstm3-100", in_channels=1, num_classes=2, **options)
    x = torch.randn(2, 1, length, requires_grad=True)
    model(x)[1].logsumexp(1).sum().backward()
    assert x.grad is not None
    return float(x.grad[:, :, 0].abs().max())


def test_first_steps_of_a_long_series_get_no_gradient_without_forget_bias_or_pooling() -> None:
    assert first_step_gradient(300) == 0.0
    assert first_step_gradient(300, forget_bias=2.0) > 1e-8
    assert first_step_gradient(300, pooling="mean") > 1e-8
    assert first_step_gradient(300, pooling="max") > 1e-8


def test_forget_bias_is_the_sum_of_both_vectors_at_the_forget_gate_only() -> None:
    torch.manual_seed(0)
    model = LSTMClassifier(2, 3, hidden=4, layers=2, forget_bias=1.5)
    torch.manual_seed(0)
    plain = LSTMClassifier(2, 3, hidden=4, layers=2)
    for layer in range(2):
        total = getattr(model.lstm, f"bias_ih_l{layer}") + getattr(model.lstm, f"bias_hh_l{layer}")
        default = getattr(plain.lstm, f"bias_ih_l{layer}") + getattr(plain.lstm, f"bias_hh_l{layer}")
        assert total[4:8].tolist() == [1.5] * 4
        torch.testing.assert_close(total[:4], default[:4])
        torch.testing.assert_close(total[8:], default[8:])
    # the forget gate it is: with f = 1, i = 0 and o = 1 the cell keeps its state
    lstm = nn.LSTM(1, 1)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.get_parameter("bias_ih_l0")[0] = -50.0
    set_forget_bias(lstm, 50.0)
    _, (_, cell) = lstm(torch.zeros(20, 1, 1), (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0)))
    assert cell.item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="bias=True"):
        set_forget_bias(nn.LSTM(1, 1, bias=False), 1.0)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "batch_first": True, "dropout": 0.0},
        {"num_layers": 3},
        {"bidirectional": True},
        {"proj_size": 3},
        {"bias": False},
        {"dtype": torch.float64},
    ],
)
def test_lstm_stands_in_for_torchs(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, theirs = LSTM(5, 6, **options), nn.LSTM(5, 6, **options)
    theirs.load_state_dict(ours.state_dict())
    dtype = options.get("dtype", torch.float32)
    x = torch.randn(4, 7, 5, dtype=dtype)
    out, (h, c) = ours(x)
    expected, (expected_h, expected_c) = theirs(x)
    torch.testing.assert_close((out, h, c), (expected, expected_h, expected_c))
    torch.testing.assert_close(ours(x, (h, c))[0], theirs(x, (h, c))[0])
    one = x[0], (h[:, 0].contiguous(), c[:, 0].contiguous())
    torch.testing.assert_close(ours(*one), theirs(*one))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    packed = nn.utils.rnn.pack_padded_sequence(x, [4] * (4 if ours.batch_first else 7), batch_first=ours.batch_first)
    torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LSTM)
    ours.flatten_parameters()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x)[0], expected)
        copied(x)[0].sum().backward()
        assert all(p.grad is not None for p in copied.parameters())
        assert all(p.grad is None for p in ours.parameters())
    assert str(ours) == str(theirs)


def test_lstm_refuses_what_torchs_refuses_and_in_its_words() -> None:
    ours, theirs = LSTM(5, 6), nn.LSTM(5, 6)
    state = torch.zeros(1, 4, 6)
    for arguments in (
        (torch.zeros(3, 4, 9),),
        (torch.zeros(3, 4, 5, 1),),
        (torch.zeros(3, 4, 5), (state[:, :2], state)),
        (torch.zeros(3, 4, 5), (state, state[..., :2])),
        (torch.zeros(3, 4, 5, dtype=torch.float64),),
    ):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*arguments)
        with pytest.raises(type(expected.value)) as found:
            ours(*arguments)
        assert str(found.value).replace("LSTM: ", "") == str(expected.value).replace("LSTM: ", "")
    assert ours(torch.zeros(3, 0, 5))[0].shape == theirs(torch.zeros(3, 0, 5))[0].shape


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_those_of_packed_sequences(batch_first: bool) -> None:
    torch.manual_seed(0)
    ours = LSTM(3, 6, num_layers=2, batch_first=batch_first)
    lengths = torch.tensor([4, 9, 1, 7])
    x = torch.randn((4, 9, 3) if batch_first else (9, 4, 3))
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    expected, states = super(LSTM, ours).forward(packed)
    expected = nn.utils.rnn.pad_packed_sequence(expected, batch_first, total_length=9)[0]
    torch.testing.assert_close(ours(x, lengths=lengths), (expected, states))
    torch.testing.assert_close(ours.last(x, lengths=lengths), states[0][-1])
    torch.testing.assert_close(ours.last(x), super(LSTM, ours).forward(x)[1][0][-1])
    with pytest.raises(ValueError, match="lengths has values from 0 to 3; expected 1 to 9"):
        ours(x, lengths=torch.tensor([1, 2, 0, 3]))
    with pytest.raises(ValueError, match=r"lengths and last\(\) take three dimensions"):
        ours(x[0], lengths=torch.tensor([2]))
    for other, form in ((LSTM(3, 6, bidirectional=True), x), (LSTM(3, 6), packed)):
        with pytest.raises(ValueError, match="of one direction without projection, on tensors"):
            other(form, lengths=lengths)


def test_the_classifier_asks_the_kernels_for_the_last_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = build_model("lstm2-32", in_channels=1, num_classes=2), []
    if not model.lstm.native(torch.zeros(1, 1, 1)):
        pytest.skip("no native kernels here")
    run = gk.lstm
    monkeypatch.setattr(gk, "lstm", lambda *a, **k: asked.append((k["output"], k["lengths"])) or run(*a, **k))
    lengths = torch.tensor([3, 5])
    x = torch.randn(2, 1, 5)
    feature, _ = model(x, lengths)
    assert asked == [("last", lengths)]
    monkeypatch.setattr(LSTM, "native", lambda self, input: False)  # as on another device: padding is run through
    torch.testing.assert_close(model(x, lengths)[0], feature)


def test_a_compiled_classifier_gives_the_same() -> None:
    model = build_model("lstm", in_channels=2, num_classes=3, hidden=5, layers=2)
    x, lengths = torch.randn(3, 2, 7), torch.tensor([7, 2, 5])
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, lengths), model(x, lengths))


def test_training_agrees_with_torchs_step_by_step() -> None:
    """Ten steps of Adam from the same weights on the same batches end at the same loss."""
    losses = []
    for cls in (LSTM, nn.LSTM):
        torch.manual_seed(0)
        lstm, head = cls(2, 12, 2, batch_first=True), nn.Linear(12, 3)
        optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 0.01)
        x, y = torch.randn(40, 25, 2), torch.randint(3, (40,))
        for _ in range(10):
            loss = nn.functional.cross_entropy(head(lstm(x)[0][:, -1]), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dropout_acts_in_training_only() -> None:
    model = LSTMClassifier(1, 2, hidden=16, layers=2, dropout=0.5)
    x = torch.randn(2, 1, 10)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_input_of_the_wrong_form_is_named() -> None:
    model = build_model("fcn", in_channels=2, num_classes=3)
    with pytest.raises(ValueError, match=r"x has shape \[4, 20\]; expected \[batch, channels=2, time\]"):
        model(torch.randn(4, 20))
    with pytest.raises(ValueError, match="channels=2"):
        model(torch.randn(4, 1, 20))
    with pytest.raises(ValueError, match="time ≥ 1"):
        model(torch.randn(4, 2, 0))
    x = torch.randn(4, 2, 20)
    with pytest.raises(ValueError, match=r"lengths has shape \[3\]"):
        model(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"dtype torch\.float32; expected integers"):
        model(x, torch.ones(4))
    for bad in (0, 21):
        with pytest.raises(ValueError, match=r"valid are 1\.\.20"):
            model(x, torch.tensor([5, bad, 5, 5]))


def test_bad_options_name_their_limit_and_the_nearest_name() -> None:
    def build(name: str, **options: Any) -> nn.Module:
        return build_model(name, **{"in_channels": 1, "num_classes": 2, **options})

    with pytest.raises(ValueError, match=r"model 'inceptoin' is not one of .*did you mean 'inception'"):
        build("inceptoin")
    with pytest.raises(ValueError, match=r"no option 'hiden' .did you mean 'hidden'"):
        build("lstm", hiden=3)
    for options, message in (
        ({"hidden": 0}, "hidden=0"),
        ({"layers": 0}, "layers=0"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in \[0, 1\)"),
        ({"dropout": 0.1, "layers": 1}, "acts between layers"),
        ({"pooling": "sum"}, "pooling='sum' is not one of"),
        ({"num_classes": 1}, "num_classes=1 must be 2 or more"),
        ({"in_channels": 0}, "in_channels=0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            build("lstm", **options)
    with pytest.raises(ValueError, match="one kernel per block"):
        build("fcn", widths=(4, 4))
    with pytest.raises(ValueError, match="one or more of each"):
        build("resnet", widths=())
    with pytest.raises(ValueError, match="blocks=0"):
        build("inception", blocks=0)


def test_the_base_class_asks_for_features() -> None:
    with pytest.raises(NotImplementedError):
        Classifier(1, 2, 3)(torch.randn(2, 1, 4))


def test_presets_of_a_named_size_can_be_overridden() -> None:
    model = build_model("lstm3-100", in_channels=1, num_classes=2, hidden=8)
    assert isinstance(model, LSTMClassifier)
    assert (model.lstm.num_layers, model.feature_dim) == (3, 8)
