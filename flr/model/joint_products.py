"""Products of one input with several frozen weights as one: queries, keys and values; gate and up.

A product of a few hundred tokens with a small weight leaves most of a GPU idle, and three of them take three launches.
The weights become rows of one matrix, in place of their own memory, and each module of a group computes the product
with all of them and takes its rows; a compiler that is told to (:func:`share_products`) computes it once.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Names of modules that share their input, in an attention and in an MLP.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def groups_of(layer: nn.Module) -> Iterator[list[nn.Linear]]:
    """Frozen products of ``layer`` that may be joined."""
    for module in layer.modules():
        for names in _GROUPS:
            found: list[Any] = [module._modules.get(name) for name in names]
            if all(_is_plain(x) for x in found) and len({_like(x) for x in found}) == 1:
                yield found


def _is_plain(module: Any) -> bool:
    """Whether it is a product and nothing more, of a frozen weight that is whole."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return all(type(p) is nn.Parameter and not p.requires_grad and p.numel() > 0 for p in module.parameters())


def _like(module: nn.Linear) -> tuple[Any, ...]:
    return module.in_features, module.weight.dtype, module.weight.device, module.bias is None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parameters [n_i, …] as one tensor [Σ n_i, …], which they are views of from now on."""
    first, whole = parts[0], sum(len(p) for p in parts)
    expected = first.data_ptr()
    for p in parts:
        if p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or p.data_ptr() != expected:
            break
        if not p.is_contiguous():
            break
        expected += p.nbytes
    else:
        return torch.as_strided(first.detach(), (whole, *first.shape[1:]), first.stride(), first.storage_offset())
    joint = torch.cat([p.detach() for p in parts])
    for p, rows in zip(parts, joint.split([len(p) for p in parts]), strict=True):
        p.data = rows
    return joint


def _forward(self: Any, x: Tensor) -> Tensor:
    begin, end = self.flr_rows
    return linear(x, self.flr_weight, self.flr_bias)[..., begin:end]


@contextlib.contextmanager
def joint_products(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Modules of the groups compute joint products inside. Their weights stay views of joint ones afterwards."""
    changed: list[Any] = []
    try:
        for group in (group for layer in layers for group in groups_of(layer)):
            weight = _joined([m.weight for m in group])
            biases = [m.bias for m in group if m.bias is not None]
            bias = _joined(biases) if biases else None
            end = 0
            for module in group:
                begin, end = end, end + module.out_features
                own = {"flr_weight": weight, "flr_bias": bias, "flr_rows": (begin, end)}
                module.__dict__.update(own, forward=types.MethodType(_forward, module))
                changed.append(module)
        yield
    finally:
        for module in changed:
            for name in ("flr_weight", "flr_bias", "flr_rows", "forward"):
                module.__dict__.pop(name, None)


def share_products(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same products of a graph as one, in place; the graph itself."""
    known: dict[Any, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not linear:
            continue
        first = known.setdefault((node.args, tuple(node.kwargs.items())), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph
