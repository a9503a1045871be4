"""What every type of the JSON-RPC is made of; see `tdmld.rpc.types` for what the values mean."""

from typing import Annotated

import msgspec

AmountText = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,19}$")]
AddressText = Annotated[
    str, msgspec.Meta(min_length=52, max_length=52, pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]*$")
]
HeightNumber = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that travels over JSON-RPC."""
