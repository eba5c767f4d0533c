"""The base of all sections of the configuration."""

from __future__ import annotations

import os
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys, NaN or empty text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1
    )

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_for_number(cls, value: object, info: ValidationInfo) -> object:
        # Without this check pydantic reads `epochs: yes` as 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("must not be true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: object) -> object:
        # No shell has expanded what stands in a file or behind a `=`.
        if isinstance(value, str) and value.startswith("~/"):
            return os.path.expanduser(value)
        return value
