"""Flags over environment over tdmld.toml over defaults; what nobody knows is named."""

from pathlib import Path

import pytest

from tdmld.chain.crypto import KeyPair
from tdmld.config import Config, ConfigError, default_data_dir, load_config

PEER = KeyPair(bytes(32)).address


def write(directory: Path, text: str) -> Path:
    (directory / "tdmld.toml").write_text(text)
    return directory


def test_an_empty_directory_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(tmp_path, {}, {}) == Config(data_dir=tmp_path)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, 'log_level = "debug"\nrpc_listen = "127.0.0.1:1"\n[ask]\nprice = 1\nmemory = 5')
    environment = {"TDMLD_RPC_LISTEN": "127.0.0.1:2", "TDMLD_ASK_PRICE": "2", "HOME": "/root"}
    config = load_config(
        tmp_path, {"ask.price": 3, "log_level": None, "launcher": ("nice",)}, environment
    )
    assert (config.log_level, config.rpc_port, config.ask.price, config.ask.memory) == (
        "debug",
        2,
        3,
        5,
    )
    assert config.launcher == ("nice",)
    assert config.ask.standby_slots == 1


def test_the_environment_spells_lists_and_truth(tmp_path: Path) -> None:
    config = load_config(
        tmp_path,
        {},
        {
            "TDMLD_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
            "TDMLD_ASK_ENABLED": "false",
            "TDMLD_LAUNCHER": "nice -n 'a b'",
            "TDMLD_API_INFO": "token:http://127.0.0.1:1",
        },
    )
    assert config.listen == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2")
    assert config.launcher == ("nice", "-n", "a b")
    assert config.ask.enabled is False


def test_peers_are_grouped_by_their_key(tmp_path: Path) -> None:
    peers = (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", f"/dns4/example.org/tcp/2/p2p/{PEER}")
    config = load_config(tmp_path, {"peers": peers}, {})
    assert config.bootstrap() == ((PEER, ("/ip4/127.0.0.1/tcp/1", "/dns4/example.org/tcp/2")),)


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ('lisen = ["x"]', r"tdmld\.toml: unknown key 'lisen'\n  next: did you mean listen"),
        ("[ask]\nprize = 1", r"unknown key 'ask\.prize'\n  next: did you mean ask\.price"),
        ("[nothing]\na = 1", "unknown key 'nothing'"),
        ("ask = 1", "'ask' is a table"),
        ("data_dir = '/x'", "unknown key 'data_dir'"),
        ("listen = 5", r"tdmld\.toml: listen = 5 cannot be used"),
        ("rpc_listen = 5", "rpc_listen = 5 cannot be used"),
        (f"[ask]\nprice = {2**53 + 1}", r"ask\.price = \d+ cannot be used"),
        (f"[ask]\nmemory = {2**50 + 1}", r"ask\.memory = \d+ cannot be used"),
        ("[ask]\nprice = -1", r"ask\.price = -1 cannot be used"),
        ("[ask]\nprice = true", r"ask\.price = True cannot be used"),
        ('log_level = "loud"', "log_level = 'loud' cannot be used"),
        ('listen = ["0.0.0.0:4001"]', "'0.0.0.0:4001' is not an address to listen on"),
        ('listen = ["/ip4/1.2.3.4/tcp/70000"]', "is not an address to listen on"),
        ('carrier_listen = "/ip4/1.2.3.4"', "carrier_listen: .* is not an address"),
        ('peers = ["/ip4/127.0.0.1/tcp/1"]', "is not a peer"),
        ('peers = ["/ip4/127.0.0.1/tcp/1/p2p/Qmabc"]', "is not a peer"),
        ('rpc_listen = "7717"', "is not host:port"),
        ('rpc_listen = "127.0.0.1:99999"', "is not host:port"),
        ('rpc_listen = "0.0.0.0:7717"', "can be reached from other machines"),
        ("a = [", r"tdmld\.toml is not TOML"),
    ],
)
def test_names_what_is_wrong_in_the_file(tmp_path: Path, toml: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        load_config(write(tmp_path, toml), {}, {})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"TDMLD_LISTN": "x"}, "unknown variable TDMLD_LISTN\n  next: did you mean TDMLD_LISTEN"),
        ({"TDMLD_ASK_PRICE": "cheap"}, "environment: TDMLD_ASK_PRICE = 'cheap' cannot be used"),
        ({"TDMLD_LAUNCHER": "'"}, "TDMLD_LAUNCHER cannot be split"),
    ],
)
def test_names_what_is_wrong_in_the_environment(
    tmp_path: Path, environment: dict[str, str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(tmp_path, {}, environment)


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "#" * (1 << 19))
    with pytest.raises(ConfigError, match="more than"):
        load_config(tmp_path, {}, {})
    (tmp_path / "tdmld.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path, {}, {})


def test_the_rpc_may_be_opened_on_purpose(tmp_path: Path) -> None:
    config = load_config(tmp_path, {"rpc_listen": "0.0.0.0:1", "rpc_insecure": True}, {})
    assert (config.rpc_host, config.rpc_port) == ("0.0.0.0", 1)


def test_the_data_directory_follows_the_environment() -> None:
    assert default_data_dir({"TDMLD_DATA_DIR": "/a"}) == Path("/a")
    assert default_data_dir({"XDG_DATA_HOME": "/x"}).name == "tdmld"


def test_what_others_should_dial_is_configured_like_what_is_listened_on(tmp_path: Path) -> None:
    text = "/dns4/home.example.org/tcp/14001"
    config = load_config(tmp_path, {"announce": (text,)}, {"TDMLD_CARRIER_ANNOUNCE": text})
    assert (config.announce, config.carrier_announce) == ((text,), (text,))
    assert (config.mdns, config.upnp, config.relay) == (True, True, True)
    with pytest.raises(ConfigError, match="not an address for others to dial"):
        load_config(tmp_path, {"announce": ("home.example.org:14001",)}, {})
