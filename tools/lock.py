"""Print requirements.lock: what thesis_lib needs with the extras that tests use, pinned to what this environment has.

python -m pip install -U -e '.[test,peers,diffusion,export,slurm]' 'jsonschema<4.25'
./run_tests.sh && python tools/lock.py > requirements.lock

(Reading a notebook imports jsonschema, which from 4.25 on builds a parser of URIs at its import: 2 seconds a notebook.)
"""

import importlib.metadata
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# CUDA's libraries exist for Linux alone; torch's own pins of them are marked so too.
LINUX_ONLY = re.compile(r"nvidia-|cuda-|triton$")


def closure(name: str, extras: frozenset[str] = frozenset()) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that a distribution with these extras needs, itself included, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending, done = [(name, extras)], set()
    while pending:
        name, extras = item = pending.pop()
        if item in done:
            continue
        done.add(item)
        found[canonicalize_name(name)] = distribution = importlib.metadata.distribution(name)
        for requirement in map(Requirement, distribution.requires or []):
            if any(_applies(requirement, extra) for extra in extras or {""}):
                pending.append((requirement.name, frozenset(requirement.extras)))
    return found


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


if __name__ == "__main__":
    print("# Exact pins of the environment that the tests ran in. Made by tools/lock.py.")
    packages = closure("thesis_lib", frozenset({"", "test", "peers", "diffusion", "export", "slurm"}))
    for name in sorted(packages.keys() - {"thesis-lib"}):
        version = packages[name].version.split("+")[0]
        print(f"{name}=={version}" + ('; sys_platform == "linux"' if LINUX_ONLY.match(name) else ""))
