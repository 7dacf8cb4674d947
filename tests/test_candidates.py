"""The written rule of candidates: which are tried for how many pictures, and that each of them can be made."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from regraft.augment import Augment
from regraft.candidates import Place, shortened, worth_trying

PLACES = tuple(
    Place(name, depth, above)
    for depth, (name, above) in enumerate(
        [("a", 0.95), ("b", 0.7), ("c", 0.38), ("d", 0.2), ("e", 0.12), ("f", 0.01)], start=1
    )
)
DRAWN = Augment(crop=True, flip=True)
FEW = ["scratch", "top layers"]
TABLE = {
    0: [],
    2: [],
    39: [],
    40: FEW,
    199: FEW,
    200: [*FEW, "more layers"],
    499: [*FEW, "more layers"],
    500: [*FEW, "more layers", "layer added", "all layers"],
    1999: [*FEW, "more layers", "layer added", "all layers"],
    2000: [*FEW, "more layers", "layer added", "layers replaced", "moving norms", "all layers"],
    100_000: [*FEW, "more layers", "layer added", "layers replaced", "moving norms", "all layers"],
}


def names(n, places=PLACES, best="f"):
    return [candidate.name for candidate in worth_trying(n, places, best, DRAWN)]


@pytest.mark.parametrize(("n", "expected"), TABLE.items())
def test_candidates_come_with_the_number_of_pictures(n, expected):
    assert names(n) == expected


@pytest.mark.parametrize("n", [40, 200, 500, 2000])
def test_layers_are_dropped_only_where_the_best_cut_lies_below_the_last(n):
    assert "layers dropped" not in names(n, best="f")
    assert names(n, best="e")[:3] == ["scratch", "top layers", "layers dropped"]
    assert "layers dropped" not in names(n, best="a")  # nothing lies below it that could be trained
    assert "layers dropped" not in names(n, best="not shown")
    dropped = {c.name: c for c in worth_trying(n, PLACES, "e", DRAWN)}["layers dropped"]
    assert (dropped.cut, dropped.end) == ("d", "e")


def test_parts_begin_at_the_lowest_cut_above_which_little_of_the_arithmetic_lies():
    found = {c.name: c for c in worth_trying(3000, PLACES, "f", DRAWN)}
    assert (found["top layers"].cut, found["top layers"].end) == ("e", "f")
    assert (found["more layers"].cut, found["more layers"].end) == ("c", "f")
    assert found["more layers"].opens == ("e",)
    assert found["all layers"].cut == "picture"
    assert found["scratch"].cut == "input"
    assert found["layers replaced"].fresh == found["layers replaced"].cut == "e"
    assert found["layer added"].hidden == (256,)
    assert found["moving norms"].statistics
    assert found["layers replaced"].statistics
    assert not found["top layers"].statistics


def test_the_simplest_come_first_and_all_are_augmented_as_asked():
    found = worth_trying(3000, PLACES, "e", DRAWN)
    assert found[0].name == "scratch"
    assert found[-1].name == "all layers"
    assert all(candidate.augment == DRAWN for candidate in found)
    assert all(a.views >= b.views for a, b in zip(worth_trying(600, PLACES, "f", DRAWN), found, strict=False))


NETWORKS = {
    "six places": PLACES,
    "two": (Place("a", 1, 0.9), Place("b", 2, 0.0)),
    "two, both high": (Place("a", 1, 0.01), Place("b", 2, 0.0)),
    "one": (Place("a", 1, 0.5),),
    "all far below": tuple(Place(str(i), i, 0.9 - i / 100) for i in range(1, 8)),
    "all far above": tuple(Place(str(i), i, 0.1 - i / 100) for i in range(1, 8)),
    "equal shares": tuple(Place(str(i), i, 0.5) for i in range(1, 5)),
    "sixty": tuple(Place(str(i), i, 1 - i / 60) for i in range(1, 61)),
}


@pytest.mark.parametrize("places", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_candidate_stands_on_cuts_that_are_there_and_does_not_end_below_its_beginning(places):
    depth = {"picture": 0, **{place.name: place.depth for place in places}}
    for n in (40, 200, 500, 2000):
        for best in [place.name for place in places]:
            found = worth_trying(n, places, best, DRAWN)
            assert len({candidate.name for candidate in found}) == len(found)
            for candidate in found[1:]:
                assert depth[candidate.cut] < depth[candidate.end] or len(places) == 1, candidate
                assert not candidate.fresh or depth[candidate.cut] <= depth[candidate.fresh] <= depth[candidate.end]
                assert all(depth[candidate.cut] <= depth[cut] <= depth[candidate.end] for cut in candidate.opens)


def test_without_a_network_only_the_small_one_is_tried():
    for n in (40, 3000):
        (only,) = worth_trying(n, (), "input", DRAWN)
        assert (only.name, only.cut) == ("scratch", "input")
    assert worth_trying(39, (), "input", DRAWN) == ()


def test_candidates_are_plain_values():
    first, again = (worth_trying(3000, PLACES, "e", DRAWN) for _ in range(2))
    assert first == again
    told = [candidate.to_json() for candidate in first]
    assert len({str(value) for value in told}) == len(told)
    assert all(one != other for one, other in pairwise(told))


@pytest.mark.parametrize(
    ("name", "n", "lengths"),
    [
        ("top layers", 1000, [(5, 2), (2, 2)]),
        ("more layers", 1000, [(3, 2), (2, 2)]),
        ("all layers", 1000, [(2, 2)]),
        ("scratch", 10_000, [(8, 2), (4, 2)]),
        ("scratch", 1000, [(13, 4)]),
        ("scratch", 300, []),
        ("layer added", 1000, []),
        ("layer added", 2000, [(7, 2)]),
        ("layers replaced", 2000, [(7, 2)]),
    ],
)
def test_a_candidate_is_shortened_to_a_half_and_a_quarter_but_not_below_what_it_needs(name, n, lengths):
    whole = {c.name: c for c in worth_trying(n, PLACES, "f", DRAWN)}[name]
    found = shortened(whole, n)
    assert [(c.epochs, c.views) for c in found] == lengths
    for shorter in found:
        assert f"in {shorter.epochs} epochs and {shorter.views} views" in shorter.does
        assert replace(shorter, does=whole.does, epochs=whole.epochs, views=whole.views) == whole
