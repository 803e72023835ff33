"""Writes the tables of configuration.md from the dataclasses: `.venv/bin/python docs/config_tables.py`."""

import dataclasses
import inspect
import pathlib
import re
import typing

from jax_latent_moe import config

PAGE = pathlib.Path(__file__).with_name("configuration.md")
CLASSES = (
    config.LatentMoEConfig,
    config.RouterConfig,
    config.InitConfig,
    config.XlaBackend,
    config.PallasBackend,
    config.PallasMatmulTile,
    config.PallasWgradTile,
    config.PallasFp8Tile,
    config.PallasWidenTile,
    config.CutlassBackend,
    config.CutlassTile,
    config.ParallelConfig,
    config.Precision,
)


def meanings(cls: type) -> dict[str, str]:
    """What the "Attributes" section of the docstring says of each field."""
    section = inspect.cleandoc(cls.__doc__ or "").split("Attributes:\n")[1]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def type_name(annotation) -> str:
    """A type as users write its values: strings for a Literal, names for the rest."""
    if annotation is typing.Any:  # what registered backends are configured by
        return "a backend's dataclass"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"tuple of {type_name(typing.get_args(annotation)[0])}"
    if options := typing.get_args(annotation):
        return ", ".join(type_name(option) for option in options)
    return "`None`" if annotation is type(None) else f"`{annotation.__name__}`"


def table(cls: type) -> str:
    """The fields of a dataclass as a Markdown table."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    text, hints = meanings(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            default = "required"
        elif dataclasses.is_dataclass(field.default):
            default = f"`{type(field.default).__name__}()`"
        else:
            default = f"`{field.default!r}`".replace("'", '"')
        rows.append(f"| `{field.name}` | {type_name(hints[field.name])} | {default} | {text[field.name]} |")
    return "\n".join(rows)


def render(page: str) -> str:
    """The page with the table below each `<!-- fields of NAME -->` made anew."""
    for cls in CLASSES:
        start, end = f"<!-- fields of {cls.__name__} -->\n", "<!-- end -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{table(cls)}\n\n{rest[rest.index(end) :]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
