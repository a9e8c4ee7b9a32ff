"""Formats of the ledger: entries, statements, seal keys, task documents; no bytes whatever break a decoder."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import SignatureRefused, WireError
from clawnet.ledger import entries, seal, statements, taskdoc
from clawnet.ledger.proofs import verify_proof
from clawnet.ledger.state import read_state
from tests.rules.ledger_mesh import MESH, NOW, ZERO, StubKeys

A, B, H = sha256(b"a").digest(), sha256(b"b").digest(), sha256(b"h").digest()
SIGN = b"s" * 64
KEYS = StubKeys()
ALICE = KEYS.new("alice")

BODIES = [
    entries.Genesis(ZERO, None),
    entries.Genesis(ZERO, b"stamp"),
    entries.Grant(B, 10**15, bytes(16)),
    entries.Send(B, 1, H),
    entries.Lock(NOW, NOW + 300_000, None, [entries.LockLine(H, B, 2_000_000, 1)]),
    entries.Release([entries.ReleaseItem(70_000, 0, 1, 2_000_000, H, H)]),
    entries.Refund([entries.RefundItem(3, 0, None), entries.RefundItem(3, 1, entries.Proof(1, [b"waiver"]))]),
    entries.Claim([entries.ClaimItem(B, 70_000, H, 0, 2_000_000, H, None)]),
    entries.Checkpoint(H),
    entries.Rotate(B, SIGN),
]


def built(body: entries.Body, seq: int = 70_000) -> entries.Parsed:
    return entries.build(MESH, A, seq, H, NOW, body, lambda message: SIGN)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_an_entry_reads_back_as_it_was_built(body: entries.Body) -> None:
    entry = built(body)
    again = entries.parse(entry.raw)
    assert again == entry
    assert again.body == body
    assert again.hash == sha256(b"clawnet/entry/1" + entry.raw[:-64]).digest()
    assert again.signature == SIGN
    assert entries.kind_of(body) == entry.kind


def test_sizes_stay_what_the_protocol_says() -> None:
    release = entries.Release([entries.ReleaseItem(200, 0, 1, 2_000_000, H, H)])
    claim = entries.Claim([entries.ClaimItem(B, 300, H, 0, 2_000_000, H, None)])
    assert len(built(BODIES[4], 300).raw) == 277
    assert len(built(release, 300).raw) == 261
    assert len(built(claim, 100).raw) == 294


def test_the_signature_covers_the_tagged_hash() -> None:
    signed: list[bytes] = []
    entry = entries.build(MESH, A, 0, ZERO, NOW, BODIES[0], lambda message: (signed.append(message), SIGN)[1])
    assert signed == [b"clawnet/entry-signature/1" + entry.hash]


def raw_entry(*fields: object) -> bytes:
    return msgspec.msgpack.encode(list(fields)) + SIGN


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "of 0 bytes"),
        (bytes(64), "of 64 bytes"),
        (bytes(65), "not a ledger entry"),
        (bytes(limits.ENTRY_BYTES_MAX + 65), "bytes"),
        (raw_entry(1, MESH, A, 0, H, NOW, 0), "length 8"),
        (raw_entry(1, MESH, A, 0, H, NOW, 0, [ZERO, None], 1), "length 8"),
        (raw_entry(1, MESH, A, -1, H, NOW, 0, [ZERO, None]), ">= 0"),
        (raw_entry(1, MESH, A, True, H, NOW, 0, [ZERO, None]), "int"),
        (raw_entry(1, MESH, A[:31], 0, H, NOW, 0, [ZERO, None]), "32"),
        (raw_entry(1, MESH, A, 0.0, H, NOW, 0, [ZERO, None]), "int"),
        (msgspec.msgpack.encode([1, MESH, A, 0, H, NOW, 0, []]) + b"\x00" + SIGN, "trailing"),
        (b"\x98\x01" + b"\x91" * 60_000 + SIGN, "not a ledger entry"),
    ],
)
def test_bytes_that_are_no_entry_are_the_wires_own_error(raw: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        entries.parse(raw)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (1, [B, 0, bytes(16)]),
        (1, [B, 10**15 + 1, bytes(16)]),
        (2, [B, 1]),
        (3, [NOW, NOW, None, []]),
        (3, [NOW, NOW, None, [[H, B, 1, 0]]]),
        (3, [NOW, NOW, None, [[H, B, 1, 65_536]]]),
        (3, [NOW, NOW, None, [[H, B, 1, 1]] * 257]),
        (4, [[]]),
        (4, [[[0, 0, 1, 1, H, H]] * 257]),
        (5, [[[1, 0]]]),
        (6, [[[B, 0, H, 0, 1, b"short", None]]]),
        (7, [H, H]),
        (8, [B, b"short"]),
    ],
)
def test_a_signed_header_with_a_wrong_body_is_held_against_its_author(kind: int, body: object) -> None:
    entry = entries.parse(raw_entry(1, MESH, A, 0, H, NOW, kind, body))
    assert entry.defect
    assert entry.body is None


@pytest.mark.parametrize(
    ("version", "kind", "body"),
    [
        (2, 0, [ZERO, None]),
        (1, 9, [1, 2, 3]),
        (1, 10, {}),
        (1, 3, [NOW, NOW, 7, [[H, B, 1, 1]]]),
        (1, 5, [[[1, 0, [2, [b"certificate"]]]]]),
        (1, 6, [[[B, 0, H, 0, 1, H, [2, [b"certificate"]]]]]),
    ],
)
def test_constructs_of_the_later_increment_are_recognised(version: int, kind: int, body: object) -> None:
    entry = entries.parse(raw_entry(version, MESH, A, 0, H, NOW, kind, body))
    assert entry.upgrade
    assert not entry.defect


def test_the_largest_integer_is_64_bits() -> None:
    entry = entries.parse(raw_entry(1, MESH, A, 2**64 - 1, H, 2**64 - 1, 0, [ZERO, None]))
    assert (entry.seq, entry.time_ms) == (2**64 - 1, 2**64 - 1)


def test_256_lines_fit_into_one_entry() -> None:
    lines = [entries.LockLine(H, B, 10**15, 65_535)] * limits.LOCK_LINES_MAX
    assert len(built(entries.Lock(2**63, 2**63, None, lines)).raw) <= limits.ENTRY_BYTES_MAX
    items = [entries.ClaimItem(B, 2**63, H, 255, 10**15, H, None)] * limits.ENTRY_ITEMS_MAX
    assert len(built(entries.Claim(items)).raw) <= limits.ENTRY_BYTES_MAX


ODD = st.one_of(
    st.binary(max_size=400),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(0, 2**64 - 1), st.binary(max_size=64), st.text(max_size=4)),
        lambda inner: st.lists(inner, max_size=9),
        max_leaves=20,
    ).map(msgspec.msgpack.encode),
    st.tuples(st.integers(0, len(BODIES) - 1), st.integers(0, 250), st.binary(min_size=1, max_size=3)).map(
        lambda cut: (raw := built(BODIES[cut[0]]).raw)[: cut[1]] + cut[2] + raw[cut[1] + len(cut[2]) :]
    ),
)


@given(ODD)
def test_no_bytes_raise_anything_but_the_wires_own_errors(data: bytes) -> None:
    for decode in (
        entries.parse,
        statements.Note.read,
        statements.Waiver.read,
        statements.Countersign.read,
        taskdoc.decode,
        read_state,
        lambda raw: verify_proof(raw, MESH, KEYS.verify),
    ):
        with suppress(WireError, SignatureRefused):
            decode(data)


STATEMENTS = [
    statements.Note(MESH, A, H, 0, 1, 5, H, 1_000, H, "exit:0", None, NOW),
    statements.Waiver(MESH, A, H, 0, 0),
    statements.Countersign(MESH, A, 1_000, H),
]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: type(statement).__name__)
def test_a_statement_is_its_signers_and_of_its_own_domain(statement: statements.Statement) -> None:
    kind = type(statement)
    signed = statement.signed(KEYS.signer(ALICE))
    assert kind.verified(signed, ALICE, KEYS.verify) == statement
    assert kind.read(signed) == statement
    with pytest.raises(SignatureRefused):
        kind.verified(signed, KEYS.new("bob"), KEYS.verify)
    with pytest.raises(SignatureRefused):
        kind.verified(signed[:-1] + bytes([signed[-1] ^ 1]), ALICE, KEYS.verify)
    payload, _ = msgspec.msgpack.decode(signed)
    for other in STATEMENTS:
        if type(other) is not kind:
            foreign = msgspec.msgpack.encode([payload, KEYS.signer(ALICE)(other.TAG + payload)])
            with pytest.raises(SignatureRefused):
                kind.verified(foreign, ALICE, KEYS.verify)


def test_statements_are_bounded() -> None:
    with pytest.raises(WireError, match="5000"):
        statements.Note.read(bytes(5000))


def test_seal_keys_differ_in_everything_they_are_derived_from() -> None:
    base = (b"seed" * 8, MESH, A, H, 0, 1)
    keys = {seal.derive_key(*base)}
    for at, other in enumerate((b"xxxx" * 8, B, B, B, 1, 2)):
        changed = list(base)
        changed[at] = other
        keys.add(seal.derive_key(*changed))
    assert len(keys) == 7
    assert all(len(key) == 32 for key in keys)
    assert seal.derive_key(*base) == seal.derive_key(*base)


def test_the_content_key_needs_the_documents_secret() -> None:
    key = seal.derive_key(b"seed" * 8, MESH, A, H, 0, 1)
    assert seal.content_key(key, A) != seal.content_key(key, B)
    assert seal.content_key(key, A) != key
    assert seal.key_hash(key) == sha256(key).digest()


def test_hkdf_is_rfc_5869() -> None:
    """Appendix A.1: the first 32 of its 42 bytes."""
    made = seal._hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert made.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def document(**changes: object) -> taskdoc.TaskDocument:
    fields: dict[str, object] = {
        "kind": "shell",
        "payload": b"argv",
        "inputs": [taskdoc.TaskInput("src", "tree", H, 1_000, 0o755)],
        "acceptance": [taskdoc.Condition("exit_code", b"0")],
        "lease_s": 30,
        "compare": False,
        "dispute_s": 86_400,
        "secret": A,
    }
    return taskdoc.TaskDocument(**(fields | changes))


def test_a_task_document_reads_back_and_its_hash_is_salted() -> None:
    encoded = taskdoc.encode(document())
    assert taskdoc.decode(encoded) == document()
    assert taskdoc.task_hash(encoded) != taskdoc.task_hash(taskdoc.encode(document(secret=B)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": b"short"},
        {"lease_s": 0},
        {"compare": 1},
        {"inputs": [taskdoc.TaskInput("x", "device", H, 1, 0)]},
        {"inputs": [taskdoc.TaskInput("x", "file", H, 1, 0)] * (limits.INPUTS_MAX + 1)},
    ],
)
def test_a_task_document_out_of_bounds_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(WireError):
        taskdoc.decode(taskdoc.encode(document(**wrong)))


def test_a_task_document_has_a_largest_size() -> None:
    with pytest.raises(WireError, match="bytes"):
        taskdoc.decode(taskdoc.encode(document(payload=bytes(limits.TASK_DOCUMENT_BYTES_MAX))))
