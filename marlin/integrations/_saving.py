"""What a model must be for its packed layers to be saved so that another process can load them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from marlin._fused_part import FusedPart
from marlin._packed_linear import PackedLinear
from marlin._parallel_linear import ParallelLinear, refuse_to_save
from marlin.formats.native import PackedShape
from marlin.formats.packed import COMPUTE_DTYPES


def packed_layers(model: nn.Module) -> dict[str, PackedShape]:
    """Those that the state dict has by their names: of fused layers, the parts."""
    return {
        name: PackedShape(m.in_features, m.out_features, m.group_size, m.sparse)
        for name, m in model.named_modules()
        if isinstance(m, PackedLinear | FusedPart)
        and "qweight" not in m._non_persistent_buffers_set
    }


def check_no_parts(model: nn.Module) -> None:
    """Refuse a model that has a rank's parts of layers; raises ValueError."""
    if any(isinstance(module, ParallelLinear) for module in model.modules()):
        refuse_to_save()


def check_loads_again(model: nn.Module, listed: Collection[str]) -> None:
    """Refuse a model that ``from_pretrained`` could not load by its configuration.

    Raises:
        ValueError: the packed layers are others than those ``listed``, or all else is fp32.
    """
    packed = packed_layers(model)
    for one, other, what in (
        (packed, listed, "packed, and not"),
        (listed, packed, "not packed, but"),
    ):
        changed = [name for name in one if name not in other]
        if changed:
            raise ValueError(
                f"save_pretrained: got a model in which {changed[0]} is {what} listed in its "
                "quantization_config; layers have been changed since it was loaded or prepared, "
                "or it is a part of such a model, and nothing has been written; call "
                "marlin.integrations.transformers.prepare_to_save(model) first"
            )
    # Some models keep a few parameters in fp32.
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes and dtypes.isdisjoint(COMPUTE_DTYPES):
        raise ValueError(
            f"save_pretrained: got a model in {', '.join(map(str, dtypes))}; with packed layers it "
            "is loaded in torch.float16 or torch.bfloat16, and nothing has been written; call "
            "model.to(torch.float16) or model.to(torch.bfloat16) first"
        )
