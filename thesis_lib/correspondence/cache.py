"""Keep features: one store, keyed by an image's digest and by all that its features depend on.

A store is a folder named by the hash of the extractor's fingerprint (its configuration and weights), so that a changed
setting never reads stale features. It holds float16 maps in safetensors shards, each moved into place when it is whole:
an interrupted run goes on where it stopped, and several processes may fill one store.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from thesis_lib import paths
from thesis_lib.correspondence.features import extract, fingerprint, read_image

SHARD = 64  # images


class Features:
    """The maps of a list of images: `features[i]` is {key: (C, h, w) float32}, read from the store when asked for.

    `size` is the side of the square that each image was brought to.
    """

    def __init__(
        self, folder: Path, digests: Sequence[str], places: dict[str, Path], keys: Sequence[str], size: int
    ) -> None:
        self.folder, self.digests, self.keys, self.size = folder, list(digests), list(keys), size
        self._places, self._open = places, {}

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {key: self.map(place, key) for key in self.keys}

    def map(self, place: int, key: str, device: str = "cpu") -> Tensor:
        """Return one map of one image, in float32 on a device; ValueError names the keys there are."""
        if key not in self.keys:
            raise ValueError(f"there are no features {key!r}, only {', '.join(self.keys)}")
        shard = self._places[self.digests[place]]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard].get_tensor(f"{self.digests[place]}/{key}").to(device).float()


@contextmanager
def features(
    extractor: nn.Module,
    images: Sequence[Path],
    *,
    categories: Sequence[str] | None = None,
    geometry: str = "squash",
    batch_size: int = 16,
    dtype: str = "float32",
    folder: str | Path | None = None,
    use_cache: bool = True,
    reset_cache: bool = False,
    progress: bool = True,
) -> Iterator[Features]:
    """Give the features of images, all of the extractor's layers from one pass over those that the store lacks.

    use_cache=False fills a store that is gone with the context: the same numbers, nothing kept. reset_cache empties the
    extractor's own store first. The categories are part of an image's key where the extractor reads prompts.
    Raises RuntimeError if a shard is damaged or cannot be written.
    """
    extractor.eval()
    root = Path(folder or paths.CACHE / "features")
    if not use_cache:  # beside the store, for these can be tens of gigabytes, too
        root.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix="features-", dir=root.parent))
    try:
        yield _fill(extractor, images, categories, geometry, batch_size, dtype, root, reset_cache, progress)
    finally:
        if not use_cache:
            shutil.rmtree(root, ignore_errors=True)


def _fill(
    extractor: nn.Module,
    images: Sequence[Path],
    categories: Sequence[str] | None,
    geometry: str,
    batch_size: int,
    dtype: str,
    root: Path,
    reset: bool,
    progress: bool,
) -> Features:
    about = fingerprint(extractor, geometry=geometry, dtype=dtype)
    folder = root / hashlib.sha256(about.encode()).hexdigest()[:16]
    if reset:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "extractor.json").is_file():  # a finished store may lie where nobody can write
        _written(folder, lambda: paths.write_whole(folder / "extractor.json", lambda p: p.write_text(about + "\n")))
    prompts = list(categories) if categories is not None and getattr(extractor, "reads_categories", False) else None
    digests = [_digest(path, prompts[i] if prompts else "") for i, path in enumerate(images)]
    places = _index(folder)
    pending = list({digest: i for i, digest in enumerate(digests) if digest not in places}.values())
    waiting: dict[str, Tensor] = {}
    with tqdm(total=len(pending), desc="features", unit="image", disable=not (progress and pending)) as bar:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            pixels = torch.stack([read_image(images[i], extractor.size, geometry) for i in batch])
            maps = extract(extractor, pixels, [prompts[i] for i in batch] if prompts else None, dtype=dtype)
            waiting |= {f"{digests[i]}/{key}": m[row].contiguous() for key, m in maps.items()
                        for row, i in enumerate(batch)}  # fmt: skip
            if len(waiting) >= SHARD * len(maps) or start + batch_size >= len(pending):
                _write(folder, waiting)
                waiting = {}
            bar.update(len(batch))
    return Features(folder, digests, _index(folder), extractor.keys, extractor.size)


def _digest(path: Path, prompt: str) -> str:
    return hashlib.blake2b(path.read_bytes() + prompt.encode(), digest_size=16).hexdigest()


def _index(folder: Path) -> dict[str, Path]:
    """Map each image's digest to the shard that holds it; a shard is written whole or not at all."""
    places = {}
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                places |= {key.split("/")[0]: shard for key in file.keys()}
        except SafetensorError as error:
            raise RuntimeError(f"the feature shard {shard} is damaged ({error}): delete it and run again") from error
    return places


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
    _written(folder, lambda: paths.write_whole(folder / f"{name}.safetensors", lambda part: save_file(tensors, part)))


def _written(folder: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"cannot write features to {folder} ({error}): what was finished is kept") from error
