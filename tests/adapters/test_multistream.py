"""multistream-select: two sides agree whatever pieces the bytes come in; nonsense is refused at its first byte."""

from __future__ import annotations

import pytest

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.net.multistream import HEADER, Proposer, Responder, line
from clawnet.net.protobuf import read_varint, varint


def settle(proposer: Proposer, responder: Responder, piece: int) -> None:
    """Carries bytes both ways, `piece` at a time, until nothing moves."""
    to_responder, to_proposer = proposer.start(), b""
    while to_responder or to_proposer:
        sent, to_responder = to_responder[:piece], to_responder[piece:]
        if sent:
            to_proposer += responder.receive(sent)
        sent, to_proposer = to_proposer[:piece], to_proposer[piece:]
        if sent:
            to_responder += proposer.receive(sent)


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("proposed", "supported", "agreed"),
    [(["/a"], ["/a"], "/a"), (["/x", "/y", "/b"], ["/a", "/b"], "/b"), (["/b", "/a"], ["/a", "/b"], "/b")],
)
def test_both_sides_agree(piece: int, proposed: list[str], supported: list[str], agreed: str) -> None:
    proposer, responder = Proposer(proposed), Responder(supported)
    settle(proposer, responder, piece)
    assert proposer.agreed == responder.agreed == agreed
    assert proposer.rest == responder.rest == b""


def test_the_wire_form_is_the_specifications() -> None:
    assert Proposer(["/noise"]).start() == b"\x13/multistream/1.0.0\n\x07/noise\n"
    assert Responder(["/noise"]).receive(b"\x13/multistream/1.0.0\n\x07/noise\n") == line(HEADER) + line("/noise")
    assert Responder(["/noise"]).receive(line(HEADER) + line("/tls/1.0.0")) == line(HEADER) + b"\x03na\n"


def test_nothing_in_common_is_said_so() -> None:
    proposer = Proposer(["/x", "/y"])
    with pytest.raises(LinkError, match="speaks none of /x, /y") as caught:
        settle(proposer, Responder(["/a"]), 100)
    assert caught.value.details["refused"] is True


def test_what_follows_the_agreement_is_kept() -> None:
    responder = Responder(["/a"])
    responder.receive(line(HEADER) + line("/a") + b"early data")
    assert (responder.agreed, responder.rest) == ("/a", b"early data")
    proposer = Proposer(["/a"])
    proposer.receive(line(HEADER) + line("/a") + b"\x00\xff")
    assert (proposer.agreed, proposer.rest) == ("/a", b"\x00\xff")


def test_ls_lists_the_protocols_and_goes_on() -> None:
    responder = Responder(["/a", "/b"])
    answer = responder.receive(line(HEADER) + line("ls"))
    assert answer == line(HEADER) + b"\x09\x03/a\n\x03/b\n\n"
    assert responder.receive(line("/b")) == line("/b")


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        b"\x13/multistream/2",
        line(HEADER) + varint(limits.MULTISTREAM_LINE_BYTES_MAX + 1),
        line(HEADER) + b"\x00",
        line(HEADER) + b"\x02ab",
        line(HEADER) + b"\x02\xff\n",
        line(HEADER) + b"\xff" * 9,
        line(HEADER) + line("/unknown") * (limits.MULTISTREAM_PROPOSALS_MAX + 1),
    ],
)
def test_what_is_not_multistream_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        Responder(["/a"]).receive(data)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400", line(HEADER) + line("/b"), line(HEADER) + line("ls")])
def test_a_wrong_answer_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        Proposer(["/a"]).receive(data)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**62])
def test_varints_come_back(value: int) -> None:
    raw = varint(value)
    assert read_varint(raw + b"x", 0) == (value, len(raw))
    assert read_varint(raw[:-1], 0) == (-1, 0)
