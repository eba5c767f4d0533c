"""Writes docs/configuration.md from the schema and the presets.

    python scripts/configuration_page.py

`tests/test_readme.py` fails when the page and the schema differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from dragkit import config as package
from dragkit.config import PRESETS, TrainConfig
from dragkit.config.flags import FLAGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_TYPE_NAMES = {bool: "true, false", int: "integer", float: "number", str: "text"}

HEAD = """# Configuration

`scripts/configuration_page.py` writes this page from the schema. It lists every setting with its
default.

## Where a value comes from

A later source overrides an earlier one: default, preset, file, flag.

```
python -m dragkit.train --preset cwq --config mine.yaml --lr 1e-4 --set retriever.dropout=0.2
python -m dragkit.config show --preset cwq --config mine.yaml
python -m dragkit.config schema
```

`show` prints every value with the source it came from. `schema` prints the JSON Schema of a
configuration file, which editors use for completion.

- `--set SECTION.FIELD=VALUE` reaches every setting and may be repeated. `none` empties an
  optional setting, and commas separate the items of a list.
- A setting marked \\* has a flag of its name. {longer}
- Earlier names and values of settings still work in files, with `--set` and in checkpoints. The
  table `RENAMED` in `dragkit/config/resolve.py` lists them.
- Words in a flag join by `_` or `-`. A switch stands alone, takes `true` or `false`, or begins
  with `--no_`.
- A file holds sections and keys in YAML. The blocks `phase1` and `phase2` hold sections that
  apply in that phase only:

```yaml
retriever:
  dropout: 0.2
phase2:
  optim:
    batch_size: 8
```

All wrong keys and values are reported at once, each with its source and the nearest name that
exists. Without training data and without a preset, a run takes the bundled demo questions and the
preset `tiny`.

## Environment variables

| variable | effect |
| --- | --- |
| `DRAGKIT_CACHE` | folder for packed questions and encoded texts, `~/.cache/dragkit` by default |
| `DRAGKIT_BACKEND` | `auto`, `triton` or `torch` for all operators |
| `DRAGKIT_DEBUG` | `1` shows tracebacks |
| `DRAGKIT_DATA` | folder with the question sets of benchmarks and of the experiments |
| `DRAGKIT_BENCH_RESULTS` | folder that `pytest bench` writes result files to |
"""


def text(value: object) -> str:
    """A value as a user would type it, and an empty text for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    shown = ",".join(value) if isinstance(value, list | tuple) else value
    return f"`{number(shown)}`" if isinstance(shown, float) else f"`{shown}`"


def number(value: float) -> str:
    """A number in its shortest form. Integers have commas."""
    return f"{value:,.0f}" if value == round(value) else f"{value:g}".replace("e-0", "e-")


def accepted(field: FieldInfo) -> str:
    """The values of a setting: a list of words, or a type with its bounds."""
    options = [field.annotation, *get_args(field.annotation)]
    for option in options:
        if get_args(option) and type(None) not in get_args(option) and option != field.annotation:
            options += get_args(option)
    literal = [o for o in options if isinstance(o, str | int) and not isinstance(o, type)]
    if literal:
        return ", ".join(f"`{word}`" for word in literal)
    if any(get_origin(option) is tuple for option in options):
        return "list of names"
    names = [name for kind, name in _TYPE_NAMES.items() if kind in options]
    bounds = [
        f"{sign} {number(getattr(bound, attribute))}"
        for bound in field.metadata
        for kind, (attribute, sign) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    return ", ".join([" or ".join(names), *bounds])


def section_table(name: str, section: type) -> list[str]:
    """The table of one section."""
    flagged = set(FLAGS.values())
    lines = [f"## {name}", "", str(section.__doc__).strip().splitlines()[0], ""]
    lines += ["| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        mark = " \\*" if f"{name}.{key}" in flagged else ""
        meaning = str(field.description).replace("|", "\\|")
        lines.append(f"| `{key}`{mark} | {text(field.default)} | {accepted(field)} | {meaning} |")
    return [*lines, ""]


def preset_table() -> list[str]:
    """The table of presets."""
    lines = ["## Presets", "", "| preset | setting | value |", "| --- | --- | --- |"]
    folder = Path(str(package.__file__)).parent / "presets"
    for name in PRESETS:
        settings = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        label = f"`{name}`"
        for path, value in _leaves(settings):
            lines.append(f"| {label} | `{path}` | {text(value)} |")
            label = ""
    return lines


def _leaves(settings: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Dotted keys and values of a nested mapping, in file order."""
    leaves: list[tuple[str, object]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, value))
    return leaves


def page() -> str:
    """The whole page."""
    longer = [f"`--{flag}`" for flag, key in FLAGS.items() if flag != key.rpartition(".")[2]]
    sentence = f"Two of these flags have a longer name: {' and '.join(longer)}."
    lines = [HEAD.format(longer=sentence)]
    for name, field in TrainConfig.model_fields.items():
        if name != "preset":
            lines += section_table(name, field.annotation)
    return "\n".join([*lines, *preset_table(), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
