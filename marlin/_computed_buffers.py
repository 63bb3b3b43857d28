"""Values for buffers that a model computes when it is built, which the meta device skips."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from marlin.formats.packed import describe


def rebuild_computed_buffers(model: nn.Module) -> dict[str, str]:
    """Give values to what no checkpoint holds, such as rotary frequencies, in a model from meta.

    A module made of such buffers alone, that its class can build from its ``config``, is built
    again off meta. Returns the buffers left without values, by name, and why.
    """
    stuck: dict[str, str] = {}
    for path, module in model.named_modules():
        leaves = [leaf for leaf, b in module._buffers.items() if b is not None and b.is_meta]
        if not leaves:
            continue
        try:
            fresh = _built_again(module)
            new = {leaf: _equal_kind(module, fresh, leaf) for leaf in leaves}
        except Exception as error:  # any library's constructor may be called
            stuck |= {f"{path}.{leaf}" if path else leaf: str(error) for leaf in leaves}
            continue
        module._buffers.update(new)
        for name, value in vars(fresh).items():  # plain attributes computed from the buffers
            if isinstance(value, Tensor) and isinstance(vars(module).get(name), Tensor):
                setattr(module, name, value)
    return stuck


def _built_again(module: nn.Module) -> nn.Module:
    """Another module of the class of ``module``, on the CPU; raises ValueError if it cannot be."""
    kind = type(module).__name__
    parameters = list(inspect.signature(type(module)).parameters.values())
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required != ["config"] or not hasattr(module, "config"):
        raise ValueError(f"{kind} is not built from its config alone")
    if any(True for _ in module.parameters()):
        raise ValueError(f"{kind} has parameters, too")
    with torch.device("cpu"):
        fresh: nn.Module = type(module)(config=module.config)
    return fresh


def _equal_kind(module: nn.Module, fresh: nn.Module, leaf: str) -> Tensor:
    old, new = module._buffers[leaf], fresh._buffers.get(leaf)
    assert old is not None
    if leaf not in module._non_persistent_buffers_set:
        raise ValueError(f"{leaf} is to be loaded, not computed")
    if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
        got = "nothing" if new is None else describe(new)
        raise ValueError(
            f"{type(module).__name__}(config) makes {got}, the model's is {describe(old)}"
        )
    return new
