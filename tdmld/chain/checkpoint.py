"""A trusted block: what a node or a light client takes from outside the chain."""

from dataclasses import dataclass

from tdmld.chain.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A block that its owner trusts: the chain must have this id at this height."""

    height: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.height}:{self.hash.hex()}"


def parse_checkpoint(text: str) -> Checkpoint:
    """HEIGHT:HASH; DecodeError when it is not."""
    height, _, digest = text.partition(":")
    try:
        if not (height.isascii() and height.isdigit()) or len(height) > 18 or int(height) == 0:
            raise ValueError("HEIGHT is a positive number")
        if len(digest) != 64:
            raise ValueError("HASH has 64 hex digits")
        return Checkpoint(int(height), bytes.fromhex(digest))
    except ValueError as error:
        raise DecodeError(str(error)) from error
