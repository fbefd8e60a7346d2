"""What to say when a data set, a split or a file of it is not there."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def missing(
    root: Path, found: str, *, name: str, contents: str, size: str, published: str, parameter: str = "`dataset_root`"
) -> FileNotFoundError:
    """Make the error for a data set that is not at `root`.

    It says what was found there instead, what the set is, its size, where it is published and which parameter, or
    which of them, points to a copy. Of a synthetic set, a folder below "synthetic", that notebook 01 draws it.
    """
    if "synthetic" in root.parts:
        return FileNotFoundError(
            f"{name}, here the synthetic set, is not at {root}: {found}. Notebook 01_data_preparation draws it: run it "
            "first, with the same profile"
        )
    return FileNotFoundError(
        f"{name} is not at {root}: {found}.\n"
        f"  what:      {contents}\n"
        f"  size:      {size}\n"
        f"  published: {published}\n"
        f"  then:      set the notebook parameter {parameter} to the folder that holds it, in each notebook"
    )


def choose(value: str, known: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `known`; otherwise raise a ValueError that names the near ones."""
    known = list(known)
    if value in known:
        return value
    near = get_close_matches(str(value), known)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {value!r}: {hint}known are {', '.join(known)}")
