"""A node's configuration: flags over TDMLD_* environment over tdmld.toml over defaults.

`Config` is the whole list of what can be set. A key `rpc_listen` is the flag --rpc-listen, the
variable TDMLD_RPC_LISTEN and the line `rpc_listen = ...`; a key of the table [ask] such as `price`
is --ask-price, TDMLD_ASK_PRICE and `price = ...` below [ask]. Lists are separated by commas in the
environment. Whatever nobody knows is an error that names itself, wherever it stands.
"""

import difflib
import ipaddress
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tdmld.chain import limits
from tdmld.chain.checkpoint import Checkpoint, parse_checkpoint
from tdmld.chain.crypto import public_key
from tdmld.chain.errors import DecodeError
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file

CONFIG_FILE = "tdmld.toml"
_FILE_BYTES_MAX = 1 << 18
_PREFIX = "TDMLD_"
_OTHER_VARIABLES = frozenset({"TDMLD_DATA_DIR", "TDMLD_API_INFO", "TDMLD_PASSWORD_FILE"})
"""Ours, but not configuration of a node: where it is, how to reach it, where a password is."""

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Slots = Annotated[int, msgspec.Meta(ge=0, le=limits.AUDIT_CAPACITY)]
_Price = Annotated[int, msgspec.Meta(ge=0, le=limits.PRICE)]
_Device = Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda:[0-9]{1,2})$")]
_Memory = Annotated[int, msgspec.Meta(ge=0, le=limits.MEMORY_BYTES)]

_LISTEN = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/\d{1,5}")
_PEER = re.compile(rf"({_LISTEN.pattern})/p2p/([1-9A-HJ-NP-Za-km-z]+)")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ConfigError(UserError):
    """Configuration that cannot be used; names the key and where it stands."""

    def __init__(self, what: str, *, why: str = "", next: str = "") -> None:
        super().__init__(what, why=why, next=next, exit_code=2)


class AskConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this node offers on the market. `tdmld.toml`: the table [ask]."""

    enabled: bool = True
    """Whether the node asks for work at all."""
    price: _Price = 1000
    """Smallest price: units for 10^6 parameters times 10^3 tokens."""
    memory: _Memory = 2 << 30
    """Bytes that a slot of this node may use."""
    audit_capacity: _Slots = 1
    """Audits it does at a time."""
    standby_slots: _Slots = 1
    """Slots that it stands by for at a time."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set about a node."""

    data_dir: Path
    """The node's directory (docs: ANNEX A8); absolute."""
    listen: tuple[_Text, ...] = ("/ip4/127.0.0.1/tcp/0",)
    """Multiaddrs of the daemon."""
    carrier_listen: _Text = "/ip4/127.0.0.1/tcp/0"
    """Multiaddr of the carrier: tensors and contents."""
    announce: tuple[_Text, ...] = ()
    """Multiaddrs at which others reach the daemon, such as those of a forwarded port."""
    carrier_announce: tuple[_Text, ...] = ()
    """The same for the carrier."""
    mdns: bool = True
    """Find other nodes on the local network, and be found; nothing on loopback addresses."""
    upnp: bool = True
    """Ask the router to forward the ports; nothing on loopback addresses."""
    relay: bool = True
    """Carry the connections of nodes that cannot be reached, when this one can."""
    rpc_listen: _Text = "127.0.0.1:7717"
    """host:port of the JSON-RPC server; port 0: any free one, written to run/rpc.url."""
    rpc_insecure: bool = False
    """Allow rpc_listen on an address that other machines reach, without TLS."""
    peers: tuple[_Text, ...] = ()
    """Daemons to dial first: multiaddr/p2p/<address>."""
    deny: tuple[_Text, ...] = ()
    """Peer ids and IP networks that may not connect, and are not dialled."""
    launcher: tuple[_Text, ...] = ()
    """Words put before the command line of what workers are forked from, such as
    ["nice", "-n", "5"]."""
    worker_memory: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    """Bytes of private memory that a worker may have; 0: as many as it can get."""
    device: _Device = "cpu"
    """Where workers compute: "cpu", or "cuda:<number>" for a GPU by its place on the PCI bus."""
    sync: Literal["blocks", "snapshot"] = "blocks"
    """How an empty node begins: by executing every block, or with a recent state from a peer."""
    checkpoint: str = ""
    """HEIGHT:HASH of a block that you trust; a chain that has another one there is refused."""
    keep_blocks: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    """Blocks to keep, at least those of the unbonding period; 0: all."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ask: AskConfig = AskConfig()

    @property
    def trusted(self) -> Checkpoint | None:
        """`checkpoint` as a value."""
        return parse_checkpoint(self.checkpoint) if self.checkpoint else None

    @property
    def rpc_host(self) -> str:
        return self.rpc_listen.rpartition(":")[0].strip("[]")

    @property
    def rpc_port(self) -> int:
        return int(self.rpc_listen.rpartition(":")[2])

    def bootstrap(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """`peers` as (peer id, multiaddrs without /p2p/), one entry a peer."""
        found: dict[str, list[str]] = {}
        for text in self.peers:
            address, _, peer_id = text.partition("/p2p/")
            found.setdefault(peer_id, []).append(address)
        return tuple((peer_id, tuple(addresses)) for peer_id, addresses in found.items())


def default_data_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """TDMLD_DATA_DIR, else the user's data directory of the platform."""
    if chosen := environment.get("TDMLD_DATA_DIR"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tdmld"
    base = environment.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "tdmld"


def load_config(
    data_dir: Path,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """The configuration of the node in `data_dir`.

    `flags` maps keys (`"rpc_listen"`, `"ask.price"`) to what was given on the command line; None
    means not given. ConfigError names the source and the key.
    """
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    file = data_dir / CONFIG_FILE
    for source, pairs in (
        (str(file), _from_file(file)),
        ("environment", _from_environment(environment)),
        ("command line", _given(flags or {})),
    ):
        for key, (name, value) in pairs.items():
            values[key] = value
            origin[key] = f"{source}: {name}"
    converted = {key: _convert(key, value, origin[key]) for key, value in values.items()}
    ask = {key[4:]: value for key, value in converted.items() if key.startswith("ask.")}
    plain = {key: value for key, value in converted.items() if not key.startswith("ask.")}
    config = Config(data_dir=data_dir.absolute(), ask=AskConfig(**ask), **plain)
    _check(config, origin)
    return config


def config_toml(values: Mapping[str, object]) -> str:
    """`values` (keys as for `load_config`'s flags) as the text of a tdmld.toml."""
    plain = [(key, value) for key, value in values.items() if "." not in key]
    ask = [(key[4:], value) for key, value in values.items() if key.startswith("ask.")]
    # JSON's strings, integers, truth values and lists of strings are TOML's, too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain]
    if ask:
        lines += ["", "[ask]", *(f"{key} = {json.dumps(value)}" for key, value in ask)]
    return "\n".join(lines) + "\n"


def default_settings() -> dict[str, object]:
    """Every key with its default, in the order of the documentation."""
    plain = Config(data_dir=Path("/"))
    return {
        key: getattr(plain.ask, key[4:]) if key.startswith("ask.") else getattr(plain, key)
        for key in _KEYS
    }


def _keys() -> dict[str, Any]:
    """Every key with its type."""
    of_config = {f.name: f.type for f in msgspec.structs.fields(Config)}
    of_ask = {f"ask.{f.name}": f.type for f in msgspec.structs.fields(AskConfig)}
    return {k: v for k, v in of_config.items() if k not in ("data_dir", "ask")} | of_ask


_KEYS = _keys()
_VARIABLES = {_PREFIX + key.replace(".", "_").upper(): key for key in _KEYS}

_LISTS = ("listen", "announce", "carrier_announce", "peers", "deny")

_Pairs = dict[str, tuple[str, object]]
"""key -> (how the source spells it, value)"""


def _from_file(path: Path) -> _Pairs:
    try:
        table = tomllib.loads(read_file(path, _FILE_BYTES_MAX).decode())
    except FileNotFoundError:
        return {}
    except FileTooLarge as error:
        raise ConfigError(str(error), next="remove what does not belong there") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", why=os.strerror(error.errno or 0)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML", why=str(error), next="mend that line") from error
    return {key: (key, value) for key, value in _flatten(path, table)}


def _flatten(path: Path, table: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if key == "ask" and isinstance(value, dict):
            yield from ((f"ask.{inner}", inside) for inner, inside in value.items())
        else:
            yield key, value
    known = [f"ask.{k}" for k in _nested(table)] + [k for k in table if k != "ask"]
    for key in known:
        if key not in _KEYS:
            raise _unknown(f"{path}: unknown key {key!r}", key, _KEYS)
    if "ask" in table and not isinstance(table["ask"], dict):
        raise ConfigError(f"{path}: 'ask' is a table", next="write it as [ask]")


def _nested(table: Mapping[str, object]) -> list[str]:
    ask = table.get("ask")
    return list(ask) if isinstance(ask, dict) else []


def _from_environment(environment: Mapping[str, str]) -> _Pairs:
    found: _Pairs = {}
    for name, text in environment.items():
        if not name.startswith(_PREFIX) or name in _OTHER_VARIABLES:
            continue
        key = _VARIABLES.get(name)
        if key is None:
            raise _unknown(
                f"environment: unknown variable {name}", name, [*_VARIABLES, *_OTHER_VARIABLES]
            )
        found[key] = (name, text)
    return found


def _given(flags: Mapping[str, object]) -> _Pairs:
    for key in flags:
        if key not in _KEYS:
            raise _unknown(f"unknown option {key!r}", key, _KEYS)
    return {
        key: ("--" + key.replace(".", "-").replace("_", "-"), value)
        for key, value in flags.items()
        if value is not None
    }


def _unknown(what: str, name: str, known: Any) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return ConfigError(
        what,
        next=f"did you mean {' or '.join(near)}?" if near else "remove it",
    )


def _convert(key: str, value: object, origin: str) -> Any:
    kind = _KEYS[key]
    if isinstance(value, str) and key == "launcher":
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise ConfigError(f"{origin} cannot be split into words", why=str(error)) from error
    elif isinstance(value, str) and key in _LISTS:
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        # From TOML types must be right; the environment and the command line have only text.
        return msgspec.convert(value, kind, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin} = {value!r} cannot be used", why=str(error)) from error


def _check(config: Config, origin: Mapping[str, str]) -> None:
    """What a type cannot say."""
    for key, texts, purpose, example in (
        ("listen", config.listen, "to listen on", "/ip4/0.0.0.0/tcp/4001"),
        ("carrier_listen", (config.carrier_listen,), "to listen on", "/ip4/0.0.0.0/tcp/4002"),
        ("announce", config.announce, "for others to dial", "/ip4/1.2.3.4/tcp/4001"),
        (
            "carrier_announce",
            config.carrier_announce,
            "for others to dial",
            "/ip4/1.2.3.4/tcp/4002",
        ),
    ):
        for text in texts:
            if not _LISTEN.fullmatch(text) or int(text.rpartition("/")[2]) > 65535:
                raise ConfigError(
                    f"{origin[key]}: {text!r} is not an address {purpose}",
                    next=f"write it like {example}",
                )
    for text in config.peers:
        match = _PEER.fullmatch(text)
        try:
            if match is None:
                raise DecodeError("it does not read /ip4/<address>/tcp/<port>/p2p/<peer id>")
            public_key(match[3])
        except DecodeError as error:
            raise ConfigError(
                f"{origin['peers']}: {text!r} is not a peer", why=str(error)
            ) from error
    for text in config.deny:
        if not _is_network(text) and not _is_peer_id(text):
            raise ConfigError(
                f"{origin['deny']}: {text!r} is neither a peer id nor an IP network",
                next="write it like 192.0.2.0/24, 2001:db8::/32 or 12D3Koo...",
            )
    try:
        _ = config.trusted
    except DecodeError as error:
        raise ConfigError(
            f"{origin['checkpoint']}: {config.checkpoint!r} is no checkpoint",
            why=str(error),
            next="write it as HEIGHT:HASH, such as tdmld rpc chain_head prints them",
        ) from error
    host, colon, port = config.rpc_listen.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(
            f"{origin['rpc_listen']}: {config.rpc_listen!r} is not host:port",
            next="write it like 127.0.0.1:7717",
        )
    if config.rpc_host not in _LOOPBACK and not config.rpc_insecure:
        raise ConfigError(
            f"{origin['rpc_listen']}: {config.rpc_listen} can be reached from other machines",
            why="the token would travel unencrypted",
            next="listen on 127.0.0.1 and use a tunnel, or accept the risk with --rpc-insecure",
        )


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_peer_id(text: str) -> bool:
    try:
        public_key(text)
    except DecodeError:
        return False
    return True
