"""Converted checkpoints in vLLM: its layers with our parameters, and the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import Layer, make_layer, make_layer_24
from torch import Tensor, nn

import marlin
from marlin.formats.checkpoint import CheckpointError
from marlin.formats.native import PackedShape, config_for

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import marlin.integrations.vllm as plugin

ROOT = Path(__file__).parents[1]
HALF = torch.float16


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    plugin.register()
    file = tmp_path_factory.mktemp("vllm") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """vLLM's layers are made for one of several ranks; without the others, nothing is reduced."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vllm_linear, vllm_parameter, plugin):
            for name, value in (("rank", rank), ("world_size", ranks)):
                function = f"get_tensor_model_parallel_{name}"
                if hasattr(module, function):
                    patch.setattr(module, function, lambda value=value: value)
        patch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda output: output)
        yield


def config_of(layers: dict[str, Layer], **fused: list[str]) -> plugin.MarlinConfig:
    shapes = {
        name: PackedShape(la.in_features, la.out_features, la.group_size, la.sparse)
        for name, la in layers.items()
    }
    made = plugin.MarlinConfig.from_config(config_for(shapes))
    made.leaves = {name: set(dict(la.named_buffers())) for name, la in layers.items()}
    made.packed_modules_mapping = fused
    return made


def share_order(layers: dict[str, Layer]) -> None:
    """Layers of one input that were quantised with act-order have one order."""
    first = next(iter(layers.values()))
    for layer in layers.values():
        if not layer.sparse and layer.perm is not None:
            layer.perm.copy_(first.perm)


def load(layer: nn.Module, layers: dict[str, Layer], shards: list[Any]) -> None:
    """As vLLM's models do, every tensor of the checkpoint by the loader of its parameter."""
    for source, shard in zip(layers.values(), shards, strict=True):
        for leaf, tensor in source.named_buffers():
            parameter = getattr(layer, leaf)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def weight_of(layer: nn.Module, in_features: int) -> Tensor:
    """By one-hot inputs: exact."""
    return layer.quant_method.apply(layer, torch.eye(in_features, dtype=HALF)).T


def rows_of(layer: Layer, rank: int, size: int) -> Tensor:
    return layer.dequantize()[rank * size : (rank + 1) * size]


KINDS = [
    pytest.param(make_layer, {"zeros": True, "perm": True}, id="dense"),
    pytest.param(make_layer_24, {"zeros": True}, id="sparse"),
]


class TestLayers:
    @pytest.mark.parametrize(("make", "options"), KINDS)
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("head", [24, 64])
    def test_qkv(self, make: Any, options: dict[str, bool], ranks: int, head: int) -> None:
        """4 heads of q and 2 of k and v, which 4 ranks have twice; only q has zero points."""
        k = 200
        layers = {
            "a.q_proj": make(4 * head, k, 64, bias=True, **options),
            "a.k_proj": make(2 * head, k, 64, bias=True, **{**options, "zeros": False}),
            "a.v_proj": make(2 * head, k, 64, bias=True, **{**options, "zeros": False}),
        }
        share_order(layers)
        config = config_of(layers, qkv_proj=["q_proj", "k_proj", "v_proj"])
        for rank in range(ranks):
            with as_rank(rank, ranks):
                layer = QKVParallelLinear(
                    k, head, 4, 2, True, False, HALF, config, "a.qkv_proj", return_bias=False
                )
                load(layer, layers, ["q", "k", "v"])
            q, kv = 4 * head // ranks, max(2 * head // ranks, head)
            other = rank * 2 // ranks if ranks > 2 else rank
            expected = [
                rows_of(layers["a.q_proj"], rank, q),
                rows_of(layers["a.k_proj"], other, kv),
                rows_of(layers["a.v_proj"], other, kv),
            ]
            assert torch.equal(weight_of(layer, k), torch.cat(expected))
            x = torch.randn(3, k, dtype=HALF)
            assert torch.equal(layer(x), layer.quant_method.apply(layer, x, layer.bias))

    @pytest.mark.parametrize(("make", "options"), KINDS)
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_gate_up(self, make: Any, options: dict[str, bool], ranks: int) -> None:
        layers = {name: make(200, 72, 32, **options) for name in ("m.gate_proj", "m.up_proj")}
        config = config_of(layers, gate_up_proj=["gate_proj", "up_proj"])
        for rank in range(ranks):
            with as_rank(rank, ranks):
                layer = MergedColumnParallelLinear(
                    72, [200, 200], False, quant_config=config, params_dtype=HALF,
                    prefix="m.gate_up_proj",
                )  # fmt: skip
                load(layer, layers, [0, 1])
            size = 200 // ranks
            expected = [rows_of(source, rank, size) for source in layers.values()]
            assert torch.equal(weight_of(layer, 72), torch.cat(expected))

    def test_gate_up_that_is_stored_as_one(self) -> None:
        layers = {"m.gate_up_proj": make_layer(256, 72, 32, perm=True)}
        config = config_of(layers, gate_up_proj=["gate_proj", "up_proj"])
        dense = layers["m.gate_up_proj"].dequantize()
        for rank in range(2):
            with as_rank(rank, 2):
                layer = MergedColumnParallelLinear(
                    72, [128, 128], False, quant_config=config, params_dtype=HALF,
                    prefix="m.gate_up_proj",
                )  # fmt: skip
                load(layer, layers, [None])
            own = [dense[a : a + 64] for a in (64 * rank, 128 + 64 * rank)]
            assert torch.equal(weight_of(layer, 72), torch.cat(own))

    @pytest.mark.parametrize(("make", "options"), KINDS)
    @pytest.mark.parametrize("kind", [ColumnParallelLinear, ReplicatedLinear])
    def test_one_layer(self, make: Any, options: dict[str, bool], kind: Any) -> None:
        layers = {"m.up_proj": make(90, 72, 32, bias=True, **options)}
        source, config = layers["m.up_proj"], config_of(layers)
        for rank in range(2):
            with as_rank(rank, 2):
                layer = kind(72, 90, quant_config=config, params_dtype=HALF, prefix="m.up_proj")
                load(layer, layers, [None])
            whole = kind is ReplicatedLinear
            own = source.dequantize() if whole else rows_of(source, rank, 45)
            assert torch.equal(weight_of(layer, 72), own)

    @pytest.mark.parametrize(
        ("make", "k", "size"),
        [(make_layer, 448, 128), (make_layer, 400, 64), (make_layer, 80, -1),
         (make_layer_24, 448, 128), (make_layer_24, 400, 64)],
    )  # fmt: skip
    def test_row(self, make: Any, k: int, size: int) -> None:
        """Shares of 224 columns cut a group of 128; those of 200 need columns before their own."""
        layers = {"m.down_proj": make(72, k, size, bias=True, zeros=True)}
        source, config = layers["m.down_proj"], config_of(layers)
        x = torch.randn(3, k, dtype=HALF)
        outputs = []
        for rank in range(2):
            own = slice(rank * k // 2, (rank + 1) * k // 2)
            with as_rank(rank, 2):
                layer = RowParallelLinear(
                    k, 72, quant_config=config, params_dtype=HALF, prefix="m.down_proj",
                    return_bias=False,
                )  # fmt: skip
                load(layer, layers, [None])
                outputs.append(layer(x[:, own]))
            assert torch.equal(weight_of(layer, k // 2), source.dequantize()[:, own])
        torch.testing.assert_close(sum(outputs), source(x), rtol=5e-3, atol=5e-3)

    def test_row_with_act_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = {"m.down_proj": make_layer(72, 400, 64, perm=True)}
        source, config = layers["m.down_proj"], config_of(layers)
        monkeypatch.setattr(plugin, "tensor_model_parallel_all_gather", lambda x: x)
        total = torch.zeros(72, 400)
        for rank in range(2):
            with as_rank(rank, 2):
                layer = RowParallelLinear(
                    400, 72, False, quant_config=config, params_dtype=HALF, prefix="m.down_proj"
                )
                load(layer, layers, [None])
            total += weight_of(layer, 400).float()  # given all of the input, as if gathered
        assert torch.equal(total, source.dequantize().float())

    def test_compiles(self) -> None:
        layers = {"m.up_proj": make_layer(90, 72, 32)}
        layer = ReplicatedLinear(
            72, 90, False, quant_config=config_of(layers), params_dtype=HALF, prefix="m.up_proj"
        )
        load(layer, layers, [None])
        x = torch.randn(3, 72, dtype=HALF)
        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x)[0])

    @pytest.mark.parametrize("leaves_waits_out", [False, True])
    def test_no_weights_early_where_kernels_leave_waits_out(self, leaves_waits_out: bool) -> None:
        layers = {"m.up_proj": make_layer(90, 72, 32)}
        layer = ReplicatedLinear(
            72, 90, False, quant_config=config_of(layers), params_dtype=HALF, prefix="m.up_proj"
        )
        load(layer, layers, [None])
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        with torch._inductor.config.patch({"triton.enable_pdl": leaves_waits_out}):
            torch.compile(lambda x: layer(x)[0], fullgraph=True, backend=keep)(
                torch.randn(3, 72, dtype=HALF)
            )
        (product,) = [
            node for node in graphs[0].graph.nodes if node.target is torch.ops.marlin.gemm
        ]
        assert product.kwargs["static_weights"] is not leaves_waits_out

    def test_scales_of_another_dtype(self) -> None:
        layers = {"m.up_proj": make_layer(90, 72, 32)}
        layer = ReplicatedLinear(
            72, 90, False, quant_config=config_of(layers), params_dtype=torch.bfloat16,
            prefix="m.up_proj",
        )  # fmt: skip
        load(layer, layers, [None])
        assert layer.scales.dtype == torch.bfloat16
        tiny = {"m.up_proj": make_layer(90, 72, 32, dtype=torch.bfloat16)}
        tiny["m.up_proj"].scales[0, 0] = 1e-9
        layer = ReplicatedLinear(
            72, 90, False, quant_config=config_of(tiny), params_dtype=HALF, prefix="m.up_proj"
        )
        with pytest.raises(ValueError, match=r"m\.up_proj: got a cast to torch.float16 with"):
            load(layer, tiny, [None])


def replicated(config: plugin.MarlinConfig, *, bias: bool) -> ReplicatedLinear:
    return ReplicatedLinear(72, 90, bias, quant_config=config, prefix="m.up", params_dtype=HALF)


class TestRefusals:
    def qkv(self, layers: dict[str, Layer], **options: Any) -> QKVParallelLinear:
        config = config_of(layers, qkv_proj=["q_proj", "k_proj", "v_proj"])
        settings = {"hidden_size": 72, "head_size": 32, "total_num_heads": 2, **options}
        return QKVParallelLinear(
            bias=False, params_dtype=HALF, quant_config=config, prefix="a.qkv_proj", **settings
        )

    def layers(self, **changes: Any) -> dict[str, Layer]:
        made: dict[str, Layer] = {f"a.{n}_proj": make_layer(64, 72, 32) for n in "qkv"}
        return {name: changes.get(name[2], layer) for name, layer in made.items()}

    @pytest.mark.parametrize(
        ("changes", "options", "words"),
        [
            ({"v": make_layer(64, 72, 64)}, {}, "differ in group size"),
            ({"v": make_layer_24(64, 72, 32)}, {}, "differ in group size, sparsity"),
            ({"v": make_layer(64, 72, 32, perm=True)}, {}, "sparsity or act-order"),
            ({}, {"hidden_size": 64}, r"the model's layer is 64 -> \[64, 64, 64\] features"),
            ({"q": make_layer(128, 72, 32)}, {}, r"the checkpoint's 72 -> \[128, 64, 64\]"),
        ],
    )
    def test_layers_that_cannot_be_fused(self, changes: Any, options: Any, words: str) -> None:
        with pytest.raises(ValueError, match=rf"a\.qkv_proj: .*{words}"):
            self.qkv(self.layers(**changes), **options)

    def test_a_smaller_layer(self) -> None:
        layers = self.layers(k=make_layer(40, 72, 32))
        layer = self.qkv(layers)
        with pytest.raises(ValueError, match=r"a\.qkv_proj: rows: got 0\.\.64"):
            load(layer, layers, ["q", "k", "v"])

    def test_orders_that_differ(self) -> None:
        layers: dict[str, Layer] = {
            f"a.{n}_proj": make_layer(64, 72, 32, perm=True, seed=seed)
            for seed, n in enumerate("qkv")
        }
        with pytest.raises(ValueError, match=r"a\.qkv_proj: .* have different act-orders"):
            load(self.qkv(layers), layers, ["q", "k", "v"])

    def test_a_layer_of_which_some_is_unquantised(self) -> None:
        layers = self.layers()
        del layers["a.v_proj"]
        with pytest.raises(ValueError, match=r"has a\.q_proj, a\.k_proj in 4 bits, but not a\.v_p"):
            self.qkv(layers)

    def test_tensors_that_were_not_loaded(self) -> None:
        layers = self.layers()
        layer = self.qkv(layers)
        layer.qweight.weight_loader(layer.qweight, layers["a.q_proj"].qweight, "q")
        with pytest.raises(ValueError, match="a part of this layer, without qweight, scales"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_dummy_weights(self) -> None:
        layer = self.qkv(self.layers())
        layer.quant_method.process_weights_after_loading(layer)
        assert not bool(weight_of(layer, 72).any())

    def test_values(self) -> None:
        layers = {"m.up": make_layer(90, 72, 32, zeros=True)}
        layers["m.up"].zeros[0, 0] = 16
        config = config_of(layers)
        layer = ReplicatedLinear(
            72, 90, False, quant_config=config, prefix="m.up", params_dtype=HALF
        )
        with pytest.raises(ValueError, match=r"m\.up\.zeros: got 16; zero points are 0\.\.15"):
            load(layer, layers, [None])

    @pytest.mark.parametrize("bias", [False, True])
    def test_bias(self, bias: bool) -> None:
        layers = {"m.up": make_layer(90, 72, 32, bias=not bias)}
        config = config_of(layers)
        layer = ReplicatedLinear(
            72, 90, bias, quant_config=config, prefix="m.up", params_dtype=HALF
        )
        source = {"m.up": make_layer(90, 72, 32)}
        words = "the model's layer has (no|a) bias, the checkpoint has (one|none) for it"
        with pytest.raises(ValueError, match=words):
            load(layer, source, [None])

    def test_head(self) -> None:
        config = config_of({"lm_head": make_layer(128, 72, 32)})
        with pytest.raises(ValueError, match=r"lm_head: .* linear layers only, not ParallelLMHead"):
            ParallelLMHead(128, 72, params_dtype=HALF, quant_config=config, prefix="lm_head")

    def test_experts(self) -> None:
        config = config_of({"mlp.experts.0.up_proj": make_layer(128, 72, 32)})
        experts = type("RoutedExperts", (nn.Module,), {})()
        with pytest.raises(ValueError, match=r"the checkpoint has mlp\.experts\.0\.up"):
            config.get_quant_method(experts, "mlp.experts")
        assert config.get_quant_method(experts, "other.experts") is None
        assert config.get_quant_method(nn.Module(), "mlp") is None

    def test_configuration(self) -> None:
        kind = get_quantization_config("marlin")
        assert kind is plugin.MarlinConfig
        original = {"quant_method": "marlin", "bits": 4, "group_size": 128}
        with pytest.raises(CheckpointError, match="the packing of the original Marlin kernel"):
            kind.from_config(original)
        assert kind.override_quantization_method(original, None) is None

    def test_layers_that_stay(self) -> None:
        layer = ColumnParallelLinear(72, 90, quant_config=config_of({}), prefix="m.other")
        assert type(layer.quant_method) is UnquantizedLinearMethod


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installed marlin adds to sys.path, for one that is not installed."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    folder = tmp_path_factory.mktemp("site")
    info = folder / f"marlin-{marlin.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: marlin\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]))
    return folder


class TestEngine:
    """vLLM itself, in other processes, finds the plug-in by the entry point of pyproject.toml."""

    @pytest.mark.parametrize(("ranks", "options"), [(1, []), (2, ["--eager"])])
    def test_equals_transformers(
        self, tmp_path: Path, site: Path, ranks: int, options: list[str]
    ) -> None:
        from test_transformers import write_llama
        from transformers import AutoModelForCausalLM
        from vllm_run import TOKENS

        import marlin.integrations.transformers  # noqa: F401

        if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} CUDA devices, found {torch.cuda.device_count()}")
        directory = tmp_path / "llama"
        write_llama(directory)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # One core each: more than one rank of a node must be told.
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(ranks)),
        }
        script = Path(__file__).with_name("vllm_run.py")
        run = subprocess.run(
            [sys.executable, script, directory, str(ranks), *options],
            env=environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, run.stdout[-3000:] + run.stderr[-3000:]
        found = json.loads(lines[-1].removeprefix("RESULT "))
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokens = TOKENS + [token for token, _ in found]
        with torch.no_grad():
            logs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        for position, (token, log) in enumerate(found, start=len(TOKENS) - 1):
            assert log == pytest.approx(float(logs[position, token]), abs=0.03)
            assert float(logs[position].max() - logs[position, token]) < 0.03
