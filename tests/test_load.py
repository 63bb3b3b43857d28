"""Converted checkpoints in models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    Source,
    Tiny,
    gptq_config,
    make_layer,
    read_all,
    write_checkpoint,
    write_tensors,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError


class Special(nn.Linear):
    pass


class TestLoad:
    @pytest.fixture
    def converted(self, tmp_path: Path) -> Source:
        source = write_checkpoint(tmp_path / "src")
        convert(source.directory, tmp_path / "dst", progress=False)
        return Source(tmp_path / "dst", source.layers, source.others)

    @pytest.mark.parametrize("start", ["cpu", "meta"])
    def test_values(self, converted: Source, start: str) -> None:
        from marlin.linear import MarlinLinear
        from marlin.load import load

        with torch.device(start):
            model = Tiny()
        assert load(model, converted.directory) is model
        assert model.head.weight is model.model.embed.weight
        assert torch.equal(model.model.embed.weight, converted.others["model.embed.weight"])
        assert model.model.step == 3
        for name, layer in converted.layers.items():
            module = model.get_submodule(name)
            assert isinstance(module, MarlinLinear)
            x = torch.randn(5, layer.q.size(1)).half()
            want = x.double() @ layer.weight().T + (
                0 if layer.bias is None else layer.bias.double()
            )
            torch.testing.assert_close(module(x).double(), want, rtol=2e-3, atol=2e-3)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))

    def test_refuses_another_model(self, converted: Source) -> None:
        from marlin.load import load

        model = Tiny()
        model.extra = nn.Linear(2, 2)
        del model.model.mask
        model.model.layers[0].up = nn.Linear(64, 95, bias=False)
        model.model.norm = nn.LayerNorm(65, bias=False)
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(CheckpointError) as caught:
            load(model, converted.directory)
        text = "\n".join(caught.value.refusals)
        assert len(caught.value.refusals) == 5
        assert "extra.weight: the checkpoint has no such tensor" in text
        assert "model.mask: the model has no such parameter" in text
        assert "model.layers.0.up: the model's layer is 64 -> 95 features" in text
        assert "model.norm.weight: the checkpoint's shape is [64], the model's [65]" in text
        assert {name: id(module) for name, module in model.named_modules()} == before

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda layer: layer.register_forward_hook(print), "it has hooks"),
            (lambda layer: setattr(layer, "forward", print), "its forward was replaced"),
            (weight_norm, "its weight is parametrized"),
            (lambda layer: setattr(layer, "__class__", Special), "Special is a subclass"),
        ],
        ids=["hook", "forward", "parametrized", "subclass"],
    )
    def test_layers_that_do_more_are_not_replaced(
        self, converted: Source, change: Callable[[nn.Linear], object], reason: str
    ) -> None:
        from marlin.load import load

        model = Tiny()
        change(model.model.layers[0].down)
        with pytest.raises(CheckpointError, match=rf"0\.down: .*cannot be replaced: {reason}"):
            load(model, converted.directory)

    def test_layers_loaded_before_are_replaced_again(self, converted: Source) -> None:
        from marlin.load import load

        model = load(Tiny(), converted.directory)
        first = model.model.layers[0].down
        load(model, converted.directory)
        assert model.model.layers[0].down is not first
        assert torch.equal(model.model.layers[0].down.qweight, first.qweight)

    def test_tensors_below_a_packed_layer(self, converted: Source) -> None:
        from marlin.load import load

        model = Tiny()
        model.model.layers[0].down.adapter = nn.Linear(96, 2, bias=False)
        tensors = read_all(converted.directory)
        write_tensors(converted.directory, {**tensors, "model.layers.1.up.g": torch.zeros(2)})
        with pytest.raises(CheckpointError) as caught:
            load(model, converted.directory)
        below = "holds this below a layer that is replaced, and a packed layer has only qweight"
        one, other = caught.value.refusals
        assert one.startswith(f"model.layers.0.down.adapter.weight: the model {below}")
        assert other.startswith(f"model.layers.1.up.g: the checkpoint {below}")

    def test_tensors_that_the_model_does_not_need(self, converted: Source) -> None:
        from marlin.load import load

        extra = {"model.angles": torch.zeros(4), "model.layers.9.old.masked_bias": torch.zeros(1)}
        write_tensors(converted.directory, {**read_all(converted.directory), **extra})
        model = Tiny()
        with pytest.raises(CheckpointError) as caught:
            load(model, converted.directory)
        assert [text.split(":")[0] for text in caught.value.refusals] == list(extra)
        model.model.register_buffer("angles", torch.arange(4.0), persistent=False)
        model._keys_to_ignore_on_load_unexpected = [r"\.masked_bias$"]
        load(model, converted.directory)
        assert torch.equal(model.model.angles, torch.arange(4.0))

    def test_refuses_the_source(self, tmp_path: Path) -> None:
        from marlin.load import load

        write_checkpoint(tmp_path / "src")
        with pytest.raises(CheckpointError, match="marlin convert"):
            load(Tiny(), tmp_path / "src")

    def test_buffers_that_meta_cannot_compute(self, converted: Source) -> None:
        from marlin.load import load

        with torch.device("meta"):
            model = Tiny()
            model.register_buffer("angles", torch.arange(4.0), persistent=False)
        with pytest.raises(CheckpointError, match="no values for the buffers angles"):
            load(model, converted.directory)

    def test_computed_buffers_are_rebuilt(self, converted: Source) -> None:
        from marlin.load import load

        class Rotary(nn.Module):
            def __init__(self, config: int) -> None:
                super().__init__()
                self.config = config
                self.register_buffer("angles", torch.arange(float(config)), persistent=False)

        with torch.device("meta"):
            model = Tiny()
            model.rotary = Rotary(4)
        load(model, converted.directory)
        assert torch.equal(model.rotary.angles, torch.arange(4.0))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({}, "Rotary is not built from its config alone"),
            ({"scale": 1}, r"Rotary\(config\) makes float32 \[4\], the model's is float32 \[5\]"),
            ({"scale": 0, "dtype": torch.float16}, r".*float32 \[4\], .* is float16 \[4\]"),
        ],
    )
    def test_computed_buffers_of_another_kind(
        self, converted: Source, change: dict[str, object], reason: str
    ) -> None:
        from marlin.load import load

        class Rotary(nn.Module):
            def __init__(self, config: int, scale: int, dtype: torch.dtype | None = None) -> None:
                super().__init__()
                self.config = config
                angles = torch.arange(float(config + scale), dtype=dtype)
                self.register_buffer("angles", angles, persistent=False)

        if change:
            Rotary.__init__.__defaults__ = (0, None)
        with torch.device("meta"):
            model = Tiny()
            model.rotary = Rotary(4, **{"scale": 1, **change})
        with pytest.raises(CheckpointError, match=rf"buffers rotary\.angles \({reason}"):
            load(model, converted.directory)

    @pytest.mark.parametrize(
        ("leaf", "value", "reason"),
        [
            ("perm", 3, "not a permutation"),
            ("zeros", 16, "zeros holds 16"),
            ("scales", float("inf"), "finite"),
        ],
    )
    def test_damaged_values(self, tmp_path: Path, leaf: str, value: float, reason: str) -> None:
        from marlin.load import load

        layer = make_layer(64, 64, act_order=True, sym=False)
        write_checkpoint(tmp_path / "src", {"x": layer}, config=gptq_config(sym=False), others={})
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        tensors = read_all(tmp_path / "dst")
        tensors[f"x.{leaf}"].view(-1)[5] = value
        write_tensors(tmp_path / "dst", tensors)
        model = nn.Module()
        model.x = before = nn.Linear(64, 64, bias=False)
        with pytest.raises(CheckpointError, match=reason):
            load(model, tmp_path / "dst")
        assert model.x is before

    @pytest.mark.parametrize(
        ("name", "dtype", "words"),
        [
            ("model.embed.weight", torch.int8, "holds I8, the model float32: want a float of 16"),
            ("model.norm.weight", torch.bool, "holds BOOL, the model float32: want a float of 16"),
            ("model.norm.weight", torch.float8_e4m3fn, "holds F8_E4M3, the model float32"),
            ("model.step", torch.float32, "holds F32, the model int64: want an integer"),
        ],
    )
    def test_kinds_of_dtype(
        self, converted: Source, name: str, dtype: torch.dtype, words: str
    ) -> None:
        from marlin.load import load

        tensors = read_all(converted.directory)
        tensors[name] = tensors[name].to(dtype)
        write_tensors(converted.directory, tensors)
        model = Tiny()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"{name}: the checkpoint {words}"):
            load(model, converted.directory)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())

    def test_nothing_is_loaded_of_what_is_damaged_at_its_end(self, converted: Source) -> None:
        from marlin.load import load

        tensors = read_all(converted.directory)
        *_, last = (name for name in tensors if name.endswith(".scales"))
        tensors[last][0, 0] = float("nan")
        tensors["head.weight"] = tensors["model.embed.weight"] + 1
        write_tensors(converted.directory, tensors)
        model = Tiny()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load(model, converted.directory)
        tied, damaged = caught.value.refusals
        assert "ties" in tied
        assert "not finite" in damaged
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
