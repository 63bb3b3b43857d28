"""Packed layers in a model of transformers whose configuration does not list them."""

from __future__ import annotations

import sys

from torch import nn


def refuse_to_save_unlisted(model: nn.Module) -> None:
    """Have ``save_pretrained`` refuse layers that have been put into a model of transformers.

    It would write them beside a configuration that does not mention them, and ``from_pretrained``
    would make layers of random weights of that. ``prepare_to_save`` lists them.
    """
    modeling = sys.modules.get("transformers.modeling_utils")  # imported if there is such a model
    if modeling is None:
        return
    if not any(isinstance(module, modeling.PreTrainedModel) for module in model.modules()):
        return
    try:
        from marlin.integrations.transformers import refuse_unprepared
    except ImportError:  # an older transformers, which is not supported
        return
    refuse_unprepared(model)
