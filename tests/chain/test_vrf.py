"""BEACON-2, BEACON-4: the vectors of RFC 9381, appendix B.3, uniqueness, what a forger may send."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import (
    crypto_core_ed25519_add,
    crypto_core_ed25519_scalar_add,
    crypto_core_ed25519_scalar_mul,
    crypto_core_ed25519_scalar_reduce,
    crypto_scalarmult_ed25519_base_noclamp,
    crypto_scalarmult_ed25519_noclamp,
)

from tdmld.chain import vrf
from tdmld.chain.crypto import KeyPair

ORDER = 2**252 + 27742317777372353535851937790883648493
FIELD = 2**255 - 19
IDENTITY = b"\x01" + bytes(31)

EXAMPLES = {
    16: {
        "SK": "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "PK": "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "alpha": "",
        "x": "307c83864f2833cb427a2ef1c00a013cfdff2768d980c0a3a520f006904de94f",
        "ctr": "00",
        "H": "91bbed02a99461df1ad4c6564a5f5d829d0b90cfc7903e7a5797bd658abf3318",
        "k_string": "7100f3d9eadb6dc4743b029736ff283f5be494128df128df2817106f345b8594"
        "b6d6da2d6fb0b4c0257eb337675d96eab49cf39e66cc2c9547c2bf8b2a6afae4",
        "k": "8a49edbd1492a8ee09766befe50a7d563051bf3406cbffc20a88def030730f0f",
        "U": "aef27c725be964c6a9bf4c45ca8e35df258c1878b838f37d9975523f09034071",
        "V": "5016572f71466c646c119443455d6cb9b952f07d060ec8286d678615d55f954f",
        "pi": "8657106690b5526245a92b003bb079ccd1a92130477671f6fc01ad16f26f723f"
        "26f8a57ccaed74ee1b190bed1f479d97"
        "27d2d0f9b005a6e456a35d4fb0daab1268a1b0db10836d9826a528ca76567805",
        "beta": "90cf1df3b703cce59e2a35b925d411164068269d7b2d29f3301c03dd757876ff"
        "66b71dda49d2de59d03450451af026798e8f81cd2e333de5cdf4f3e140fdd8ae",
    },
    17: {
        "SK": "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "PK": "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "alpha": "72",
        "x": "68bd9ed75882d52815a97585caf4790a7f6c6b3b7f821c5e259a24b02e502e51",
        "ctr": "01",
        "H": "5b659fc3d4e9263fd9a4ed1d022d75eaacc20df5e09f9ea937502396598dc551",
        "k_string": "42589bbf0c485c3c91c1621bb4bfe04aed7be76ee48f9b00793b2342acb9c167"
        "cab856f9f9d4febc311330c20b0a8afd3743d05433e8be8d32522ecdc16cc5ce",
        "k": "d8c3a66921444cb3427d5d989f9b315aa8ca3375e9ec4d52207711a1fdb44107",
        "U": "1dcb0a4821a2c48bf53548228b7f170962988f6d12f5439f31987ef41f034ab3",
        "V": "fd03c0bf498c752161bae4719105a074630a2aa5f200ff7b3995f7bfb1513423",
        "pi": "f3141cd382dc42909d19ec5110469e4feae18300e94f304590abdced48aed593"
        "3bf0864a62558b3ed7f2fea45c92a465"
        "301b3bbf5e3e54ddf2d935be3b67926da3ef39226bbc355bdc9850112c8f4b02",
        "beta": "eb4440665d3891d668e7e0fcaf587f1b4bd7fbfe99d0eb2211ccec90496310eb"
        "5e33821bc613efb94db5e5b54c70a848a0bef4553a41befc57663b56373a5031",
    },
    18: {
        "SK": "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "PK": "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "alpha": "af82",
        "x": "909a8b755ed902849023a55b15c23d11ba4d7f4ec5c2f51b1325a181991ea95c",
        "ctr": "00",
        "H": "bf4339376f5542811de615e3313d2b36f6f53c0acfebb482159711201192576a",
        "k_string": "38b868c335ccda94a088428cbf3ec8bc7955bfaffe1f3bd2aa2c59fc31a0febc"
        "59d0e1af3715773ce11b3bbdd7aba8e3505d4b9de6f7e4a96e67e0d6bb6d6c3a",
        "k": "5ffdbc72135d936014e8ab708585fda379405542b07e3bd2c0bd48437fbac60a",
        "U": "2bae73e15a64042fcebf062abe7e432b2eca6744f3e8265bc38e009cd577ecd5",
        "V": "88cba1cb0d4f9b649d9a86026b69de076724a93a65c349c988954f0961c5d506",
        "pi": "9bc0f79119cc5604bf02d23b4caede71393cedfbb191434dd016d30177ccbf80"
        "96bb474e53895c362d8628ee9f9ea3c0"
        "e52c7a5c691b6c18c9979866568add7a2d41b00b05081ed0f58ee5e31b3a970e",
        "beta": "645427e5d00c62a23fb703732fa5d892940935942101e456ecca7bb217c61c45"
        "2118fec1219202a0edcf038bb6373241578be7217ba85a2687f7a0310b2df19f",
    },
}
"""All of B.3, the vectors of ECVRF-EDWARDS25519-SHA512-TAI, under the RFC's names."""

ELL2_PROOF = bytes.fromhex(
    "7d9c633ffeee27349264cf5c667579fc583b4bda63ab71d001f89c10003ab46f"
    "14adf9a3cd8b8412d9038531e865c341"
    "cafa73589b023d14311c331a9ad15ff2fb37831e00f0acaa6d73bc9997b06501"
)
"""Example 19, appendix B.4: the key and the input of example 16 in the suite of Elligator 2."""


def hexed(number: int) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in EXAMPLES[number].items()}


@pytest.mark.parametrize("number", EXAMPLES)
def test_matches_the_rfc(number: int) -> None:
    row = hexed(number)
    assert KeyPair(row["SK"]).public == row["PK"]
    assert vrf.prove(row["SK"], row["alpha"]) == row["pi"]
    assert vrf.verify(row["PK"], row["alpha"], row["pi"]) == row["beta"]


@pytest.mark.parametrize("number", EXAMPLES)
def test_matches_the_rfc_at_every_step(number: int) -> None:
    row = hexed(number)
    secret, prefix = vrf._scalar(row["SK"])
    assert secret == crypto_core_ed25519_scalar_reduce(row["x"] + bytes(32))
    assert vrf._to_curve(row["PK"], row["alpha"]) == row["H"]
    assert vrf._hash(prefix, row["H"]) == row["k_string"]
    assert crypto_core_ed25519_scalar_reduce(row["k_string"]) == row["k"]
    assert crypto_scalarmult_ed25519_base_noclamp(row["k"]) == row["U"]
    assert crypto_scalarmult_ed25519_noclamp(row["k"], row["H"]) == row["V"]
    gamma, challenge = row["pi"][:32], row["pi"][32:48]
    assert crypto_scalarmult_ed25519_noclamp(secret, row["H"]) == gamma
    assert vrf._challenge(row["PK"], row["H"], gamma, row["U"], row["V"]) == challenge
    assert vrf._output(gamma) == row["beta"]


@pytest.mark.parametrize("number", EXAMPLES)
def test_tries_and_increments_as_often_as_the_rfc(number: int) -> None:
    row = hexed(number)
    for counter in range(row["ctr"][0] + 1):
        candidate = vrf._hash(b"\x03\x01", row["PK"], row["alpha"], bytes([counter, 0]))[:32]
        try:
            point = vrf._times_cofactor(candidate)
        except vrf._REFUSED:
            point = b""
        assert (point == row["H"]) is (counter == row["ctr"][0])


def test_a_proof_of_another_suite_shows_nothing() -> None:
    row = hexed(16)
    assert vrf.verify(row["PK"], row["alpha"], ELL2_PROOF) is None


# ---- uniqueness: one output for a key and an input, whatever its holder tries ------------------

KEY = KeyPair(bytes(range(32)))
ALPHA = b"height 7"
PROOF = vrf.prove(KEY.seed, ALPHA)
OUTPUT = vrf.verify(KEY.public, ALPHA, PROOF)


def prove_freely(
    nonce: bytes, gamma: bytes, public: bytes = KEY.public, secret: bytes | None = None
) -> bytes:
    """What somebody with the secret key can sign: any nonce, any Gamma, an honest challenge."""
    point = vrf._to_curve(public, ALPHA)
    challenge = vrf._challenge(
        public,
        point,
        gamma,
        crypto_scalarmult_ed25519_base_noclamp(nonce),
        crypto_scalarmult_ed25519_noclamp(nonce, point),
    )
    known = vrf._scalar(KEY.seed)[0] if secret is None else secret
    product = crypto_core_ed25519_scalar_mul(challenge + bytes(16), known)
    return gamma + challenge + bytes(crypto_core_ed25519_scalar_add(nonce, product))


scalars = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32, "little"))


@given(scalars)
@settings(max_examples=25, deadline=None)
def test_another_nonce_gives_another_proof_and_the_same_output(nonce: bytes) -> None:
    other = prove_freely(nonce, PROOF[:32])
    assert other != PROOF
    assert vrf.verify(KEY.public, ALPHA, other) == OUTPUT


@given(scalars, scalars)
@settings(max_examples=25, deadline=None)
def test_the_holder_of_the_key_cannot_prove_another_point(nonce: bytes, factor: bytes) -> None:
    gamma = crypto_scalarmult_ed25519_noclamp(factor, vrf._to_curve(KEY.public, ALPHA))
    assert vrf.verify(KEY.public, ALPHA, prove_freely(nonce, gamma)) is None


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80))
@settings(max_examples=25, deadline=None)
def test_any_key_proves_any_input_alike_each_time(seed: bytes, alpha: bytes) -> None:
    proof = vrf.prove(seed, alpha)
    assert proof == vrf.prove(seed, alpha)
    output = vrf.verify(KeyPair(seed).public, alpha, proof)
    assert output is not None
    assert (len(proof), len(output)) == (vrf.PROOF_BYTES, vrf.OUTPUT_BYTES)
    assert vrf.verify(KeyPair(seed).public, alpha + b"\0", proof) is None


def test_proves_one_input_of_one_key_only() -> None:
    assert OUTPUT is not None
    assert vrf.verify(KEY.public, b"height 8", PROOF) is None
    assert vrf.verify(KeyPair(bytes(32)).public, ALPHA, PROOF) is None


# ---- what a forger may send --------------------------------------------------------------------


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_refuses_every_flipped_bit() -> None:
    for bit in range(8 * len(PROOF)):
        assert vrf.verify(KEY.public, ALPHA, flipped(PROOF, bit)) is None, bit
    for bit in range(8 * len(KEY.public)):
        assert vrf.verify(flipped(KEY.public, bit), ALPHA, PROOF) is None, bit
    for bit in range(8 * len(ALPHA)):
        assert vrf.verify(KEY.public, flipped(ALPHA, bit), PROOF) is None, bit


@given(st.binary(max_size=33), st.binary(min_size=70, max_size=90))
@settings(max_examples=60, deadline=None)
def test_refuses_noise_without_raising(public: bytes, proof: bytes) -> None:
    assert vrf.verify(public, b"", proof) is None


@pytest.mark.parametrize("length", [0, 1, 79, 81, 160])
def test_refuses_another_length(length: int) -> None:
    assert vrf.verify(KEY.public, ALPHA, (PROOF + PROOF)[:length]) is None
    assert vrf.verify(KEY.public[:31], ALPHA, PROOF) is None
    assert vrf.verify(KEY.public + b"\0", ALPHA, PROOF) is None


@pytest.mark.parametrize(
    "proof",
    [
        PROOF[:32] + bytes(16) + PROOF[48:],
        PROOF[:48] + bytes(32),
        bytes(80),
        IDENTITY + bytes(48),
        PROOF[:48] + b"\xff" * 32,
        PROOF[:48] + ORDER.to_bytes(32, "little"),
    ],
    ids=["zero challenge", "zero response", "zeros", "identity", "response too high", "the order"],
)
def test_refuses_degenerate_proofs(proof: bytes) -> None:
    assert vrf.verify(KEY.public, ALPHA, proof) is None


def test_a_response_plus_the_order_is_no_second_proof() -> None:
    again = (int.from_bytes(PROOF[48:], "little") + ORDER).to_bytes(32, "little")
    assert vrf.verify(KEY.public, ALPHA, PROOF[:48] + again) is None


SMALL_ORDER = {
    "order 1": IDENTITY,
    "order 2": (FIELD - 1).to_bytes(32, "little"),
    "order 4": bytes(32),
    "order 4, negative": bytes(31) + b"\x80",
    **{
        f"order 8, number {place}": bytes.fromhex(text)
        for place, text in enumerate(
            (
                "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
                "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
                "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
                "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
            )
        )
    },
}
"""The eight points whose order divides the cofactor."""

NOT_CANONICAL = {
    "one, negative": bytes([1]) + bytes(30) + b"\x80",
    "minus one, negative": (FIELD - 1 + 2**255).to_bytes(32, "little"),
    "the field's order": FIELD.to_bytes(32, "little"),
    "the field's order, negative": (FIELD + 2**255).to_bytes(32, "little"),
    "one above": (FIELD + 1).to_bytes(32, "little"),
    "one above, negative": (FIELD + 1 + 2**255).to_bytes(32, "little"),
    "nineteen above": (FIELD + 18).to_bytes(32, "little"),
}
"""Second encodings: y not below the field's order, or a sign of x = 0."""


def test_the_table_of_small_orders_is_one() -> None:
    for name, point in SMALL_ORDER.items():
        assert vrf._times_cofactor(point) == IDENTITY, name
    assert len(set(SMALL_ORDER.values())) == 8


@pytest.mark.parametrize("bad", [*SMALL_ORDER.values(), *NOT_CANONICAL.values()])
def test_refuses_such_points_as_key_and_as_gamma(bad: bytes) -> None:
    assert vrf.verify(bad, ALPHA, PROOF) is None
    assert vrf.verify(KEY.public, ALPHA, bad + PROOF[32:]) is None


def test_refuses_the_forgery_that_a_key_of_order_one_would_allow() -> None:
    """With the identity for key and Gamma, any nonce is a response: the equations hold."""
    nonce = (5).to_bytes(32, "little")
    proof = prove_freely(nonce, IDENTITY, public=IDENTITY, secret=bytes(32))
    point = vrf._to_curve(IDENTITY, ALPHA)
    u, v = (
        crypto_scalarmult_ed25519_base_noclamp(proof[48:]),
        crypto_scalarmult_ed25519_noclamp(proof[48:], point),
    )
    assert vrf._challenge(IDENTITY, point, IDENTITY, u, v) == proof[32:48]
    assert vrf.verify(IDENTITY, ALPHA, proof) is None


def even_challenge(gamma: bytes, public: bytes) -> bytes:
    """A proof whose challenge eight divides, so that points of small order drop out of both
    equations: what the RFC alone accepts."""
    for number in range(1, 1000):
        proof = prove_freely(number.to_bytes(32, "little"), gamma, public)
        if proof[32] % 8 == 0:
            return proof
    raise AssertionError("no challenge in a thousand ends in three zeros")


@pytest.mark.parametrize("torsion", list(SMALL_ORDER.values())[1:])
def test_refuses_a_gamma_beside_the_prime_order_group(torsion: bytes) -> None:
    gamma = crypto_core_ed25519_add(PROOF[:32], torsion)
    assert vrf._output(gamma) == OUTPUT, "even this gains no other output"
    assert vrf.verify(KEY.public, ALPHA, even_challenge(gamma, KEY.public)) is None


@pytest.mark.parametrize("torsion", list(SMALL_ORDER.values())[1:])
def test_refuses_a_key_beside_the_prime_order_group(torsion: bytes) -> None:
    """Eight keys for one secret would be eight tickets."""
    public = crypto_core_ed25519_add(KEY.public, torsion)
    secret = vrf._scalar(KEY.seed)[0]
    gamma = crypto_scalarmult_ed25519_noclamp(secret, vrf._to_curve(public, ALPHA))
    assert vrf.verify(public, ALPHA, even_challenge(gamma, public)) is None
