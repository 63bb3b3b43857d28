"""Converted checkpoints in Hugging Face transformers.

After ``import marlin.integrations.transformers``, ``from_pretrained`` loads what ``marlin convert``
wrote, and ``save_pretrained`` writes it again::

    import marlin.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("DST", device_map="cuda")

The layers that ``config.json`` lists become :class:`marlin.MarlinLinear`, or
:class:`marlin.MarlinLinear24` where they are 2:4 sparse. transformers reads the tensors, one after
the other, straight to their devices.

After :func:`marlin.replace_linear` in a model of transformers, ``prepare_to_save(model)`` makes
``save_pretrained`` write such a checkpoint.

Inside ``with repacking():``, checkpoints of other formats are loaded, too, without a conversion::

    with marlin.integrations.transformers.repacking():
        model = AutoModelForCausalLM.from_pretrained("GPTQ", device_map="cuda")
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from marlin.examine import Layer
from marlin.formats.checkpoint import CheckpointError
from marlin.formats.detect import METHODS
from marlin.formats.native import config_for, packed_modules
from marlin.formats.packed import COMPUTE_DTYPES
from marlin.integrations._placeholders import (
    check_checkpoint,
    empty_layer,
    finish_layers,
    names_in_model,
    open_files,
    place_empty_layers,
)
from marlin.integrations._repacking import open_source, pack_layers, source_linears
from marlin.integrations._saving import check_loads_again, check_no_parts, packed_layers

# Before it, a quantizer is not told which files are loaded, and so not which layers have zero
# points, an order or a bias.
LEAST_VERSION = 5

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"marlin.integrations.transformers needs transformers >= {LEAST_VERSION}.0, and it cannot "
        f"be imported ({error}): pip install 'marlin[transformers]'"
    ) from error
if int(transformers.__version__.partition(".")[0]) < LEAST_VERSION:
    raise ImportError(
        f"marlin.integrations.transformers needs transformers >= {LEAST_VERSION}.0, found "
        f"{transformers.__version__}: pip install -U transformers, or use marlin.load"
    )

from transformers.core_model_loading import revert_weight_conversion  # noqa: E402
from transformers.quantizers.auto import (  # noqa: E402
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "marlin"
REPACKING = "marlin-repacking"


def _offloads_integers() -> bool:
    """Whether tensors come back from the disk in their own dtypes, not all in the model's."""
    from transformers.integrations.accelerate import accelerate_disk_offload

    return "dtype" not in inspect.signature(accelerate_disk_offload).parameters


def _given(checkpoint_files: list[str] | None) -> list[str]:
    if not checkpoint_files:
        raise CheckpointError(
            "from_pretrained was given a state_dict, which does not say what its layers have: "
            "give the folder of a converted checkpoint, or use model.load_state_dict"
        )
    return checkpoint_files


@register_quantization_config(METHOD)
class MarlinConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a converted checkpoint: ``In a checkpoint``, csrc/README.md.

    Attributes:
        quant_method: ``"marlin"``.
        format_version: 1, or 2 if a layer is 2:4 sparse.
        bits: 4.
        modules: module name -> ``in_features``, ``out_features``, ``group_size``, ``sparsity``.
    """

    quant_method: Any  # transformers has an enum of its own methods here, and takes others' names

    def __init__(self, **entries: Any) -> None:
        """Take the entries as they are in ``config.json``.

        Raises:
            CheckpointError: they are malformed, of another version, or of the original Marlin.
        """
        packed_modules({"quantization_config": {"quant_method": METHOD, **entries}})
        self.quant_method = METHOD
        self.format_version: int = entries["format_version"]
        self.bits: int = entries["bits"]
        self.modules: dict[str, dict[str, Any]] = copy.deepcopy(dict(entries["modules"]))


@register_quantizer(METHOD)
class MarlinQuantizer(HfQuantizer):
    """Replaces the listed modules before transformers loads their tensors."""

    requires_calibration = True
    quantization_config: MarlinConfig

    def __init__(self, quantization_config: MarlinConfig, **kwargs: Any) -> None:
        """Called by ``from_pretrained``.

        Raises:
            ValueError: the checkpoint is not a converted one.
        """
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "quantization_config: got a MarlinConfig for a checkpoint that is not converted; "
                "it cannot quantise while loading: load a quantised checkpoint inside "
                "marlin.integrations.transformers.repacking(), or run `marlin convert` on it, or "
                "marlin.replace_linear(model) on the loaded model"
            )
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float16
        self._names: list[str] = []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the model, which is that of activations and scales.

        Raises:
            TypeError: it is neither fp16 nor bf16.
        """
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"dtype: got {dtype}, passed to from_pretrained or in config.json; scales and "
                "activations are torch.float16 or torch.bfloat16; pass dtype=torch.float16 or "
                "dtype=torch.bfloat16"
            )
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        # transformers builds the model in a context where new tensors are on the meta device.
        with torch.device("cpu"):
            checkpoint = open_files(_given(checkpoint_files), config.to_dict())
            modules = check_checkpoint(checkpoint, self._dtype)
        names = names_in_model(model, modules, model.base_model_prefix)
        place_empty_layers(
            model,
            checkpoint,
            modules,
            names,
            lambda name: empty_layer(checkpoint, name, modules[name], self._dtype),
        )
        self._names = list(names.values())
        # As save_pretrained will write them: by the names of the model's own tensors.
        config.modules = {names[name]: entry for name, entry in config.modules.items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        finish_layers(model, self._names, self._dtype)
        _save_by(self, model)
        offloaded = [name for name in self._names if model.get_submodule(name).scales.is_meta]
        if offloaded and not _offloads_integers():
            raise RuntimeError(
                f"{offloaded[0]}: offloaded, and transformers {transformers.__version__} reads "
                "integers back from the disk as floats: update transformers, or leave out "
                "offload_buffers=True"
            )

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called by ``save_pretrained``, before it writes.

        Raises:
            ValueError: ``from_pretrained`` could not load what would be written: the model has a
                rank's parts of layers, other packed layers than its configuration lists, as a part
                of a model has, or another dtype than theirs may be.
        """
        check_no_parts(model)  # one that was not put there by marlin.parallel's functions
        if not getattr(model, "_hf_peft_config_loaded", False):  # else adapters only are written
            check_loads_again(model, _listed(model.config))
            self._keep_names(model)
        return super().get_state_dict_and_metadata(model)  # type: ignore[no-untyped-call, unused-ignore]

    def _keep_names(self, model: Any) -> None:
        """Have layers written under the names that the configuration lists, those in the model.

        Models that have been rearranged, as those of text and images were, are saved under their
        older names otherwise: ``save_original_format`` of ``save_pretrained``.
        """
        names = [f"{name}.qweight" for name in self.quantization_config.modules]
        older = revert_weight_conversion(model, {name: torch.empty(0) for name in names})
        if older.keys() != set(names):
            model._weight_conversions = []  # what it would revert

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the tensors as they are, and this configuration."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients of activations pass the frozen layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are made for ``torch.compile(fullgraph=True)``."""
        return True


def prepare_to_save(model: Any) -> None:
    """Have ``save_pretrained`` of a model with packed layers write what ``from_pretrained`` loads.

    For a model whose layers :func:`marlin.replace_linear` has packed: its configuration does not
    say so, and without it ``from_pretrained`` would make layers of random weights. A model that
    ``from_pretrained`` has loaded with packed layers needs no preparation, unless others are packed
    or unpacked since: ``save_pretrained`` refuses it then.

    Args:
        model: a ``PreTrainedModel`` with packed layers, fused or not; its ``config`` gets a
            ``quantization_config`` that lists them.

    Raises:
        TypeError: the model is another module, such as one of peft, which saves adapters only.
        ValueError: the model has no packed layers, a rank's parts of some, adapters around some,
            or layers of another quantization method of transformers; it is unchanged.
    """
    _check_can_be_prepared(model)
    shapes = packed_layers(model)
    if not shapes:
        raise ValueError(
            "model: got one without packed layers; save_pretrained writes it as it is; to pack "
            "them, call marlin.replace_linear(model) first"
        )
    ends = ".base_layer"
    adapted = next((name.removesuffix(ends) for name in shapes if name.endswith(ends)), "")
    if adapted:
        raise ValueError(
            f"model: got one with an adapter around {adapted}; adapters are saved without the "
            "model; prepare and save it before it gets them, or after peft's unload()"
        )
    config = MarlinConfig(**config_for(shapes))
    model.config.quantization_config = config
    _save_by(MarlinQuantizer(config), model)
    model.quantization_method = METHOD


def _models_in(model: nn.Module) -> list[Any]:
    """Those of transformers, ``model`` among them if it is one."""
    return [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]


def _save_by(quantizer: MarlinQuantizer, model: Any) -> None:
    """Have ``save_pretrained`` ask the quantizer, also that of models inside ``model``.

    Those with packed layers would write them beside a configuration that lists others or none.
    """
    for inside in _models_in(model):
        if packed_layers(inside):
            inside.hf_quantizer = quantizer


def refuse_unprepared(model: nn.Module) -> None:
    """Have ``save_pretrained`` refuse packed layers until :func:`prepare_to_save` has listed them.

    For ``marlin.replace_linear`` and ``marlin.load``, which put them into the model.
    """
    for inside in _models_in(model):
        if getattr(inside, "hf_quantizer", None) is None:
            _save_by(MarlinQuantizer(MarlinConfig(**config_for({}))), inside)


def _listed(config: Any) -> Collection[str]:
    """The packed layers that ``save_pretrained`` will list in ``config.json``."""
    found = getattr(config, "quantization_config", None)
    return found.modules if isinstance(found, MarlinConfig) else (found or {}).get("modules", {})


def _check_can_be_prepared(model: Any) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}; it must be a PreTrainedModel of transformers; "
            "save another module by its state_dict(), and pass the model that an adapter is for "
            "before it gets it"
        )
    check_no_parts(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, MarlinQuantizer):
        raise ValueError(
            f"model: got one that {type(quantizer).__name__} of transformers has quantized; its "
            "layers a checkpoint of packed layers cannot hold; load the model unquantized, "
            "and pack its layers with marlin.replace_linear(model)"
        )


class RepackingConfig(QuantizationConfigMixin):
    """Stands for the ``quantization_config`` of another format while its checkpoint is loaded.

    Its settings are read from the checkpoint's files, as ``marlin convert`` does.
    """

    quant_method: Any

    def __init__(self, **entries: Any) -> None:
        """Take the place of the entries in ``config.json``."""
        self.quant_method = REPACKING


@register_quantizer(REPACKING)
class RepackingQuantizer(MarlinQuantizer):
    """Has transformers load the layers of another format as they are, and packs them then."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, Layer] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        with torch.device("cpu"):
            checkpoint, found = open_source(_given(checkpoint_files), self._dtype)
        modules = {name: layer.shape for name, layer in found.layers.items()}
        names = names_in_model(model, modules, model.base_model_prefix)
        empty = source_linears(checkpoint, found, self._dtype)
        place_empty_layers(model, checkpoint, modules, names, empty.pop)
        self._layers = {names[name]: layer for name, layer in found.layers.items()}
        # What the model has from now on, and save_pretrained will write.
        self.quantization_config = MarlinConfig(
            **config_for({names[name]: shape for name, shape in modules.items()})
        )
        model.quantization_method = METHOD

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pack_layers(model, self._layers, self._dtype)
        self._layers = {}


class _ConfigOfMarlin(RepackingConfig):
    """Chooses for ``quant_method`` ``marlin``, which the original kernel's packing has, too."""

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: Any = False, **kwargs: Any) -> Any:
        kind: Any = MarlinConfig if "format_version" in config_dict else RepackingConfig
        return kind.from_dict(config_dict, return_unused_kwargs, **kwargs)


_registry = threading.RLock()


@contextmanager
def repacking() -> Iterator[None]:
    """In this block, ``from_pretrained`` loads checkpoints of other formats into packed layers.

    They are those that ``marlin convert`` takes, and the layers are what it makes of them:
    :class:`marlin.MarlinLinear`, or :class:`marlin.MarlinLinear24` where they are stored 2:4
    sparse. What it refuses is refused in the same words, before a tensor is loaded. ``device_map``
    and ``dtype`` mean what they mean for a converted checkpoint. transformers puts the tensors to
    their devices, where one layer after the other is packed: the memory needed on top of the model
    is that of a layer. ``save_pretrained`` writes a converted checkpoint. A checkpoint whose
    ``config.json`` has no ``quantization_config`` is taken by transformers for one that is not
    quantized: convert it.

    The block changes what transformers knows of these formats, for all threads; those that enter
    one at the same time wait for each other.
    """
    mapping = AUTO_QUANTIZATION_CONFIG_MAPPING
    with _registry:
        usual = {method: mapping.get(method) for method in (*METHODS, METHOD)}
        mapping.update(dict.fromkeys(METHODS, RepackingConfig))
        mapping[METHOD] = _ConfigOfMarlin
        try:
            yield
        finally:
            for method, kind in usual.items():
                if kind is None:  # transformers does not know the name
                    del mapping[method]
                else:
                    mapping[method] = kind
