"""marlin._inspect: its tables and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import sanitizer_workload
from sanitizer_workload import HOPPER_SMS, hopper_cases

from marlin import _inspect

GOOD: dict[str, Any] = {"m": 1, "n": 64, "k": 64, "sm": 90, "sms": 132}
needs_cuda_build = pytest.mark.skipif(
    not _inspect.build_info()["cuda"], reason="built without CUDA kernels"
)


def test_plans_are_numbered_and_explained() -> None:
    plans = _inspect.plans()
    assert [plan["id"] for plan in plans] == list(range(len(plans)))
    assert all(plan["reason"] for plan in plans)
    assert len({plan["name"] for plan in plans}) == len(plans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "m, n and k must be at least 1"),
        ({"n": -1}, "m, n and k must be at least 1"),
        ({"k": 0}, "m, n and k must be at least 1"),
        ({"m": 2**31}, "must be below 2.31 .* got m = 2147483648, n = "),
        ({"m": 2**30, "n": 2**11}, r"m \* n at most 2.40, got m = 1073741824, n = 2048"),
        ({"n": 2**30, "k": 2**11}, r"n \* k and m \* n at most 2.40"),
        ({"sms": 0}, "sms .multiprocessors. must be at least 1"),
        ({"group_size": 48}, "group_size must be -1, 32, 64 or 128, got 48"),
        ({"sparse": True, "k": 66}, "k of a 2:4 sparse weight must be a multiple of 4, got 66"),
    ],
    ids=str,
)
def test_plan_for_refuses_sizes(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _inspect.plan_for(**GOOD | change)


@pytest.mark.parametrize("sm", [-1, 0, 70, 75])
def test_plan_for_refuses_old_gpus(sm: int) -> None:
    with pytest.raises(RuntimeError, match=r"8\.0 or later is needed"):
        _inspect.plan_for(**GOOD | {"sm": sm})


def test_plan_for_asks_for_the_gpu() -> None:
    with pytest.raises(TypeError):
        _inspect.plan_for(1, 64, 64)


def test_plan_for_says_what_blocks_share() -> None:
    """320 tiles for 132 blocks: of 188 all do as many stages, then each does a whole one."""
    plan = _inspect.plan_for(1024, 10240, 8192, sm=90, sms=132)
    assert plan["kernel"]["name"] == "sm90_prefill_t256_r128_k64"
    assert plan["row_tiles"] * plan["token_tiles"] == 320
    assert (plan["blocks"], plan["shared_tiles"], plan["shares"]) == (132, 188, True)
    assert plan["workspace_bytes"] == 132 * (256 * 128 * 4 + 2 * 8)
    plan = _inspect.plan_for(8448, 4096, 8192, sm=90, sms=132)  # they go round
    assert (plan["shared_tiles"], plan["shares"], plan["workspace_bytes"]) == (0, False, 0)


@pytest.mark.parametrize(
    ("group_size", "sparse", "first"),
    [
        *((32, False, 9), (64, False, 33), (128, False, 33), (-1, False, 33)),
        *((32, True, 9), (64, True, 25), (128, True, 33), (-1, True, 33)),
    ],
)
def test_plan_for_says_where_weights_are_rounded(group_size: int, sparse: bool, first: int) -> None:
    """As README says: at the earliest from so many tokens on, by the layer."""

    def rounds(m: int, n: int, k: int) -> bool:
        options = {"group_size": group_size, "sparse": sparse, "sm": 90, "sms": 132}
        return bool(_inspect.plan_for(m, n, k, **options)["rounds_weights"])

    layers = [(4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336), (5120, 27648), (768, 4096)]
    assert not any(rounds(m, *layer) for m in range(1, first) for layer in layers)
    assert any(rounds(first, *layer) for layer in layers)


@needs_cuda_build
@pytest.mark.parametrize(
    "arguments",
    [{"id": -2}, {"id": 999}, {"sms": -1}],
    ids=str,
)
def test_force_plan_refuses(arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(RuntimeError, match=f"force_plan: {name}: got {value}; it must be"):
        _inspect.force_plan(**arguments)


@pytest.mark.parametrize("shares", ["no", 2, None], ids=repr)
def test_force_plan_wants_true_or_false(shares: object) -> None:
    with pytest.raises(TypeError, match=r"(?s)force_plan\(\).*shares: bool") as raised:
        _inspect.force_plan(shares=shares)  # type: ignore[arg-type]
    assert f"shares={shares!r}" in str(raised.value)


@needs_cuda_build
@pytest.mark.parametrize("id", [-1, 999])
def test_kernel_attributes_refuses(id: int) -> None:
    with pytest.raises(RuntimeError, match=f"there is no kernel {id}; there are"):
        _inspect.kernel_attributes(id)


def test_kernels_of_one_kind_of_weight_follow_each_other() -> None:
    """So that the numbers of the dense ones do not depend on how many others there are."""
    sparse = [plan["sparse"] for plan in _inspect.plans()]
    assert sparse == sorted(sparse)
    assert any(sparse)


@pytest.mark.parametrize(("sm", "sms"), [(80, 108), (89, 142), (90, 132), (120, 188)])
@pytest.mark.parametrize("m", [1, 8, 9, 33, 65, 128, 500])
def test_plan_for_keeps_the_kinds_of_weights_apart(m: int, sm: int, sms: int) -> None:
    for sparse in (False, True):
        plan = _inspect.plan_for(m, 4096, 4096, sm=sm, sms=sms, sparse=sparse)
        assert plan["sparse"] is plan["kernel"]["sparse"] is sparse
        assert plan["kernel"] in _inspect.plans()


def test_sanitizers_reach_every_hopper_kernel() -> None:
    """Sharing tiles or not, on all multiprocessors and on few; sm80 is forced one by one."""
    reached = {(kernel["name"], *partition.values()) for kernel, partition, _ in hopper_cases()}
    for plan in _inspect.plans():
        if not plan["family"].startswith("sm80"):
            expected = {(plan["name"], sms, s) for s in plan["shares"] for sms in HOPPER_SMS}
            assert expected <= reached


@pytest.mark.parametrize("name", ["prefill", "hopper:4/4", "hopper:0/99", "hopper:", "hopper:1"])
def test_sanitizers_refuse_parts_that_there_are_not(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert sanitizer_workload.main([name]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith(f"got {name}; the parts are pack,")
    assert "hopper:0/4 the first quarter of hopper" in printed
