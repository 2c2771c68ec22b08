"""Values that another node joins are written where it would copy them: a Concat of such values costs no step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from infera_gpu.choice import Choice
from infera_gpu.layout import Operand, Space, dense, view_of, views_of
from infera_gpu.op import Kernel
from infera_gpu.specialize import Placed, Segment


class _Slots:
    def __init__(self, segment: Segment, choices: Sequence[Choice], space: Space) -> None:
        self.nodes, self.choices, self.space = segment.nodes, choices, space
        self.kept = set(segment.outputs)
        self.places: dict[str, Operand] = {}
        self.until: dict[str, int] = {}
        """The last node that may read what lies in the place of a value, before another writes over it."""
        self.makers = {o: i for i, p in enumerate(self.nodes) for o in p.site.node.outputs if o}
        self.readers: dict[str, list[int]] = {}
        for i, p in enumerate(self.nodes):
            for v in p.site.node.inputs:
                self.readers.setdefault(v, []).append(i)

    def find(self, without: Collection[str]) -> Mapping[str, Operand]:
        """From the last node to the first, so that a place is known before the node that may pass it on."""
        for i in range(len(self.nodes) - 1, -1, -1):
            op, node = self.nodes[i].op, self.nodes[i].site.node
            if op.windows is not None and node.outputs[0] not in without:
                self.join(i)
            elif node.outputs[0] in self.places:
                if op.view is not None:
                    self.through_view(i)
                else:
                    self.in_place(i)
        return self.places

    def join(self, i: int) -> None:
        site = self.nodes[i].site
        name, inputs = site.node.outputs[0], site.node.inputs
        if self.choices[i].space != self.space:
            return
        lying = self.places.get(inputs[0])
        if name not in self.places and lying is not None:
            around = lying._replace(shape=site.outs[0].dims)
            if all(same_place(self.places.get(v), w) for v, w in zip(inputs, self.parts(around, i), strict=True)):
                self.offer(name, around, self.until.get(inputs[0]))  # where a later one joins these and more
                return
        whole = self.places.get(name) or dense(name, self.space, site.outs[0])
        for value, window in zip(inputs, self.parts(whole, i), strict=True):
            self.offer(value, window, self.until.get(name))

    def parts(self, whole: Operand, i: int) -> tuple[Operand, ...]:
        return windows_of(whole, self.nodes[i])

    def offer(self, value: str, place: Operand, until: int | None) -> bool:
        """Let the value lie there, if its maker can write there and its readers can read it there, in time."""
        i = self.makers.get(value)
        if i is None or value in self.places or not place.nbytes:
            return False
        placed, choice = self.nodes[i], self.choices[i]
        if placed.op.view is None:
            if choice.space != self.space:
                return False
            if not place.is_contiguous and not (
                writes_strided(choice.kernel) and all(map(self.reads, self.readers[value]))
            ):
                return False
        elif not place.is_contiguous or any(placed.site.node.outputs[1:]):
            return False
        if until is not None:
            if value in self.kept or any(reader > until for reader in self.readers[value]):
                return False
            self.until[value] = until
        self.places[value] = place
        return True

    def reads(self, i: int) -> bool:
        """Whether node i reads inputs of any strides."""
        kernel = self.choices[i].kernel
        return self.nodes[i].op.view is None and (kernel is None or kernel.strided)

    def through_view(self, i: int) -> None:
        """What is reshaped lies in the place of its new shape; other views cannot be asked for backwards."""
        placed = self.nodes[i]
        view, node, spec = placed.op.view, placed.site.node, placed.site.spec(0)
        assert view is not None
        source = dense(node.inputs[0], self.space, spec)
        made = view_of(source, lambda x: view(x, placed.site))  # type: ignore[arg-type,return-value]
        place = self.places[node.outputs[0]]
        same = made is not None and made.is_contiguous and made.nbytes == source.nbytes and made.dtype == source.dtype
        back = view_of(place, lambda y: y.reshape(spec.dims, copy=False)) if same else None
        if back is None or not self.offer(node.inputs[0], back, self.until.get(node.outputs[0])):
            del self.places[node.outputs[0]]

    def in_place(self, i: int) -> None:
        """An input that the kernel may overwrite, and that nothing else reads, lies where the output goes."""
        kernel, placed = self.choices[i].kernel, self.nodes[i]
        inputs, output = placed.site.node.inputs, placed.site.node.outputs[0]
        for k in kernel.inplace if kernel else ():
            value = inputs[k] if k < len(inputs) else ""
            if (
                value
                and value not in self.kept
                and self.readers[value] == [i]
                and placed.site.ins[k] == placed.site.outs[0]
                and self.offer(value, self.places[output], min(i, self.until.get(output, i)))
            ):
                self.until[value] -= 1  # this node reads all of it, and may not read what lies inside besides
                return


def windows_of(whole: Operand, placed: Placed) -> tuple[Operand, ...]:
    """Where the inputs of a node that joins them lie in its output, which lies at `whole`."""
    windows, site = placed.op.windows, placed.site
    assert windows is not None
    made = views_of(whole, lambda y: windows(y, site))
    assert made is not None
    return made


def same_place(a: Operand | None, b: Operand) -> bool:
    """Whether they are the same elements in the same order. Empty operands lie everywhere."""
    return not b.nbytes or (
        a is not None
        and (a.root, a.offset, a.shape, a.dtype) == (b.root, b.offset, b.shape, b.dtype)
        and all(d == 1 or s == t for d, s, t in zip(a.shape, a.strides, b.strides, strict=True))
    )


def writes_strided(kernel: Kernel | None) -> bool:
    """Whether outputs may have any strides; an operator's own function is copied to where they lie."""
    return kernel is None or kernel.strided_out


def slots_of(
    segment: Segment, choices: Sequence[Choice], space: Space, without: Collection[str] = ()
) -> Mapping[str, Operand]:
    """The places of values that lie in the output of a node that joins them (Op.windows).

    Each is a window whose root is the name of the outermost joined value: joined values may be joined again. `without`
    are joined values that keep their inputs out. Nodes that make such a value can write to its place, and all that read
    it can read it there.
    """
    if all(p.op.windows is None for p in segment.nodes):
        return {}
    return _Slots(segment, choices, space).find(without)
