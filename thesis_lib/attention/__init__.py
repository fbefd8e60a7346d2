"""Token mixers that replace the attention of a pretrained ViT, one idea a file, found by name in `MIXERS`.

A new mixer is one new module in this folder with one subclass of `Mixer`: the registry finds it. Its colour and marker
in the figures, and the kind that tables group it by, stand in `plots` and `summary`.
"""

import importlib
import pkgutil

from thesis_lib.attention.base import KINDS, Cost, Mixer, suggest

__all__ = ["KINDS", "MIXERS", "Cost", "Mixer", "get"]


def _registry() -> dict[str, type[Mixer]]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    mixers = {
        member.name: member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, Mixer)
        and member.__module__ == module.__name__
        and "name" in vars(member)
    }
    return dict(sorted(mixers.items(), key=lambda item: (KINDS.index(item[1].kind), item[0])))


MIXERS: dict[str, type[Mixer]] = _registry()


def get(name: str) -> type[Mixer]:
    """Look up a mixer class; ValueError names the near ones."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}{suggest(name, MIXERS)}; known: {', '.join(MIXERS)}")
    return MIXERS[name]
