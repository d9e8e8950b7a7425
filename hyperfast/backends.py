"""Which implementation of an operation runs, and why.

Every operation has several implementations: plain PyTorch (`REFERENCE`), C++ for the processor (`CPU`), Triton and
CUDA C++. Under `AUTO` the first one that supports the arguments is taken. A backend chosen by name never falls back:
where it cannot run, it raises and says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Backend(str, Enum):
    """An implementation family of the operations."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"

    @classmethod
    def parse(cls, name: str | Backend) -> Backend:
        """The backend called `name`; `ValueError` names the choices."""
        try:
            return cls(name.lower())
        except (ValueError, AttributeError):
            choices = ", ".join(backend.value for backend in cls)
            raise ValueError(f"unknown backend {name!r}; choose one of {choices}") from None


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run this operation on these arguments."""


# A plain module global: torch.compile guards on it, a ContextVar would break the graph.
_selected: Backend = Backend.parse(os.environ.get("HYPERFAST_BACKEND") or Backend.AUTO)


def current_backend() -> Backend:
    """The backend in force: `use_backend`, else `HYPERFAST_BACKEND`, else `AUTO`."""
    return _selected


@contextlib.contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Run every hyperfast operation inside the `with` block on `backend`, or raise where that is not possible.

    Example:
        >>> with hyperfast.use_backend("reference"):
        ...     logits = student(x)
    """
    global _selected
    previous, _selected = _selected, Backend.parse(backend)
    try:
        yield
    finally:
        _selected = previous


def _anything(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        backend: the family it belongs to.
        run: called with the operation's arguments.
        supports: called with the same arguments; `None` where they can be run, else the reason they cannot.
            Default: it runs everything, as a reference does.
    """

    backend: Backend
    run: Callable[..., Any]
    supports: Callable[..., str | None] = _anything


@dataclass(frozen=True)
class Decision:
    """What `AUTO` or an explicit choice came to for one call of one operation."""

    operation: str
    chosen: Backend
    refused: tuple[tuple[Backend, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.chosen.value}"]
        lines += [f"    not {backend.value}: {reason}" for backend, reason in self.refused]
        return "\n".join(lines)


@dataclass
class Explanation:
    """The decisions taken while a function ran; prints as a table."""

    decisions: list[Decision] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.decisions:
            return "no hyperfast operation was called"
        return "\n".join(dict.fromkeys(str(decision) for decision in self.decisions))


_listening: list[Explanation] = []


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call `function` once and report which backend each hyperfast operation in it ran on, and why not another.

    Example:
        >>> print(hyperfast.explain(student, x))
        generate: cpu
            not cuda: the tensors are on cpu
    """
    explanation = Explanation()
    _listening.append(explanation)
    try:
        function(*args, **kwargs)
    finally:
        _listening.remove(explanation)
    return explanation


class Dispatcher:
    """Runs an operation on the first implementation that supports its arguments, in the order given."""

    def __init__(self, operation: str, implementations: Sequence[Implementation]) -> None:
        self.operation = self.__name__ = operation
        self.implementations = tuple(implementations)

    def __call__(self, *args: Any) -> Any:
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Implementation:
        """The implementation that runs `args`; `BackendUnavailable` with every reason where there is none."""
        wanted = current_backend()
        refused: list[tuple[Backend, str]] = []
        for implementation in self.implementations:
            if wanted not in (Backend.AUTO, implementation.backend):
                continue
            reason = implementation.supports(*args)
            if reason is None:
                for explanation in _listening:
                    explanation.decisions.append(Decision(self.operation, implementation.backend, tuple(refused)))
                return implementation
            if (implementation.backend, reason) not in refused:  # two of one family may say the same
                refused.append((implementation.backend, reason))
        if not refused:
            refused.append((wanted, "there is no such implementation of this operation"))
        reasons = "; ".join(f"{backend.value}: {reason}" for backend, reason in refused)
        raise BackendUnavailable(
            f"{self.operation} cannot run on backend {wanted.value!r} ({reasons}). "
            "Use use_backend('auto') to let hyperfast choose."
        )
