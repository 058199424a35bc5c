"""Work for processes that need nothing of ours."""

import os
import signal


def die_or_not(config, shared):
    """Stands for a run: the one named `bad` takes its process with it."""
    if config == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
