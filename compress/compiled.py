"""A network that trains by compiled kernels: fewer and larger ones, for trainings that last."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.displacement import stay_apart


class Compiled:
    """Answers as `model` does, from kernels that `torch.compile` makes for the shape of the first images it is given.

    Images of another shape, such as an epoch's last ones, are answered by the model itself: to compile once more would
    take longer than they do. Code that the compiler cannot follow runs as it is, between compiled parts.

    Raises:
        ConfigError: torch cannot compile here, for want of a C++ compiler (on a GPU: of Triton), say.
    """

    def __init__(self, model: nn.Module) -> None:
        _require_compiler(next(model.parameters()).device)
        stay_apart()
        self.model = model
        self.compiled = torch.compile(model, dynamic=False)
        self.shape: torch.Size | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.shape is None:
            self.shape = x.shape
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the compiler does to follow code, not of the code
                return self.compiled(x)  # type: ignore[no-any-return]  # torch.compile's results are untyped
        answer: Tensor = (self.compiled if x.shape == self.shape else self.model)(x)
        return answer


def _require_compiler(device: torch.device) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it imports for this
            torch.compile(_more)(torch.zeros(1, device=device))
    except Exception as error:  # whatever the many layers below raise
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"`compile` (=true) needs a torch that can compile for the device {device.type}, and this one cannot "
            f"({why}); install what is missing, or set it to false."
        ) from error


def _more(x: Tensor) -> Tensor:
    return x + 1
