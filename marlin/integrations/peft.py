"""LoRA of Hugging Face peft on packed layers.

After ``import marlin.integrations.peft``, ``target_modules`` of a ``peft.LoraConfig`` may be
:class:`marlin.MarlinLinear` and :class:`marlin.MarlinLinear24` layers, wherever the configuration
comes from: ``get_peft_model``, ``PeftModel.from_pretrained``, a model's ``add_adapter``. The packed
weight is frozen, and the adapter beside it is trained. Name the layers: ``"all-linear"`` means
``nn.Linear`` to peft. After ``prepare_model_for_kbit_training`` activations are fp32, and the model
must run under ``torch.autocast``.
"""

from __future__ import annotations

from typing import Any

from marlin._fused_part import FusedPart
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24

try:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ImportError(
        f"marlin.integrations.peft needs peft, and it cannot be imported ({error}): "
        "pip install 'marlin[peft]'"
    ) from error


class MarlinLoraLinear(LoraLinear):
    """A packed layer and its adapters.

    Variants that read or change the weight (DoRA, PiSSA, ...) fail when they ask for it.
    """

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"merge: got an adapter of a {type(self.get_base_layer()).__name__}; 4-bit weights "
            "cannot hold the sum; keep the adapter beside them, or merge it into the float model "
            "and quantise that again"
        )


def _refuse_fused(layer: FusedPart, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "target_modules: got a layer that marlin.fuse has made one of several; its input must stay "
        "that of the others; call marlin.unfuse(model), get the adapters, then marlin.fuse(model), "
        "which leaves layers with adapters out"
    )


_post_init = LoraConfig.__post_init__


def _register(config: LoraConfig) -> None:
    """Each configuration tells peft of layers that are not its own, so every new one does."""
    _post_init(config)
    layers: dict[Any, Any] = dict.fromkeys((MarlinLinear, MarlinLinear24), MarlinLoraLinear)
    # It is refused here, as peft would only list the layers of torch that it knows.
    config._register_custom_module(layers | {FusedPart: _refuse_fused})


LoraConfig.__post_init__ = _register  # type: ignore[method-assign, unused-ignore]
