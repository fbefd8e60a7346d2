"""Profiles: one YAML file with a section a notebook, which holds values for the names in its cell tagged `parameters`.

Beside these, `variants` names the notebooks that run once per value of a parameter, `jobs` what one run may take of a
machine (read by the Snakefile), and `extends` another profile whose sections hold wherever this one names nothing else:

    extends: thesis
    02_attention_evaluation: {dataset_root: /data/nights}
"""

import ast
import difflib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from thesis_lib import paths

RESERVED = {"variants", "jobs"}
SYNTHETIC = ("synthetic_triplets", "synthetic_images", "synthetic_studies")  # parameters of 01: what it draws


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two the last would hold, and nobody be told."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for count, (key, _) in enumerate(node.value):
            if key.value in keys[:count]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
        return node


def load(profile: str, *, folder: Path = paths.NOTEBOOKS) -> dict[str, dict]:
    """Read profiles/<profile>.yaml, or the file that `profile` names if it ends in .yaml or .yml.

    Raises FileNotFoundError with the profiles there are, ValueError for what is no profile (see `_read`), for a section
    or variant without a notebook in `folder`, for a number that YAML takes for text (1e-4), for profiles that extend
    each other and for a file of another folder that has the name of one in profiles/.
    """
    path, content = _file(profile), {"variants": {}}
    if path.stem in names() and path != _file(path.stem):
        raise ValueError(f"{path} would write into the results of profiles/{path.stem}.yaml: rename it")
    chain = [path]
    while base := (_read(chain[-1]).get("extends")):
        chain.append(_file(base, beside=chain[-1].parent))
        if chain[-1] in chain[:-1]:
            raise ValueError(f"{path.name} extends itself: {' > '.join(p.name for p in chain)}")
    for own in map(_read, reversed(chain)):
        for section, values in own.items():
            if section != "extends":
                content[section] = content.get(section, {}) | (values or {})
    notebooks = {p.stem for p in folder.glob("*.ipynb")}
    for section in [*content.keys() - RESERVED, *content["variants"]]:
        if section not in notebooks:
            raise ValueError(f"{path.name}: section {section!r} is no notebook's name{near(section, notebooks)}")
    _refuse_text_numbers(content, path.name)
    return content


def names() -> list[str]:
    """Return the names of the profiles in profiles/."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def _file(profile: str, beside: Path = Path()) -> Path:
    path = beside / profile if profile.endswith((".yaml", ".yml")) else paths.PROFILES / f"{profile}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no profile {profile!r}: there are {', '.join(names())}, or the path of a .yaml file")
    return path.resolve()


def _read(path: Path) -> dict:
    """Return what one file holds itself; ValueError, with its name, unless its sections are mappings."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no sections, but {content!r}")
    for section, values in content.items():
        if section == "extends" and not isinstance(values, str):
            raise ValueError(f"{path.name}: extends: {values!r} is not the name of one profile")
        if section != "extends" and not isinstance(values, dict | None):
            raise ValueError(f"{path.name}: {section}: {values!r} is no mapping, 'name: value'")
    for notebook, axes in (content.get("variants") or {}).items():
        if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
            raise ValueError(f"{path.name}: variants: {notebook}: {axes!r} is no mapping, 'parameter: [value, value]'")
    return content


def runs(content: dict[str, dict], notebook: str) -> dict[str, dict[str, Any]]:
    """Return the runs of a notebook by name, each with the parameters that tell it from the others."""
    axes = content["variants"].get(notebook, {})
    return {
        "-".join([notebook, *map(str, values)]): dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    }


def owner(result: str, names: Iterable[str]) -> str | None:
    """Return which of these runs a result is of: its name is the run's, or the run's with a dot and a part's after."""
    return max((name for name in names if f"{result}.".startswith(f"{name}.")), key=len, default=None)


def defaults(notebook: Path) -> dict[str, Any]:
    """Return the parameters of a notebook and their default values; of one that is no literal, the ast node.

    Raises ValueError if no cell, or several, are tagged `parameters`.
    """
    cells = json.loads(notebook.read_text())["cells"]  # nbformat takes seconds to import, and this is all it would do
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook.name}: one cell must carry the tag 'parameters'; {len(tagged)} do")
    values = {}
    for node in ast.parse("".join(tagged[0]["source"])).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name):
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    values[target.id] = node.value
    return values


def check(values: dict[str, Any], notebook: Path) -> None:
    """Raise ValueError if a name is no parameter of the notebook, or a value is of another type than its default."""
    known = defaults(notebook)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{notebook.name} has no parameter {name!r}{near(name, known)}")
        default = known[name]
        if value is None or default is None or isinstance(default, ast.AST):
            continue
        # A switch may also take a text (`pretrained`: or a path), a number no switch, a fraction also a whole number.
        kinds = {bool: (bool, str), float: (float, int), tuple: (tuple, list)}
        accepted = kinds.get(type(default), (type(default),))
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise ValueError(
                f"{notebook.name}: {name} is {type(default).__name__} ({default!r} by default), not {value!r}"
                + (": write a list as '[a, b]'" if isinstance(default, list) else "")
            )


def check_all(content: dict[str, dict]) -> None:
    """Check every section of a profile, and every run's parameters, as `check` does."""
    for section in sorted({*content, *content["variants"]} - RESERVED):
        for values in [content.get(section, {}), *runs(content, section).values()]:
            check(values, paths.NOTEBOOKS / f"{section}.ipynb")


def near(name: object, known) -> str:
    """Return the end of a message about an unknown name: the names near it, or all that are known."""
    close = difflib.get_close_matches(str(name), known)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(sorted(known)) or 'none'}"


def _refuse_text_numbers(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_text_numbers(item, f"{where}: {key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_text_numbers(item, where)
    elif isinstance(value, str) and (number := re.fullmatch(r"([-+]?\d+\.?\d*)[eE]([-+]?\d+)", value)):
        mantissa, exponent = number.groups()
        right = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
        raise ValueError(f"{where}: {value} is text to YAML, not a number: write {right}")
