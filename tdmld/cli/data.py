"""`tdmld data prepare`: documents into the tokens that a job trains on."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import App, Parameter

from tdmld.cli.common import AsJson, emit
from tdmld.cli.exits import Exit
from tdmld.cli.reference import training_errors
from tdmld.cli.text import size
from tdmld.errors import UserError

app = App(name="data", help="Make training data of documents.", help_format="plaintext")

_PROGRESS_TOKENS = 10_000_000


@app.command
def prepare(
    *sources: Path,
    out: Annotated[Path, Parameter(help="Directory for tokens.bin and manifest.json.")],
    tokenizer: Annotated[
        str, Parameter(help='A Hugging Face tokenizer.json, or "bytes" for one token a byte.')
    ] = "bytes",
    field: Annotated[str, Parameter(help="The field or column that holds the text.")] = "text",
    format: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        Parameter(help="What the files are; by their names if not given."),
    ] = None,
    end: Annotated[
        str, Parameter(help='The token that follows each document, such as "<|endoftext|>".')
    ] = "",
    most: Annotated[
        int | None, Parameter(help="Stop after so many tokens (a job holds 700 MiB).")
    ] = None,
    json: AsJson = False,
) -> int:
    """Make one token file of text files, JSON lines (.jsonl) or parquet files (.parquet).

    A job file names the directory: text = "DIRECTORY" and tokenizer = "tokens" in its table [data].
    The same files, in the same order, with the same options give the same bytes on every machine.
    """
    if not sources:
        raise UserError(
            "no files are named", next="tdmld data prepare --help", exit_code=Exit.USAGE
        )
    if most is not None and most < 1:
        raise UserError("--most is below 1", next="leave it out for all", exit_code=Exit.USAGE)
    from tdmld.train.documents import pieces
    from tdmld.train.prepare import encoder_of
    from tdmld.train.prepare import prepare as run

    told = 0

    def on_progress(tokens: int) -> None:
        nonlocal told
        if tokens - told >= _PROGRESS_TOKENS:
            told = tokens
            print(f"  {tokens:,} tokens", file=sys.stderr, flush=True)

    with training_errors():
        encoder = encoder_of(tokenizer)
        found = run(
            pieces(sources, field, format),
            encoder,
            out,
            end=end,
            most=most,
            on_progress=on_progress,
        )
    document = {"directory": str(out), **msgspec.to_builtins(found)}
    text = [
        f"{out}: {found.tokens:,} tokens of {found.documents:,} documents "
        f"({size(found.text_bytes)} of text), vocabulary {found.vocabulary:,}",
        f'in the job file: [data] text = "{out}", tokenizer = "tokens"; '
        f"vocab_size of the config {found.vocabulary} or more",
    ]
    emit(document, text, as_json=json)
    return Exit.OK
