"""Reads a settings file in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from dragkit.errors import ConfigError, MissingInputError, similar_names

_MAX_BYTES = 1_000_000
# Merged keys of one mapping. A few lines of merges of merges would make billions.
_MAX_MERGED = 1000


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects a repeated key. Plain YAML silently keeps the last one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_MERGED:
            raise yaml.constructor.ConstructorError(
                problem=f"a mapping of more than {_MAX_MERGED} keys", problem_mark=node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            # A list or a mapping is no key, which the base class reports.
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # PyYAML lets the errors of int(), date() and its own tables out, without their place.
            raise yaml.constructor.ConstructorError(
                problem=f"{str(node.value)[:60]!r} is not a {node.tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from error


def read_yaml(path: Path) -> Mapping[object, object]:
    """Reads a settings file. An empty file holds no settings.

    Raises:
        ConfigError: the content is not YAML, or not a mapping.
        MissingInputError: the file cannot be read.
    """
    try:
        # A named pipe without a writer would wait for ever. A shell's <(...) is under /dev.
        if path.is_fifo() and not str(path).startswith("/dev/"):
            raise MissingInputError(f"{path}: is a named pipe, not a file. Check --config.")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(
                f"{path}: is longer than {_MAX_BYTES:,} bytes, so it holds no settings. Check "
                "--config."
            )
        settings = yaml.load(content.decode("utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot read the configuration file: {error.strerror}."
            f"{similar_names(path)} Check --config."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text. Save the file as UTF-8 YAML.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from error
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{path}: must hold sections such as `optim:` with keys, not a "
            f"{type(settings).__name__}"
        )
    return settings
