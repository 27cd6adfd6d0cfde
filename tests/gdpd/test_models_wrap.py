"""`wrap_model`: a user's network as a classifier, and each way of naming the wrong layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from gdpd.models import Classifier, wrap_model


class Net(nn.Module):
    """A user's network: convolution, pooling, head; what stands before and after the head can be chosen."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.before = before or nn.Identity()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.conv(x))).flatten(1)
        return self.fc(self.before(h)).softmax(dim=1)  # probabilities: the classifier must give the logits


class LengthNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)
        self.feature = nn.Identity()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        out = self.lstm(x)[0]
        last = out[:, -1] if lengths is None else out[torch.arange(len(x)), lengths - 1]
        return self.head(self.feature(last))


def test_feature_and_logits_are_those_inside_the_users_network() -> None:
    torch.manual_seed(0)
    net = Net()
    model = wrap_model(net, "pool", in_channels=2)
    x = torch.randn(4, 2, 10)
    feature, logits = model(x)
    assert isinstance(model, Classifier)
    assert (model.feature_dim, model.num_classes, model.head) == (6, 3, net.fc)
    torch.testing.assert_close(feature, torch.relu(net.conv(x)).mean(2))
    torch.testing.assert_close(logits.softmax(1), net(x))
    torch.testing.assert_close(model.classify(feature), logits)
    torch.testing.assert_close(model.features(x), feature)


def test_the_hidden_sequence_is_that_of_the_layer_that_was_named() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 2, 10)
    feature, logits, sequence = wrap_model(net, "pool", in_channels=2, sequence_layer="conv")(x, sequence=True)
    torch.testing.assert_close(sequence, net.conv(x).transpose(1, 2))
    torch.testing.assert_close((feature, logits), wrap_model(net, "pool", in_channels=2)(x))
    lengths = torch.tensor([10, 4, 1, 7])
    lstm = LengthNet()
    model = wrap_model(
        lstm, "feature", in_channels=2, layout="channels_last", pass_lengths=True, sequence_layer="lstm",
        sequence_layout="channels_last",
    )  # fmt: skip
    sequence = model(x, lengths, sequence=True)[2]
    expected = lstm.lstm(x.transpose(1, 2))[0]
    for i, end in enumerate(lengths.tolist()):
        torch.testing.assert_close(sequence[i, :end], expected[i, :end])
        assert not sequence[i, end:].any()


def test_a_sequence_that_is_not_named_or_of_another_form_is_refused() -> None:
    x = torch.randn(4, 2, 10)
    with pytest.raises(ValueError, match=r"reads the hidden sequence of Net.*give sequence_layer"):
        wrap_model(Net(), "pool", in_channels=2)(x, sequence=True)
    with pytest.raises(ValueError, match=r"'pool', read as channels_first, gives shape \[4, 1, 6\]; expected.*10, 6\]"):
        wrap_model(Net(), "pool", in_channels=2, sequence_layer="pool")(x, sequence=True)
    with pytest.raises(ValueError, match=r"expected.*\[4, 10, 5\]"):
        wrap_model(Net(), "pool", in_channels=2, sequence_layer="conv", sequence_dim=5)(x, sequence=True)
    with pytest.raises(ValueError, match="sequence_layer='convs' is not a layer of Net; close names: conv"):
        wrap_model(Net(), "pool", in_channels=2, sequence_layer="convs")
    with pytest.raises(ValueError, match="sequence_layout='flat' is not one of"):
        wrap_model(Net(), "pool", in_channels=2, sequence_layer="conv", sequence_layout="flat")


def test_gradients_reach_the_users_parameters_through_both_outputs() -> None:
    net = Net()
    feature, logits = wrap_model(net, "before", in_channels=2)(torch.randn(4, 2, 10))
    (feature.sum() + logits.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_state_dict_holds_each_tensor_once_and_no_hook_stays() -> None:
    net = Net()
    model = wrap_model(net, "pool", in_channels=2)
    model(torch.randn(2, 2, 5))
    assert sorted(model.state_dict()) == [
        "module.conv.bias",
        "module.conv.weight",
        "module.fc.bias",
        "module.fc.weight",
    ]
    assert len(list(model.parameters())) == 4
    assert not any(m._forward_hooks for m in net.modules())


def test_copies_and_pickles_capture_their_own_feature() -> None:
    model = wrap_model(Net(), "pool", in_channels=2)
    x = torch.randn(3, 2, 7)
    before = model(x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.module.get_parameter("conv.weight").zero_()
        assert not torch.allclose(twin(x)[0], before)
        torch.testing.assert_close(model(x)[0], before)


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("user's own bug")

    net = Failing()
    with pytest.raises(RuntimeError, match="user's own bug"):
        wrap_model(net, "pool", in_channels=2)(torch.randn(2, 2, 5))
    assert not any(m._forward_hooks for m in net.modules())


def test_layouts_and_lengths_are_passed_as_asked() -> None:
    torch.manual_seed(0)
    net = LengthNet()
    model = wrap_model(net, "feature", in_channels=2, layout="channels_last", pass_lengths=True)
    x, lengths = torch.randn(3, 2, 8), torch.tensor([8, 3, 5])
    torch.testing.assert_close(model(x, lengths)[1], net(x.transpose(1, 2), lengths))
    torch.testing.assert_close(model(x)[1], net(x.transpose(1, 2)))

    mlp = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    flat = wrap_model(mlp, "1", in_channels=2, layout="flat")
    torch.testing.assert_close(flat(x)[1], mlp(x.flatten(1)))
    with pytest.raises(ValueError, match="layout='tbc' is not one of"):
        wrap_model(mlp, "1", layout="tbc")


def test_padded_series_are_refused_by_a_module_that_takes_no_lengths() -> None:
    model = wrap_model(Net(), "pool", in_channels=2)
    x = torch.randn(2, 2, 8)
    model(x, torch.tensor([8, 8]))
    with pytest.raises(ValueError, match=r"would read padding as data.*mode='stretch'"):
        model(x, torch.tensor([8, 5]))


def test_a_wrong_layer_name_is_met_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"feature_layer='poool' is not a layer of Net; close names: pool"):
        wrap_model(Net(), "poool")
    with pytest.raises(ValueError, match=r"head_layer='fcc' .* close names: fc"):
        wrap_model(Net(), "pool", "fcc")
    with pytest.raises(ValueError, match=r"layers: conv, pool, before, fc\)"):
        wrap_model(Net(), "zzzzzzzz")


def test_a_head_that_is_no_linear_or_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="head layer 'conv' is a Conv1d"):
        wrap_model(Net(), "pool", "conv")
    with pytest.raises(ValueError, match=r"no nn.Linear is registered after .*'fc' .* \(Linear layers: fc\)"):
        wrap_model(Net(), "fc")
    with pytest.raises(ValueError, match="Linear layers: none"):
        wrap_model(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()), "0")


def test_a_linear_inside_the_feature_layer_is_not_taken_for_the_head() -> None:
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Flatten(), nn.Linear(10, 4), nn.Tanh()))
    net.add_module("last", nn.Linear(4, 2))
    assert wrap_model(net, "body").head is net.get_submodule("last")


def test_a_layer_between_feature_and_head_is_found_out_in_each_mode() -> None:
    model = wrap_model(Net(before=nn.Tanh()), "pool", in_channels=2)
    with pytest.raises(ValueError, match="does not read the output of feature layer 'pool'"):
        model(torch.rand(2, 2, 5))
    model = wrap_model(Net(before=nn.Dropout(0.9)), "pool", in_channels=2)
    x = torch.randn(20, 2, 5)
    model.eval()
    model(x)
    model.train()
    with pytest.raises(ValueError, match="a dropout"):
        model(x)


def test_features_of_the_wrong_kind_are_described() -> None:
    x = torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match=r"'conv' returns shape \[3, 6, 8\]; head 'fc' takes \[3, 6\]"):
        wrap_model(Net(), "conv", in_channels=2)(x)
    model = wrap_model(LengthNet(), "lstm", in_channels=2, layout="channels_last")
    with pytest.raises(ValueError, match="returns a tuple, not a tensor"):
        model(x)


def test_layers_that_do_not_run_exactly_once_are_refused() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    class Never(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.before(torch.relu(self.conv(x)).mean(2))

    x = torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match="feature layer 'pool' ran 2 times"):
        wrap_model(Twice(), "pool", in_channels=2)(x)
    with pytest.raises(ValueError, match="head layer 'fc' ran 0 times"):
        wrap_model(Never(), "before", in_channels=2)(x)


def test_a_replaced_head_is_reported() -> None:
    net = Net()
    model = wrap_model(net, "pool", in_channels=2)
    net.fc = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"'fc' of the wrapped module is no longer an nn.Linear"):
        model(torch.randn(2, 2, 5))
