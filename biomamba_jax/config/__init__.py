"""The schema of every YAML file, with its checks: frozen dataclasses that `command_line.parse` reads.

A setting's docstring is its `--help`.
"""

from biomamba_jax.config.data import DataConfig, PrepareConfig, RowsConfig
from biomamba_jax.config.evaluate import BioASQConfig, DomainConfig, EvaluateConfig, PubMedQAConfig
from biomamba_jax.config.model import ModelConfig
from biomamba_jax.config.train import (
    CheckpointConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "BioASQConfig",
    "CheckpointConfig",
    "DataConfig",
    "DomainConfig",
    "EvaluateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "PretrainConfig",
    "PubMedQAConfig",
    "RowsConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
]
