"""Every setting of a run as frozen dataclasses, which check their values when they are made.

A file in ``configs/`` returns ``to_config_dict(Config(...))``; a command line sets options in it and converts
it back with ``Config.from_dict``.
"""

from milora_jax.config.adapter import (
    ACTIVATIONS,
    BALANCES,
    COEFFICIENTS,
    FEATURES,
    GATES,
    POOLERS,
    ROUTER_GRADIENTS,
    AdapterSection,
)
from milora_jax.config.data import TRAIN_ON, DataSection, parse_weights
from milora_jax.config.evaluation import EvalSection, split_metric
from milora_jax.config.mesh import MeshSection, parse_mesh
from milora_jax.config.model import DTYPES, QUANTIZE, ModelSection
from milora_jax.config.train import (
    BEST_BY,
    OBJECTIVES,
    OPTIMIZERS,
    REMAT,
    SCHEDULES,
    TRACKERS,
    TrainSection,
    tracker_names,
)
from milora_jax.config.whole import Config, to_config_dict, value_type

__all__ = [
    "ACTIVATIONS",
    "BALANCES",
    "BEST_BY",
    "COEFFICIENTS",
    "DTYPES",
    "FEATURES",
    "GATES",
    "OBJECTIVES",
    "OPTIMIZERS",
    "POOLERS",
    "QUANTIZE",
    "REMAT",
    "ROUTER_GRADIENTS",
    "SCHEDULES",
    "TRACKERS",
    "TRAIN_ON",
    "AdapterSection",
    "Config",
    "DataSection",
    "EvalSection",
    "MeshSection",
    "ModelSection",
    "TrainSection",
    "parse_mesh",
    "parse_weights",
    "split_metric",
    "to_config_dict",
    "tracker_names",
    "value_type",
]
