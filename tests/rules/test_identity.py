"""Keys, peer ids, addresses, certificates and invites: known values, round trips, and every forgery refused."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet.errors import DataError, NotPermittedError
from clawnet.identity import certificates, invite, keys, multiaddr
from clawnet.identity.certificates import Charter, certify_node, certify_owner, read_charter, sign_charter, verify_chain
from clawnet.identity.invite import Invite
from clawnet.identity.keys import KeyPair
from clawnet.identity.multiaddr import Multiaddr

FOUNDER = KeyPair.from_seed(b"f" * 32)
NODE = KeyPair.from_seed(b"n" * 32)
ALICE = KeyPair.from_seed(b"a" * 32)
BOB = KeyPair.from_seed(b"b" * 32)
PEER = NODE.peer_id

# The example key of the libp2p specification for peer ids, and its peer id as go-libp2p prints it.
SPEC_PUBLIC = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


# --- keys


def test_the_specifications_key_has_its_peer_id() -> None:
    assert keys.peer_id_of(SPEC_PUBLIC).startswith("12D3KooW")
    assert keys.base58_decode(keys.peer_id_of(SPEC_PUBLIC)).hex() == "002408011220" + SPEC_PUBLIC.hex()


def test_rfc_8032_signature() -> None:
    key = KeyPair.from_seed(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_signature_holds_for_its_message_and_key_only() -> None:
    signature = NODE.sign(b"message")
    assert keys.verify(NODE.public, b"message", signature)
    assert not keys.verify(NODE.public, b"messagf", signature)
    assert not keys.verify(ALICE.public, b"message", signature)
    assert not keys.verify(NODE.public, b"message", signature[:-1])
    assert not keys.verify(NODE.public[:-1], b"message", signature)
    assert not keys.verify(b"\0" * 32, b"message", b"\0" * 64)


@given(st.binary(max_size=64))
def test_base58_round_trip(data: bytes) -> None:
    assert keys.base58_decode(keys.base58_encode(data)) == data


@given(st.binary(min_size=32, max_size=32))
def test_peer_ids_round_trip_in_both_forms(public: bytes) -> None:
    peer = keys.peer_id_of(public)
    cid = "b" + base64.b32encode(b"\x01\x72" + keys.base58_decode(peer)).decode().lower().rstrip("=")
    assert len(peer) == 52
    assert keys.public_of(peer) == public
    assert keys.public_of(cid) == public


@given(st.text(max_size=80))
def test_no_text_is_a_peer_id_by_accident(text: str) -> None:
    with pytest.raises(DataError):
        keys.public_of(text)


def test_another_key_type_is_named_as_such() -> None:
    with pytest.raises(DataError, match="not the peer id of an Ed25519 key"):
        keys.public_of("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


def test_a_key_pair_shows_no_secret() -> None:
    assert repr(NODE) == f"KeyPair({PEER})"
    assert NODE.seed.hex() not in repr(NODE)


# --- multiaddrs


@pytest.mark.parametrize(
    ("text", "binary"),
    [
        ("/ip4/127.0.0.1/tcp/4002", "047f000001060fa2"),
        ("/ip4/127.0.0.1/udp/4001/quic-v1", "047f00000191020fa1cd03"),
        ("/ip6/::1/tcp/80", "2900000000000000000000000000000001060050"),
        ("/dns4/example.org/tcp/443", "360b6578616d706c652e6f72670601bb"),
    ],
)
def test_known_multiaddrs(text: str, binary: str) -> None:
    address = multiaddr.parse(text)
    assert str(address) == text
    assert address.to_bytes().hex() == binary
    assert Multiaddr.from_bytes(bytes.fromhex(binary)) == address


@given(
    st.one_of(
        st.tuples(st.just("ip4"), st.ip_addresses(v=4).map(str)),
        st.tuples(st.just("ip6"), st.ip_addresses(v=6).map(str)),
        st.tuples(st.sampled_from(["dns", "dns4", "dns6"]), st.just("a-1.example")),
    ),
    st.integers(0, 65_535),
    st.sampled_from(["tcp", "quic-v1"]),
    st.sampled_from([None, PEER, ALICE.peer_id]),
)
def test_multiaddrs_round_trip(host: tuple[str, str], port: int, transport: str, peer: str | None) -> None:
    address = Multiaddr(host[1], port, transport, peer, host[0])
    assert multiaddr.parse(str(address)) == address
    assert Multiaddr.from_bytes(address.to_bytes()) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:4002",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/tcp",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/-1",
        "/ip4/127.0.0.1/tcp/\u0661",
        "/ip4/127.0.0.256/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/127.0.0.1/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        "/ip4/127.0.0.1/udp/1",
        "/ip4/127.0.0.1/udp/1/quic",
        "/ip4/127.0.0.1/tcp/1/ws",
        "/ip4/127.0.0.1/tcp/1/p2p",
        "/ip4/127.0.0.1/tcp/1/p2p/12D3",
        f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit",
        "/dns/-a-/tcp/1",
        "/dns/a b/tcp/1",
        "/unix/tmp/tcp/1",
        "/ip4/127.0.0.1/tcp/1/",
        "/" * 300,
    ],
)
def test_malformed_multiaddrs(text: str) -> None:
    with pytest.raises(DataError):
        multiaddr.parse(text)


@given(st.binary(max_size=100))
def test_no_bytes_make_the_binary_reader_fail_in_another_way(data: bytes) -> None:
    try:
        address = Multiaddr.from_bytes(data)
    except DataError:
        return
    assert Multiaddr.from_bytes(address.to_bytes()) == address


def test_addresses_of_sockets() -> None:
    assert str(multiaddr.of_socket("fe80::1%eth0", 5, peer=PEER)) == f"/ip6/fe80::1/tcp/5/p2p/{PEER}"
    assert str(multiaddr.of_socket("10.0.0.1", 5, "quic-v1")) == "/ip4/10.0.0.1/udp/5/quic-v1"


# --- charter and certificates


def charter_of(founder: KeyPair) -> Charter:
    return Charter(1, "home", founder.public, (NODE.public,), "private", 1, b"r" * 16)


CHARTER, MESH = read_charter(sign_charter(charter_of(FOUNDER), FOUNDER))


def owner_certificate(issuer: KeyPair, owner: KeyPair, *, may_invite: bool = False, mesh: bytes = MESH) -> bytes:
    return certify_owner(issuer, mesh, owner.public, may_invite=may_invite, issued_ms=2, inviter=PEER)


def node_certificate(owner: KeyPair, node: KeyPair = NODE, mesh: bytes = MESH) -> bytes:
    return certify_node(owner, mesh, node.public, issued_ms=3, inviter=PEER)


def test_the_chains_that_prove_membership() -> None:
    assert verify_chain(CHARTER, MESH, [node_certificate(FOUNDER)], NODE.public) == (FOUNDER.public, True, PEER)
    member = [owner_certificate(FOUNDER, ALICE), node_certificate(ALICE)]
    assert verify_chain(CHARTER, MESH, member, NODE.public) == (ALICE.public, False, PEER)
    invited = [owner_certificate(FOUNDER, ALICE, may_invite=True), owner_certificate(ALICE, BOB), node_certificate(BOB)]
    assert verify_chain(CHARTER, MESH, invited, NODE.public) == (BOB.public, False, PEER)
    assert verify_chain(
        CHARTER, MESH, [owner_certificate(FOUNDER, ALICE, may_invite=True), node_certificate(ALICE)], NODE.public
    )[1]


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([], "1 to 3 certificates"),
        ([node_certificate(FOUNDER)] * 4, "1 to 3 certificates"),
        ([node_certificate(ALICE)], "another owner"),
        ([node_certificate(FOUNDER, ALICE)], "another key"),
        ([node_certificate(FOUNDER, mesh=b"m" * 32)], "another mesh"),
        ([owner_certificate(FOUNDER, ALICE, mesh=b"m" * 32), node_certificate(ALICE)], "another mesh"),
        ([owner_certificate(ALICE, ALICE), node_certificate(ALICE)], "not signed by the owner before it"),
        ([owner_certificate(FOUNDER, ALICE), node_certificate(BOB)], "another owner"),
        ([owner_certificate(FOUNDER, ALICE), owner_certificate(ALICE, BOB), node_certificate(BOB)], "may not invite"),
        (
            [
                owner_certificate(FOUNDER, ALICE, may_invite=True),
                owner_certificate(ALICE, BOB, may_invite=True),
                node_certificate(BOB),
            ],
            "cannot pass on the right",
        ),
        ([owner_certificate(FOUNDER, ALICE)], "malformed"),
        ([node_certificate(FOUNDER)[:-1]], "malformed"),
        ([b""], "malformed"),
        ([b"x" * 5_000], "the limit is"),
    ],
)
def test_chains_that_prove_nothing(chain: list[bytes], reason: str) -> None:
    with pytest.raises(NotPermittedError, match=reason):
        verify_chain(CHARTER, MESH, chain, NODE.public)


@given(st.data())
def test_one_flipped_bit_anywhere_breaks_a_chain(data: st.DataObject) -> None:
    chain = [owner_certificate(FOUNDER, ALICE), node_certificate(ALICE)]
    which = data.draw(st.integers(0, 1))
    statement = bytearray(chain[which])
    at = data.draw(st.integers(0, len(statement) - 1))
    statement[at] ^= 1 << data.draw(st.integers(0, 7))
    chain[which] = bytes(statement)
    with pytest.raises(NotPermittedError):
        verify_chain(CHARTER, MESH, chain, NODE.public)


def test_a_signature_for_one_kind_of_statement_is_none_for_another() -> None:
    payload, signature = msgspec.msgpack.decode(node_certificate(FOUNDER), type=tuple[bytes, bytes])
    assert keys.verify(FOUNDER.public, certificates.NODE_TAG + payload, signature)
    assert not keys.verify(FOUNDER.public, certificates.OWNER_TAG + payload, signature)
    assert not keys.verify(FOUNDER.public, payload, signature)


def test_a_charter_is_its_founders_and_its_mesh_id_covers_every_byte() -> None:
    statement = sign_charter(charter_of(FOUNDER), FOUNDER)
    assert read_charter(statement) == (CHARTER, MESH)
    forged = msgspec.msgpack.encode(
        (
            msgspec.msgpack.encode(charter_of(FOUNDER)),
            ALICE.sign(certificates.CHARTER_TAG + msgspec.msgpack.encode(charter_of(FOUNDER))),
        )
    )
    with pytest.raises(NotPermittedError, match="not signed by its founder"):
        read_charter(forged)
    other = Charter(1, "home", FOUNDER.public, (NODE.public,), "private", 1, b"s" * 16)
    assert read_charter(sign_charter(other, FOUNDER))[1] != MESH


@given(st.binary(max_size=300))
def test_no_bytes_make_the_readers_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(NotPermittedError):
        read_charter(data)
    with pytest.raises(NotPermittedError):
        verify_chain(CHARTER, MESH, [data], NODE.public)


# --- invites

INVITE = Invite(MESH, PEER, ("/ip4/203.0.113.7/tcp/4002", "/dns/example.org/udp/4001/quic-v1"), b"s" * 16, "own", 99)


def test_an_invite_is_one_line_and_survives_what_people_do_to_lines() -> None:
    token = INVITE.encode()
    assert token.startswith("clawnet1") and len(token.split()) == 1 and token.isprintable()
    assert invite.decode(token) == INVITE
    assert invite.decode(f"  {token[:40]}\n{token[40:]}\r\n") == INVITE
    assert INVITE.secret.hex() not in token


@given(st.integers(8, 150), st.sampled_from("ABCxyz019-_"))
def test_a_slip_in_an_invite_is_noticed(at: int, letter: str) -> None:
    token = INVITE.encode()
    at = min(at, len(token) - 2)
    wrong = token[:at] + letter + token[at + 1 :]
    if wrong != token:
        with pytest.raises(DataError, match=r"incomplete or mistyped|malformed"):
            invite.decode(wrong)
    with pytest.raises(DataError):
        invite.decode(token[:at])


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "must start with clawnet1"),
        ("hello", "must start with clawnet1"),
        ("clawnet1", "incomplete or mistyped"),
        ("clawnet1%%%", "incomplete or mistyped"),
        ("clawnet2AAAA", "newer clawnet"),
        ("clawnet1" + "A" * 5_000, "more than"),
        ("clawnet1\u0661", "incomplete or mistyped"),
    ],
)
def test_what_is_no_invite(token: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        invite.decode(token)


@given(st.text(max_size=200))
def test_no_text_makes_the_invite_reader_fail_in_another_way(text: str) -> None:
    with pytest.raises(DataError):
        invite.decode("clawnet1" + text)
