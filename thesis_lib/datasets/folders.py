"""Plain folders of images."""

import os
from pathlib import Path

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_folder(root: str | Path) -> list[Path]:
    """List every image file under `root`, at any depth, sorted by path.

    Hidden files and folders are left out, links to folders are followed once each. Raises FileNotFoundError for a
    folder that is not there or holds no image.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}: point `extra_image_roots` to folders that exist")
    images, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        inner[:] = [
            name
            for name in inner
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        ]
        images += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    if not images:
        raise FileNotFoundError(f"no image under {root}: looked for {', '.join(sorted(EXTENSIONS))} at any depth")
    return sorted(images)
