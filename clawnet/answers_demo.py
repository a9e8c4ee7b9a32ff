"""The answer of `clawnet demo`: the nodes it ran, what became of each task, and the books before and after."""

from __future__ import annotations

from msgspec import field

from clawnet.answers_market import Answer, Task, Why


class DemoSandbox(Answer):
    """Whether the sandbox passed its probe; without it shell tasks stay on the node that submits them."""

    passed: bool
    reason: str
    remedy: str


class DemoNode(Answer):
    """One daemon; the first in the list founded the mesh and submits the tasks. `shell` is its mode by ring."""

    name: str
    peer_id: str
    pid: int
    home: str
    listen: list[str]
    joined_by: str
    shell: dict[str, str]


class DemoInput(Answer):
    """The directory that travels with the first task."""

    path: str
    files: int
    bytes: int


class DemoTask(Answer):
    """One task: what it was to show, whether it did (`ok`), what was found, and how the market came to it."""

    name: str
    title: str
    ok: bool
    finding: str
    task: Task
    why: Why


class DemoWallet(Answer):
    """One node's credits by its own word; `before` is after joining, before the first task."""

    node: str
    before: str
    after: str
    change: str
    locked: str


class DemoAudit(Answer):
    """One node's audit of all the chains it holds; `problems` is empty when every one is valid."""

    node: str
    ok: bool
    complete: bool
    chains: int
    entries: int
    problems: list[str]


class DemoBooks(Answer):
    """`total` is what the wallets hold together; `agree`: it equals what was granted, and all audits pass."""

    granted: str
    total: str
    agree: bool
    wallets: list[DemoWallet]
    audits: list[DemoAudit]


class Demo(Answer):
    """`clawnet demo`. `kept` is the directory that --keep left, with one home for each node in it."""

    ok: bool
    sandbox: DemoSandbox
    input: DemoInput
    nodes: list[DemoNode]
    tasks: list[DemoTask]
    books: DemoBooks
    kept: str | None
    duration_s: float
    problems: list[str] = field(default_factory=list)
