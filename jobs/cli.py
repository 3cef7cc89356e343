"""The command line: exit code 0 when all is done, 1 when shards failed, 2 for a wrong recipe."""

import errno
import logging
import os
import sys
from typing import NoReturn

import typer

from jobs.commands import cluster, data, look, start, train
from jobs.commands.options import DONE, SOME_FAILED, WRONG_INPUT
from jobs.errors import RunError, UserError

# img2dataset imports albumentations, which asks the network for news unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# What a disk or an account may refuse, through no fault of the code.
_THE_MACHINES = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A list of image URLs in, a cleaned image-caption corpus out. Every command may be killed "
    "and given again: it continues.",
)
for each in (start, data, train, look, cluster):
    app.add_typer(each.commands)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; the entry point of `capfilt`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(args=arguments)
    except UserError as error:
        typer.echo(error, err=True)
        sys.exit(WRONG_INPUT)
    except RunError as error:
        typer.echo(f"{error}; what is committed is safe, the same command continues", err=True)
        sys.exit(SOME_FAILED)
    except OSError as error:
        if error.errno not in _THE_MACHINES:
            raise  # a bug, to be seen whole
        typer.echo(f"{error}; what is committed is safe, the same command continues", err=True)
        sys.exit(SOME_FAILED)
    sys.exit(DONE)
