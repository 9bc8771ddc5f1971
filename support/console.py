"""What is printed, and how a command ends: printing never decides over a training. A reader of the paper may skip this
file.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time


class Forgiving:
    """A stream whose writing never fails: a closed pipe, a full disk or a missing console costs the text, nothing else.

    What the console cannot encode is written as backslash escapes.
    """

    def __init__(self, stream):
        self.stream = io.StringIO() if stream is None else stream

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            with contextlib.suppress(OSError, ValueError):
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            pass
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):  # encoding, fileno, ...
        return getattr(self.stream, name)

    def isatty(self):
        try:
            return self.stream.isatty()
        except (OSError, ValueError):
            return False


@contextlib.contextmanager
def forgiving():
    """For a `with` block, standard output and error are forgiving; then they are as before."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Forgiving(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def status(command, rank="0"):
    """Calls a command line's function and returns its exit status; what the user can mend ends in one line and 2."""
    with forgiving():
        try:
            return command()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            no_memory = isinstance(error, MemoryError) or re.search("(allocate|out of) memory", str(error))
            no_home = "home directory" in str(error)  # a path ~nobody/...
            if isinstance(error, RuntimeError) and not (no_memory or no_home):
                raise  # an error of the program
            who = "error" if rank == "0" else f"process {rank}"  # so that "error" is said once
            said = " ".join(str(error).split())[:1000]
            if no_memory:
                said = f"not enough memory; take a smaller network, smaller images or a smaller --batch-size. {said}"
            print(f"{who}: {said.strip()}", file=sys.stderr)
            return 2


def leave(status):
    """Ends the program. All is saved by now, so that a second Ctrl-C is no longer heard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the interpreter would complain when it flushes at its end
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def quoted(path):
    """A path as part of a command that is to be typed, in the shell at hand."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def replace(source, target, seconds=1.0):
    """`os.replace`, tried again for a second where another program (a virus scanner) holds the file for a moment."""
    end = time.monotonic() + seconds
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
