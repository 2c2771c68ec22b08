"""Values are written where what follows would copy them: where a node joins them, and within the border of a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from infera_gpu.choice import Choice
from infera_gpu.layout import Operand, Space, dense, view_of, views_of
from infera_gpu.op import Border, Kernel, Site
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Placed, Segment

LARGE = 1 << 22
"""Bytes. Kernels write no larger values within borders: to read them a block at a time, copied into the cache with its
border, costs no more."""


class Slots(NamedTuple):
    """Where values lie.

    `places` are windows, by value; each has the name of a value for its root: of the outermost joined value, since
    joined values may be joined again, or of a value that has a border around it. `around` is, by node, where a kernel
    reads input 0 with the border that it wants, and what of that is within: the place of that value, or, where it has
    none, of the copy that the kernel needs anyway. `nbytes` are the sizes of roots with a border.
    """

    places: Mapping[str, Operand]
    around: Mapping[int, tuple[Operand, Operand]]
    nbytes: Mapping[str, int]


class _Slots:
    def __init__(self, segment: Segment, choices: Sequence[Choice], space: Space, without: Collection[str]) -> None:
        self.nodes, self.choices, self.space, self.without = segment.nodes, choices, space, without
        self.kept = set(segment.outputs)
        self.places: dict[str, Operand] = {}
        self.around: dict[int, tuple[Operand, Operand]] = {}
        self.until: dict[str, int] = {}
        """The last node that may read what lies in the place of a value, itself or a view of it, before another writes
        over it."""
        self.makers = {o: i for i, p in enumerate(self.nodes) for o in p.site.node.outputs if o}
        self.readers: dict[str, list[int]] = {}
        for i, p in enumerate(self.nodes):
            for v in p.site.node.inputs:
                self.readers.setdefault(v, []).append(i)
        self.last_read = self.last_reads()

    def last_reads(self) -> dict[str, float]:
        """The last node that may read the memory of each value, views of it included; never, where an output is one."""
        last: dict[str, float] = dict.fromkeys(self.kept, math.inf)
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i].site.node
            read: float = i
            if self.nodes[i].op.view is not None:
                read = max(i, *(last.get(o, -1) for o in node.outputs if o))
            for value in node.inputs:
                last[value] = max(last.get(value, -1), read)
        return last

    def find(self) -> Slots:
        """From the last node to the first, so that a place is known before the node that may pass it on."""
        for i in range(len(self.nodes) - 1, -1, -1):
            op, node = self.nodes[i].op, self.nodes[i].site.node
            if op.windows is not None and node.outputs[0] not in self.without:
                self.join(i)
            elif node.outputs[0] in self.places:
                if op.view is not None:
                    self.through_view(i)
                else:
                    self.in_place(i)
            kernel = self.choices[i].kernel
            if kernel is not None and kernel.border is not None and i not in self.around:
                self.surround(i, kernel.border)
        return Slots(self.places, self.around, {whole.root: whole.nbytes for whole, _ in self.around.values()})

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

    def surround(self, i: int, wanted: Callable[[Site], Border | None]) -> None:
        """Input 0 of node i lies within the border that its kernel wants, where no reader needs a copy for that."""
        site = self.nodes[i].site
        value, spec = site.node.inputs[0], site.spec(0)
        maker = self.makers.get(value)
        if maker is None or value in self.kept or value in self.without:
            return
        border = None if self.choices[i].space != self.space else site.told("border", wanted)
        if border is None or value in site.node.inputs[1:]:
            return
        readers = self.readers[value]
        bordered = [i] if readers == [i] else [j for j in readers if self.border(j, value) == border]
        whole, inner = within(value, self.space, spec, border)
        if len(bordered) < len(readers) and not inner.is_contiguous:
            return
        kernel = self.choices[i].kernel
        copied = kernel is not None and not site.told("strided_in", kernel.strided_in)
        if copied and self.nodes[maker].op.view is not None and readers == [i]:
            self.around[i] = whole, inner
        if spec.nbytes <= LARGE and self.offer(value, inner, None, all_read=True):
            self.around.update(dict.fromkeys(bordered, (whole, inner)))

    def border(self, i: int, value: str) -> Border | None:
        """The border that node i wants around the value, which it reads as input 0 and no other."""
        kernel, site = self.choices[i].kernel, self.nodes[i].site
        first, *others = site.node.inputs
        if kernel is None or kernel.border is None or first != value or value in others:
            return None
        return site.told("border", kernel.border)

    def parts(self, whole: Operand, i: int) -> tuple[Operand, ...]:
        return windows_of(whole, self.nodes[i])

    def offer(self, value: str, place: Operand, until: int | None, *, all_read: bool = False) -> bool:
        """Let the value lie there, if its maker can write there and its readers can read it there, in time.

        Whether `all_read` it there is asked unless it is known.
        """
        i = self.makers.get(value)
        if i is None or value in self.places or not place.nbytes:
            return False
        placed, choice = self.nodes[i], self.choices[i]
        if placed.op.view is None:
            if choice.space != self.space:
                return False
            if not place.is_contiguous and not (
                _writes(choice, placed.site, place) and (all_read or all(map(self.reads, self.readers[value])))
            ):
                return False
        elif not place.is_contiguous or any(placed.site.node.outputs[1:]):
            return False
        if until is not None:
            if self.last_read[value] > until:
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


def within(root: str, space: Space, spec: TensorSpec, border: Border) -> tuple[Operand, Operand]:
    """A contiguous operand at the start of its root that is larger than `spec` by a border, and what lies within it."""
    dims = tuple([before + d + after for d, (before, after) in zip(spec.dims, border, strict=True)])
    whole = dense(root, space, TensorSpec(dims, spec.dtype))
    offset = sum([before * s for (before, _), s in zip(border, whole.strides, strict=True)])
    return whole, whole._replace(shape=spec.dims, offset=offset)


def _writes(choice: Choice, site: Site, place: Operand) -> bool:
    """Whether outputs may lie there."""
    kernel, size = choice.kernel, place.dtype.itemsize
    if kernel is None or writes_strided(kernel):
        return True
    if place.strides[-2:] == (place.shape[-1] * size, size):
        return site.told("rows_out", kernel.rows_out)
    return _is_slice(place) and site.told("slices_out", kernel.slices_out)


def _is_slice(place: Operand) -> bool:
    """Whether it is a slice, along the last axis, of something contiguous."""
    (*dims, _), (*strides, last) = place.shape, place.strides
    return last == place.dtype.itemsize and all(
        d == 1 or s == n * t for d, s, n, t in zip(dims, strides, dims[1:], strides[1:], strict=False)
    )


def slots_of(segment: Segment, choices: Sequence[Choice], space: Space, without: Collection[str] = ()) -> Slots:
    """Values that lie in the output of a node that joins them (Op.windows), or within a border (Kernel.border).

    `without` are values that keep others out, and that get no border. Nodes that make such a value can write to its
    place, and all that read it can read it there.
    """
    if all(p.op.windows is None for p in segment.nodes) and not any(c.kernel and c.kernel.border for c in choices):
        return Slots({}, {}, {})
    return _Slots(segment, choices, space, without).find()
