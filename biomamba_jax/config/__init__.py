"""Frozen dataclasses that are the schema of the YAML files and command lines.

The docstring below a field is its `--help`, and its type holds its limits (see `checks`).
"""

from biomamba_jax.config.data import DataConfig, RowsConfig
from biomamba_jax.config.evaluate import (
    BioASQConfig,
    DomainConfig,
    EvaluateConfig,
    MultipleChoiceConfig,
    PubMedQAConfig,
)
from biomamba_jax.config.finetune import ExamplesConfig, FinetuneConfig, LoraConfig
from biomamba_jax.config.mesh import DistributedConfig, MeshConfig
from biomamba_jax.config.model import ModelConfig
from biomamba_jax.config.prepare import PrepareConfig
from biomamba_jax.config.train import (
    CheckpointConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
