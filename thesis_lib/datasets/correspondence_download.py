"""Fetch SPair-71k, PF-WILLOW or CUB-200-2011 from where it is published, and say where that is.

python -m thesis_lib.datasets.correspondence_download SPair-71k FOLDER
"""

import argparse
import gzip
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pooch

from thesis_lib.datasets.missing import choose, missing

COMMAND = "python -m thesis_lib.datasets.correspondence_download"
# What unpacking raises at an archive that is cut off or damaged; RuntimeError: a zip's flags that make no sense.
BROKEN = (tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError)


@dataclass(frozen=True)
class Source:
    """Where a set is published: files with their MD5 where one is known, and what they hold."""

    files: dict[str, str | None]
    folder: str
    contents: str
    size: str


SOURCES = {
    "SPair-71k": Source(
        {"https://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz": None},
        "SPair-71k",
        "70,958 pairs of images of 18 categories: JPEGImages/, ImageAnnotation/, PairAnnotation/, Layout/",
        "a few hundred MB",
    ),
    "PF-WILLOW": Source(
        {
            "https://www.di.ens.fr/willow/research/proposalflow/dataset/PF-dataset.zip": None,
            "https://www.di.ens.fr/willow/research/cnngeometric/other_resources/test_pairs_pf.csv": None,
        },
        "PF-WILLOW",
        "900 pairs with 10 points each: test_pairs_pf.csv, PF-dataset/",
        "well under 1 GB",
    ),
    "CUB-200-2011": Source(
        {
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78",
        },
        "CUB_200_2011",
        "11,788 images of 200 bird species with 15 parts: images/, images.txt, parts/part_locs.txt, ...",
        "1.2 GB",
    ),
}


def download(dataset: str, folder: str | Path) -> Path:
    """Fetch and unpack a set into its own folder below `folder`, and return that root; finished files are kept.

    Raises RuntimeError where a file could not be fetched or has an MD5 other than the known one, ValueError for what is
    not whole, not the set, or has a path that leaves its folder.
    """
    source = SOURCES[choose(dataset, SOURCES, "correspondence data set")]
    root = Path(folder).expanduser() / source.folder
    inside = root if dataset == "PF-WILLOW" else root.parent  # the other archives bring their own folder
    inside.mkdir(parents=True, exist_ok=True)
    for url, md5 in source.files.items():
        checksum = None if md5 is None else f"md5:{md5}"
        try:
            path = Path(pooch.retrieve(url, checksum, fname=url.rsplit("/", 1)[1], path=inside, progressbar=True))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong MD5 is pooch's ValueError
            raise RuntimeError(f"{dataset} could not be fetched from {url}: {error}") from error
        if path.suffix != ".csv":
            unpack(path, inside)
        elif path.read_bytes().lstrip().startswith(b"<"):
            raise _unusable(path, "a web page, no table")
        if not root.is_dir():
            raise _unusable(path, f"it holds no folder {root.name}")
    return root


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip archive into `folder`, all of it or nothing.

    Raises ValueError for one that is not whole, or has a path that leaves the folder.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as name:
        unpacked = Path(name).resolve()
        try:
            if archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as content:
                    for path in content.namelist():
                        if not (unpacked / path).resolve().is_relative_to(unpacked):
                            raise ValueError(f"{archive} is refused: {path} leaves the folder")
                    content.extractall(unpacked)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
        except tarfile.FilterError as error:
            raise ValueError(f"{archive} is refused: {error}") from error
        except BROKEN as error:
            raise _unusable(archive, "not a whole archive: " + str(error).partition("\n")[0]) from error
        for path in unpacked.iterdir():
            if path.is_dir():  # merged into what an earlier run unpacked
                shutil.copytree(path, folder / path.name, copy_function=shutil.move, dirs_exist_ok=True)
            else:
                shutil.move(path, folder / path.name)


def _unusable(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is not what was published ({what}): delete it, then run the same again")


def not_there(root: Path, dataset: str, found: str) -> FileNotFoundError:
    """Make the error for a set that is not at `root`."""
    source = SOURCES[dataset]
    published = f"{' and '.join(source.files)}; fetch it by: {COMMAND} {dataset} {root.parent}"
    return missing(
        root,
        found,
        name=dataset,
        contents=source.contents,
        size=source.size,
        published=published,
        parameter=f"{dataset} in 08's `datasets`",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fetch and unpack a set of image pairs with key-points.")
    parser.add_argument("dataset", choices=list(SOURCES))
    parser.add_argument("folder", type=Path, help="the set goes into a folder of its own in here")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.dataset} is at {download(options.dataset, options.folder)}")
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
