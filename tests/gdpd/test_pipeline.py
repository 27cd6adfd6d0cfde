"""`DDIMPipeline` is an eager loop of a DiffKD-style trainer: values, gradients, statistics, and what it says no to."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import gdpd.pipeline
import gdpd_kernels as gk
from gdpd.sampler import DDIMPipeline

C, BATCH = 12, 6


class MapDenoiser(nn.Module):
    """Convolutions on maps, a learned time table, a residual bottleneck: the form of the releases."""

    def __init__(self, channels: int = C, time: int = 1280) -> None:
        super().__init__()
        low = channels // 4
        self.time = nn.Embedding(time, channels)
        self.body = nn.Sequential(
            nn.Conv2d(channels, low, 1),
            nn.BatchNorm2d(low),
            nn.ReLU(inplace=True),
            nn.Conv2d(low, low, 3, padding=1),
            nn.BatchNorm2d(low),
            nn.ReLU(inplace=True),
            nn.Conv2d(low, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.head = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        h = z + self.time(t.long())[..., None, None]
        return self.head(h + self.body(h))


class Adapter(nn.Module):
    """One weight in (0, 1) per sample."""

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.score = nn.Linear(channels, 2)

    def forward(self, feat: Tensor) -> Tensor:
        return self.score(feat.mean(dim=(2, 3))).softmax(dim=1)[:, 0]


def scheduler(**options: Any) -> DDIMScheduler:
    steps = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, beta_schedule="linear", **options)
    # In float64, so that a loop over its update can be compared beyond float32.
    steps.alphas_cumprod, steps.final_alpha_cumprod = steps.alphas_cumprod.double(), steps.final_alpha_cumprod.double()
    return steps


def eager(model: nn.Module, steps: Any, adapter: nn.Module | None, feat: Tensor, n: int = 5, eta: float = 0) -> Tensor:
    """The loop that a trainer writes over diffusers' own update, in its own random numbers."""
    z = feat
    if adapter is not None:
        eps = torch.randn(feat.shape, dtype=feat.dtype)
        alpha = adapter(feat).view(-1, 1, 1, 1)
        z = alpha * feat + (1 - alpha) * eps
    steps.set_timesteps(2 * n)
    for t in steps.timesteps[n:]:
        predicted = model(z, t)
        predicted = predicted if isinstance(predicted, Tensor) else predicted.sample
        z = steps.step(predicted, t, z, eta=eta, variance_noise=torch.randn(z.shape, dtype=z.dtype) if eta else None)[0]
    return z


def call(pipeline: DDIMPipeline, feat: Tensor, **options: Any) -> Tensor:
    return pipeline(
        batch_size=len(feat), device=feat.device, dtype=feat.dtype, shape=feat.shape[1:], feat=feat, **options
    )


def features(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = size or (BATCH, C, 1, 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype).requires_grad_()


class Pair:
    """The same model and adapter twice: one for the pipeline, one for the loop."""

    def __init__(self, make: Callable[[], nn.Module] = MapDenoiser, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.ours = nn.ModuleDict({"model": make(), "adapter": Adapter()}).to(dtype)
        self.theirs = copy.deepcopy(self.ours)
        self.pipeline = DDIMPipeline(self.ours["model"], scheduler(), self.ours["adapter"])

    def apply(self, change: Callable[[nn.Module], object]) -> None:
        for both in (self.ours, self.theirs):
            torch.manual_seed(1)
            change(both["model"])

    def compare(self, *size: int, fused: bool = True, dtype: torch.dtype = torch.float64) -> None:
        """Values, all gradients and all buffers agree; `fused` says whether the operator is expected to have run."""
        results = []
        for both in (self.ours, self.theirs):
            both.zero_grad()
            feat = features(*size, dtype=dtype)
            torch.manual_seed(3)
            if both is self.ours:
                with watched() as ran:
                    z_hat = call(self.pipeline, feat)
                assert ran == [fused], ran
            else:
                z_hat = eager(both["model"], scheduler(), both["adapter"], feat)
            z_hat.backward(torch.linspace(-1, 2, z_hat.numel(), dtype=z_hat.dtype).view_as(z_hat))
            results.append([z_hat, feat.grad, torch.get_rng_state()])
        assert torch.equal(results[0].pop(), results[1].pop())  # as many random numbers were drawn
        # To the largest gradient: those of biases before a BatchNorm are nothing but rounding.
        rtol = 1e-9 if dtype == torch.float64 else 1e-4
        scale = max(float(p.grad.abs().max()) for p in self.theirs.parameters() if p.grad is not None)
        pairs = [*zip(*results, strict=True), *zip(self.ours.buffers(), self.theirs.buffers(), strict=True)]
        for p, q in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                pairs.append((p.grad, q.grad))
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * max(scale, 1))


class watched:
    """Notes for every call of a pipeline whether the operator ran."""

    def __enter__(self) -> list[bool]:
        self.ran: list[bool] = []
        self.original = DDIMPipeline._captured

        def captured(pipeline: DDIMPipeline, feat: Tensor) -> Any:
            found = self.original(pipeline, feat)
            self.ran.append(found is not None)
            return found

        DDIMPipeline._captured = captured  # type: ignore[method-assign]
        return self.ran

    def __exit__(self, *_: object) -> None:
        DDIMPipeline._captured = self.original  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    gdpd.pipeline._note_once.cache_clear()
    yield
    gdpd.pipeline._note_once.cache_clear()


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.BackendFallback)
        yield


# --- the loop of a trainer ------------------------------------------------------------------------------------------


def in_part_eval(model: nn.Module) -> None:
    model.head.eval()


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def first_layers_frozen(model: nn.Module) -> None:
    model.body[:3].requires_grad_(False)


@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval, in_part_eval, frozen, first_layers_frozen])
def test_one_pixel_is_the_loop_of_a_trainer(change: Callable[[nn.Module], object]) -> None:
    pair = Pair()
    pair.apply(change)
    pair.compare()


def test_larger_maps_run_the_loop_and_say_so_once() -> None:
    pair = Pair()
    with pytest.warns(gk.BackendFallback, match="4 × 3 pixels"):
        pair.compare(BATCH, C, 4, 3, fused=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.compare(BATCH, C, 4, 3, fused=False)


@pytest.mark.parametrize("option", ["steps_offset", "trailing", "linspace", "v_prediction", "sample", "not to one"])
def test_settings_of_the_scheduler_are_followed(option: str) -> None:
    settings: dict[str, Any] = {
        "steps_offset": {"steps_offset": 1},
        "not to one": {"set_alpha_to_one": False},
        "trailing": {"timestep_spacing": "trailing"},
        "linspace": {"timestep_spacing": "linspace"},
    }.get(option, {"prediction_type": option})
    pair = Pair()
    steps = scheduler(**settings)
    for n in (2, 7):
        torch.manual_seed(2)
        ours = call(DDIMPipeline(pair.ours["model"], steps, pair.ours["adapter"]), features(), num_inference_steps=n)
        torch.manual_seed(2)
        theirs = eager(pair.theirs["model"], scheduler(**settings), pair.theirs["adapter"], features(), n)
        torch.testing.assert_close(ours, theirs)
        assert len(steps.timesteps) == 2 * n  # as a loop leaves it


def test_without_an_adapter_the_start_is_the_feature_and_nothing_is_drawn() -> None:
    model = MapDenoiser().double()
    before = torch.get_rng_state()
    ours = call(DDIMPipeline(model, scheduler()), features())
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(ours, eager(copy.deepcopy(model), scheduler(), None, features()))


def test_a_generator_gives_the_noise() -> None:
    pipeline = DDIMPipeline(MapDenoiser().eval(), scheduler(), Adapter())
    feat = features(dtype=torch.float32).detach()
    for eta in (0.0, 1.0):
        drawn = [call(pipeline, feat, generator=torch.Generator().manual_seed(5), eta=eta) for _ in range(2)]
        assert torch.equal(*drawn)
        assert not torch.equal(drawn[0], call(pipeline, feat, generator=torch.Generator().manual_seed(6), eta=eta))


@pytest.mark.usefixtures("quiet")
def test_noise_of_the_steps_has_the_spread_of_the_loops() -> None:
    """A model that predicts nothing: what is left is the noise, whose variance the table gives."""

    class Nothing(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return 0 * z

    feat = torch.zeros(400, C, 1, 1)
    torch.manual_seed(0)
    fused = call(DDIMPipeline(Nothing(), scheduler()), feat, eta=1.0)
    loop = eager(Nothing(), scheduler(), None, feat, eta=1.0)
    assert fused.std() == pytest.approx(loop.std().item(), rel=0.06)
    assert abs(fused.mean()) < 0.06 * fused.std()
    larger = call(DDIMPipeline(Nothing(), scheduler()), feat.view(100, C, 2, 2), eta=1.0)
    assert larger.std() == pytest.approx(loop.std().item(), rel=0.06)


def test_no_grad_keeps_nothing() -> None:
    pipeline = DDIMPipeline(MapDenoiser(), scheduler(), Adapter())
    with torch.no_grad():
        assert not call(pipeline, features(dtype=torch.float32)).requires_grad


@pytest.mark.parametrize("half", [False, True])
def test_autocast_is_as_near_to_float64_as_the_loop_under_autocast(half: bool) -> None:
    pair = Pair(dtype=torch.float32)
    feat = features(64, C, 1, 1, dtype=torch.float32).detach()
    feat = feat.bfloat16() if half else feat  # what a student's own autocast hands over
    exact = copy.deepcopy(pair.theirs).double()
    eps = {}

    def keep(generated: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def randn(*size: Any, dtype: torch.dtype, **options: Any) -> Tensor:
            eps["drawn"] = generated(*size, dtype=dtype, **options) if "drawn" not in eps else eps["drawn"]
            return eps["drawn"].to(dtype)

        return randn

    original, torch.randn = torch.randn, keep(torch.randn)  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = call(pair.pipeline, feat)
            theirs = eager(pair.theirs["model"], scheduler(), pair.theirs["adapter"], feat)
        truth = eager(exact["model"], scheduler(), exact["adapter"], feat.double())
    finally:
        torch.randn = original
    assert ours.dtype == torch.float32
    error, bound = (ours - truth).norm(), (theirs - truth).norm()
    assert 0 < error <= 2 * bound


# --- a module changed after it was captured -------------------------------------------------------------------------


def weights_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: torch.randn_like(v) if "weight" in k else v for k, v in model.state_dict().items()})


def layer_replaced(model: nn.Module) -> None:
    model.body[2] = nn.SiLU()


def layers_added(model: nn.Module) -> None:
    model.head = nn.Sequential(model.head, nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).double()


def head_swapped(model: nn.Module) -> None:
    model.time.weight = nn.Parameter(torch.randn_like(model.time.weight))


CHANGES = [weights_in_place, loaded, layer_replaced, layers_added, head_swapped, nn.Module.eval, frozen]


def test_a_changed_module_is_noticed() -> None:
    pair = Pair()
    pair.compare()
    for change in CHANGES:
        pair.apply(change)
        pair.compare()


def test_moved_to_another_dtype_and_back() -> None:
    pair = Pair()
    pair.compare()
    for dtype in (torch.float32, torch.float64):
        for both in (pair.ours, pair.theirs):
            both.to(dtype)
        pair.theirs.load_state_dict(pair.ours.state_dict())  # which rounding has drawn apart
        pair.compare(dtype=dtype)


# --- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run_as_often_as_in_the_loop(kind: str) -> None:
    pair = Pair()
    pair.compare()
    calls: dict[str, list[float]] = {"ours": [], "theirs": []}

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, *given: Any) -> None:
            tensor = given[-1] if isinstance(given[-1], Tensor) else given[-1][0]
            calls[name].append(float(tensor.detach().sum()))

        return note

    handles = [
        getattr(both["model"].body[3], f"register_{kind}_hook")(hook(name))
        for name, both in (("ours", pair.ours), ("theirs", pair.theirs))
    ]
    pair.compare(fused=False)
    assert len(calls["theirs"]) == 5
    assert calls["ours"] == pytest.approx(calls["theirs"])
    for handle in handles:
        handle.remove()
    pair.compare()
    assert len(calls["ours"]) == 5


def test_hooks_are_told_once_with_their_place() -> None:
    pipeline = DDIMPipeline(model := MapDenoiser(), scheduler())
    model.body[2].register_forward_hook(lambda *_: None)
    feat = features(dtype=torch.float32)
    with pytest.warns(gk.BackendFallback, match=r"body\.2 \(ReLU\): has a forward hook"):
        call(pipeline, feat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipeline, feat)


def test_hooks_of_parameters_are_called_where_the_operator_runs() -> None:
    pair = Pair()
    seen = []
    for both in (pair.ours, pair.theirs):
        weight = both["model"].head[0].weight
        weight.register_hook(lambda g: 2 * g)
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    pair.compare()
    torch.testing.assert_close(*seen)


# --- models of other kinds ------------------------------------------------------------------------------------------


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=1,
        in_channels=C,
        out_channels=C,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        norm_num_groups=1,
    )


def test_a_model_of_diffusers_handed_straight_in() -> None:
    Pair(unet).compare()


@pytest.mark.usefixtures("quiet")
def test_a_function_in_the_place_of_a_module() -> None:
    pair = Pair()
    pair.pipeline = DDIMPipeline(lambda z, t: pair.ours["model"](z, t), scheduler(), pair.ours["adapter"])
    pair.compare(fused=False)


@pytest.mark.usefixtures("quiet")
def test_a_model_that_cannot_be_captured() -> None:
    class Sorts(MapDenoiser):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return super().forward(z.sort(dim=1).values, t)

    Pair(Sorts).compare(fused=False)


def test_copies_and_pickles_with_what_it_holds() -> None:
    pipeline = DDIMPipeline(MapDenoiser().eval(), scheduler(), Adapter())
    feat = features(dtype=torch.float32).detach()

    def run(pipeline: DDIMPipeline) -> Tensor:
        return call(pipeline, feat, generator=torch.Generator().manual_seed(1))

    expected = run(pipeline)
    holder = SimpleNamespace(model=pipeline.model, pipeline=pipeline)
    for again in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert torch.equal(run(again.pipeline), expected)
        assert again.pipeline.model is again.model
        with torch.no_grad():
            again.model.head[1].bias.add_(1)
        assert not torch.equal(run(again.pipeline), expected)
    assert torch.equal(run(pipeline), expected)


def test_compiled_in_one_graph_for_every_batch_size() -> None:
    pair = Pair()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda feat: call(pair.pipeline, feat), fullgraph=True, dynamic=True, backend=counter)
    compiled_so_far = []
    for batch in (5, 9):
        torch.manual_seed(4)
        ours = compiled(features(batch, C, 1, 1))
        torch.manual_seed(4)
        theirs = eager(pair.theirs["model"], scheduler(), pair.theirs["adapter"], features(batch, C, 1, 1))
        torch.testing.assert_close(ours, theirs)
        ours.sum().backward()
        compiled_so_far.append(counter.frame_count)
    assert len(set(compiled_so_far)) == 1
    torch._dynamo.reset()


# --- what it says no to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 5}, ValueError, r"batch_size is 5, feat has 6 rows"),
        ({"shape": (C,)}, ValueError, r"shape is \(12,\), feat has \(12, 1, 1\)"),
        ({"device": "meta"}, ValueError, r"device is meta, feat is on cpu"),
        ({"dtype": torch.int64}, ValueError, r"dtype is torch.int64; expected a floating"),
        ({"feat": None}, TypeError, r"feat: expected a tensor \[batch, C, H, W\], got NoneType"),
        ({"feat": torch.zeros(BATCH, C)}, ValueError, r"feat has shape \(6, 12\).*feat\[:, :, None, None\]"),
        ({"num_inference_steps": 0}, ValueError, r"num_inference_steps is 0; expected an integer of at least 1"),
        ({"num_inference_steps": 2.0}, ValueError, r"num_inference_steps is 2.0"),
        ({"eta": -1.0}, ValueError, r"eta is -1.0"),
        (
            {"feat": torch.zeros(1, C, 1, 1), "batch_size": 1},
            ValueError,
            r"BatchNorm in training mode needs at least 2",
        ),
    ],
)
def test_calls_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    feat = torch.zeros(BATCH, C, 1, 1)
    good = {"batch_size": BATCH, "device": "cpu", "dtype": feat.dtype, "shape": (C, 1, 1), "feat": feat}
    pipeline = DDIMPipeline(MapDenoiser(), scheduler())
    assert pipeline(**good).shape == feat.shape
    with pytest.raises(error, match=message):
        pipeline(**(good | change))


def stepless(n: int) -> SimpleNamespace:
    own = SimpleNamespace(alphas_cumprod=gk.alphas_cumprod(), num_train_timesteps=1000)
    own.set_timesteps = lambda steps: vars(own).update(timesteps=list(range(n)))
    return own


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "dpm"}, ValueError, r"solver is 'dpm'; only 'ddim'"),
        ({"model": "unet"}, TypeError, r"model: expected a module or function, got str"),
        ({"noise_adapter": 0.5}, TypeError, r"noise_adapter: expected a module or function, got float"),
        ({"scheduler": None}, TypeError, r"NoneType has no alphas_cumprod and no set_timesteps"),
        ({"scheduler": DDIMScheduler()}, ValueError, r"clip_sample is on.*clip_sample=False"),
        ({"scheduler": scheduler(thresholding=True)}, ValueError, r"thresholding is on"),
        (
            {"scheduler": SimpleNamespace(alphas_cumprod=torch.ones(5), set_timesteps=print, num_train_timesteps=9)},
            ValueError,
            r"num_train_timesteps is 9, but alphas_cumprod has 5 entries",
        ),
        (
            {"scheduler": SimpleNamespace(alphas_cumprod=[0.5], set_timesteps=print)},
            TypeError,
            r"alphas_cumprod has to be a tensor",
        ),
    ],
)
def test_parts_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDIMPipeline(**({"model": MapDenoiser(), "scheduler": scheduler()} | arguments))


def test_a_scheduler_of_its_own_kind() -> None:
    own = stepless(0)
    own.set_timesteps = lambda n: vars(own).update(timesteps=[i * (1000 // n) for i in reversed(range(n))])
    model = MapDenoiser().eval()
    feat = features(dtype=torch.float32)
    torch.testing.assert_close(
        call(DDIMPipeline(model, own), feat), call(DDIMPipeline(model, scheduler()), feat), rtol=1e-4, atol=1e-5
    )


def test_a_scheduler_that_sets_another_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"set_timesteps\(10\) has to set 10 timesteps; it set 3"):
        call(DDIMPipeline(MapDenoiser(), stepless(3)), features(dtype=torch.float32))


def test_a_scheduler_whose_noise_levels_were_changed_is_noticed() -> None:
    steps = scheduler()
    pipeline = DDIMPipeline(MapDenoiser(), steps)
    before = pipeline.table(5)
    assert pipeline.table(5) is before
    steps.alphas_cumprod.mul_(0.9)
    assert pipeline.table(5) != before
    steps.register_to_config(clip_sample=True)
    steps.alphas_cumprod.mul_(0.9)
    with pytest.raises(ValueError, match="clip_sample is on"):
        pipeline.table(5)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (lambda feat: 0.5, TypeError, r"noise_adapter: returned float"),
        (lambda feat: torch.ones(3), ValueError, r"noise_adapter: returned shape \(3,\).*each of 6 samples"),
        (lambda feat: torch.ones(len(feat)).long(), ValueError, r"torch.int64"),
    ],
)
def test_adapters_that_do_not_fit(adapter: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(DDIMPipeline(MapDenoiser(), scheduler(), adapter), features(dtype=torch.float32))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("model", [lambda z, t: z.flatten(1), lambda z, t: None])
def test_models_that_return_something_else(model: Any) -> None:
    with pytest.raises(ValueError, match="model: returned"):
        call(DDIMPipeline(model, scheduler()), features(dtype=torch.float32))
