"""Watch over a training loop: what it is told, and when."""

from typing import Any


class Watch:
    """Observer of a training loop, which does nothing here; what a method raises ends the run."""

    def begin(self, step: int) -> None:
        """Called before the first step and before anything is written; step: that it is after."""

    def compiled(self, seconds: float) -> None:
        """Called when the step is compiled, which took so many seconds; after packing again."""

    def step(self, step: int, loss: float) -> None:
        """Called when a step is computed."""

    def write(self, step: int) -> None:
        """Called before the metrics of a step are written."""

    def save(self, step: int) -> None:
        """Called before a checkpoint is written."""

    def saved(self, step: int, state: Any) -> None:
        """Called with the state, once a checkpoint is on disk or will be by a background thread."""
