"""The command line `gdpd`: reads options, calls the library, and turns what goes wrong into one line.

Exit codes: 0 done, 1 some runs of a grid failed, 2 bad input, 130 interrupted. Nothing heavy is imported before
a command needs it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: `sys.argv[1:]`) and return the exit code.

    What the caller can mend (a bad value, a missing file, a full disk) becomes one line on stderr and exit code 2.
    GDPD_TRACEBACK=1 in the environment shows the traceback instead. Warnings are one line each, too.
    """
    try:
        import typer
    except ImportError:
        return _say('the command needs typer, which is not installed: pip install "gdpd-kernels[cli]"', 2)
    from gdpd.cli.app import app

    usage_error: Any = typer.BadParameter.__mro__[1]  # click's class, which some releases of typer carry along
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = app(args=given, prog_name="gdpd", standalone_mode=False)
        if code != _INTERRUPTED:  # typer's own answer to the interrupt key
            return code if isinstance(code, int) else 0
        raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        hint = "`gdpd distill --resume` goes on from the last checkpoint, `gdpd grid` and `gdpd demo` by themselves"
        return _say(f"interrupted; {hint}", _INTERRUPTED)
    except usage_error as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _say(error.format_message().rstrip(".") + hint, 2)
    except Exception as error:
        if os.environ.get("GDPD_TRACEBACK") == "1" or not _mendable(error):
            raise
        return _say(_told(error), 2)


def _mendable(error: Exception) -> bool:
    # Values, files and missing extras are the caller's to mend, and so is what the library has a class of its own
    # for. Anything else is a defect of the library and keeps its traceback.
    own = type(error).__module__.split(".")[0] in ("gdpd", "gdpd_kernels")
    return own or isinstance(error, (ValueError, OSError, ImportError))


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # in place of [Errno 2] and a file in quotes at the end
    return str(error) or type(error).__name__


def _say(message: str, code: int) -> int:
    print(f"gdpd: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    if issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        return  # for the developers of what is called, not for whoever runs a command
    print(f"gdpd: warning: {' '.join(str(message).split())}", file=sys.stderr)
