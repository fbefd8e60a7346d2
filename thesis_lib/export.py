"""A metric's embedding as one file that runs without this package: torch.export or ONNX, any batch size.

    python -m thesis_lib.export pool FOLDER

Either takes images (B, 3, H, W), floats in [0, 1], squashed to the metric's size, and gives embeddings (B, D); a pair's
distance is 1 - the cosine of its two. What a metric checks of its input (shape, range) is not in the files.
"""

import argparse
import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thesis_lib import efficiency, perceptual

FILES = {"torch.export": "embed.pt2", "onnx": "embed.onnx"}
INPUT, OUTPUT = "images", "embeddings"
Exportable = perceptual.Metric | torch.export.ExportedProgram


class _Embed(nn.Module):
    def __init__(self, metric: perceptual.Metric) -> None:
        super().__init__()
        self.metric = metric

    def forward(self, images: Tensor) -> Tensor:
        return self.metric.embed_unchecked(images)


def program(metric: perceptual.Metric) -> torch.export.ExportedProgram:
    """Trace the embedding on the CPU with a dynamic batch; the metric is left in eval mode there."""
    metric.cpu().eval()
    example = torch.rand(2, 3, *metric.backbone.patch_embed.img_size)
    shapes = {INPUT: {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        return torch.export.export(_Embed(metric).eval(), (example,), dynamic_shapes=shapes)


def _traced(metric: Exportable) -> torch.export.ExportedProgram:
    return program(metric) if isinstance(metric, perceptual.Metric) else metric


def save_program(metric: Exportable, path: str | Path) -> Path:
    """Write the .pt2 file that `torch.export.load(path).module()` runs, of a metric or its `program`."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(_traced(metric), path)
    return path


def save_onnx(metric: Exportable, path: str | Path) -> Path:
    """Write an ONNX file of a metric or its `program`, weights inside, input "images", output "embeddings".

    ModuleNotFoundError: torch's exporter needs the packages onnx and onnxscript (extra `export`).
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"writing ONNX needs {package}: pip install onnx onnxscript onnxruntime")
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it lists custom operators of torchvision that nothing here uses
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                _traced(metric),
                (),
                path,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    return path


def load(path: str | Path, *, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return a file of either kind as a function of images on the CPU; `threads` (torch's number by default) for ONNX.

    A .pt2 is a program, and torch unpickles parts of it: load only files that you trust; an .onnx runs no code.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one or one of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no exported metric {path}: `python -m thesis_lib.export` writes one")
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path} is neither .pt2 (torch.export) nor .onnx")
    if path.suffix == ".onnx":
        import onnxruntime  # not in the try: that it is missing is not the file's fault
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a damaged file either raises what happens to fail
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not an exported metric: {why}") from error
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def compare(
    metric: perceptual.Metric,
    folder: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 3,
    seed: int = 0,
    **timing,
) -> list[dict]:
    """Export a metric into `folder` and return rows of size and CPU time, by `runtime`: eager, torch.export, onnx.

    Per runtime: "file_size" (MB; of eager the weights alone), and by batch "latency" (ms a batch), "throughput" and
    "max_difference" from the eager embedding. Runtimes take turns `rounds` times; `timing` is
    `efficiency.time_forward`'s, per turn. Without onnx or onnxruntime, and for a metric with an operation that
    torch's exporter cannot say in ONNX, its one row has no value and a note.
    """
    folder, recipe = Path(folder).expanduser(), metric.backbone.recipe
    run: dict[str, Callable[[Tensor], Tensor]] = {"eager": metric.cpu().eval().embed_unchecked}
    sizes = {"eager": sum(t.numel() * t.element_size() for t in metric.backbone.state_dict().values())}
    traced = program(metric)
    sizes["torch.export"] = save_program(traced, folder / FILES["torch.export"]).stat().st_size
    run["torch.export"] = load(folder / FILES["torch.export"])
    absent = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    why = f"not installed: {', '.join(absent)}" if absent else None
    if not absent:
        try:
            sizes["onnx"] = save_onnx(traced, folder / FILES["onnx"]).stat().st_size
            run["onnx"] = load(folder / FILES["onnx"])
        except torch.onnx.OnnxExporterError:  # token merging sorts, for one
            why = "torch's exporter knows no ONNX form of one of its operations"
    common = {"backbone": recipe["name"], "mixer": recipe["mixer"], "dtype": "float32", "device": "cpu", "seed": seed}
    common |= {"image_size": metric.backbone.patch_embed.img_size[0], "threads": torch.get_num_threads(), "note": None}
    rows = [
        {"metric": "file_size", "value": size / 1e6, "unit": "MB", "n": 1, "runtime": name}
        for name, size in sizes.items()
    ]
    if why:
        rows.append({"metric": "file_size", "value": None, "unit": "MB", "n": 0, "runtime": "onnx", "note": why})
    for batch in batch_sizes:
        shape = (batch, 3, *metric.backbone.patch_embed.img_size)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected = run["eager"](images)
            off = {name: (function(images) - expected).abs().max().item() for name, function in run.items()}
        times: dict[str, list[np.ndarray]] = {name: [] for name in run}
        for _ in range(rounds):
            for name, function in run.items():
                times[name].append(efficiency.time_forward(function, images, **timing))
        for name in run:
            seconds = np.concatenate(times[name])
            found = [
                efficiency.median_row("latency", 1e3 * seconds),
                efficiency.median_row("throughput", batch / seconds),
                {"metric": "max_difference", "value": off[name], "unit": "1", "n": batch},
            ]
            rows += [row | {"batch": batch, "runtime": name} for row in found]
    return [common | row for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m thesis_lib.export", description=__doc__.splitlines()[0])
    parser.add_argument("metric", help="mixer of the demo backbone, or folder of a saved metric")
    parser.add_argument("folder", type=Path, help="where to write " + " and ".join(FILES.values()))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args(arguments)
    try:
        metric, _ = perceptual.load(options.metric)
        rows = compare(metric, options.folder, batch_sizes=options.batch_sizes)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    for row in rows:
        batch = f" at batch {row['batch']}" if "batch" in row else ""
        print(f"{row['runtime']:<13}{row['metric'] + batch:<28}", row["note"] or f"{row['value']:.4g} {row['unit']}")


if __name__ == "__main__":
    main()
