"""The commands by name; exit codes and messages.

0 success; 2 a user's mistake, one message; 130 stopped by Ctrl-C; anything else is a fault of ours
and leaves a traceback (1).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

import typer

from rlalign import __version__
from rlalign.cli import (
    ballots,
    common,
    convert,
    encode,
    evaluate,
    export,
    fit,
    look,
    operate,
    random_model,
    rllib,
    sample,
    serve,
    streams,
    train,
    vote,
)
from rlalign.core.registry import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_WORK = (
    "train",
    "pretrain",
    "fit-reward",
    "sample",
    "serve-reward",
    "vote",
    "rllib",
    "evaluate",
    "export",
    "convert",
    "encode",
    "random-model",
)
"""Commands that are about what they do, and not about what they say."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def rlalign(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    """Aligns diffusion models with rewards and preferences: on one laptop or on a Ray cluster, with
    the same numbers."""
    if version:
        print(f"rlalign {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand in _WORK:
        context.with_resource(streams.go_on_unread())


app.command()(train.train)
app.command()(train.pretrain)
app.command()(fit.fit_reward)
app.command()(sample.sample)
app.command()(serve.serve_reward)
app.command()(vote.vote)
app.command()(ballots.ballots)
app.command()(rllib.rllib)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(convert.convert)
app.command()(encode.encode)
app.command()(random_model.random_model)
app.command("list")(look.list_plugins)
app.command()(look.check)
app.command()(look.schema)
for command in (operate.submit, operate.status, operate.logs, operate.stop, operate.scale):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code. A fault of ours propagates as the exception that it
    is."""
    if arguments is None:
        streams.use_utf8()
    streams.prepare()
    if not sys.stderr.isatty():
        # bars of the libraries that load weights, one line per change in a log
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        _refuse_bytes(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, prog_name="rlalign", standalone_mode=False)
        # a full disk or a closed pipe shows here, not at the interpreter's end
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _refused(str(error))
    except typer.TyperException as error:
        # the command line itself: an unknown command or option, a missing argument
        return _refused(f"{error.format_message()} (rlalign --help says what there is)")
    except KeyboardInterrupt:
        return common.STOPPED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # typer and rich make an exit of a reader who has gone; whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        from rlalign.networks.precision import unrepeatable

        if message := unrepeatable(error):
            return _refused(message)
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _refused(
            f"{place}{os.strerror(error.errno)}; make room or name another folder, and start again"
        )


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """Raises UserError for an argument that is no text, such as a folder's name of another
    encoding."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{argument!r}: names must be UTF-8, and this one is not; give it another name"
            ) from error


def _refused(message: str) -> int:
    # nobody can be told; the code says it
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return 2
