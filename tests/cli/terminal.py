"""A terminal for tests: a process of its own on a pseudo-terminal, typed at and looked at."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import gemma2

ROOT = Path(gemma2.__file__).parent.parent
PROMPT = "> "


class Terminal:
    """The command `gemma2` as somebody sees it. `screen` is all that has been shown."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.screen = ""
        self._seen = 0

        def take_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the process

        self.process = subprocess.Popen(
            [sys.executable, "-m", "gemma2", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONIOENCODING": "utf-8",
                "COLUMNS": "80",
                "LINES": "24",
                **environment,
            },
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """Press keys: a newline is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._master, text.encode())

    def ctrl_c(self) -> None:
        """Press Ctrl-C at the prompt.

        Not at once: readline does not notice it between showing the prompt and waiting for a key.
        """
        time.sleep(0.3)
        self.type("\x03")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Give what is shown up to and with the pattern, from where the last one ended."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.S).search(self.screen, self._seen)):
            ready = select.select([self._master], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"no {pattern!r} within {seconds} s; shown is:\n{self.screen}"
            self._read()
        shown = self.screen[self._seen : found.end()]
        self._seen = found.end()
        return shown

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side has been closed
            data = b""
        assert data, f"the process has ended; shown is:\n{self.screen}"
        self.screen += data.decode("utf-8", errors="replace").replace("\r\n", "\n")

    def ask(self, text: str) -> str:
        """Type a message or command at the prompt; give what is shown until the next prompt."""
        self.type(text + "\n")
        self.wait_for("\n")
        return self.wait_for(rf"(?m)^{PROMPT}").removesuffix(PROMPT)

    def ended(self, seconds: float = 60) -> int:
        """Wait for the process; give its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self._read()
                except AssertionError:
                    break
        return self.process.wait(timeout=max(1.0, end - time.monotonic()))

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
