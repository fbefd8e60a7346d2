"""Checkpoints of `training.fit`: written so that an interruption never leaves half of one, refused for another run.

Each says which code wrote it: what other code finished is trained anew, what other code began goes on.
"""

import hashlib
import io
import json
import os
import shutil
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

PACKAGE = Path(__file__).parent
TRAINED_BY = (  # what decides the weights that a run ends with
    *("training", "trainer", "backbone", "perceptual", "distillation", "layer_plan", "attention/*"),
    *("attention_t*", "attention_students", "adaptive_t*", "token_*", "class*", "augmentation", "demo_backbone"),
    *("correspondence/features", "correspondence/diffusion", "correspondence/hyperfeatures"),
    *("correspondence/students", "correspondence/objectives", "correspondence/training"),
)


def _code() -> str:
    files = {path for pattern in TRAINED_BY for path in PACKAGE.glob(f"{pattern}.py")}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


CODE = _code()  # of this process, whatever is written to its files meanwhile


class Checkpoint:
    """One run's folder: weights as safetensors, everything else in `state.pt`, which names the weights it belongs to.

    Weight files are named by their content and `state.pt` is replaced last, in one step: whatever interrupts a save,
    the folder holds a whole checkpoint. `config` holds the plain values that a run must share to go on from it.
    """

    def __init__(self, folder: str | Path, config: Mapping) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "state.pt"
        self.advice = f"delete {self.path} to train anew"
        self.config = json.loads(json.dumps(config, default=str))  # as the values come back from the file

    def load(self) -> dict | None:
        """Read the state, its entry `weights` mapping role to named tensors; None where there is no checkpoint.

        RuntimeError: its files cannot be read. ValueError: they belong to a run of another configuration.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found, files = _flat(state["config"]), state["files"]
            state["weights"] = {role: safetensors.torch.load_file(self.folder / name) for role, name in files.items()}
        except Exception as error:  # pickle, zip, safetensors and file errors share no narrower class
            raise RuntimeError(f"the checkpoint {self.folder} cannot be read ({error}); {self.advice}") from error
        own = _flat(self.config)
        keys = [key for key in sorted(found.keys() | own.keys()) if found.get(key) != own.get(key)]
        if keys:
            there, here = ({key: textwrap.shorten(str(flat.get(key)), 80) for key in keys[:8]} for flat in (found, own))
            shown = "; ".join(f"{key}: {there[key]} there, {here[key]} here" for key in there)
            more = f"; and {len(keys) - 8} more" if len(keys) > 8 else ""
            raise ValueError(f"the checkpoint {self.folder} is of another run ({shown}{more}); {self.advice}")
        return state

    def accept(self, state: dict, finished: bool, accelerator: Accelerator) -> dict | None:
        """Return the state that `load` gave, or None where other code finished it: then it waits in `<folder>.old`.

        Where the code is another one there is a warning. Every process must call this after it has loaded.
        """
        (same,) = broadcast_object_list([state.get("code") == CODE])  # the main process decides
        if same:
            return state
        accelerator.wait_for_everyone()  # nobody reads any longer what is moved now
        if accelerator.is_main_process:
            what = f"training goes on after epoch {state['epoch']}"
            if finished:
                old = self.folder.with_name(f"{self.folder.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                self.folder.rename(old)
                what = f"it is moved to {old}, and training starts anew"
            what = f"the code changed since the checkpoint {self.folder} was written: {what}"
            warnings.warn(what, RuntimeWarning, stacklevel=3)
        return None if finished else state

    def save(self, state: Mapping, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store `state` and the weights of each role in place of what was there.

        RuntimeError: they cannot be written (a full disk); the checkpoint that was there before stays valid.
        """
        files = {role: f"{digest(tensors.items())[:16]}.safetensors" for role, tensors in weights.items()}
        buffer = io.BytesIO()
        torch.save({**state, "config": self.config, "code": CODE, "files": files}, buffer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for role, name in files.items():
                if not (self.folder / name).exists():
                    _write(self.folder / name, safetensors.torch.save(dict(weights[role])))
            _write(self.path, buffer.getvalue())
        except OSError as error:
            before = "the one before it is kept" if self.path.exists() else "there is none before it"
            where = f"the checkpoint of epoch {state['epoch']} to {self.folder}"
            raise RuntimeError(f"cannot write {where} ({error}); {before}") from error
        for path in self.folder.glob("*.safetensors"):
            if path.name not in files.values():
                path.unlink()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy to the CPU what training can change: parameters that require a gradient, and buffers."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad] + list(model.named_buffers())
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named}


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write what `weights` copied back into the model."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def model_config(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Describe a model for `Checkpoint.config`: recipes, shapes of what is trained, digest of the rest, groups.

    Recipes are those of the backbones within: they name mixer and options, which shapes need not tell apart.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    config: dict[str, Any] = {
        "trained": {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad},
        "frozen": digest((name, p) for name, p in model.named_parameters() if not p.requires_grad),
    }
    for name, module in model.named_modules():
        for kind in vars(module).keys() & {"recipe", "description"}:  # of `backbone.create`, of `create_student`
            config[f"{kind} {name}".strip()] = vars(module)[kind]
    for i, group in enumerate(optimizer.param_groups):
        options = {key: group[key] for key in ("weight_decay", "lr_scale") if key in group}
        config[f"group {i}"] = options | {"parameters": [names[id(p)] for p in group["params"]]}
    return config


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes, types and values of tensors with SHA-256, whatever their order and device."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def images_digest(images: Any) -> str | None:
    """Hash the files' digests of cached images; None for tensors, whose files nobody knows."""
    digests = getattr(images, "digests", None)
    return None if digests is None else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
