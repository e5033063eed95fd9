"""What makes the classes of a family known to Transformers.

It stands beside the families and not in __init__.py, which is not copied beside a checkpoint: with remote code the
heads build their base model through AutoModel, and a model that is saved again copies its code only if its class says
which Auto class it belongs to.
"""

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_ecmoe import AUTO_CLASSES
from .mixins_ecmoe import EcMoeHeadMixin
from .parallel_ecmoe import EqualSplitsEP
from .versions_ecmoe import EPImplementationInterface


def register_family(config_class: type[PreTrainedConfig], *model_classes: type[PreTrainedModel]) -> None:
    """Registers a family's config class and its models, in the order of `AUTO_CLASSES`, with the Auto classes."""
    config_class.register_for_auto_class()
    for auto_class, model_class in zip(AUTO_CLASSES, model_classes, strict=True):
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)
        if auto_class == "AutoModel":
            EcMoeHeadMixin.base_models[config_class.model_type] = model_class
        if auto_class == "AutoModelForCausalLM":
            # By these names Trainer's label smoothing and `transformers serve` know a language model.
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__


if EPImplementationInterface is not None:
    EPImplementationInterface.register("equal_splits", EqualSplitsEP)
