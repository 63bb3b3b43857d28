"""When MarlinLinear promises the kernel that its weights are not being written."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from layers import make_layer

from marlin import MarlinLinear


def promises(layer: MarlinLinear) -> list[bool]:
    return [layer._weights_are_static() for _ in range(2)]


def test_promise_holds_from_the_second_call() -> None:
    assert promises(make_layer(perm=True)) == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scales.mul_(2),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer._buffers.update(qweight=layer.qweight.clone()),
        lambda layer: setattr(layer, "perm", None),
        lambda layer: setattr(layer, "bias", torch.zeros(72, dtype=torch.float16)),
    ],
)
def test_promise_is_withdrawn_after_a_change(change: Callable[[MarlinLinear], object]) -> None:
    layer = make_layer(perm=True)
    promises(layer)
    change(layer)
    assert promises(layer) == [False, True]


def test_promise_is_withdrawn_after_a_write_in_inference_mode() -> None:
    layer = make_layer()
    with torch.inference_mode():
        assert promises(layer) == [False, True]
        layer.qweight.add_(1)
        assert promises(layer) == [False, True]


def test_promise_is_never_made_for_inference_tensors() -> None:
    with torch.inference_mode():
        layer = make_layer()
        assert promises(layer) == [False, False]


def test_copies_make_their_own_promise() -> None:
    layer = make_layer()
    promises(layer)
    assert promises(copy.deepcopy(layer)) == [False, True]
    assert promises(pickle.loads(pickle.dumps(layer))) == [False, True]


def test_promise_can_be_set_by_hand() -> None:
    layer = make_layer()
    layer.static_weights = False
    assert promises(layer) == [False, False]
    layer.static_weights = True
    assert promises(layer) == [True, True]


@pytest.mark.parametrize(
    ("promise", "leaves_waits_out"), [(None, False), (True, False), (True, True)]
)
def test_compiled_and_exported_graphs_promise_only_if_told(
    promise: bool | None, leaves_waits_out: bool
) -> None:
    """And not where inductor's kernels may start early, and read before they wait."""
    layer, x = make_layer(), torch.randn(2, 200).half()
    layer.static_weights = promise
    promises(layer)
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        found.extend(node.kwargs for node in graph.graph.nodes if "gemm" in str(node.target))
        return graph

    with torch._inductor.config.patch({"triton.enable_pdl": leaves_waits_out}):
        torch.compile(layer, fullgraph=True, backend=backend)(x)
        exported = torch.export.export(layer, (x,)).graph
    found += [node.kwargs for node in exported.nodes if "gemm" in str(node.target)]
    promised = bool(promise) and not leaves_waits_out
    assert [bool(kwargs.get("static_weights")) for kwargs in found] == [promised] * 2


@pytest.mark.parametrize("assign", [True, False])
def test_tensors_can_be_swapped(assign: bool) -> None:
    layer = make_layer(bias=True)
    promises(layer)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(make_layer(bias=True).state_dict(), assign=assign)
        layer.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert promises(layer) == [False, True]


def test_watch_keeps_no_tensor_alive() -> None:
    layer = make_layer()
    promises(layer)
    old = weakref.ref(layer.qweight)
    layer._buffers["qweight"] = torch.empty(0)
    assert old() is None
