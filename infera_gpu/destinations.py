"""Outputs that steps may write where the caller wants them, instead of copying them there in the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from infera_gpu.plan import Plan, Step


def destinations(plan: Plan) -> Mapping[str, frozenset[str]]:
    """The outputs on the device that have a block of memory to themselves, each with the inputs in whose very place it
    may lie: those that nothing reads but the one kernel that writes it, which says that it can (`Kernel.shares`,
    `Kernel.inplace`).

    A decoder's caches so come out where they went in, with nothing to move but the new tokens.
    """
    inputs = {o.root: name for name, o in plan.inputs.items()}
    outputs = Counter(o.root for o in plan.outputs.values())
    begins = {b.name: b.offset for b in plan.blocks}
    writers: defaultdict[str, list[Step]] = defaultdict(list)
    readers: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for step in plan.steps:
        read = [o for o in step.ins if o is not None and not o.constant]
        readers.update(o.root for o in read)
        for o in step.outs:
            writers[o.root].append(step)
        for o in (*read, *step.outs):
            ends[o.root] = max(ends[o.root], o.bounds()[1])
    found = {}
    for name, o in plan.outputs.items():
        if o.constant or o.space != "device" or o.root in inputs or outputs[o.root] > 1 or not o.is_contiguous:
            continue
        if (begins.get(o.root), ends[o.root]) == (o.offset, o.offset + o.nbytes):
            made = writers[o.root]
            over = _shared(made[0], o.root) if len(made) == 1 else ()
            found[name] = frozenset(
                inputs[root] for root in over if root in inputs and readers[root] == 1 and not outputs[root]
            )
    return found


def _shared(step: Step, root: str) -> Iterator[str]:
    """The roots of the inputs of a step in whose place it may write what lies in `root`."""
    if step.kernel is None or step.placed is None:
        return
    for i, j in (*step.kernel.shares(step.placed.site), *((0, j) for j in step.kernel.inplace)):
        out, given = step.outs[i], step.ins[j] if j < len(step.ins) else None
        if given is not None and out.root == root and out.is_contiguous and given.may_become(out):
            yield given.root
