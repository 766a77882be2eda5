"""How tensors that lie in several places of files come to lie end to end in a slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from test_layout import file_byte, steps

from layer_streamer.checkpoint.manifest import TensorSpec
from layer_streamer.planning.layout import COPY_ALIGNMENT, Step, lay_out


@st.composite
def joined_steps(draw: st.DrawFn) -> Step:
    """Tensors some of which are made of others' extents, whatever their order, file and size."""
    step = draw(steps())
    specs = draw(st.permutations(list(step.tensors.values())))
    tensors, at = {}, 0
    while at < len(specs):
        count = draw(st.integers(1, len(specs) - at))
        pieces = tuple(replace(spec, dtype=specs[at].dtype) for spec in specs[at : at + count])
        key, at = f"j{at}", at + count
        itemsize = pieces[0].dtype.itemsize
        if count == 1 or any(piece.nbytes % itemsize for piece in pieces):
            tensors |= {piece.name: step.tensors[piece.name] for piece in pieces}
            continue
        nbytes = sum(piece.nbytes for piece in pieces)
        shape = (nbytes // itemsize,)
        tensors[key] = replace(pieces[0], name=key, shape=shape, nbytes=nbytes, pieces=pieces)
    return Step(0, tensors)


def bytes_of(spec: TensorSpec) -> Iterator[tuple[int, TensorSpec, int]]:
    """Some bytes of a tensor: its own index, the piece that has it, the index in that."""
    begin = 0
    for piece in spec.extents:
        for index in {0, piece.nbytes // 2, piece.nbytes - 1} if piece.nbytes else set():
            yield begin + index, piece, index
        begin += piece.nbytes


@given(step=joined_steps(), unified=st.booleans())
def test_every_byte_of_a_joined_tensor_comes_from_the_piece_that_has_it(
    step: Step, unified: bool
) -> None:
    layout = lay_out(step, unified=unified)
    assert [view.key for view in layout.views] == list(step.tensors)
    for view in layout.views:
        for index, piece, inner in bytes_of(step.tensors[view.key]):
            found = file_byte(step, layout, unified, view, index)
            assert found == (piece.path, piece.offset + inner)


@given(step=joined_steps(), unified=st.booleans())
def test_joined_tensors_are_aligned_in_the_slot_and_no_copy_meets_another(
    step: Step, unified: bool
) -> None:
    layout = lay_out(step, unified=unified)
    for view in layout.views:
        if step.tensors[view.key].pieces:
            assert view.offset % COPY_ALIGNMENT == 0
        assert view.offset % view.dtype.itemsize == 0
        assert view.offset + view.nbytes <= layout.device_nbytes
    copies = sorted(layout.copies, key=lambda copy: copy.dst)
    for left, right in pairwise(copies):
        assert left.dst + left.nbytes <= right.dst
    if unified:
        assert all(copy.dst >= layout.host_nbytes for copy in copies)


@given(step=joined_steps())
def test_a_joined_tensor_is_read_once_and_counted_once(step: Step) -> None:
    layout = lay_out(step, unified=False)
    payload = sum(spec.nbytes for spec in step.tensors.values())
    assert step.nbytes == payload
    assert payload <= layout.read_nbytes
    assert payload <= layout.copy_nbytes
