"""Training steps as CUDA graphs: forward and backward of a model's loss, each one launch from Python.

A step of a small batch costs the host more than the device: some 5,000 kernels at 28 layers, launched one by one. A
graph launches them at once. It knows its tensors by address, so shapes must come again (``padded`` makes them), and
inputs are copied into tensors of the graph's own.

    shape seen once ──> as always;  again ──> captured, and compared with the same operations one by one;  then replayed

The backbone's layers may be compiled first, so that the graph has a third of the kernels
(:mod:`flr.model.compiled_layers`); what is captured is compared with the layers as they were.

What cannot be compiled or captured, or does not come out equal, is logged once and goes on as always.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flr.config import IGNORE
from flr.decode.capture import capturing, cause, graphs_allowed
from flr.model.compiled_layers import compiled, compiled_layers

logger = logging.getLogger("flr")

#: What is differentiated: tensors by name to results, some of which may be None.
Call = Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]]
TARGET_STEP = 8
_KEPT = 32  # shapes with a graph: inputs and results of each, and what lies between in memory that all share
_SEEN = 2  # the call of a shape at which it is captured
#: What fills the new columns of a batch's tensors [B, W] of a whole row.
_FILL: dict[str, Any] = {
    "input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE, "reasoner_mask": False,
}  # fmt: skip


def usable(args: Any, model: nn.Module) -> bool:
    """Whether steps of a training with these arguments may be captured at all."""
    return (
        args.cuda_graphs
        and graphs_allowed()
        and args.device.type == "cuda"
        and args.world_size == 1
        and args.n_gpu <= 1
        and not (args.gradient_checkpointing or args.torch_compile or args.fsdp or args.deepspeed)
        and args.prompt_cache == "none"
        and len({p.device for p in model.parameters()}) == 1
    )


def padded(batch: dict[str, Any], prompt_end: int) -> dict[str, Any]:
    """A batch whose prompts are padded on the left, and whose targets on the right, to few different widths.

    Args:
        batch: what a collator makes; tensors of whole rows [B, W], and ``targets`` and ``target_mask`` [B, S].
        prompt_end: the column behind the prompt's last; columns from it on are targets.
    """
    width = batch["input_ids"].shape[1]
    left, right = -prompt_end % prompt_step(prompt_end), _more_targets(width - prompt_end)
    made: dict[str, Any] = {
        name: nn.functional.pad(batch[name], (left, right), value=fill) for name, fill in _FILL.items() if name in batch
    }
    for name in {"targets", "target_mask"} & batch.keys():
        made[name] = nn.functional.pad(batch[name], (0, _more_targets(batch[name].shape[1])))
    if "thought_start" in batch:
        made["thought_start"] = batch["thought_start"] + left
    return {**batch, **made}


def prompt_step(length: int) -> int:
    """What the widths of prompts are multiples of: at most an eighth of them, so that padding costs little.

    Example:
        >>> [length + -length % prompt_step(length) for length in (1, 5, 20, 60, 65, 200, 300)]
        [8, 8, 24, 64, 80, 224, 320]
    """
    return max(8, 1 << max(0, (length - 1).bit_length() - 3))


def _more_targets(count: int) -> int:
    """Columns to add to ``count`` of targets: codes have one length, titles have many."""
    return -count % TARGET_STEP if count > TARGET_STEP // 2 else 0


def _record(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Run ``function`` under capture; what is returned runs the same kernels on the same tensors again."""
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


@contextmanager
def in_place_of(model: nn.Module, leaves: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Other parameters for those of ``model`` whose ids are the keys."""
    places = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if id(p) in leaves
    ]
    try:
        for where, name, p in places:
            where[name] = leaves[id(p)]
        yield
    finally:
        for where, name, p in places:
            where[name] = p


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.captured, ctx.serial = captured, captured.shared.serial
        results = tuple(x.detach().clone() for x in captured.results())
        ctx.mark_non_differentiable(
            *(r for r, x in zip(results, captured.results(), strict=True) if not x.requires_grad)
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shared = ctx.captured.shared
        if ctx.serial != shared.serial:
            raise RuntimeError(
                "backward: expected one, and before the next forward of a captured step, got it later or a second time"
            )
        found = ctx.captured.gradients(grads)
        shared.serial += 1  # what a backward has used may lie in memory that it has used again
        return None, *found


@dataclass
class _Shared:
    """What graphs of all shapes have in common: they are replayed one after another, forward and then backward."""

    parameters: list[nn.Parameter]
    grads: list[Tensor]
    pool: Any
    serial: int = 0  # of the latest forward, whose intermediate results the pool holds


class _Captured:
    """Forward and backward of a call for one set of shapes, on tensors of their own."""

    def __init__(self, call: Call, tensors: Mapping[str, Tensor], model: nn.Module, shared: _Shared) -> None:
        self.call, self.model, self.shared = call, model, shared
        self.parameters, self.grads = shared.parameters, shared.grads
        self.reached = [True] * len(shared.grads)  # parameters that the results depend on
        self.leaves: list[nn.Parameter] = []
        self.inputs = {name: x.clone() for name, x in tensors.items()}
        self.outputs: tuple[Tensor | None, ...] = ()
        self.seeds: list[Tensor] = []
        self._forward = self._backward = self._run  # until captured

    def results(self) -> list[Tensor]:
        return [x for x in self.outputs if x is not None]

    def _run(self) -> None:
        # Leaves of our own, with the parameters' memory: where autograd adds up the gradient of a leaf remembers the
        # stream of its first use, and a capture may not wait for the stream of an earlier step.
        self.leaves = [nn.Parameter(p.detach()) for p in self.parameters]
        with in_place_of(self.model, {id(p): x for p, x in zip(self.parameters, self.leaves, strict=True)}):
            self.outputs = self.call(self.inputs)

    def _wanted(self) -> list[Tensor]:
        return [x for x in self.results() if x.requires_grad]

    def _differentiate(self) -> None:
        torch._foreach_zero_(self.grads)
        for leaf, grad in zip(self.leaves, self.grads, strict=True):
            leaf.grad = grad  # which autograd adds to in place
        torch.autograd.backward(self._wanted(), self.seeds, inputs=self.leaves)

    def capture(self, layers: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Raises what the capture raises, RuntimeError where its replay does something else.

        Args:
            layers: what the captured operations run inside; those that they are compared with do not.
        """
        device = next(iter(self.inputs.values())).device
        self._run()
        self.seeds = [torch.ones_like(x) for x in self._wanted()]
        self.outputs = ()  # which hold what a backward would need
        state = _random_state(device)
        self._run()
        grads = torch.autograd.grad(self._wanted(), self.leaves, self.seeds, allow_unused=True)
        self.reached = [x is not None for x in grads]
        expected = [*(x.detach().clone() for x in self.results()), *(x for x in grads if x is not None)]
        after = _random_state(device)
        self.outputs = grads = ()
        with layers() as changed:
            if changed is not None:  # compile
                self._run()
                torch.autograd.grad(self._wanted(), self.leaves, self.seeds, allow_unused=True)
                self.outputs = ()
            self._forward = _record(self._run, self.shared.pool)
            self._backward = _record(self._differentiate, self.shared.pool)
        _set_random_state(state, device)
        self._forward()
        self._backward()
        _compare([*self.results(), *(x for x in self._gradients() if x is not None)], expected)
        _set_random_state(after, device)

    def _gradients(self) -> list[Tensor | None]:
        return [x.detach() if reached else None for x, reached in zip(self.grads, self.reached, strict=True)]

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        for name, x in tensors.items():
            self.inputs[name].copy_(x)
        self._forward()
        self.shared.serial += 1
        found = iter(_Replay.apply(self, *self.parameters))
        return tuple(None if x is None else next(found) for x in self.outputs)

    def gradients(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Those of the parameters, for those of the results."""
        given = [g for g, x in zip(grads, self.results(), strict=True) if x.requires_grad]
        for seed, grad in zip(self.seeds, given, strict=True):
            seed.zero_() if grad is None else seed.copy_(grad)
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == grad.data_ptr():
                parameter.grad = parameter.grad.clone()  # of the micro-batch before, which took over our memory
        self._backward()
        return tuple(self._gradients())


class StepGraphs:
    """Calls of a model by graphs where their shapes have come before.

    Args:
        compile_layers: a backend of ``torch.compile`` for the backbone's layers; None for the layers as they are.
    """

    def __init__(self, compile_layers: str | Callable[..., Any] | None = None) -> None:
        self._program = None if compile_layers is None else compiled(compile_layers)
        self._known: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._counts: dict[Hashable, int] = {}
        self._addresses: int | None = None  # of the parameters, which graphs know by them
        self._shared: _Shared | None = None
        self.refused = False

    def clear(self) -> None:
        """Give the graphs' memory back."""
        self._known.clear()
        self._counts.clear()
        self._shared = None

    def __call__(
        self, call: Call, tensors: dict[str, Tensor], model: nn.Module, key: Hashable
    ) -> tuple[Tensor | None, ...]:
        """What ``call(tensors)`` returns, with its gradients in the parameters of ``model``.

        Args:
            call: reads nothing that changes from call to call but the tensors and the model's parameters.
            tensors: without gradients.
            model: has all the parameters that are to get gradients.
            key: what else the result depends on.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        shapes = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(tensors.items()))
        if (addresses := _addresses(model)) != self._addresses:
            self.clear()
            self._addresses = addresses
        key = (key, shapes)
        if (captured := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return captured(tensors)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == _SEEN and not self.refused and trained and torch.is_grad_enabled():
            made = self._captured(call, tensors, model, trained)
            if made is not None:
                self._addresses = _addresses(model)  # compiled layers lay frozen weights together
                self._known[key] = made
                while len(self._known) > _KEPT:
                    self._counts.pop(self._known.popitem(last=False)[0], None)
                return made(tensors)
        return self._one_by_one(call, tensors)

    def _one_by_one(self, call: Call, tensors: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        try:
            return call(tensors)
        except torch.OutOfMemoryError:
            if not self._known:
                raise
        logger.warning("training without CUDA graphs: this batch needs the memory that they hold")
        self.clear()
        self.refused = True
        torch.cuda.empty_cache()
        return call(tensors)

    def _captured(
        self, call: Call, tensors: dict[str, Tensor], model: nn.Module, trained: list[nn.Parameter]
    ) -> _Captured | None:
        if self._program is not None:
            try:
                return self._capture(call, tensors, model, trained, partial(compiled_layers, model, self._program))
            except Exception as error:  # of a compiler, which may raise anything
                logger.warning("training without compiled layers: %s", cause(error))
                self._program = None
                self.clear()
        try:
            return self._capture(call, tensors, model, trained, nullcontext)
        except Exception as error:  # what cannot be captured raises whatever the operation in its way does
            logger.warning("training without CUDA graphs: %s", cause(error))
            self.refused = True
            self.clear()
            return None

    def _capture(
        self, call: Call, tensors: dict[str, Tensor], model: nn.Module, trained: list[nn.Parameter], layers: Any
    ) -> _Captured:
        if self._shared is None:
            pool = _new_pool()
            self._shared = _Shared(trained, [torch.zeros_like(p) for p in trained], pool)
        made = _Captured(call, tensors, model, self._shared)
        made.capture(layers)
        return made


def _addresses(model: nn.Module) -> int:
    return hash(tuple(p.data_ptr() for p in model.parameters()))


def _new_pool() -> Any:
    torch.cuda.empty_cache()
    return torch.cuda.graph_pool_handle()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    """RuntimeError unless results and gradients are equal but for rounding."""
    norms = torch.stack([x.float().norm() for x in expected])
    found = [x.detach() for x in found]
    errors = torch.stack([(x.float() - y.float()).norm() for x, y in zip(found, expected, strict=True)])
    low = any(x.dtype in (torch.bfloat16, torch.float16) for x in expected)
    bound = (5e-2 if low else 1e-3) * norms + 1e-3 * norms.max()
    if not bool((errors <= bound).all()):
        worst = float((errors / bound.clamp_min(1e-30)).max())
        raise RuntimeError(
            f"their results differ from those of the same operations one by one, {worst:.3g} times the bound"
        )
