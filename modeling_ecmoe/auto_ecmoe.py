"""What makes the classes of a family known to Transformers.

It stands beside the families and not in __init__.py, which is not copied beside a checkpoint: with remote code the
heads build their base model through AutoModel, and a model that is saved again copies its code only if its class says
which Auto class it belongs to.
"""

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .versions_ecmoe import EPImplementationInterface  # first: an older Transformers is refused in one line

# isort: split
from .mixins_ecmoe import EcMoeHeadMixin
from .parallel_ecmoe import EqualSplitsEP

# By these names Trainer's label smoothing, pipelines and `transformers serve` know what a model is.
_NAMES = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def register_family(config_class: Any, *model_classes: type[PreTrainedModel]) -> None:
    """Registers a family's config class and its models with the Auto classes that the config class names."""
    config_class.register_for_auto_class()
    _make_known(config_class)
    for auto_class, ending in config_class.auto_classes.items():
        if not hasattr(transformers, auto_class):  # of a newer version than the oldest supported one
            continue
        (model_class,) = (found for found in model_classes if found.__name__.endswith(ending))
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)
        if auto_class == "AutoModel":
            EcMoeHeadMixin.base_models[config_class.model_type] = model_class
        if auto_class in _NAMES:
            _NAMES[auto_class][config_class.model_type] = model_class.__name__


def _make_known(config_class: Any) -> None:
    """As remote code: lets AutoTokenizer, which reads a folder's config, read it without a question once the model of
    one was loaded.

    What is registered is the dense config under our model_type. It counts as Transformers' own class, so that
    trust_remote_code=True still runs the code of each folder, and no model belongs to it, so that none is made without.
    """
    if config_class.model_type in CONFIG_MAPPING:  # the package is there
        return
    dense: Any = next(c for c in config_class.__mro__ if c.__module__.startswith("transformers."))

    class KnownConfig(dense):
        model_type = config_class.model_type

    KnownConfig.__module__ = dense.__module__
    transformers.AutoConfig.register(config_class.model_type, KnownConfig)


if EPImplementationInterface is not None:
    EPImplementationInterface.register("equal_splits", EqualSplitsEP)
