"""The expert-choice model family. Importing it registers every class with the Auto classes of Transformers."""

import transformers

from . import configuration_ecmoe, modeling_ecmoe
from .block_ecmoe import use_inference_routing
from .calibration_ecmoe import calibrate_thresholds
from .configuration_ecmoe import *
from .modeling_ecmoe import *
from .modeling_ecmoe import MODEL_CLASSES
from .report_ecmoe import RoutingRecord, record_routing, routing_report, sparse_blocks, training_routes

for _config_class, _model_classes in MODEL_CLASSES.items():
    transformers.AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class, _model_class in _model_classes.items():
        getattr(transformers, _auto_class).register(_config_class, _model_class, exist_ok=True)

__all__ = [
    *configuration_ecmoe.__all__,
    *modeling_ecmoe.__all__,
    "MODEL_CLASSES",
    "RoutingRecord",
    "calibrate_thresholds",
    "record_routing",
    "routing_report",
    "sparse_blocks",
    "training_routes",
    "use_inference_routing",
]
