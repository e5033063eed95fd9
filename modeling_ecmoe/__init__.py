"""The expert-choice model family. Importing it registers every class with the Auto classes of Transformers."""

import transformers

from .block_ecmoe import use_inference_routing
from .calibration_ecmoe import RoutingRecord, calibrate_thresholds, record_routing
from .configuration_ecmoe import EcMoeLlamaConfig, EcMoeMistralConfig, EcMoeQwen2Config, EcMoeQwen3Config
from .modeling_ecmoe import MODEL_CLASSES
from .modeling_ecmoe import *  # noqa: F403  (the model classes, as __all__ there lists them)

for _config_class, _model_classes in MODEL_CLASSES.items():
    transformers.AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class, _model_class in _model_classes.items():
        getattr(transformers, _auto_class).register(_config_class, _model_class, exist_ok=True)
