"""The table of commands, and the one place where a command's errors become words and exit codes.

Commands are named by module path and imported when they are called: `tdmld --help` loads neither
torch nor libp2p nor textual nor transformers (tests/cli/test_help.py).
"""

import difflib
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from tdmld import __version__
from tdmld.cli.exits import Exit
from tdmld.errors import UserError

app = App(
    name="tdmld",
    help="Sell and buy training compute, peer to peer, trusting nobody.",
    help_format="plaintext",
    version=__version__,
    suppress_keyboard_interrupt=False,
)
app.command("tdmld.cli.init:init", name="init", help="Make a node: keys, settings, genesis.")
app.command("tdmld.cli.run:run", name="run", help="Run the node in this terminal.")
app.command("tdmld.cli.status:status", name="status", help="What the node is doing.")
app.command("tdmld.cli.tui:tui", name="tui", help="Watch the node on a dashboard.")
app.command("tdmld.cli.job:app", name="job", help="Submit, follow and fetch training jobs.")
app.command("tdmld.cli.data:app", name="data", help="Make training data of documents.")
app.command("tdmld.cli.wallet:app", name="wallet", help="The owner's money.")
app.command("tdmld.cli.stake:app", name="stake", help="Bind money, validate, unbind it.")
app.command("tdmld.cli.keys:app", name="keys", help="The owner's node keys.")
app.command("tdmld.cli.chain:app", name="chain", help="The chain as this node has it.")
app.command("tdmld.cli.peers:app", name="peers", help="Whom the node is connected to.")
app.command(
    "tdmld.cli.doctor:doctor", name="doctor", help="Whether it can be reached, and why not."
)
app.command("tdmld.cli.light:app", name="light", help="Prove and check without the chain.")
app.command("tdmld.cli.rpc:rpc", name="rpc", help="Call any method of the node.")
app.command("tdmld.cli.devnet:app", name="devnet", help="A network of real nodes on this machine.")
app.command(
    "tdmld.cli.reference:reference",
    name="reference",
    help="Train a job's model in one process, without the network.",
)
app.command("tdmld.cli.evaluate:evaluate", name="evaluate", help="Measure a trained model.")
app.command("tdmld.cli.version:version", name="version", help="What is installed here.")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; whatever it raises on purpose is told on stderr. Bugs keep their trace."""
    try:
        result = app(
            arguments,
            backend="trio",
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except UnknownCommandError as error:
        return _unknown_command(error)
    except CycloptsError as error:
        _tell(str(error), next="the same with --help")
        return Exit.USAGE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: head, less
        _close_stdout()
        return Exit.OK
    except Exception as error:  # the end of every command: known kinds are told, others go on up
        return _explain(error)
    return int(result) if isinstance(result, int) else Exit.OK


def _unknown_command(error: UnknownCommandError) -> int:
    """cyclopts would import every command in order to describe them."""
    group = error.app or app
    name = (error.unused_tokens or ["?"])[0]
    known = [known for known in group if not known.startswith("-")]
    near = difflib.get_close_matches(name, known, n=2)
    chain = " ".join(["tdmld", *(error.command_chain or ())])
    _tell(
        f"there is no command `{chain} {name}`",
        why=f"there are {', '.join(known)}",
        next=f"{chain} {near[0]}" if near else f"{chain} --help",
    )
    return Exit.USAGE


def _explain(error: Exception) -> int:
    """Tell an expected error and give its exit code; raise any other."""
    bare = _unwrap(error)
    if isinstance(bare, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(bare, UserError):
        _tell(bare.what, why=bare.why, next=bare.next)
        return bare.exit_code
    if isinstance(bare, OSError) and bare.strerror:
        where = f"{bare.filename}: " if bare.filename else ""
        _tell(f"{where}{bare.strerror}")
        return Exit.FAILED
    code = _rpc_exit(bare)
    if code is None:
        raise error
    what, _, following = str(bare).partition("; ")
    _tell(what, next=following)
    return code


def _unwrap(error: BaseException) -> BaseException:
    """The one error inside nurseries' groups, if there is just one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _rpc_exit(error: BaseException) -> Exit | None:
    errors = sys.modules.get("tdmld.rpc.errors")
    if errors is None or not isinstance(error, errors.RpcError):
        return None
    if isinstance(error, errors.Unauthorized | errors.Forbidden | errors.Refused):
        return Exit.REFUSED
    if isinstance(error, errors.Unreachable):
        return Exit.UNREACHABLE
    if isinstance(error, errors.NotFound):
        return Exit.NOT_FOUND
    if isinstance(error, errors.InvalidParams):
        return Exit.USAGE
    return Exit.FAILED


def _tell(what: str, *, why: str = "", next: str = "") -> None:
    print(f"tdmld: {UserError(what, why=why, next=next)}", file=sys.stderr, flush=True)


def _close_stdout() -> None:
    """Keep the interpreter from writing to the broken pipe again while it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
