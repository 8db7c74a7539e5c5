"""Work on a thread of its own while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One piece of work at a time. Its error is raised where it is waited for, and nowhere else.

    The thread does not keep a process alive that ends for another reason.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin the work, once the work before it has ended (whose error it raises)."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work, if there is any, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
