"""The gate: who wins, how surely, and whether pretraining paid."""

from __future__ import annotations

import numpy as np

from regraft.gate import Rival, rank

N = 400
GROUPS = np.arange(N)


def hits(share, seed=0):
    """So many right answers, at places that differ by seed."""
    out = np.zeros(N)
    out[np.random.default_rng(seed).permutation(N)[: round(share * N)]] = 1
    return out


def test_pretraining_paid_only_when_it_beats_all_else_beyond_the_noise():
    mine = Rival("mine/", hits(0.9), pretrained=True)
    gate = rank(
        [Rival("default", hits(0.7, 1)), mine, Rival("input", hits(0.6, 2)), Rival("scratch", hits(0.5, 3))], GROUPS, 5
    )
    assert gate.paid is True
    assert [place.rival.name for place in gate.places] == ["mine/", "default", "input", "scratch"]
    assert gate.sentence.startswith("mine/ wins: pretraining paid; +20.0 points over default (")
    assert gate.sentence.endswith("beyond the noise")
    assert "over the raw input" in gate.sentence


def test_a_win_within_the_noise_did_not_pay():
    gate = rank([Rival("mine/", hits(0.81), pretrained=True), Rival("default", hits(0.80, 1))], GROUPS, 5)
    assert gate.places[0].rival.name == "mine/"
    assert gate.paid is False
    assert "not beyond the noise" in gate.sentence


def test_another_winner_is_named():
    gate = rank([Rival("mine/", hits(0.6), pretrained=True), Rival("default", hits(0.9, 1))], GROUPS, 5)
    assert gate.paid is False
    assert gate.sentence.startswith("default wins: pretraining did not pay; +30.0 points over mine/")


def test_of_two_that_were_pretrained_the_better_need_not_beat_the_other():
    rest = [Rival("input", hits(0.5, 2)), Rival("scratch", hits(0.4, 3)), Rival("default", hits(0.6, 4))]
    ours = [Rival("a/", hits(0.91), pretrained=True), Rival("b/", hits(0.90), pretrained=True)]
    assert rank([*ours, *rest], GROUPS, 5).paid is True


def test_without_all_that_it_must_beat_it_is_open_whether_it_paid():
    gate = rank([Rival("a/", hits(0.91), pretrained=True), Rival("input", hits(0.5, 2))], GROUPS, 5)
    assert gate.paid is None
    assert "open without scratch and default" in gate.sentence


def test_a_network_that_learned_these_very_classes_proves_nothing():
    rest = [Rival("input", hits(0.5, 2)), Rival("scratch", hits(0.4, 3)), Rival("default", hits(0.6, 4))]
    gate = rank([Rival("a/", hits(0.91), pretrained=True, known=7), *rest], GROUPS, 5)
    assert gate.paid is None
    assert "learned the classes of 7 of these pictures" in gate.sentence


def test_without_any_that_was_pretrained_nothing_is_said_of_it():
    gate = rank([Rival("default", hits(0.9)), Rival("input", hits(0.5, 1))], GROUPS, 5)
    assert gate.paid is None
    assert "pretraining" not in gate.sentence
    document = gate.to_json()
    assert document["winner"] == "default"
    assert document["ranking"][1]["behind"][0] > 0.3


def test_members_of_one_group_count_as_one():
    alone = rank([Rival("a", hits(0.8)), Rival("b", hits(0.75, 1))], GROUPS, 5).places[1].behind
    paired = rank(
        [Rival("a", np.repeat(hits(0.8)[:100], 4)), Rival("b", np.repeat(hits(0.75, 1)[:100], 4))], GROUPS // 4, 5
    )
    behind = paired.places[1].behind
    assert behind.high - behind.low > 1.5 * (alone.high - alone.low)
