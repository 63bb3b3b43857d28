"""Tensor parallelism: parts of layers are exact, and ranks together compute what one does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from checkpoints import Tiny, gptq_config, make_sparse, write_checkpoint, write_tensors
from checkpoints import make_layer as make_gptq
from fusable import Block
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, assert_message, assert_same, make_layer, make_layer_24
from operands import make_input
from ranks import Ranks
from torch import Tensor, nn

import marlin
from marlin import CheckpointError, FusedLinear, MarlinLinear, MarlinLinear24
from marlin._part import Part
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.native import PackedShape
from marlin.parallel import (
    Column,
    ColumnParallelMarlinLinear,
    Row,
    RowParallelMarlinLinear,
    load,
    parallelize,
    shard,
    split,
)

ops = torch.ops.marlin


class TestSplit:
    @pytest.mark.parametrize(
        ("features", "world_size", "multiple", "bounds"),
        [
            (4096, 2, None, (0, 2048, 4096)),
            (896, 2, None, (0, 448, 896)),
            (13696, 8, None, tuple(range(0, 13697, 1712))),  # even, though not in blocks
            (4096, 3, None, (0, 1280, 2688, 4096)),  # whole blocks of 128
            (200, 3, None, (0, 64, 128, 200)),
            (7, 3, None, (0, 2, 4, 7)),
            (960, 4, 80, (0, 240, 480, 720, 960)),
            (400, 2, 80, (0, 160, 400)),
            (5, 1, None, (0, 5)),
        ],
    )
    def test_bounds(
        self, features: int, world_size: int, multiple: int | None, bounds: tuple[int, ...]
    ) -> None:
        assert split(features, world_size, multiple=multiple) == bounds

    @given(st.integers(1, 5000), st.integers(1, 16))
    def test_every_rank_gets_a_part(self, features: int, world_size: int) -> None:
        if features < world_size:
            with pytest.raises(ValueError, match="use fewer ranks"):
                split(features, world_size)
            return
        bounds = split(features, world_size)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, features, world_size + 1)
        assert all(start < stop for start, stop in pairwise(bounds))

    @pytest.mark.parametrize(
        ("arguments", "options", "words"),
        [
            ((64, 0), {}, "world_size: got 0; it must be an int of at least 1"),
            ((0, 2), {}, "features: got 0; it must be an int of at least 1"),
            ((64.0, 2), {}, "features: got 64.0; it must be an int of at least 1"),
            ((64, 2), {"multiple": 16.0}, "multiple: got 16.0 for 64 features"),
            ((64, 2), {"multiple": 48}, "multiple: got 48 for 64 features"),
            ((64, 2), {"multiple": 64}, "world_size: got 2 for 64 features in units of 64"),
        ],
    )
    def test_refusals(self, arguments: Any, options: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            split(*arguments, **options)


def part_of(layer: Layer, rows: range, columns: range) -> tuple[Part, Layer]:
    """A part, by itself, its lead included."""
    whole = PackedShape(layer.in_features, layer.out_features, layer.group_size, layer.sparse)
    part = Part(whole, rows, columns)
    tensors = {
        leaf: part.cut(leaf, tensor)
        for leaf, tensor in layer.named_buffers()
        if not (leaf == "perm" and len(columns) < layer.in_features)
    }
    sizes = {"in_features": part.shape.in_features, "out_features": part.shape.out_features}
    return part, type(layer).from_packed(**tensors, **sizes)


def codes_of(layer: Layer) -> Tensor:
    n, k = layer.out_features, layer.in_features
    if layer.sparse:
        q, mask = ops.unpack_24(layer.qweight, layer.places, n, k)
        return q.where(mask, 16)
    return ops.unpack(layer.qweight, n, k)


def assert_part(layer: Layer, rows: range, columns: range) -> None:
    """Its weights are those of the whole, its blocks as if packed from its own codes."""
    part, made = part_of(layer, rows, columns)
    assert 0 <= part.lead < 32
    dense = made.dequantize()[:, part.lead :]
    whole = layer.dequantize()
    if not layer.sparse and layer.perm is not None:
        whole = whole[:, layer.perm]
        if made.perm is not None:
            dense = dense[:, made.perm]
    assert torch.equal(dense, whole[rows.start : rows.stop, columns.start : columns.stop])
    start = columns.start - part.lead
    codes = codes_of(layer)[rows.start : rows.stop, start : columns.stop].contiguous()
    assert torch.equal(codes_of(made), codes)
    if layer.sparse:
        again = ops.pack_24(codes % 16, codes < 16)
        assert torch.equal(made.places, again[1])
        assert torch.equal(made.qweight, again[0])
    else:
        assert torch.equal(made.qweight, ops.pack(codes))
    if layer.bias is not None:
        assert torch.equal(made.bias, layer.bias[rows.start : rows.stop])
    for leaf, tensor in made.named_buffers():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.nbytes, leaf
        assert storage.data_ptr() != dict(layer.named_buffers())[leaf].untyped_storage().data_ptr()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_part_of_any_layer(data: st.DataObject) -> None:
    sparse = data.draw(st.booleans())
    step = 4 if sparse else 1
    n, k = data.draw(st.integers(1, 140)), step * data.draw(st.integers(1, 400 // step))
    options = {"zeros": data.draw(st.booleans()), "bias": True}
    size = data.draw(st.sampled_from([32, 64, 128, -1]))
    make = make_layer_24 if sparse else make_layer
    layer = make(n, k, size, **options)
    top = data.draw(st.integers(0, n - 1))
    left = step * data.draw(st.integers(0, k // step - 1))
    rows = range(top, data.draw(st.integers(top + 1, n)))
    columns = range(left, step * data.draw(st.integers(left // step + 1, k // step)))
    assert_part(layer, rows, columns)


@pytest.mark.parametrize("perm", [False, True])
def test_parts_of_blocks_groups_and_orders(perm: bool, device: str) -> None:
    layer = make_layer(200, 448, 128, perm=perm, zeros=True, bias=True).to(device)
    for rows in (range(200), range(64, 128), range(64, 200), range(1, 199), range(64, 100)):
        for columns in (range(448), range(64, 192), range(192, 448), range(96, 400), range(5, 7)):
            assert_part(layer, rows, columns)


@pytest.mark.parametrize(
    ("size", "columns", "expected", "lead"),
    [
        (128, range(128, 384), 128, 0),
        (128, range(64, 448), 64, 0),
        (128, range(224, 448), 32, 0),
        (128, range(192, 256), -1, 0),  # inside one group
        (128, range(100, 448), 32, 4),
        (64, range(416, 448), -1, 0),
        (-1, range(77, 100), -1, 0),
    ],
)
def test_groups_of_a_part(size: int, columns: range, expected: int, lead: int) -> None:
    part = Part(PackedShape(448, 64, size), range(64), columns)
    assert (part.group_size, part.lead) == (expected, lead)


class TestShard:
    @pytest.mark.parametrize("make", [make_layer, make_layer_24])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_shards_make_the_layer(self, make: Any, world_size: int, device: str) -> None:
        layer = make(72, 448, 128, zeros=True, bias=True).to(device).eval()
        dense = layer.dequantize()
        for dim in (0, 1):
            parts = [shard(layer, dim, rank, world_size) for rank in range(world_size)]
            assert torch.equal(torch.cat([part.dequantize() for part in parts], dim), dense)
            assert all(type(part) is type(layer) and not part.training for part in parts)
            biases = [part.bias for part in parts]
            if dim == 0:
                assert torch.equal(torch.cat(biases), layer.bias)
            else:
                assert torch.equal(biases[0], layer.bias)
                assert biases[1:] == [None] * (world_size - 1)

    def test_of_one_is_the_layer(self) -> None:
        layer = make_layer(72, 200, 64, perm=True, zeros=True, bias=True)
        assert_same(shard(layer, 0, 0, 1), layer)
        assert_same(shard(layer, 1, 0, 1), layer)

    def test_order_stays_with_the_columns(self) -> None:
        layer = make_layer(72, 200, 64, perm=True)
        x = make_input(3, 200, dtype=torch.float16)
        outputs = [shard(layer, 0, rank, 2)(x) for rank in range(2)]
        assert torch.equal(torch.cat(outputs, -1), layer(x))

    @pytest.mark.parametrize(
        ("arguments", "options", "words"),
        [
            ((2, 0, 2), {}, ["dim: got 2", "0 for output features"]),
            ((0, 2, 2), {}, ["rank: got 2", "0..1"]),
            ((0, 0, 100), {}, ["world_size: got 100 for 72 features", "fewer ranks"]),
            ((0, 0, 2), {"bounds": (0, 72)}, ["bounds: got (0, 72)", "3 numbers that rise"]),
            ((0, 0, 2), {"bounds": (0, 72, 72)}, ["rise from 0 to 72"]),
            ((1, 1, 2), {"bounds": (0, 100, 200)}, ["bounds: got 100", "a group of 64", "32"]),
        ],
    )
    def test_refusals(self, arguments: Any, options: Any, words: list[str]) -> None:
        with pytest.raises(ValueError, match="got") as caught:
            shard(make_layer(), *arguments, **options)
        assert_message(caught.value, *words)

    def test_refuses_what_no_slice_of_the_input_fits(self) -> None:
        with pytest.raises(ValueError, match=r"act-order with dim=1.*RowParallelMarlinLinear"):
            shard(make_layer(perm=True), 1, 0, 2)
        with pytest.raises(ValueError, match=r"columns: got 0\.\.6 of a 2:4 sparse layer"):
            shard(make_layer_24(64, 12, -1), 1, 0, 2, bounds=(0, 6, 12))
        with pytest.raises(TypeError, match="layer: got Linear; it must be a MarlinLinear"):
            shard(nn.Linear(4, 4), 0, 0, 2)  # type: ignore[arg-type]


# What follows runs on ranks. Functions that they call are given the device first.


def own(x: Tensor, bounds: tuple[int, ...]) -> Tensor:
    rank = dist.get_rank()
    return x[..., bounds[rank] : bounds[rank + 1]]


def assert_sum(y: Tensor, whole: Layer, x: Tensor, bounds: tuple[int, ...]) -> None:
    """y within the bound that marlin.parallel states, of the exact result."""
    dense = whole.dequantize().double()
    if not whole.sparse and whole.perm is not None:
        dense, x = dense[:, whole.perm], x[:, whole.perm]
    exact = x.double() @ dense.T
    partial = [(x[..., a:b].double() @ dense[:, a:b].T).abs() for a, b in pairwise(bounds)]
    magnitudes = x.double().abs() @ dense.abs().T
    if whole.bias is not None:
        exact += whole.bias.double()
        partial[0] += whole.bias.double().abs()
        magnitudes += whole.bias.double().abs()
    unit = torch.finfo(x.dtype).eps / 2
    allowed = reference.error_bound(exact, magnitudes, x.size(-1), x.dtype)
    allowed += len(partial) * unit * sum(partial)
    assert bool(((y.double() - exact).abs() <= allowed).all())


# Weights of `integers` are exact in the activations' type: kernels may round them.
CASES: list[dict[str, Any]] = [
    {"size": 128, "zeros": True, "bias": True},
    {"size": 64, "perm": True, "bias": True},
    {"size": -1, "bias": True},
    {"size": 128, "sparse": True, "bias": True},
    {"size": 64, "dtype": torch.bfloat16, "bias": True},
]


def make(size: int, sparse: bool = False, integers: bool = True, **options: Any) -> Layer:
    maker = make_layer_24 if sparse else make_layer
    return maker(200, 448, size, integers=integers, **options)


def column(device: str, case: dict[str, Any]) -> None:
    whole = make(**case).to(device)
    x = make_input(5, 448, dtype=whole.scales.dtype, device=device)
    for bounds in (None, {2: (0, 1, 200), 3: (0, 70, 128, 200)}[dist.get_world_size()]):
        layer = ColumnParallelMarlinLinear.from_layer(whole, bounds=bounds)
        dense = whole.dequantize().double()
        a, b = layer.bounds[dist.get_rank()], layer.bounds[dist.get_rank() + 1]
        bias = whole.bias[a:b]
        reference.assert_close(layer(x), x, dense[a:b], bias, rounded=False)
        gathered = ColumnParallelMarlinLinear.from_layer(whole, gather_output=True, bounds=bounds)
        y = gathered(x)
        assert torch.equal(own(y, layer.bounds), layer(x))
        assert y.shape == (5, 200)
        if device == "cpu":  # sums in one order
            assert torch.equal(y, whole(x))


def row(device: str, case: dict[str, Any]) -> None:
    whole = make(**case).to(device)
    dtype = whole.scales.dtype
    x = make_input(5, 448, dtype=dtype, device=device)
    one_hot = torch.eye(448, dtype=dtype, device=device)
    plain = make(**{**case, "bias": False, "integers": False}).to(device)
    odd = {2: (0, 100, 448), 3: (0, 100, 196, 448)}[dist.get_world_size()]
    for bounds in (None, odd):
        layer = RowParallelMarlinLinear.from_layer(whole, bounds=bounds)
        y = layer(own(x, layer.bounds))
        assert_sum(y, whole, x, layer.bounds)
        same = [torch.empty_like(y) for _ in range(dist.get_world_size())]
        dist.all_gather(same, y)
        assert all(torch.equal(other, y) for other in same)
        from_whole = RowParallelMarlinLinear.from_layer(
            whole, input_is_parallel=False, bounds=bounds
        )
        assert torch.equal(from_whole(x), y)
        assert layer(own(x[:0], layer.bounds)).shape == (0, 200)
        # Of one-hot inputs one rank's partial result is a weight and the others' are zero.
        exact = RowParallelMarlinLinear.from_layer(plain, bounds=bounds)
        assert torch.equal(exact(own(one_hot, layer.bounds)), plain.dequantize().T)


class TestLayers:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_column(self, ranks: Ranks, case: dict[str, Any]) -> None:
        ranks.call(column, case)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_row(self, ranks: Ranks, case: dict[str, Any]) -> None:
        ranks.call(row, case)

    def test_gradients(self, ranks: Ranks) -> None:
        ranks.call(gradients)

    def test_compiled(self, ranks: Ranks) -> None:
        ranks.call(compiled)

    def test_state(self, ranks: Ranks) -> None:
        ranks.call(state)

    def test_input_of_another_split(self, ranks: Ranks) -> None:
        ranks.call(wrong_input)


class Mlp(nn.Module):
    def __init__(self, order: bool = False) -> None:
        super().__init__()
        options = {"integers": True, "bias": True}
        self.up = make_layer(456, 64, 32, **options)
        self.gate = make_layer_24(456, 64, 32, **options)
        self.down = make_layer(64, 456, 128, perm=order, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) / 64 * self.gate(x) / 64)


MLP_PLAN = {"up": Column(), "gate": Column(), "down": Row()}


def gradients(device: str) -> None:
    """Those of the input are the whole model's, through every collective."""
    wholes: list[tuple[nn.Module, nn.Module]] = []
    for order in (False, True):
        wholes.append((Mlp(order), parallelize(Mlp(order), MLP_PLAN)))
    for style in (Column(gather_output=True), Row(input_is_parallel=False)):
        wholes.append((Mlp(), parallelize(Mlp(), {"up": style})))
    for whole, parallel in wholes:
        x = make_input(3, 64, dtype=torch.float16, device=device).requires_grad_()
        (whole.to(device)(x).float() / 1024).cos().sum().backward()
        expected, x.grad = x.grad, None
        (parallel.to(device)(x).float() / 1024).cos().sum().backward()
        assert expected is not None
        assert x.grad is not None
        error = (x.grad - expected).float().norm() / expected.float().norm()
        assert error < 1e-2


def compiled(device: str) -> None:
    model = parallelize(Mlp(order=True), MLP_PLAN).to(device)
    x = make_input(3, 64, dtype=torch.float16, device=device)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(y, model(x))


def state(device: str) -> None:
    model = parallelize(Mlp(order=True), MLP_PLAN).to(device)
    keys = set(model.state_dict())
    assert {"up.layer.qweight", "gate.layer.places", "down.layer.scales", "down.order"} <= keys
    assert ("down.layer.bias" in keys) == (dist.get_rank() == 0)
    other = parallelize(Mlp(order=True), MLP_PLAN).to(device)
    other.load_state_dict(model.state_dict())
    assert "bounds=(0, " in repr(model.down)


def wrong_input(device: str) -> None:
    layer = RowParallelMarlinLinear.from_layer(make_layer(64, 448, 64)).to(device)
    with pytest.raises(RuntimeError, match=r"input: got 448 features; .* by bounds=\(0, "):
        layer(torch.zeros(1, 448, dtype=torch.float16, device=device))


class TestParallelize:
    def test_replaces_what_the_plan_names(self, ranks: Ranks) -> None:
        ranks.call(replaces)

    def test_refusals_change_nothing(self, ranks: Ranks) -> None:
        ranks.call(refuses)

    def test_fused_layers(self, ranks: Ranks) -> None:
        ranks.call(refuses_fused)

    def test_once_more(self, ranks: Ranks) -> None:
        ranks.call(again)


def replaces(device: str) -> None:
    model = nn.Module()
    model.first, model.head = Mlp(), make_layer(40, 64, 64)
    model.second = model.first
    model.eval()
    plan = {"first.up": Column(gather_output=True), "*.gate": Column(), "down": Row()}
    assert parallelize(model, plan) is model
    kinds = [ColumnParallelMarlinLinear, ColumnParallelMarlinLinear, RowParallelMarlinLinear]
    assert [type(child) for child in model.first.children()] == kinds
    assert not any(module.training for module in model.modules())
    assert model.first.up.gather_output
    assert not model.first.gate.gather_output
    assert model.second is model.first
    assert type(model.head) is MarlinLinear
    assert type(model.first.gate.layer) is MarlinLinear24


def refuses(device: str) -> None:
    model = Mlp()
    before = dict(model.named_modules())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"up": Column(), "*.q_proj": Column()}, ValueError, r"got '\*\.q_proj', which no packed"),
        ({"up": Column(), "down": Row(bounds=(0, 1))}, ValueError, r"down: bounds: got \(0, 1\)"),
        ({"up": Column(), "gate": Column}, TypeError, "for 'gate'; it must be a Column or a Row"),
    ]
    for plan, kind, words in cases:
        with pytest.raises(kind, match=words):
            parallelize(model, plan)
    model.up.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"up: cannot be replaced: it has hooks"):
        parallelize(model, MLP_PLAN)
    assert dict(model.named_modules()) == before


def refuses_fused(device: str) -> None:
    """Neither the parts nor the layer of all of them, whatever the plan calls them."""
    model = Block()
    assert len(marlin.fuse(model).fused) == 2
    model.own = FusedLinear([make_layer(64, 64, 64), make_layer(64, 64, 64)])
    before = dict(model.named_modules())
    for pattern in ("wq", "mlp.*", "*.packed", "*fused_gate_up*", "own", "own.packed", "*"):
        for plan in ({pattern: Column()}, {"down": Row(), pattern: Row()}):
            with pytest.raises(ValueError, match=r"fused.*call marlin\.unfuse\(model\) first"):
                parallelize(model, plan)
    assert dict(model.named_modules()) == before
    for layer in (model.mlp.gate, model.own):
        with pytest.raises(TypeError, match=r"layer: got Fused.*call marlin\.unfuse"):
            shard(layer, 0, 0, 2)
    parallelize(model, {"down": Row()})
    assert type(model.mlp.down) is RowParallelMarlinLinear


def again(device: str) -> None:
    """A second plan leaves the parts of the first one alone."""
    model = parallelize(Mlp(), {"up": Column(), "gate": Column()})
    parallelize(model, {"*": Row()})
    assert type(model.up) is ColumnParallelMarlinLinear
    assert type(model.up.layer) is MarlinLinear
    assert type(model.down) is RowParallelMarlinLinear
    with pytest.raises(ValueError, match=r"got '\*', which no packed layer is left for"):
        parallelize(model, {"*": Row()})


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    layers = {
        "model.layers.0.up": make_sparse(64, 96, sym=False, seed=1),
        "model.layers.0.down": make_gptq(96, 64, act_order=True, bias=True, seed=2),
        "model.layers.1.up": make_gptq(72, 40, sym=False, bias=True, seed=3),
    }
    config = gptq_config(32, sym=False, desc_act=True)
    source = write_checkpoint(folder / "src", layers, config=config, shards=2)
    marlin.convert(source.directory, folder / "dst", sparse=True, progress=False)
    return folder / "dst"


class TestLoad:
    def test_equals_the_whole_model_cut(self, ranks: Ranks, converted: Path) -> None:
        ranks.call(loads, converted)

    def test_reads_only_its_own(self, ranks: Ranks, converted: Path) -> None:
        ranks.call(reads_little, converted)


def test_windows_of_a_file(tmp_path: Path) -> None:
    tensors = {"matrix": torch.randn(7, 5), "blocks": torch.randn(4, 6, 8), "row": torch.randn(9)}
    write_tensors(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for window in ((), (slice(1, 3),), (slice(0, 4), slice(2, 5)), (slice(3, 4), slice(0, 1))):
        for name, tensor in tensors.items():
            cut = window[: tensor.dim()]
            assert torch.equal(checkpoint.read(name, cut), tensor[cut])
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    last = max(checkpoint.tensors.values(), key=lambda info: info.stop)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        checkpoint.read(last.name, (slice(1, last.shape[0]),))


def tiny() -> Tiny:
    with torch.device("meta"):
        model = Tiny()
        model.model.layers[1].up = nn.Linear(72, 40)
        return model


TINY_PLAN = {
    "model.layers.0.up": Column(),
    "down": Row(),
    "model.layers.1.up": Column(gather_output=True),
}


def loads(device: str, directory: Path) -> None:
    loaded = load(tiny(), directory, TINY_PLAN, device=device)
    expected = parallelize(marlin.load(tiny(), directory, device=device), TINY_PLAN)
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].device.type == device
    tokens = torch.arange(10, device=device).view(2, 5)
    whole = marlin.load(tiny(), directory, device=device)
    torch.testing.assert_close(
        loaded(tokens, torch.float16), whole(tokens, torch.float16), rtol=1e-2, atol=1e-2
    )
    with pytest.raises(ValueError, match="'up_proj', which no packed layer is left for"):
        load(tiny(), directory, {"up_proj": Column()})
    with pytest.raises(CheckpointError, match="no module of this name"):
        load(nn.Module(), directory, TINY_PLAN)


def reads_little(device: str, directory: Path) -> None:
    read: dict[str, int] = {}
    read_tensor = Checkpoint.read

    def count(self: Checkpoint, name: str, *arguments: Any, **options: Any) -> Tensor:
        tensor = read_tensor(self, name, *arguments, **options)
        read[name] = read.get(name, 0) + tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", count)
        load(tiny(), directory, TINY_PLAN, device=device)
    up, down = "model.layers.0.up", "model.layers.0.down"
    # 96 output features are two blocks of 64, and so are 96 input features.
    whole = dist.get_world_size() == 2
    assert read[f"{up}.qweight"] <= 2 * 2048
    assert read[f"{down}.qweight"] <= 2 * 2048
    if dist.get_rank() == 0:
        assert read[f"{up}.qweight"] == read[f"{down}.qweight"] == 2048
    assert read[f"{up}.scales"] < 2 * 96 * 2
    assert whole or read[f"{down}.scales"] == 64 * 2
