"""RFC 9381, appendix B.3, and what a forger may send."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain import vrf
from tdmld.chain.crypto import KeyPair

EXAMPLES = {
    16: (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "8657106690b5526245a92b003bb079ccd1a92130477671f6fc01ad16f26f723f26f8a57ccaed74ee1b190bed"
        "1f479d9727d2d0f9b005a6e456a35d4fb0daab1268a1b0db10836d9826a528ca76567805",
        "90cf1df3b703cce59e2a35b925d411164068269d7b2d29f3301c03dd757876ff66b71dda49d2de59d0345045"
        "1af026798e8f81cd2e333de5cdf4f3e140fdd8ae",
    ),
    17: (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "f3141cd382dc42909d19ec5110469e4feae18300e94f304590abdced48aed5933bf0864a62558b3ed7f2fea4"
        "5c92a465301b3bbf5e3e54ddf2d935be3b67926da3ef39226bbc355bdc9850112c8f4b02",
        "eb4440665d3891d668e7e0fcaf587f1b4bd7fbfe99d0eb2211ccec90496310eb5e33821bc613efb94db5e5b5"
        "4c70a848a0bef4553a41befc57663b56373a5031",
    ),
    18: (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "9bc0f79119cc5604bf02d23b4caede71393cedfbb191434dd016d30177ccbf8096bb474e53895c362d8628ee"
        "9f9ea3c0e52c7a5c691b6c18c9979866568add7a2d41b00b05081ed0f58ee5e31b3a970e",
        "645427e5d00c62a23fb703732fa5d892940935942101e456ecca7bb217c61c452118fec1219202a0edcf038b"
        "b6373241578be7217ba85a2687f7a0310b2df19f",
    ),
}


@pytest.mark.parametrize("number", EXAMPLES)
def test_matches_the_rfc(number: int) -> None:
    seed, public, alpha, proof, output = (bytes.fromhex(text) for text in EXAMPLES[number])
    assert KeyPair(seed).public == public
    assert vrf.prove(seed, alpha) == proof
    assert vrf.verify(public, alpha, proof) == output


KEY = KeyPair(bytes(range(32)))
PROOF = vrf.prove(KEY.seed, b"height 7")


def test_proves_one_input_of_one_key_only() -> None:
    assert vrf.verify(KEY.public, b"height 7", PROOF) is not None
    assert vrf.verify(KEY.public, b"height 8", PROOF) is None
    assert vrf.verify(KeyPair(bytes(32)).public, b"height 7", PROOF) is None


@given(st.integers(0, 79), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_refuses_any_changed_byte(at: int, change: int) -> None:
    bad = bytearray(PROOF)
    bad[at] ^= change
    assert vrf.verify(KEY.public, b"height 7", bytes(bad)) is None


@given(st.binary(max_size=33), st.binary(min_size=70, max_size=90))
@settings(max_examples=60, deadline=None)
def test_refuses_noise_without_raising(public: bytes, proof: bytes) -> None:
    assert vrf.verify(public, b"", proof) is None


@pytest.mark.parametrize(
    "proof",
    [
        PROOF[:32] + bytes(16) + PROOF[48:],
        PROOF[:48] + bytes(32),
        bytes(80),
        b"\x01" + bytes(79),
        PROOF[:48] + b"\xff" * 32,
    ],
    ids=["zero challenge", "zero response", "zeros", "identity", "response above the order"],
)
def test_refuses_degenerate_proofs(proof: bytes) -> None:
    assert vrf.verify(KEY.public, b"height 7", proof) is None


def test_refuses_small_order_keys() -> None:
    assert vrf.verify(b"\x01" + bytes(31), b"", PROOF) is None


def test_a_response_plus_the_order_is_no_second_proof() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    again = (int.from_bytes(PROOF[48:], "little") + order).to_bytes(32, "little")
    assert vrf.verify(KEY.public, b"height 7", PROOF[:48] + again) is None
