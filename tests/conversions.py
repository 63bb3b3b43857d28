"""What must hold of a conversion from every format. The source is ``src`` in a folder of its own,
and is converted to ``dst`` beside it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    Source,
    Tiny,
    dequantized,
    make_layer,
    read_all,
    snapshot,
    write_tensors,
)
from damage import Damage
from hypothesis import strategies as st
from torch import Tensor, nn

from marlin import ConversionReport, MarlinLinear, MarlinLinear24, load
from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify


def any_layer(step: int = 1) -> st.SearchStrategy[GptqLayer]:
    """Layers of every kind, of which both sizes are multiples of ``step``."""
    sizes = st.integers(1, 320 // step).map(lambda count: step * count)
    return st.builds(
        make_layer,
        k=sizes,
        n=sizes,
        group_size=st.sampled_from([-1, 32, 64, 128]),
        sym=st.booleans(),
        act_order=st.booleans(),
    )


def is_symmetric(layer: GptqLayer) -> bool:
    return bool((layer.zeros == 8).all())


def convert_exactly(root: Path, **options: Any) -> ConversionReport:
    """Convert; both checkpoints hold the same, the source is as it was, and nothing else is left.

    That ``verify`` says so is not enough: it reads with the converter's code.
    """
    before = snapshot(root / "src")
    report = convert(root / "src", root / "dst", progress=False, **options)
    assert snapshot(root / "src") == before
    assert verify(root / "dst", root / "src", progress=False).mismatches == []
    assert sorted(path.name for path in root.iterdir()) == ["dst", "src"]
    return report


def assert_change_is_found(
    root: Path, tensor: str, change: Callable[[Tensor], object], says: str
) -> None:
    """Once ``change`` was made to a tensor of the source, ``verify`` finds it, and nothing else."""
    convert(root / "src", root / "dst", progress=False)
    changed = read_all(root / "src")
    change(changed[tensor])
    write_tensors(root / "src", changed)
    (mismatch,) = verify(root / "dst", root / "src", progress=False).mismatches
    layer = tensor.rpartition(".")[0]
    assert re.match(rf"{re.escape(layer)}: {says}", mismatch), mismatch


def refusals_of(
    root: Path, valid: Path, damage: Damage, run: Callable[..., object] = convert
) -> tuple[str, ...]:
    """Every reason for which a damaged copy of ``valid`` is refused, all of which are printed."""
    shutil.copytree(valid, root / "src")
    damage(root / "src")
    with pytest.raises(CheckpointError) as caught:
        run(root / "src", root / "dst", progress=False)
    refusals = tuple(caught.value.refusals)
    assert f": {len(refusals)} problems" in str(caught.value)
    assert all(reason in str(caught.value) for reason in refusals)
    return refusals


def assert_loads(root: Path, source: Source) -> None:
    """A model of plain layers gets those of the source, dense or sparse as they were stored, and
    computes what these do in fp32.
    """
    model = model_of(source)
    load(model, root / "dst")
    stored = read_all(root / "dst")
    for name, layer in source.layers.items():
        module = model.get_submodule(name)
        assert type(module) is (MarlinLinear24 if f"{name}.places" in stored else MarlinLinear)
        assert torch.equal(module.dequantize(), layer.weight().half())
        x = torch.randn(5, layer.q.size(1)).half()
        bias = 0 if layer.bias is None else layer.bias.float()
        want = x.float() @ layer.weight().float().T + bias
        torch.testing.assert_close(module(x).float(), want, rtol=2e-3, atol=4e-3)


def assert_logits(root: Path, source: Source) -> None:
    """A converted ``Tiny`` computes what the dequantized one does."""
    with torch.device("meta"):
        model = Tiny()
    load(model, root / "dst")
    assert model.head.weight is model.model.embed.weight
    tokens = torch.arange(50)
    with torch.no_grad():
        got = model(tokens, torch.float16)
        want = dequantized(source)(tokens, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))


def model_of(source: Source) -> nn.Module:
    """A model on the meta device with an ``nn.Linear`` for each layer of the source."""
    root = nn.Module()
    for name, layer in source.layers.items():
        n, k = layer.q.shape
        path, _, leaf = name.rpartition(".")
        parent = root
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        has_bias = layer.bias is not None
        parent.add_module(leaf, nn.Linear(k, n, bias=has_bias, device="meta"))
    return root
