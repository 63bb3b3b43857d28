"""replace_linear: what it replaces, what it leaves and why, and what it reports."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from marlin import MarlinLinear, ReplaceReport, replace_linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 72, bias=False)
        self.o_proj = nn.Linear(72, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.o_proj(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 100, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


PROJECTIONS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "o_proj")]


def names(report: ReplaceReport) -> list[str]:
    return [layer.name for layer in report.replaced]


def reasons(report: ReplaceReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.skipped}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_model(device: str, dtype: torch.dtype, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = Model().to(device, dtype).eval()
    tokens = torch.arange(12, device=device).view(2, 6)
    weights = {name: model.get_submodule(name).weight.detach().double() for name in PROJECTIONS}
    before = model(tokens)
    report = replace_linear(model, group_size=32, symmetric=symmetric)
    assert names(report) == PROJECTIONS
    assert reasons(report) == {"lm_head": "skip='lm_head'"}
    assert isinstance(model.lm_head, nn.Linear)
    for name in PROJECTIONS:
        layer = model.get_submodule(name)
        assert isinstance(layer, MarlinLinear)
        assert layer.group_size == 32
        assert layer.scales.dtype == dtype
        assert (layer.zeros is None) == symmetric
        assert not layer.training
        # Half a step, and the rounding of the dequantised weight itself.
        step = layer.scales.double()[reference.group_of_column(layer.in_features,
                                                               layer.scales.size(0))].T  # fmt: skip
        slack = 0.5 + 16 * torch.finfo(dtype).eps
        assert bool(((layer.dequantize().double() - weights[name]).abs() <= slack * step).all())
    after = model(tokens)
    assert after.shape == before.shape
    assert torch.nn.functional.cosine_similarity(after.float(), before.float(), dim=-1).min() > 0.98


def test_report() -> None:
    model = Model().half()
    report = replace_linear(model)
    first = report.replaced[0]
    assert (first.name, first.shape) == ("layers.0.q_proj", (72, 64))
    assert first.bytes_before == 72 * 64 * 2
    assert first.bytes_after == 2 * 64 * 64 // 2 + 72 * 2  # two blocks of 64 x 64, one group
    assert report.bytes_before == sum(layer.bytes_before for layer in report.replaced)
    assert report.bytes_after == sum(layer.bytes_after for layer in report.replaced)
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["replaced"][0]["shape"] == [72, 64]
    assert restored["skipped"] == [{"name": "lm_head", "reason": "skip='lm_head'"}]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "before", "after"]
    assert lines[1].split() == ["layers.0.q_proj", "72", "x", "64", "9.0", "KiB", "4.1", "KiB"]
    assert lines[5].startswith("replaced 4")
    assert lines[6:] == ["left as they were: 1", "  lm_head  skip='lm_head'"]
    again = replace_linear(model, skip=())
    assert names(again) == ["lm_head"]
    assert replace_linear(model).replaced == []
    assert "replaced 0" in str(replace_linear(model))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        ("lm_head", ["lm_head"]),
        (("q_proj",), ["layers.0.q_proj", "layers.1.q_proj"]),
        (("layers.1.q_proj",), ["layers.1.q_proj"]),
        (["layers.0.*", "lm_*"], ["layers.0.q_proj", "layers.0.o_proj", "lm_head"]),
        (("*.[!q]_proj",), ["layers.0.o_proj", "layers.1.o_proj"]),
        (("Q_PROJ", "layers", "proj"), []),
    ],
)
def test_skip(skip: str | list[str], left: list[str]) -> None:
    model = Model().half()
    report = replace_linear(model, skip=skip)
    assert sorted(reasons(report)) == sorted(left)
    for name in left:
        assert type(model.get_submodule(name)) is nn.Linear
    assert len(report.replaced) == 5 - len(left)


def test_filter_fn() -> None:
    asked = []

    def wide(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return module.out_features > 64

    report = replace_linear(Model().half(), filter_fn=wide)
    assert asked == PROJECTIONS
    assert names(report) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert reasons(report)["layers.0.o_proj"] == "filter_fn"


def test_tied_weight_is_left() -> None:
    model = Model().half()
    model.lm_head.weight = model.embed.weight
    report = replace_linear(model, skip=())
    assert reasons(report) == {"lm_head": "its weight is tied to that of embed"}
    assert model.lm_head.weight is model.embed.weight


def test_tied_by_memory_is_left() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert reasons(replace_linear(model)) == {
        "0": "its weight is tied to that of 1",
        "1": "its weight is tied to that of 0",
    }


def test_shared_module_stays_shared() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 64)), "b": nn.ModuleList()}).half()
    shared = model["a"][0]
    model["b"].append(shared)
    model.add_module("c", shared)  # first in named_modules order is a.0, but c is nearer the root
    report = replace_linear(model)
    assert len(report.replaced) == 1
    assert isinstance(model["c"], MarlinLinear)
    assert model["c"] is model["a"][0]
    assert model["c"] is model["b"][0]
    for name in ("a.0", "b.0", "c"):  # each of its names counts for skip
        other = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.ModuleList([shared])})
        other.add_module("c", shared)
        assert not replace_linear(other, skip=(name,)).replaced


class Subclass(nn.Linear):
    pass


def with_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: None)
    return linear


class Wrapped(nn.Parameter):
    pass


def with_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight = Wrapped(linear.weight.detach())
    return linear


def with_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Subclass(64, 64), "Subclass is a subclass of nn.Linear and may do more than it"),
        (lambda: with_hook(nn.Linear(64, 64)), "it has hooks (_forward_pre_hooks)"),
        (lambda: with_forward(nn.Linear(64, 64)), "its forward was replaced on the instance"),
        (lambda: weight_norm(nn.Linear(64, 64)), "its weight is parametrized"),
        (lambda: with_weight(nn.Linear(64, 64)), "its weight is a Wrapped, not a plain tensor"),
        (lambda: nn.LazyLinear(64), "LazyLinear is a subclass"),
        (lambda: nn.Linear(0, 64), "its weight is empty"),
        (lambda: nn.Linear(64, 64, device="meta").to(torch.float8_e4m3fn),
         "its weight is torch.float8_e4m3fn"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_left_as_they_are(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    (skipped,) = replace_linear(model).skipped
    assert skipped.name == "0"
    assert skipped.reason.startswith(reason)
    assert isinstance(model[0], nn.Linear)


def test_attention_and_encoder_layers_still_work() -> None:
    """Modules of torch that read the weight of a linear layer keep it."""
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).bfloat16().eval()
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        before = model(x)
        report = replace_linear(model)
        assert torch.equal(model(x), before)
    assert reasons(report) == {
        "linear1": "nn.TransformerEncoderLayer reads its weight in its fast path",
        "linear2": "nn.TransformerEncoderLayer reads its weight in its fast path",
        "self_attn.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear and may "
        "do more than it",
    }


def test_meta_model_is_replaced_by_meta_layers() -> None:
    with torch.device("meta"):
        model = Model()
    report = replace_linear(model, dtype=torch.bfloat16)
    assert names(report) == PROJECTIONS
    layer = model.get_submodule(PROJECTIONS[0])
    assert layer.qweight.is_meta
    assert layer.scales.dtype == torch.bfloat16
    assert replace_linear(Model().to("meta"), device="cpu").replaced


@pytest.mark.parametrize("make_dtype", [None, torch.bfloat16])
def test_float32_model(make_dtype: torch.dtype | None) -> None:
    model, tokens = Model(), torch.arange(12).view(2, 6)
    before = model(tokens)
    report = replace_linear(model, dtype=make_dtype)
    dtype = make_dtype or torch.float16
    assert model.get_submodule(PROJECTIONS[0]).scales.dtype == dtype
    assert {layer.dtype_before for layer in report.replaced} == {"float32"}
    assert f"the rest of the model, too, with model.to({dtype})" in str(report)
    with pytest.raises(RuntimeError, match=r"input|scales"):
        model(tokens)
    after = model.to(dtype)(tokens).float()
    assert torch.nn.functional.cosine_similarity(after, before, dim=-1).min() > 0.98


@pytest.mark.gpu
def test_device_moves_layer_by_layer() -> None:
    model = Model().half()
    replace_linear(model, device="cuda")
    assert model.get_submodule(PROJECTIONS[0]).qweight.is_cuda
    assert not model.embed.weight.is_cuda


def test_one_original_at_a_time() -> None:
    """When a layer is quantised, the weights of those before it are gone."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).half()
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = MarlinLinear.from_linear.__func__  # type: ignore[attr-defined]

    def counting(cls: type[MarlinLinear], linear: nn.Linear, **options: object) -> MarlinLinear:
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, linear, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarlinLinear, "from_linear", classmethod(counting))
        replace_linear(model)
    assert alive == [4, 3, 2, 1]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    replace_linear(Model().half())
    assert capsys.readouterr() == ("", "")
    replace_linear(Model().half(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert PROJECTIONS[-1] in captured.err


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: replace_linear(nn.Linear(64, 64)), TypeError,
         ("model: got a Linear itself", "MarlinLinear.from_linear")),
        (lambda: replace_linear(Subclass(64, 64)), TypeError, ("model: got a Subclass itself",)),
        (lambda: replace_linear({"a": 1}), TypeError, ("model: got dict", "torch.nn.Module")),
        (lambda: replace_linear(Model(), dtype=torch.float32), TypeError,
         ("dtype: got torch.float32", "None to keep")),
        (lambda: replace_linear(Model(), group_size=48), ValueError, ("group_size: got 48",)),
        (lambda: replace_linear(Model(), skip=(1,)), TypeError, ("skip: got (1,)", "pass ()")),
    ],
)  # fmt: skip
def test_refused_arguments(
    call: Callable[[], object], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_not_finite_is_found_before_anything_is_replaced(leaf: str) -> None:
    model = Model().half()
    with torch.no_grad():
        getattr(model.layers[1].o_proj, leaf).view(-1)[5] = float("nan")
    with pytest.raises(ValueError) as caught:
        replace_linear(model)
    for part in (f"layers.1.o_proj.{leaf}: got NaN", "nothing has been replaced",
                 "skip=('layers.1.o_proj',)"):  # fmt: skip
        assert part in str(caught.value)
    assert not any(isinstance(module, MarlinLinear) for module in model.modules())
    assert len(replace_linear(model, skip=("layers.1.o_proj", "lm_head")).replaced) == 3


@pytest.mark.parametrize(
    ("leaf", "value", "reason"),
    [
        ("bias", torch.ones(3), "got float32 [3]; it must be float ["),
        ("bias", torch.ones(64, dtype=torch.int64), "got int64 [64]; it must be float ["),
        ("weight", torch.ones(3), "got float32 [3]; out_features="),
        ("weight", torch.ones(64, 60), "got float32 [64, 60]; out_features="),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_are_checked_before_anything_is_replaced(
    leaf: str, value: Tensor, reason: str, device: str
) -> None:
    """As after pruning of whole features that forgets the layer's own numbers."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"}).to(device)
    setattr(model["k"], leaf, nn.Parameter(value.to(device), requires_grad=False))
    with pytest.raises(ValueError) as caught:
        replace_linear(model)
    for part in (f"k.{leaf}: {reason}", "nothing has been replaced", "skip=('k',)"):
        assert part in str(caught.value)
    assert all(type(layer) is nn.Linear for layer in model.values())
    with pytest.raises(ValueError, match=f"{leaf}: got"):
        MarlinLinear.from_linear(model["k"])


def test_weight_beyond_the_dtype_names_the_layer() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].q_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj\.weight: got magnitude 1e\+06"):
        replace_linear(model)
    assert isinstance(model.layers[1].q_proj, nn.Linear)
    assert len(replace_linear(model, dtype=torch.bfloat16).replaced) == 2  # the other two are done


def test_state_dict_round_trip_of_a_replaced_model() -> None:
    torch.manual_seed(1)
    model = Model().half()
    replace_linear(model, symmetric=False)
    fresh = Model().half()
    replace_linear(fresh, symmetric=False)
    fresh.load_state_dict(model.state_dict())
    tokens = torch.arange(5).view(1, 5)
    assert torch.equal(fresh(tokens), model(tokens))
