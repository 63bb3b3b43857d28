"""replace_linear(sparse=True): pruned on the way, or pruned already, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import assert_message, assert_same
from test_replace import PROJECTIONS, Model, names, reasons
from torch import nn

from marlin import MarlinLinear, MarlinLinear24, replace_linear
from marlin.prune import largest_two


def pruned_model(dtype: torch.dtype = torch.float16) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype)
    for name in PROJECTIONS:
        weight = model.get_submodule(name).weight
        weight.data *= largest_two(weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_model(device: str, dtype: torch.dtype, symmetric: bool) -> None:
    """The same numbers as the dense layers of the same weights, in fewer bits."""
    model = pruned_model(dtype).to(device).eval()
    dense = pruned_model(dtype).to(device).eval()
    report = replace_linear(model, group_size=32, symmetric=symmetric, sparse=True)
    less = replace_linear(dense, group_size=32, symmetric=symmetric)
    assert names(report) == PROJECTIONS
    assert reasons(report) == {"lm_head": "skip='lm_head'"}
    assert all(isinstance(model.get_submodule(name), MarlinLinear24) for name in PROJECTIONS)
    for name in PROJECTIONS:
        one, other = model.get_submodule(name), dense.get_submodule(name)
        assert torch.equal(one.dequantize(), other.dequantize())
        assert not one.training
    tokens = torch.arange(12, device=device).view(2, 6)
    torch.testing.assert_close(model(tokens).float(), dense(tokens).float(), rtol=0.05, atol=0.05)
    assert [layer.shape for layer in report.replaced] == [layer.shape for layer in less.replaced]


def test_pruning_on_the_way() -> None:
    torch.manual_seed(0)
    model, reference = Model().half(), Model().half()
    reference.load_state_dict(model.state_dict())
    for name in PROJECTIONS:
        weight = reference.get_submodule(name).weight
        weight.data *= largest_two(weight)
    replace_linear(model, sparse=True, prune="magnitude")
    replace_linear(reference, sparse=True)
    for name in PROJECTIONS:
        one, other = model.get_submodule(name), reference.get_submodule(name)
        assert torch.equal(one.dequantize(), other.dequantize())
    assert "replaced 0" in str(replace_linear(model, sparse=True, prune="magnitude"))


def test_what_is_not_pruned_is_found_before_anything_is_replaced() -> None:
    model = pruned_model()
    model.layers[1].o_proj.weight.data[5, 8:12] = 1
    with pytest.raises(ValueError) as caught:
        replace_linear(model, sparse=True)
    assert_message(
        caught.value, "layers.1.o_proj.weight: got 4 weights other than zero in row 5, columns "
        "8..11", "prune='magnitude'", "skip=('layers.1.o_proj',)", "nothing has been replaced",
    )  # fmt: skip
    assert not any(isinstance(module, MarlinLinear24) for module in model.modules())
    assert (
        len(replace_linear(model, sparse=True, skip=("layers.1.o_proj", "lm_head")).replaced) == 3
    )


def test_features_that_are_not_in_fours_are_left() -> None:
    model = nn.Sequential(nn.Linear(30, 64), nn.Linear(64, 30)).half()
    report = replace_linear(model, sparse=True, prune="magnitude")
    assert reasons(report) == {
        "0": "its 30 input features are not a multiple of 4, as sparse=True needs"
    }
    assert names(report) == ["1"]
    assert names(replace_linear(model)) == ["0"]
    assert isinstance(model[0], MarlinLinear)
    assert isinstance(model[1], MarlinLinear24)


def test_meta_model_and_device() -> None:
    with torch.device("meta"):
        model = Model()
    assert names(replace_linear(model, sparse=True)) == PROJECTIONS
    assert model.get_submodule(PROJECTIONS[0]).places.is_meta
    assert len(replace_linear(pruned_model(), sparse=True, device="cpu").replaced) == 4


@pytest.mark.gpu
def test_device_moves_layer_by_layer() -> None:
    model, here = Model().half(), pruned_model()
    replace_linear(model, device="cuda", sparse=True, prune="magnitude")
    assert model.get_submodule(PROJECTIONS[0]).places.is_cuda
    assert not model.embed.weight.is_cuda
    moved = pruned_model()
    replace_linear(moved, device="cuda", sparse=True)
    replace_linear(here, sparse=True)
    for name in PROJECTIONS:  # packed by both backends alike
        assert_same(moved.get_submodule(name).cpu(), here.get_submodule(name))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: replace_linear(Model(), prune="magnitude"),
         ("prune: got 'magnitude' with sparse=False", "sparse=True")),
        (lambda: replace_linear(Model(), sparse=True, prune="wanda"),
         ("prune: got 'wanda'", "'magnitude'", "None")),
    ],
)  # fmt: skip
def test_refused_arguments(call: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert_message(caught.value, *parts)


def test_values_beyond_the_dtype_name_the_layer() -> None:
    model = pruned_model(torch.float32)
    weight = model.layers[1].q_proj.weight
    weight.data[weight != 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj\.weight: got magnitude 1e\+06"):
        replace_linear(model, sparse=True)
