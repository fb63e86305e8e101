"""TensorBoard's record of a run: an event file, written here and now.

torch's SummaryWriter writes in a thread: what fails there is a traceback of that thread, and half a record, behind
which TensorBoard reads nothing any more.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes them
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from megagpt.train.appended import AppendedFile


class EventFile(AppendedFile):
    """One file of a folder's; TensorBoard reads them in the order of their names, which begin with the time."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Begin anew behind start_step done steps: of later ones, earlier files do not count.  Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}")
        begin = SessionLog(status=SessionLog.START)
        self._add([Event(file_version="brain.Event:2"), Event(step=start_step + 1, session_log=begin)])

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Text, for its own tab."""
        self._add([Event(step=step, summary=text(name, markdown))])

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        self._add([Event(step=step, summary=scalar(name, value)) for name, value in values.items()])

    def _add(self, events: Iterable[Event]) -> None:
        record = io.BytesIO()
        writer = RecordWriter(record)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        self.append(record.getvalue())
