"""Plain folders of images."""

import os
from pathlib import Path

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_folder(root: str | Path) -> list[Path]:
    """List every image file under `root`, at any depth, sorted by path.

    Hidden files and folders are left out, links to folders are followed once each. Raises FileNotFoundError for a
    folder that is not there or holds no image, OSError for one inside that cannot be read, ValueError for a name that
    is no UTF-8, which no table can hold.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}: point `extra_image_roots` to folders that exist")
    images, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        inner.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))  # a folder before the links to it
        files = [name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS]
        for name in (*inner, *files):
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the name {name!r} in {folder!r} is no UTF-8: rename it") from error
        images += [Path(folder, name) for name in files]
    if not images:
        raise FileNotFoundError(f"no image under {root}: looked for {', '.join(sorted(EXTENSIONS))} at any depth")
    return sorted(images)


def _refuse(error: OSError) -> None:
    raise error  # os.walk would leave the folder out and say nothing
