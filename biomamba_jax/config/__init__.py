"""The schema of every YAML file, with its checks: frozen dataclasses that `command_line.parse` reads.

A setting's docstring is its `--help`.
"""

from biomamba_jax.config.data import DataConfig, PrepareConfig
from biomamba_jax.config.model import ModelConfig
from biomamba_jax.config.train import (
    CheckpointConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ScheduleConfig",
    "TrainConfig",
]
