"""Shows how far a comparison is: on a terminal a live line, elsewhere a line for each run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from popriskmin.compare.text import brief
from popriskmin.compare.training.runner import Job, Progress
from popriskmin.compare.training.train import Record


class Display(Progress):
    """A bar with the time left on a terminal; a line for each run elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.row: TaskID | None = None
        self.total = self.ended = self.present = 0
        self.began = time.monotonic()

    def __enter__(self) -> Display:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def start(self, total: int, present: int) -> None:
        """Say that of `total` runs `present` are there already."""
        self.total, self.ended, self.present, self.began = total, present, present, time.monotonic()
        kept = f", {present} of them kept from before" if present else ""
        self.console.print(f"{total} runs{kept}", highlight=False)
        self.row = self.bar.add_task("training", total=total, completed=present, left="")

    def done(self, job: Job, records: list[Record]) -> None:
        """Say that a run has ended, and how long the others will take at this pace."""
        self.ended += 1
        left = self.time_left()
        end = records[-1]
        if self.row is not None:
            self.bar.update(self.row, completed=self.ended, left=left)
        if not self.console.is_terminal or end["status"] != "finished":
            line = f"[{self.ended}/{self.total}] {job}: {end['status']}, {end['seconds']:.1f} s"
            self.console.print(f"{line}, {left}", highlight=False, markup=False, soft_wrap=True)
        if end["status"] == "failed":
            self.console.print(brief(end["error"]), style="red", markup=False, soft_wrap=True)

    def time_left(self) -> str:
        """Return in words the time that the remaining runs take at the pace so far."""
        made = self.ended - self.present
        if made == 0:
            return ""
        seconds = (time.monotonic() - self.began) / made * (self.total - self.ended)
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left"
