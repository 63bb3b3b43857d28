"""Whether a model computes what its weights say: asked before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.e2e_model import PLAIN, Decoder, Sizes
from benchmarks.e2e_weights import VARIANTS, dense_linear
from marlin import MarlinLinear, MarlinLinear24

# Codes that are off by one give 20%, roundings to fp16 about 0.1%.
BOUND = 0.01
BATCH, TOKENS = 3, 34


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of ``wanted``."""
    difference = value.double() - wanted.double()
    return float(difference.norm() / wanted.double().norm())


def largest_error(values: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest relative error of some tensors; not a number if one of them has such."""
    errors = [relative_error(v, w.to(v.device)) for v, w in zip(values, wanted, strict=True)]
    return torch.tensor(errors).max().item()


def dequantized(model: Decoder) -> Decoder:
    """The same model with ``nn.Linear`` layers of the values that the packed weights stand for."""
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, MarlinLinear | MarlinLinear24):
            owner, _, attribute = name.rpartition(".")
            linear: nn.Module = dense_linear(layer.dequantize(), layer.bias)
            setattr(dense.get_submodule(owner), attribute, linear)
    return dense


def error_of_tiny_model(sizes: Sizes, variant: str, device: str) -> float:
    """The largest error of the logits of a small model of the variant, all its tokens at once and
    the last of them by itself over the cache of the others, against its dequantized twin."""
    model = Decoder(sizes.tiny(), VARIANTS[variant].make, device, TOKENS)
    tokens = torch.randint(model.sizes.vocab, (BATCH, TOKENS), device=device)
    positions = torch.arange(TOKENS, device=device)
    cache = model.new_cache(BATCH, TOKENS)
    wanted = dequantized(model)(tokens, positions, cache, PLAIN)
    at_once = model(tokens, positions, cache, PLAIN)
    for kv in cache:
        kv.zero_()
    model(tokens[:, :-1], positions[:-1], [kv[:, :-1] for kv in cache], PLAIN)
    by_itself = model(tokens[:, -1:], positions[-1:], cache, PLAIN)
    return largest_error((at_once, by_itself), (wanted, wanted))
