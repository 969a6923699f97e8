"""What the user can mend is raised as InputError: one line that names the file, line or flag, and what to do."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input from the user. Its message is one line and complete; no traceback is needed to understand it."""


def run(main: Callable[[], None]) -> None:
    """Calls a command's main function; an InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
