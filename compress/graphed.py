"""A training step on a GPU, recorded once and replayed: small networks spend their time in starting kernels.

NVIDIA's CUDA graphs, through `torch.cuda.graph`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
WARM = 3  # steps before the recording, in which libraries choose their kernels and optimizers make their state


class GraphedStep:
    """Does what `update` does with images and labels, by a recording from the fourth batch of a shape on.

    The recording holds one shape; batches of another, such as an epoch's last, are computed step by step. So are all
    batches for as long as a layer has to look at numbers on the CPU while it trains, which it says by `waits`.
    """

    def __init__(self, update: Update, model: nn.Module) -> None:
        self.update = update
        self.refused = False
        self.awaited = [module for module in model.modules() if getattr(module, "waits", False)]
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.awaited = [module for module in self.awaited if module.waits]
        if self.awaited or self.refused:
            return self.update(x, y)
        if self.inputs is None or len(x) > len(self.inputs[0]):
            self.inputs, self.warm, self.graph = (x.clone(), y.clone()), 0, None
        if x.shape != self.inputs[0].shape:
            return self.update(x, y)
        with torch.cuda.device(x.device):
            if self.warm < WARM:
                self.warm += 1
                return self._aside(x, y)
            if self.graph is None and not self._record():
                return self.update(x, y)
            assert self.graph is not None and self.outputs is not None
            for mine, theirs in zip(self.inputs, (x, y), strict=True):
                mine.copy_(theirs)
            self.graph.replay()
        loss, correct = self.outputs
        return loss.clone(), correct.clone()

    def _aside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One step on a stream of its own, as what is recorded next wants it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.update(x, y)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self) -> bool:
        """Record `update`, which computes nothing yet; False where it cannot be recorded, which is said once."""
        assert self.inputs is not None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.get_state()
        try:
            with torch.cuda.graph(graph):
                self.outputs = self.update(*self.inputs)
        except RuntimeError as error:
            self.refused = True
            # torch is still on the recording's stream, and its generator believes that it is being recorded.
            torch.cuda.set_stream(stream)
            anew = torch.Generator(device=stream.device)
            anew.set_state(before)
            generator.graphsafe_set_state(anew.graphsafe_get_state())
            why = str(_first(error)).partition("\n")[0]
            warnings.warn(f"training steps are not recorded as a CUDA graph, which is slower: {why}", stacklevel=2)
            return False
        self.graph = graph
        return True


def _first(error: BaseException) -> BaseException:
    """The error that the others followed from."""
    while error.__context__ is not None:
        error = error.__context__
    return error
