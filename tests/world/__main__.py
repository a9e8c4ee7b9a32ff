"""python -m tests.world: runs seeds, prints steps/s, and stops at the first broken law with seed and story."""

from __future__ import annotations

import argparse
import sys
import time

from tests.world.clock import LawBroken
from tests.world.laws import REPLAYED_MAX
from tests.world.liars import HABITS, lies_of
from tests.world.messages import SIZES, report
from tests.world.plants import PLANTS, SETTINGS, planted
from tests.world.signer import signer
from tests.world.world import LARGE, ONE_ISSUER_MAX, World


def main(argv: list[str] | None = None) -> int:
    """0 when every law held; with --plant 0 when the planted bug was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.world", description=__doc__)
    parser.add_argument("--seeds", default="0:200", help="FIRST:LAST (exclusive), or one seed")
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="simulated seconds of traffic and faults")
    parser.add_argument("--tasks", type=int, default=1, help="tasks per node and simulated minute")
    parser.add_argument("--calm", action="store_true", help="no faults: figures only")
    parser.add_argument("--ed25519", action="store_true", help="real signatures instead of the cheap signer")
    parser.add_argument("--liars", default="", help="NAME+NAME or all: members that lie; implies --ed25519")
    parser.add_argument("--power", action="store_true", help="every seed has power cuts, not one in four")
    parser.add_argument("--late", action="store_true", help="clocks 120 s off either way, results at the last moment")
    parser.add_argument("--links", type=int, default=0, help="links a node may have: fewer than there are members")
    parser.add_argument("--plant", default="", help="put a known bug in and look for it; 'list' names them")
    parser.add_argument("--story", type=int, default=60, help="lines of the story to print")
    parser.add_argument("--keep-going", action="store_true", help="name every seed that breaks a law, tell no story")
    parser.add_argument(
        "--messages", nargs="*", type=int, metavar="NODES", help="messages a task at these sizes of a calm mesh"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="one line a seed")
    args = parser.parse_args(argv)
    if args.messages is not None:
        report(tuple(args.messages) or SIZES)
        return 0
    first, _, last = args.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    if args.plant == "list" or (args.plant and args.plant not in PLANTS):
        print("\n".join(f"{name}: {work.__doc__}" for name, work in PLANTS.items()))
        return 0 if args.plant == "list" else 64
    if any(name not in HABITS for name in lies_of(0, args.liars)):
        print("\n".join(f"{name}: {work.__doc__}" for name, work in HABITS.items()))
        return 64
    args.ed25519 = args.ed25519 or bool(args.liars)
    if args.nodes > ONE_ISSUER_MAX:
        print(
            f"over {ONE_ISSUER_MAX} nodes: each issues its own first credits; from one issuer each would audit a chain "
            "of a grant for every node, as many entries as nodes times nodes; the last audit is of all chains still"
        )
    if args.nodes > LARGE:
        print(
            f"over {LARGE} nodes: 3 links a node are its own choice, a fault in five minutes a machine, nobody is away "
            "for more than 200 s, no plain payments"
        )
        print(
            f"over {REPLAYED_MAX} nodes: so many disks, drawn by lot, are read into new nodes at the end; else all are"
        )
    print(f"signer: {'Ed25519' if args.ed25519 else 'blake2b keyed by the secret, verified by an oracle'}")
    with signer(args.ed25519) as oracle:
        if args.plant:
            with planted(args.plant):
                found = _seeds(args, seeds, oracle)
            print(f"planted {args.plant}: {'found' if found else 'NOT FOUND'}")
            return 1 - found
        return _seeds(args, seeds, oracle)


def _seeds(args: argparse.Namespace, seeds: range, oracle: object) -> int:
    steps = broken_total = tasks = paid = 0
    links = 0.0
    began, spent = time.perf_counter(), time.process_time()
    for done, seed in enumerate(seeds):
        if args.keep_going and done and done % 100 == 0:
            print(f"{done} of {len(seeds)} seeds, laws broken in {broken_total}", flush=True)
        world = None
        start = time.perf_counter()
        try:
            world = World(
                seed,
                args.nodes,
                args.seconds,
                faults=not args.calm,
                tasks_per_minute=args.tasks,
                power=args.power,
                links_max=args.links,
                **(SETTINGS.get(args.plant) or {"lies": lies_of(seed, args.liars), "late": args.late}),
            )
            world.run()
        except LawBroken as broken:
            broken_total += 1
            if args.keep_going:
                print(f"seed {seed}: {str(broken).strip().splitlines()[0][:220]} ... {str(broken).strip()[-160:]!r}")
                continue
            print(f"seed {seed}: LAW BROKEN: {broken}")
            if world is not None:
                print("\n".join(list(world.clock.story)[-args.story :]))
            return 1
        steps += world.steps_total
        tasks += len(world.client.accepted)
        paid += world.referee.releases_total
        links += len(world.network.edges) / args.nodes
        if args.verbose or len(seeds) == 1:
            took = time.perf_counter() - start
            r = world.referee
            print(
                f"seed {seed}: trace {world.clock.trace}, {len(world.client.accepted)} tasks, {r.releases_total} paid, "
                f"{r.refunds_total} refunded, {world.steps_total} steps, {world.clock.elapsed_s:.0f} simulated s, "
                f"faults {sum(world.faults.done.values())}, {took:.2f} s: {world.traffic_took_s:.2f} s for "
                f"{args.seconds:g} s of traffic, the rest for settling and the last laws"
            )
            print("  trouble: " + ", ".join(f"{what} {count}" for what, count in sorted(world.seen.items())))
    took = time.perf_counter() - began
    held = f"laws broken in {broken_total}" if broken_total else "every law held"
    print(f"{len(seeds)} seeds, {held}; {steps} steps in {took:.1f} s: {steps / took:.0f} steps/s")
    busy = time.process_time() - spent
    print(f"CPU {busy:.1f} s: {steps / busy:.0f} steps a CPU second")
    minutes = args.seconds / 60 * args.nodes * (len(seeds) - broken_total)
    minutes = max(minutes, 1e-9)
    print(
        f"tasks: {tasks} accepted, {tasks / minutes:.2f} a node and simulated minute of traffic; "
        f"{paid} paid and settled, {paid / minutes:.2f}; {links / max(1, len(seeds) - broken_total):.1f} links a node"
    )
    print(f"signatures: {getattr(oracle, 'signed_total', 0)} made, {getattr(oracle, 'verified_total', 0)} verified")
    return 1 if broken_total else 0


if __name__ == "__main__":
    sys.exit(main())
