"""Configuration: the schema with its defaults, and how a run's values are merged."""

from dragkit.config.resolve import (
    FIELDS,
    SECTIONS,
    config_schema,
    dump_config,
    nearest_key,
    parse_text,
    resolve_config,
    show_config,
)
from dragkit.config.schema import (
    DEFAULT_GENERATOR,
    PRESETS,
    TINY_GENERATOR,
    DataConfig,
    EncoderConfig,
    GeneratorConfig,
    LossConfig,
    OptimConfig,
    RetrieverConfig,
    RunConfig,
    SamplerConfig,
    TrainConfig,
)

__all__ = [
    "DEFAULT_GENERATOR",
    "FIELDS",
    "PRESETS",
    "SECTIONS",
    "TINY_GENERATOR",
    "DataConfig",
    "EncoderConfig",
    "GeneratorConfig",
    "LossConfig",
    "OptimConfig",
    "RetrieverConfig",
    "RunConfig",
    "SamplerConfig",
    "TrainConfig",
    "config_schema",
    "dump_config",
    "nearest_key",
    "parse_text",
    "resolve_config",
    "show_config",
]
