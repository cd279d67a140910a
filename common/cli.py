"""What the four command lines have in common: how a failure reaches the user.

One line on standard error that begins with the command's name, and an exit code from
`common.errors`; 2 for wrong arguments, 130 after Ctrl-C.  Not here: any option or command.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from common.errors import KaError

__all__ = ["run"]

INTERRUPTED = 130


def run(group: click.Group, name: str) -> NoReturn:
    """Run the command line *name* with the process's arguments, and exit."""
    try:
        # Without standalone mode click returns the code of an Exit instead of raising it.
        code = group(standalone_mode=False, prog_name=name) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KaError as error:
        _say(name, str(error))
        sys.exit(error.code.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _say(name, f"{where}{error.strerror or error}")
        sys.exit(1)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _say(name, "interrupted")
        sys.exit(INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else name
        _say(name, f"{error.format_message()} See `{command} --help`.")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _say(name, error.format_message())
        sys.exit(2)
    sys.exit(code)


def _say(name: str, line: str) -> None:
    click.echo(f"{name}: {line}", err=True)
