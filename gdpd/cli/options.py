"""Command-line options made from `RunConfig`, so that an option is declared once: default, unit, help, limits."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from gdpd.config import RunConfig

_PANELS = {
    "data": "Data",
    "models": "Networks",
    "method": "Method",
    "prior": "Diffusion prior and sampler",
    "training": "Training",
    "machine": "Machine",
}

Command = TypeVar("Command", bound=Callable[..., Any])


def with_run_options(command: Command) -> Command:
    """Give a typer command one option per field of `RunConfig`, in place of its `**given` parameter.

    The command receives only the options that were given, as the strings that the shell handed over: what they
    mean and where their limits lie is `RunConfig`'s to say.
    """
    own = inspect.signature(command, eval_str=True)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [_parameter(row) for row in RunConfig.describe()]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

    def wrapped(context: typer.Context, **arguments: Any) -> Any:
        values = {p.name: arguments.pop(p.name) for p in added}
        given = {name: value for name, value in values.items() if _was_given(context, name)}
        return command(**arguments, **given)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = own.replace(parameters=[context, *kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [context, *kept, *added]}
    return wrapped  # type: ignore[return-value]


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parameter(row: dict[str, Any]) -> inspect.Parameter:
    flag = "--" + row["name"].replace("_", "-")
    boolean = row["type"] == "bool"
    unit = f" Unit: {row['unit']}." if row["unit"] else ""
    declared = typer.Option(
        f"{flag}/--no-{flag[2:]}" if boolean else flag,
        help=row["help"] + unit,
        metavar=None if boolean else _metavar(row),
        rich_help_panel=_PANELS[row["group"]],
    )
    # The default is there to be shown; what was not given is left to RunConfig or to a YAML file.
    default = row["default"] if boolean or isinstance(row["default"], str) else json.dumps(row["default"])
    return inspect.Parameter(
        row["name"],
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[bool if boolean else str, declared],
    )


def _metavar(row: dict[str, Any]) -> str:
    if row["choices"]:
        return "|".join(row["choices"])
    kinds = [kind.strip() for kind in row["type"].split("|")]
    words = {"int": "N", "float": "X", "str": "TEXT", "None": "null", "dict[str, Any]": "{KEY: VALUE}"}
    return "|".join(words.get(kind, "[N, ...]") for kind in kinds)


def run_config(config: Path | None, given: dict[str, Any]) -> RunConfig:
    """The configuration that a YAML file (or none) and the options given on top of it describe.

    Args:
        config: a YAML file of `option: value` lines, or None.
        given: option names to values; strings are read as YAML where the option holds more than plain text
            (null, numbers, lists, mappings). They win over the file.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value outside its limits.
        FileNotFoundError: no such file.
    """
    fields = {row["name"]: row for row in RunConfig.describe()}
    options = {name: _read(value, fields[name]["type"]) for name, value in given.items()}
    try:
        return RunConfig.from_dict(options) if config is None else RunConfig.from_yaml(config, **options)
    except TypeError as error:  # a value that cannot be read is bad input here, not a slip in the code
        raise ValueError(str(error)) from error


def _read(value: Any, kind: str) -> Any:
    if not isinstance(value, str) or kind == "str":
        return value
    if kind.startswith(("dict", "tuple")):
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value  # RunConfig says what was expected
    return None if "None" in kind and value == "null" else value
