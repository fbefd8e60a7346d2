"""What a forward pass executes, operation by operation, and the time that measured ceilings predict for it.

One pass of any model is recorded on the meta device: shapes flow, nothing is computed. Each operation gives its
multiply-adds, other operations, bytes and launches; ceilings.py measures what a machine does of each kind a second. No
time of a model enters a prediction.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thesis_lib.attention.base import SOFTMAX
from thesis_lib.ceilings import Ceilings

TERMS = ("matmul", "elementwise", "copy", "launches")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention")
COPIES = {"clone", "copy_", "copy", "_to_copy", "cat", "stack", "constant_pad_nd", "index", "index_select", "gather"}
COPIES |= {"roll", "repeat", "flip", "fill_", "im2col", "index_put_", "scatter", "slice_scatter", "select_scatter"}
FREE = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty"}
FREE |= {"empty_strided", "new_empty_strided"}
FAMILIES = dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), "softmax")
FAMILIES |= {"gelu": "gelu", "native_layer_norm": "layer_norm"}
FAMILIES |= dict.fromkeys(("exp", "exp_", "log", "tanh", "sigmoid", "erf", "silu", "sin", "cos"), "exp")
FAMILIES |= dict.fromkeys(("sum", "mean", "amax", "max", "linalg_vector_norm", "var_mean", "topk", "sort"), "sum")
FAMILIES |= {"avg_pool2d": "pool", "max_pool2d_with_indices": "pool"}
WEIGHTS = {"softmax": SOFTMAX, "gelu": 5, "layer_norm": 7}  # operations an element, as `Cost` counts them


@dataclass(frozen=True)
class Operation:
    """One call: what it is, how much it does, and where on its family's curve it lies.

    kind: the term its time belongs to. sizes: the curve's axes. work: multiply-adds, or elements. launches: kernels
    started, 0 for a view and for the call of a module, which cost the host time all the same.
    """

    name: str
    family: str
    kind: str
    sizes: tuple[int, ...] = ()
    work: int = 0
    macs: int = 0
    elementwise: int = 0
    bytes: int = 0
    launches: int = 1


VIEW = Operation("view", "view", "launches", launches=0)
MODULE = Operation("module", "module", "launches", launches=0)


@functools.cache
def kind(name: str) -> str:
    """Return the term that the time of an aten operation belongs to; views and mere wrappers only cost a launch."""
    products = ("scaled_dot_product", "attention_forward", "mkldnn_conv", "cudnn_conv")
    if name in PRODUCTS or any(part in name for part in products):
        return "launches" if name == "scaled_dot_product_attention" else "matmul"
    if name in COPIES:
        return "copy"
    wrapper = _is_wrapper(getattr(torch.ops.aten, name, None))
    return "launches" if wrapper or name in FREE or name.startswith("empty") else "elementwise"


def _is_wrapper(packet: object) -> bool:
    """Say whether all of an operator's overloads on tensors are views or made of other operators."""
    found = [getattr(packet, name) for name in packet.overloads() if not name.endswith("out")] if packet else []
    types = [[str(argument.type) for argument in op._schema.arguments] for op in found]
    on_tensors = [op for op, own in zip(found, types, strict=True) if any("Tensor" in t for t in own)]
    named = [op for op in on_tensors if "Dimname" in str(op._schema) or "str dim" in str(op._schema)]
    plain = [op for op in on_tensors if op not in named]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(plain) and all(op.is_view or composite(op.name(), "CompositeImplicitAutograd") for op in plain)


def record(model: nn.Module, batch: int, size: Sequence[int], *, dtype: str = "float32", fused: bool = True) -> list:
    """Record the operations of one pass over images (batch, 3, *size) without computing it.

    Every parameter and buffer is replaced by a meta tensor of `dtype`; the model itself is left alone. fused: softmax
    attention is one operation, as its kernels are; otherwise the products, scalings and softmax that it is made of.
    """
    number = getattr(torch, dtype)
    state = {
        name: torch.empty_like(t, device="meta", dtype=number if t.is_floating_point() else t.dtype)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    operations: list[Operation] = []
    hook = register_module_forward_pre_hook(lambda *_: operations.append(MODULE))
    try:
        with torch.no_grad(), _Functions(operations, fused), _Operations(operations):
            functional_call(model, state, (torch.empty(batch, 3, *size, device="meta", dtype=number),))
    finally:
        hook.remove()
    return operations


def totals(operations: Iterable[Operation]) -> dict[str, int]:
    """Add up multiply-adds, other operations, bytes and launches."""
    operations = list(operations)
    return {name: sum(getattr(op, name) for op in operations) for name in ("macs", "elementwise", "bytes", "launches")}


def predict(operations: Iterable[Operation], ceilings: Ceilings) -> dict[str, float]:
    """Predict the time of a pass by term, seconds: the sum over operations of overhead + max(compute, memory).

    The roofline of Williams et al. (CACM 2009) for each operation, with the rate that its family reached at its size
    and the bandwidth that a copy of as many bytes reached; the overhead counts as launches.
    """
    found = dict.fromkeys(TERMS, 0.0)
    for op, count in Counter(operations).items():
        curve = ceilings.curves[op.family]
        found["launches"] += count * curve.overhead
        if op.work:
            compute, memory = op.work / curve.rate(op.sizes), op.bytes / ceilings.bandwidth(op.bytes)
            found[op.kind] += count * max(compute, memory)
    return found


class _Functions(TorchFunctionMode):
    """Takes softmax attention for one operation, as every machine's kernel does and the meta device does not."""

    def __init__(self, operations: list[Operation], fused: bool) -> None:
        super().__init__()
        self.operations, self.fused = operations, fused

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.fused:
            return func(*args, **kwargs)
        (q, k, v), before = args[:3], len(self.operations)
        heads, n, m = math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2]
        out = q.new_empty(*q.shape[:-3], n, *q.shape[-3:-2], v.shape[-1]).transpose(-2, -3)  # the kernels' own layout
        del self.operations[before:]
        macs = heads * n * m * (q.shape[-1] + v.shape[-1])
        elements = heads * n * (q.shape[-1] + SOFTMAX * m)
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        moved = sum(_bytes(t) for t in (q, k, v, mask, out) if t is not None)
        sizes = (n, m, q.shape[-1])
        self.operations.append(Operation("attention", "attention", "matmul", sizes, macs, macs, elements, moved))
        return out


class _Operations(TorchDispatchMode):
    """Writes down every aten operation."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        view = func.is_view or name in FREE or not any(isinstance(t, Tensor) for t in tree_leaves(out))
        self.operations.append(VIEW if view else _describe(name, args, kwargs or {}, out))
        return out


def _bytes(t: Tensor) -> int:
    """Bytes that a tensor occupies; what it repeats by a stride of 0 is read once."""
    return t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)


def _describe(name: str, args: tuple, kwargs: dict, out: object) -> Operation:
    inputs, outputs = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out))
    moved = sum(map(_bytes, [*inputs, *outputs]))
    if name in PRODUCTS:
        family, sizes, macs = _product(name, args, outputs[0])
        return Operation(name, family, "matmul", sizes, macs, macs, 0, moved)
    elements = max([t.numel() for t in [*inputs, *outputs]], default=0)
    if name in COPIES:
        strided = any(not t.is_contiguous() for t in inputs)
        return Operation(name, "transpose" if strided else "copy", "copy", (elements,), elements, 0, 0, moved)
    family = FAMILIES.get(name, "add")
    if family == "pool":
        elements = outputs[0].numel() * math.prod(args[1]) ** (2 if len(args[1]) == 1 else 1)
    count = WEIGHTS.get(family, 1) * elements
    return Operation(name, family, "elementwise", (elements,), elements, 0, count, moved)


def _product(name: str, args: tuple, out: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Return family, sizes and multiply-adds of a matrix product or convolution."""
    if name == "convolution":
        weight, groups = args[1], args[8]
        macs, taps = out.numel() * weight[0].numel(), weight[0].numel()
        if groups > 1:
            return "depthwise", (out.numel(), taps), macs
        return "convolution", (out.numel() // out.shape[1], taps, out.shape[1]), macs
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    sizes = (a.shape[-2], b.shape[-1], a.shape[-1])
    return ("bmm" if a.ndim == 3 else "mm"), sizes, math.prod(a.shape[:-2]) * math.prod(sizes)
