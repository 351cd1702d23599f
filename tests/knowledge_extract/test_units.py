"""The fixed plan of work, and batches that shrink."""

import pytest
import torch

from cache.errors import SystemRefusedError
from knowledge_extract.batches import Batches
from knowledge_extract.prompts import Reading
from knowledge_extract.units import Piece, Task, passes, units_of


def states(of, **more):
    pooling = "mean" if of == "descriptions" else "end_token"
    return {"kind": "states", "of": of, "pooling": pooling, **more}


def shape(recipe):
    return [(q, [(t.kind, t.source, t.states) for t in tasks]) for q, tasks in passes(recipe)]


def test_same_quantisation_shares_the_pass_and_others_follow(make_recipe):
    blocks = {
        "layers_nf4": states("answers", quantisation="nf4"),
        "given": states("descriptions"),
        "layers": states("answers"),
        "answers": {"kind": "answers"},
    }
    assert shape(make_recipe(blocks=blocks)) == [
        ("none", [("generate", "answers", ("layers",)), ("read", "descriptions", ("given",))]),
        ("nf4", [("reread", "answers", ("layers_nf4",))]),
    ]


def test_models_that_read_each_other_s_answers(make_recipe):
    blocks = {
        "one": {"kind": "answers"},
        "two": {"kind": "answers", "quantisation": "nf4"},
        "one_nf4": states("one", quantisation="nf4"),
        "two_none": states("two", quantisation="none"),
    }
    assert shape(make_recipe(blocks=blocks)) == [
        ("none", [("generate", "one", ())]),
        ("nf4", [("generate", "two", ()), ("reread", "one", ("one_nf4",))]),
        ("none", [("reread", "two", ("two_none",))]),
    ]


def test_units_are_sorted_by_length_and_stable():
    lengths = [5, 3, 5, 3, 4]
    pieces = [
        Piece("c", n, Reading("x", (1,) * length, (True,) * length))
        for n, length in enumerate(lengths)
    ]
    units = units_of(Task("read", "none", "descriptions", ("x",)), pieces, 2)
    assert [[p.item for p in u.pieces] for u in units] == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_and_goes_on(error):
    seen = []

    def work(rows):
        seen.append(len(rows))
        if len(rows) > 2:
            raise error
        return [row * 10 for row in rows]

    batches = Batches(8)
    assert batches.run(range(7), work) == ([0, 10, 20, 30, 40, 50, 60], 2)
    assert seen == [7, 4, 2, 2, 2, 1]
    assert batches.halved == 2
    seen.clear()
    batches.run(range(4), work)
    assert max(seen) <= 2  # remembered


def test_out_of_memory_with_one_row_is_told():
    def work(rows):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(SystemRefusedError, match="out of memory with a batch of one"):
        Batches(4).run(range(4), work)


def test_other_errors_are_not_swallowed():
    def work(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Batches(4).run(range(4), work)


def test_a_bound_for_some_rows_does_not_stay():
    batches = Batches(4)
    assert batches.run(range(4), list, most=1) == ([0, 1, 2, 3], 1)
    assert batches.run(range(4), list) == ([0, 1, 2, 3], 4)
