"""`tdmld rpc CALL [PARAMS]`: any method, for scripts and curiosity."""

import json as jsonlib
from typing import Any

import msgspec

from tdmld.cli.common import DataDir
from tdmld.cli.node import connect


async def rpc(call: str, /, *params: str, data_dir: DataDir = None) -> None:
    """Call a method of the node and print its result as JSON.

    Each of PARAMS is a JSON value, or a word that is taken as text; a single JSON list or object
    is all the params at once. `tdmld rpc rpc.discover` describes every method.

    Parameters
    ----------
    call: The method, such as chain_block.
    params: Its parameters in order, such as 17.
    """
    async with connect(data_dir) as client:
        raw = await client.call_raw(call, _params(params), patience=None)
    print(msgspec.json.format(raw, indent=2).decode(), flush=True)


def _params(words: tuple[str, ...]) -> Any:
    values = [_value(word) for word in words]
    if len(values) == 1 and isinstance(values[0], list | dict):
        return values[0]
    return values


def _value(word: str) -> Any:
    # A hash of digits only, or an amount, is meant as text: ids and amounts are strings here.
    if word.isdigit() and len(word) > 15:
        return word
    try:
        return jsonlib.loads(word)
    except ValueError:
        return word
