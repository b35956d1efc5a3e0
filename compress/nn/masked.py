"""Weights of which some are zero and stay zero: what pruning leaves behind, and the schedule that makes more of them.

Zhu & Gupta, "To prune, or not to prune", 2017: amounts that rise along a cubic while training goes on.
Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020.
Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the Taylor score.
Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021: N of every M weights in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SCORES = ("magnitude", "movement", "taylor")
SCHEDULES = ("one_shot", "linear", "cubic")
GONE = -1e30  # the score of a weight that does not come back; finite, so that training checks pass


class MaskedWeight(nn.Module):
    """A parametrization: exactly zero where `mask` is False, else the weight as it is. Zeros get no gradient.

    By itself, the mask stays as it is. With a `schedule`, the share of zeros rises from `start` to `amount` over
    `steps` optimizer steps, along a line or Zhu and Gupta's cubic, every `every` steps; it counts as a step when a
    gradient comes back for a weight that was given in training mode, once however often the layer was called before.
    Which weights go is decided `by` their magnitude; by movement, minus weight times gradient, added up since the
    start; or by the Taylor score, its square, added up since the last time. By movement, weights come back.
    With a `pattern` such as "2:4" at most 2 of every 4 consecutive input channels (axis 1) at a place are left at the
    end; what goes before that goes where it has to.

    All that a schedule knows is in buffers, so that a state dict goes on with it. They, and the mask, get the weight's
    shape when it is registered. It stands in front of all other parametrizations. `put_mask` puts it there.

    Raises:
        ValueError: an unknown choice, shares that make no sense, a schedule without steps, a malformed pattern.
    """

    mask: Tensor
    step: Tensor
    updated: Tensor
    scores: Tensor

    def __init__(
        self,
        amount: float = 0.0,
        start: float = 0.0,
        schedule: str = "one_shot",
        steps: int = 0,
        every: int = 1,
        by: str = "magnitude",
        pattern: str = "",
    ) -> None:
        super().__init__()
        for name, value, known in (("schedule", schedule, SCHEDULES), ("by", by, SCORES)):
            if value not in known:
                raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(known)}.")
        if not 0 <= start <= amount < 1:
            raise ValueError(f"`start` (={start}) and `amount` (={amount}) must rise, from 0 to less than 1.")
        if (steps > 0) != (schedule != "one_shot") or every < 1:
            raise ValueError(
                f"`steps` (={steps}) and `every` (={every}) must be at least 1 for a schedule; without, `steps` is 0."
            )
        if pattern:
            parsed(pattern)
        self.amount, self.start, self.schedule, self.steps = amount, start, schedule, steps
        self.every, self.by, self.pattern = every, by, pattern
        self.register_buffer("mask", torch.ones(0, dtype=torch.bool))
        if steps:
            self.register_buffer("step", torch.tensor(0))
            self.register_buffer("updated", torch.tensor(0))
            if by != "magnitude":
                self.register_buffer("scores", torch.zeros(0))
        self._waiting = False  # for the first gradient of this step
        self._ended = False  # the schedule, as far as was seen

    def forward(self, weight: Tensor) -> Tensor:
        trained = self.training and weight.requires_grad and not torch.compiler.is_compiling()
        if trained and self.waits:
            self._catch_up(weight)
        masked = torch.where(self.mask, weight, 0.0)
        if trained and self.waits and masked.requires_grad:
            self._waiting = True
            masked.register_hook(lambda gradient: self._learn(weight.detach(), gradient))  # type: ignore[no-untyped-call]  # in torch
        return masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight as it is."""
        if not self.mask.numel():
            self.mask = torch.ones_like(weight, dtype=torch.bool)
            if "scores" in self._buffers:
                self.scores = torch.zeros_like(weight)
        return weight

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._ended = False  # the loaded state may lie before it
        super()._load_from_state_dict(*arguments)

    @property
    def waits(self) -> bool:
        """Whether training has to look at numbers on the CPU, to see what is due: until the schedule's end was seen."""
        return self.steps > 0 and not self._ended

    def amount_at(self, step: int) -> float:
        """The share of zeros wanted after so many steps."""
        if step >= self.steps:
            return self.amount
        left = 1 - (step - step % self.every) / self.steps
        return self.amount + (self.start - self.amount) * left ** (3 if self.schedule == "cubic" else 1)

    @torch.no_grad()
    def _learn(self, weight: Tensor, gradient: Tensor) -> None:
        if self._waiting:
            self._waiting = False
            self.step.add_(1).clamp_(max=self.steps)
        if self.by == "movement":
            self.scores -= weight * gradient
        elif self.by == "taylor":
            self.scores += (weight * gradient).square()

    @torch.no_grad()
    def _catch_up(self, weight: Tensor) -> None:
        """Bring the mask to what the schedule wants by now; a second time does nothing."""
        step = int(self.step)
        due = step if step == self.steps else step - step % self.every
        self._ended = due == self.steps
        if due == int(self.updated):
            return
        scores = weight.abs() if self.by == "magnitude" else self.scores
        if self.by != "movement":
            scores = scores.masked_fill(~self.mask, GONE)
        ended = bool(self.pattern) and due == self.steps
        count = 0 if ended else weight.numel() - round(self.amount_at(due) * weight.numel())
        mask = kept(scores, count, self.pattern) & (scores > GONE / 2)
        self.mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # in the weight's order of memory
        self.updated.fill_(due)
        if self.by == "taylor":
            self.scores.zero_()

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take this mask, of the weight's shape; what is False in it stays zero, by movement too."""
        self.mask = mask.clone()
        if "scores" in self._buffers:
            self.scores = torch.zeros_like(mask, dtype=self.scores.dtype).masked_fill(~mask, GONE)

    @torch.no_grad()
    def from_zeros(self, weight: Tensor) -> None:
        """Become the mask of what is not zero in `weight`, for good: a schedule ends here."""
        self.mask = weight.detach() != 0
        self.amount, self.start, self.schedule, self.steps = 0.0, 0.0, "one_shot", 0
        self.every, self.by, self.pattern = 1, "magnitude", ""
        for name in ("step", "updated", "scores"):
            self._buffers.pop(name, None)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; a mask that stays as it is has the defaults."""
        return {
            "amount": self.amount,
            "start": self.start,
            "schedule": self.schedule,
            "steps": self.steps,
            "every": self.every,
            "by": self.by,
            "pattern": self.pattern,
        }

    def extra_repr(self) -> str:
        return f"{self.schedule} to {self.amount:.1%} in {self.steps} steps, {self.by}" if self.steps else ""


@torch.no_grad()
def put_mask(layer: nn.Module, masked: MaskedWeight, mask: Tensor) -> None:
    """Parametrize the weight of a `Conv2d` or `Linear` by `masked`, with this mask, in place of one that it has.

    Raises:
        ValueError: the weight is parametrized by anything else.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not parametrize.is_parametrized(layer, "weight"):
        parametrize.register_parametrization(layer, "weight", masked.to(weight.device))
    chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]  # a ModuleDict, as it is parametrized
    if len(chain) != 1 or not isinstance(chain[0], MaskedWeight):
        kinds = ", ".join(type(part).__name__ for part in chain)
        raise ValueError(f"`layer` has a weight computed by {kinds}, which a mask must not follow.")
    masked.set_mask(mask)
    chain[0] = masked.to(weight.device).train(layer.training)
    if not masked.steps:
        chain.original.copy_(masked(chain.original))


def mask_of(layer: nn.Module) -> MaskedWeight | None:
    """The mask in front of this layer's weight, where there is one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first: Any = next(iter(layer.parametrizations.weight))  # type: ignore[union-attr,arg-type]  # as above
    return first if isinstance(first, MaskedWeight) else None


def kept(scores: Tensor, count: int, pattern: str = "") -> Tensor:
    """True for the `count` largest scores (of equal ones the first); same shape.

    With a `pattern` N:M only those may go that are not among the N largest of their M, and all of these are kept where
    `count` is less than that leaves.
    """
    if pattern:
        scores = torch.where(among_largest(scores, pattern), float("inf"), scores)
        count = max(count, int((scores == float("inf")).sum()))
    flat = scores.detach().flatten()
    if count <= 0 or count >= len(flat):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - count + 1).values
    result = flat > least
    (equal,) = torch.nonzero(flat == least, as_tuple=True)
    result[equal[: count - int(result.sum())]] = True
    return result.view(scores.shape)


def among_largest(scores: Tensor, pattern: str) -> Tensor:
    """With a `pattern` N:M, True for the N largest of every M consecutive input channels (axis 1) at one place."""
    n, m = parsed(pattern)
    last = scores.detach().movedim(1, -1)
    order = last.reshape(-1, m).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return chosen.view(last.shape).movedim(-1, 1)


def parsed(pattern: str) -> tuple[int, int]:
    """N and M of a pattern "N:M".

    Raises:
        ValueError: it does not read so, or N is not below M.
    """
    parts = pattern.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"`pattern` (={pattern!r}) must read N:M, such as 2:4: N of every M weights are left.")
    n, m = map(int, parts)
    if not 1 <= n < m <= 64:
        raise ValueError(
            f"`pattern` (={pattern!r}) must leave at least one of at most 64 weights, and not all of them."
        )
    return n, m
