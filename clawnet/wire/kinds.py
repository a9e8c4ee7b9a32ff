"""The numbers of all messages, as they stand on the wire."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """Message numbers; those of the original protocol are kept."""

    PING = 0
    PONG = 1
    PEER_INFO = 2
    DISCONNECT = 3
    HELLO = 4
    ACK = 5
    MEMBERSHIP = 6
    ERROR = 7
    TASK_SUBMIT = 10
    TASK_ACCEPT = 11
    TASK_REJECT = 12
    TASK_RESULT = 13
    TASK_CANCEL = 14
    TASK_DECLINE = 15
    TASK_PROGRESS = 16
    TASK_OUTPUT = 17
    TASK_WAIVER = 18
    MEM_SYNC_REQ = 20
    MEM_SYNC_RESP = 21
    MEM_UPDATE = 22
    MEM_DELETE = 23
    MARKET_GOSSIP = 29
    MARKET_TASK_ANNOUNCE = 30
    MARKET_BID = 31
    MARKET_WINNER = 32
    MARKET_ESCROW_LOCK = 33
    MARKET_SETTLEMENT = 34
    MARKET_DISPUTE = 35
    MARKET_REPUTATION_UPDATE = 36
    LEDGER_PULL = 37
    LEDGER_PUSH = 38
    LEDGER_COUNTERSIGN = 39
    SWARM_FORM = 40
    SWARM_JOIN = 41
    SWARM_LEAVE = 42
    SWARM_COORDINATE = 43
    SWARM_RESULT = 44
    OPENCLAW_PROMPT = 50
    OPENCLAW_RESPONSE = 51
    OPENCLAW_STREAM = 52
