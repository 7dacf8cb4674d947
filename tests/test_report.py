"""The report is one file that stands alone, says what the record says, and survives any label and file name."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft.curve_drawing import plot_curve, shortened, spread, ticks
from regraft.data import printable
from regraft.report import (
    LISTED,
    PAIRS,
    REPORT_FILE,
    THUMBNAIL,
    class_rows,
    confused_pairs,
    judge,
    ladder_of,
    render,
    spans,
    thumbnail,
    way_of,
    write_report,
)

SECTIONS = ["verdict", "curve", "ladder", "time", "classes", "calibration", "worst", "left-out", "how"]
VOID = {"meta", "br", "img", "link", "hr"}
BLOCKS = {"p", "div", "td", "th", "li", "dt", "dd", "h1", "h2", "h3", "title", "summary"}
DRAWN = {"rect", "path", "circle", "polygon", "polyline"}
Record = dict[str, Any]


def a_point(name: str, depth: int, score: float) -> Record:
    interval = {"score": score, "low": score - 0.04, "high": score + 0.03}
    return {"name": name, "depth": depth, "dim": 1280, "log_loss": 0.5, "strength": 0.1, "shape": None} | interval


def a_record(classes: int = 3, test: bool = True, chosen: str = "b+c") -> Record:
    """A record as `fit` leaves it, with the least that it holds; the first class has the lowest recall."""
    labels = [f"class{i}" for i in range(classes)]
    confusion = [[0] * classes for _ in labels]
    for i in range(classes):
        confusion[i][i] = 10 + i
        confusion[i][(i + 1) % classes] = 2
    worst = [
        {
            "where": f"{i}.png",
            "label": labels[0],
            "predicted": labels[1],
            "probability": 0.9,
            "probability_of_label": 0.1,
        }
        for i in range(3)
    ]
    results = {"calibration_error": 0.0312, "confusion": confusion, "worst": worst}
    score = {"score": 0.8712, "low": 0.8321, "high": 0.9023}
    cuts = [a_point("input", 0, 0.5), a_point("a", 4, 0.6), a_point("b", 20, 0.8), a_point("c", 40, 0.86)]
    used = sum(map(sum, confusion))
    seconds = {"prepare": 1.0, "features": 4.0, "probes": 2.0, "head": 0.5, "test": 2.0, "total": 10.0}
    judged = {"accuracy": 0.9009, "interval": [0.8319, 0.9468], "balanced_accuracy": 0.83, "pictures": used}
    return {
        "status": "finished",
        "regraft": "0.1.0",
        "options": {"data": "/photos", "test": None, "backbone": "default", "group": None, "seed": 0, "strict": False},
        "data": {
            "labels": labels,
            "pictures": 2 * used,
            "used": used,
            "per_class": [sum(row) for row in confusion],
            "grey": False,
            "left_out": [],
            "leaks": [],
            "notes": [],
            "ignored": [],
            "folds": {"repeats": 3, "folds": 5},
        },
        "numerics": {"device": "cpu", "precision": "bfloat16", "agreement": 0.9961},
        "curve": {
            "backbone": {
                "spec": "default",
                "architecture": "somenet",
                "weights": "c0ffee",
                "pretrained": True,
                "licence": "Apache-2.0",
            },
            "cuts": cuts,
            "several": [a_point("b+c", 40, 0.87), a_point("a+c (roots)", 40, 0.85)],
            "recommended": chosen,
            "transfer_helps": chosen != "input",
            "reason": "transfer helps: c is +36.0 points (+30.0 to +42.0) better than the raw input",
            "gain": {"score": 0.36, "low": 0.30, "high": 0.42},
            "seconds": seconds,
        },
        "chosen": {
            "name": chosen,
            "cuts": chosen.removesuffix(" (roots)").split("+"),
            "strength": 0.1,
            "score": score,
            "own_score": score,
        }
        | results,
        "test": judged | results | {"labels": labels, "left_out": []} if test else None,
        "forward_passes": used,
        "seconds": seconds,
        "machine": {"python": "3.11.7", "torch": "2.13.0", "cores": 2},
    }


def an_attempt(name: str, cut: str, gain: float | None, **facts: Any) -> Record:
    """What came of a candidate on all 5 folds; without a gain it was not tried."""
    came: Record = {
        "status": "skipped",
        "reason": "it would take about 90 s of the 20 s left",
        "folds": [],
        "seconds": 0.0,
    }
    came |= {"score": None, "log_loss": None, "gain": None, "log_loss_gain": None, "epochs_kept": 0, "share": 1.0}
    if gain is not None:
        came |= {"status": "finished", "reason": "", "folds": [0, 1, 2, 3, 4], "score": 0.87 + gain, "log_loss": 0.5}
        came |= {"gain": [gain, gain - 0.02, gain + 0.03], "log_loss_gain": [gain, gain - 0.01, gain + 0.01]}
        came |= {"epochs_kept": 9, "share": 0.5, "seconds": 31.4}
    settings: Record = {
        "end": "c",
        "fresh": "",
        "hidden": [],
        "opens": [],
        "epochs": 10,
        "lr": 0.001,
        "decay": 0.7,
        "rate_factor": 1.0,
    }
    settings["augment"] = {"crop": True, "flip": False, "light": False, "mix": True, "noise": False}
    return {"name": name, "does": f"what {name} does", "cut": cut} | settings | came | facts


def with_ladder(record: Record, winner: str | None = None, **facts: Any) -> Record:
    """The record with a ladder of four candidates; facts: of the winner's attempt."""
    attempts = [
        an_attempt("scratch", "input", -0.03, end="small network"),
        an_attempt("top layers", "b", 0.01),
        an_attempt("layers dropped", "a", None, end="b"),
        an_attempt("all layers", "picture", None),
    ]
    for attempt in attempts:
        if attempt["name"] == winner:
            attempt |= {**an_attempt(attempt["name"], attempt["cut"], 0.045, end=attempt["end"]), **facts}
            record["chosen"]["name"] = winner
    probe = {"name": record["curve"]["recommended"], "score": 0.87, "log_loss": 0.55}
    record["ladder"] = {"probe": probe, "attempts": attempts, "winner": winner, "reason": "as it is"}
    record["curve"] |= {"score": 0.8642, "interval": [0.81, 0.9]}
    record["options"] |= {"budget": "5m", "augment": None, "balanced": False, "clipping": ["norm", 1.0]}
    record["seconds"] |= {"search": 60.0, "final": 20.0, "total": 90.0}
    return record


def no_worst(record: Record) -> Record:
    record["test"]["worst"] = []
    return record


def empty_class(record: Record) -> Record:
    record["test"]["confusion"][1] = [0, 0, 0]
    return record


CASES: dict[str, Callable[[], Record]] = {
    "a test": lambda: a_record(),
    "no test": lambda: a_record(test=False),
    "the raw input": lambda: a_record(chosen="input"),
    "one cut": lambda: a_record(chosen="b"),
    "2 classes": lambda: a_record(classes=2),
    "100 classes": lambda: a_record(classes=100),
    "100 classes, no test": lambda: a_record(classes=100, test=False),
    "nothing misjudged": lambda: no_worst(a_record()),
    "a class without test pictures": lambda: empty_class(a_record()),
    "a ladder, no winner": lambda: with_ladder(a_record()),
    "a winner": lambda: with_ladder(a_record(), "top layers"),
    "a winner, no test": lambda: with_ladder(a_record(test=False), "layers dropped"),
    "scratch wins": lambda: with_ladder(a_record(), "scratch"),
    "a winner above the raw input": lambda: with_ladder(a_record(chosen="input"), "all layers"),
}


class Page(HTMLParser):
    """What a browser would see: elements with attributes in order, text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN, f"<{tag}/> closes nothing in HTML"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in BLOCKS:
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def with_class(self, *names: str) -> list[tuple[str, dict[str, str]]]:
        return [(tag, attrs) for tag, attrs in self.elements if set(names) <= set(attrs.get("class", "").split())]


def grey(where: str) -> np.ndarray | None:
    return np.full((8, 8, 1), 90, dtype=np.uint8)


def noise(where: str) -> np.ndarray | None:
    return np.random.default_rng(len(where)).integers(0, 256, (600, 800, 3), dtype=np.uint8)


def unreadable(where: str) -> np.ndarray | None:
    return None


def words(text: str) -> str:
    return " ".join(text.split())


def page_of(record: Record, pixels: Callable[[str], np.ndarray | None] = grey) -> Page:
    page = Page(render(record, pixels))
    page.text = words(page.text)
    return page


# --- the page as a whole ---


@pytest.mark.parametrize("case", CASES)
def test_every_report_is_closed_html_with_all_sections_in_order(case: str) -> None:
    record = CASES[case]()
    page = page_of(record)
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert ids == [section for section in SECTIONS if section != "ladder" or "ladder" in record]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_fetched_and_nothing_runs(case: str) -> None:
    html = render(CASES[case](), noise)
    page = Page(html)
    references = [
        v for _, attrs in page.elements for k, v in attrs.items() if k in ("src", "href", "srcset", "xlink:href")
    ]
    assert references
    assert all(reference.startswith(("#", "data:image/")) for reference in references)
    assert "url(" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not [k for _, attrs in page.elements for k in attrs if k.startswith("on")]
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_links_inside_the_page_lead_somewhere() -> None:
    for record, sections in (
        (a_record(), set(SECTIONS) - {"ladder"}),
        (with_ladder(a_record(), "top layers"), set(SECTIONS)),
    ):
        targets = {attrs["href"][1:] for tag, attrs in page_of(record).elements if tag == "a"}
        assert targets <= sections
        assert ("ladder" in targets) == ("ladder" in sections)


def test_a_report_is_written_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / REPORT_FILE
    write_report(path, a_record(test=False), grey)
    write_report(path, a_record(), grey)
    assert path.read_bytes().decode("utf-8") == render(a_record(), grey)
    assert [p.name for p in path.parent.iterdir()] == [REPORT_FILE]


def test_the_record_is_left_as_it_was() -> None:
    record = a_record()
    before = copy.deepcopy(record)
    render(record, grey)
    assert record == before


def test_a_record_that_went_through_json_gives_the_same_report() -> None:
    assert render(json.loads(json.dumps(a_record())), grey) == render(a_record(), grey)


def test_hundred_classes_and_many_noisy_pictures_stay_below_a_megabyte() -> None:
    record = a_record(classes=100)
    record["test"]["worst"] = [copy.deepcopy(record["test"]["worst"][0]) for _ in range(24)]
    assert len(render(record, noise).encode()) < 1_000_000


def test_the_largest_confusion_table_stays_small() -> None:
    record = a_record(classes=30)
    record["test"]["confusion"] = [[3] * 30 for _ in range(30)]
    html = render(record, grey)
    assert "matrix" in html
    assert len(html.encode()) < 250_000


# --- the verdict ---


def test_the_verdict_names_the_cut_the_score_the_test_and_the_reason() -> None:
    text = page_of(a_record()).text
    assert (
        "Reuse somenet with one head on 2 cuts, b+c: it judges 87.1 % of unseen pictures right "
        "(95 % interval 83.2 to 90.2), and 90.1 % of 39 test pictures (83.2 to 94.7)."
    ) in text
    assert "Why: transfer helps: c is +36.0 points (+30.0 to +42.0) better than the raw input." in text


def test_the_verdict_without_a_test_claims_none() -> None:
    text = page_of(a_record(test=False, chosen="b")).text
    assert "Reuse somenet up to b: it judges 87.1 % of unseen pictures right (95 % interval 83.2 to 90.2)." in text
    assert "no test pictures were given" in text
    assert "90.1 %" not in text


def test_the_verdict_says_plainly_when_transfer_does_not_help() -> None:
    text = page_of(a_record(chosen="input")).text
    assert "Transfer does not help here: a head on the raw pixels, input, does as well as any part of somenet" in text
    assert "Reuse somenet" not in text


def test_a_network_of_ones_own_with_random_weights_is_called_so() -> None:
    record = a_record()
    record["curve"]["backbone"] |= {"architecture": "custom", "pretrained": False, "licence": None}
    text = page_of(record).text
    assert "Reuse your own network with random weights" in text
    assert "unknown: ask where the weights came from" in text


def test_a_test_that_was_learned_from_is_announced_beside_the_verdict() -> None:
    record = a_record()
    assert "not clean" not in page_of(record).text
    record["data"]["leaks"] = [{"tested": "test/x.png", "learned": "train/y.png", "equal": "pixels"}]
    text = page_of(record).text
    assert text.index("The test is not clean: 1 test picture was learned from too") < text.index("How many layers")
    assert "test/x.png: same pixels as train/y.png" in text


@pytest.mark.parametrize(
    ("chosen", "winner", "facts", "said"),
    [
        (
            "b+c",
            "top layers",
            {},
            "Reuse somenet up to b, the layers above fine-tuned, with the probe beside them (share one half):",
        ),
        ("b+c", "top layers", {"share": 1.0}, "Reuse somenet up to b, the layers above fine-tuned: it judges"),
        ("b+c", "top layers", {"fresh": "b"}, "up to b, the layers above replaced by fresh ones, with the probe"),
        ("b+c", "top layers", {"hidden": [256]}, "up to b, the layers above and new hidden ones fine-tuned, with"),
        ("b+c", "top layers", {"opens": ["c"]}, "up to b, the layers above unfrozen from the top and fine-tuned, with"),
        (
            "b+c",
            "layers dropped",
            {},
            "Reuse somenet up to b, the layers above dropped and those from a on fine-tuned, with the probe",
        ),
        (
            "input",
            "all layers",
            {},
            "Reuse all layers of somenet, every one trained further, with a head on the raw pixels beside them (share",
        ),
        (
            "b+c",
            "scratch",
            {},
            "A small network from scratch does best here, with the probe on b+c of somenet beside it (share one half); "
            "no fine-tuned layers that were tried are better beyond the noise: it judges",
        ),
        (
            "b+c",
            "scratch",
            {"share": 1.0},
            "A small network from scratch does best here, alone; no reuse of somenet that was tried is better",
        ),
        (
            "input",
            "scratch",
            {"share": 1.0},
            "Transfer does not help here: a small network from scratch does best, and no reuse of somenet that was "
            "tried is better beyond the noise; it judges",
        ),
        (
            "input",
            "scratch",
            {},
            "a small network from scratch, with a head on the raw pixels beside it (share one half), does best,",
        ),
    ],
)
def test_the_verdict_says_how_the_winner_reuses_the_network(chosen: str, winner: str, facts: Record, said: str) -> None:
    text = page_of(with_ladder(a_record(chosen=chosen), winner, **facts)).text
    assert said in text
    assert text.count("Transfer does not help here") == (chosen == "input" and winner == "scratch")


def test_the_verdict_gives_the_winners_gain_as_its_reason_and_the_probes_reason_after_it() -> None:
    record = with_ladder(a_record(), "top layers", folds=[0, 1])
    text = page_of(record).text
    assert (
        "Why: on 2 of 5 folds top layers is +4.5 (+2.5 to +7.5) points over the probe on b+c, "
        "and −0.045 (−0.055 to −0.035) in log-loss, where lower is better."
    ) in text
    assert "Among the probes: transfer helps: c is +36.0 points" in text
    assert "score, cross-validated on 2 of 5 folds 87.1 %" in text
    assert "top layers over the probe +4.5 points, +2.5 to +7.5 (95 %)" in text


def test_the_verdict_is_the_probes_where_nothing_tried_is_better() -> None:
    text = page_of(with_ladder(a_record())).text
    assert "Reuse somenet with one head on 2 cuts, b+c: it judges 87.1 %" in text
    assert "Beyond the probe 2 candidates were judged; none is better beyond the noise." in text
    text = page_of(with_ladder(a_record(chosen="input"))).text
    assert "Transfer does not help here: a head on the raw pixels, input, does as well as any part of somenet" in text


# --- the curve ---


@pytest.mark.parametrize("chosen", ["input", "b", "c", "b+c", "a+c (roots)"])
def test_exactly_the_recommended_point_is_marked(chosen: str) -> None:
    page = page_of(a_record(chosen=chosen))
    marks = page.with_class("cut") + page.with_class("head")
    assert len(marks) == 6
    assert len([attrs for _, attrs in marks if "picked" in attrs["class"]]) == 1
    assert len(page.with_class("ring")) == 1
    assert re.search(rf"{re.escape(chosen)} \([^)]*\): [^:]*, recommended", page.text)


def test_the_choice_of_the_curve_stays_marked_as_the_probe_below_a_winner() -> None:
    page = page_of(with_ladder(a_record(chosen="b"), "top layers"))
    assert len(page.with_class("ring")) == 1
    assert re.search(r"b \(depth 20\): [^:]*, the probe", page.text)
    assert "recommended" not in page.text
    assert "b (the probe) 20" in page.text
    assert "chosen on the other folds alone in each fold, it scores 86.4 % (81.0 to 90.0)" in page.text
    assert "it is that of top layers, which was tried beyond the probe" in page.text


def test_every_point_tells_its_score_and_interval_when_pointed_at() -> None:
    titles = words(" ".join(re.findall(r"<title>(.*?)</title>", render(a_record(), grey), re.S)))
    assert "a (depth 4): 60.0 %, 95 % interval 56.0 % to 63.0 %" in titles
    assert "b+c (one head on 2 cuts): 87.0 %, 95 % interval 83.0 % to 90.0 %, recommended" in titles


def test_the_curve_is_drawn_to_scale() -> None:
    record = a_record()
    plot = plot_curve(record["curve"], "b+c", 0.4)
    a, b, c = plot.cuts[1:]
    assert (plot.cuts[0].x, c.x) == (plot.left, plot.right)
    assert (b.x - plot.left) / (a.x - plot.left) == pytest.approx(5, abs=0.01)
    assert (a.y - b.y) / (b.y - c.y) == pytest.approx((0.8 - 0.6) / (0.86 - 0.8), abs=0.02)
    for point in plot.cuts + plot.several:
        assert plot.top <= point.y_high < point.y < point.y_low <= plot.bottom


def test_heads_on_several_cuts_stand_apart_and_show_which_cuts_they_read() -> None:
    plot = plot_curve(a_record()["curve"], "b+c", 0.4)
    first, second = plot.several
    assert plot.right < first.x < second.x < plot.width
    x = {p.name: p.x for p in plot.cuts}
    assert first.members == (x["b"], x["c"])
    assert second.members == (x["a"], x["c"])
    assert (first.mark, first.parts, first.note) == ("A", ("b", "c"), "")
    assert (second.mark, second.parts, second.note) == ("B", ("a", "c"), "roots")
    text = page_of(a_record()).text
    assert "A: one head on 2 cuts at once: b, c. B: one head on 2 cuts at once (roots): a, c." in text
    assert "Roots: the head sees the signed square roots" in text


def test_a_curve_without_heads_on_several_cuts_uses_the_whole_width() -> None:
    curve = a_record()["curve"]
    curve["several"] = []
    assert plot_curve(curve, "b", 0.4).right > plot_curve(a_record()["curve"], "b", 0.4).right


def test_the_level_of_the_raw_input_goes_across_at_its_own_height() -> None:
    plot = plot_curve(a_record()["curve"], "b", 0.4)
    (_, level), *others = page_of(a_record()).with_class("level")
    assert others == []
    assert level["d"].startswith(f"M{plot.left} {plot.cuts[0].y}H")


def test_a_constant_answer_is_drawn_only_where_it_falls_on_the_drawing() -> None:
    curve = a_record()["curve"]
    assert plot_curve(curve, "b", 0.01).majority is None
    assert plot_curve(curve, "b", 0.5).majority == plot_curve(curve, "b", 0.01).cuts[0].y


def test_perfect_scores_at_every_depth_can_be_drawn() -> None:
    curve = a_record()["curve"]
    for point in curve["cuts"] + curve["several"]:
        point |= {"score": 1.0, "low": 1.0, "high": 1.0}
    plot = plot_curve(curve, "b", 0.4)
    assert {p.y for p in plot.cuts} <= {plot.top, plot.bottom}


def test_the_table_below_holds_every_point_of_the_curve() -> None:
    record = a_record()
    text = page_of(record).text
    table = text[text.index("All marks as a table") : text.index("Where the time went")]
    for point in record["curve"]["cuts"] + record["curve"]["several"]:
        assert f"{100 * point['score']:.1f} %" in table


@pytest.mark.parametrize(("low", "high"), [(41.6, 90.3), (97, 100), (99.9, 100), (0, 100), (50, 50), (0, 0), (0, 731)])
def test_ticks_are_few_even_and_reach_over_all_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    assert len(set(np.diff(found))) == 1


def test_crowded_names_are_spread_without_changing_places() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        places = sorted(rng.uniform(64, 900, 25))
        found = spread(places, 15, 936)
        assert np.diff(found).min() > 14.7
        assert found[-1] <= 936
        assert np.abs(np.array(found) - places).max() < 200


def test_names_that_have_room_stay_under_their_marks() -> None:
    assert spread([64, 300, 500], 15, 936) == [64, 300, 500]


def test_long_names_keep_both_ends() -> None:
    assert shortened("blocks.5", 22) == "blocks.5"
    short = shortened("features.denseblock4.denselayer16.conv2", 22)
    assert len(short) == 22
    assert short.startswith("feature")
    assert short.endswith("layer16.conv2")


# --- the ladder ---


def ladder_text(record: Record) -> str:
    text = page_of(record).text
    return text[text.index("What was tried beyond the probe") : text.index("Where the time went")]


@pytest.mark.parametrize("ladder", [None, {"probe": {}, "attempts": [], "winner": None, "reason": ""}])
def test_without_attempts_there_is_no_ladder(ladder: Record | None) -> None:
    record = a_record()
    if ladder:
        record["ladder"] = ladder
    assert ladder_of(record) is None
    assert "beyond the probe" not in page_of(record).text.lower()


def test_every_candidate_has_a_rung_in_the_order_of_the_record_above_the_raw_pixels_and_the_probe() -> None:
    record = with_ladder(a_record(), "top layers")
    text = ladder_text(record)
    names = ["raw pixels", "the probe", *(f"what {a['name']} does" for a in record["ladder"]["attempts"])]
    places = [text.index(name, text.index("how it ended")) for name in names]
    assert places == sorted(places)
    assert len(page_of(record).with_class("rung")) == 4
    assert "raw pixels a head without any network score 50.0 %" in text
    assert "the probe a head on frozen features of b+c score 87.0 % log-loss 0.550 folds all" in text


def test_a_rung_tells_gain_score_log_loss_folds_time_and_who_answers() -> None:
    text = ladder_text(with_ladder(a_record(), "top layers"))
    assert (
        "top layers what top layers does; the probe beside it has one half of the say "
        "+4.5 (+2.5 to +7.5) points over the probe +4.5 (+2.5 to +7.5) points "
        "score 91.5 % log-loss 0.500 −0.045 (−0.055 to −0.035) folds 5 of 5 time 31.4 s won"
    ) in text
    assert "does; it answers alone" in ladder_text(with_ladder(a_record(), "top layers", share=1.0))


@pytest.mark.parametrize(
    ("came", "said"),
    [
        ({}, "not better than the probe beyond the noise"),
        ({"gain": [0.04, 0.01, 0.07]}, "better than the probe; top layers was taken instead"),
        (
            {"log_loss_gain": [0.04, 0.01, 0.07], "gain": [0.0, -0.1, 0.1]},
            "better than the probe; top layers was taken",
        ),
        ({"status": "stopped", "reason": "behind the probe", "folds": [0, 1]}, "stopped: behind the probe"),
        ({"status": "failed", "reason": "The loss was nan."}, "failed: The loss was nan."),
        ({"status": "unfinished", "reason": "the time ran out", "folds": [0, 1]}, "unfinished: the time ran out"),
        ({"status": "skipped", "reason": "no time", "folds": []}, "not tried: no time"),
    ],
)
def test_a_rung_tells_why_it_ended(came: Record, said: str) -> None:
    record = with_ladder(a_record(), "top layers")
    record["ladder"]["attempts"][0] |= came
    assert said in ladder_text(record)


def test_the_ladder_is_drawn_to_one_scale_with_the_probe_at_its_zero() -> None:
    ladder = ladder_of(with_ladder(a_record(), "top layers"))
    assert ladder is not None
    low, high = ladder.rungs[0].gain, ladder.rungs[1].gain
    assert low is not None
    assert high is not None
    assert ladder.zero == next(place for place, text in ladder.scale if text == "0")
    assert 0 <= low.start < low.at < low.end <= ladder.zero < high.start < high.at < high.end <= 1
    assert (high.at - ladder.zero) / (ladder.zero - low.at) == pytest.approx(0.045 / 0.03)
    assert ladder.rungs[1].change == pytest.approx((-0.045, -0.055, -0.035))


def test_only_the_winner_is_marked_and_the_probe_where_there_is_none() -> None:
    for winner, marked in (("top layers", "rung"), (None, "base")):
        page = page_of(with_ladder(a_record(), winner))
        assert [tag for tag, attrs in page.with_class("picked") if {"rung", "base"} & set(attrs["class"].split())] == [
            "tr"
        ]
        assert len(page.with_class(marked, "picked")) == 1


def test_a_ladder_that_could_not_judge_anything_has_no_scale_and_says_so() -> None:
    record = with_ladder(a_record())
    record["ladder"]["attempts"] = record["ladder"]["attempts"][2:]
    page = page_of(record)
    assert page.with_class("gain") == page.with_class("scale") == page.with_class("rail") == []
    assert "No candidate was judged, so the probe stays the answer" in page.text


def test_the_ladder_tells_what_the_pictures_give_without_transfer() -> None:
    text = ladder_text(with_ladder(a_record()))
    assert (
        "a head on the raw pixels scores 50.0 %, the probe on b+c 87.0 %; a small network trained from scratch" in text
    )
    assert "beside the probe 84.0 %, −3.0 (−5.0 to 0.0) points over the probe on the 5 folds that it saw." in text
    record = with_ladder(a_record())
    record["ladder"]["attempts"][0] = an_attempt("scratch", "input", None)
    assert "was not judged (it would take about 90 s of the 20 s left)" in ladder_text(record)


def test_what_was_trained_before_is_said_to_be_kept() -> None:
    assert "kept" not in ladder_text(with_ladder(a_record())).lower()
    text = ladder_text(with_ladder(a_record(), "top layers", seconds=0.0))
    assert "folds 5 of 5 kept won" in text
    assert "Kept: trained before, and found in the store." in text


def test_the_way_of_a_candidate_follows_from_what_it_trains() -> None:
    ways = {
        "scratch": an_attempt("", "input", None, end="small network"),
        "all": an_attempt("", "picture", None),
        "fresh": an_attempt("", "b", None, fresh="b"),
        "hidden": an_attempt("", "b", None, hidden=[256], opens=["c"]),
        "dropped": an_attempt("", "a", None, end="b"),
        "stages": an_attempt("", "a", None, opens=["b"]),
        "tuned": an_attempt("", "b", None),
        "solved": an_attempt("", "c", None, epochs=0),
    }
    assert {way: way_of(attempt, "c") for way, attempt in ways.items()} == {way: way for way in ways}


def test_two_probes_side_by_side_are_said_to_be_so() -> None:
    record = with_ladder(a_record())
    both = an_attempt("both probes", "c", 0.02, epochs=0, share=0.5)
    record["ladder"] |= {"attempts": [both], "winner": "both probes", "reason": "both probes: so"}
    record["chosen"]["name"] = "both probes"
    page = words(render(record, lambda where: None))
    assert "with a head on the raw pixels beside it; alone, neither is better than the other beyond the noise" in page
    assert "learning rate" not in page


# --- time ---


def test_the_total_is_not_counted_as_a_part_of_itself() -> None:
    found = spans({"prepare": 1.0, "features": 4.0, "total": 10.0})
    assert [(s.name, s.seconds) for s in found] == [("prepare", 1.0), ("features", 4.0), ("other", 5.0)]
    assert [s.start for s in found] == pytest.approx([0.0, 0.1, 0.5])
    assert sum(s.share for s in found) == pytest.approx(1)


def test_a_phase_that_is_not_known_shows_under_its_own_name() -> None:
    record = a_record()
    record["seconds"]["tuning"] = 3.25
    record["seconds"]["total"] = 14.0
    assert "tuning 3.2 s" in page_of(record).text


def test_passes_that_were_saved_by_the_store_are_told() -> None:
    record = a_record()
    assert "39 pictures were pushed through the frozen part" in page_of(record).text
    record["forward_passes"] = 5
    assert "The features of the others were in the store already" in page_of(record).text
    record["forward_passes"] = 0
    assert "No picture had to be pushed through the frozen part" in page_of(record).text


def test_trying_candidates_and_the_final_fit_are_phases_of_their_own() -> None:
    text = page_of(with_ladder(a_record(), "top layers")).text
    assert "head of the probe, on all pictures 0.5 s" in text
    assert "search: trying candidates beyond the probe 60.0 s" in text
    assert "training the winner, if there is one, on all pictures; saving the model 20.0 s" in text
    assert "final head, saving the model 0.5 s" in page_of(a_record()).text


def test_views_pushed_through_for_candidates_are_not_counted_for_the_curve() -> None:
    record = with_ladder(a_record(), "top layers")
    record["curve"]["forward_passes"], record["forward_passes"] = 39, 339
    text = page_of(record).text
    assert "39 pictures were pushed through the frozen part for the curve" in text
    assert "For what was tried beyond the probe 300 views of pictures were pushed through a frozen part." in text


# --- classes ---


def test_classes_come_from_the_test_where_there_is_one_and_the_page_says_so() -> None:
    record = a_record()
    record["chosen"]["confusion"] = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert judge(record).pictures == 39
    assert "Judged on the 39 test pictures by the saved model" in page_of(record).text
    record["test"] = None
    assert judge(record).pictures == 3
    assert "There are no test pictures, so these are 3 pictures out of fold" in page_of(record).text


def test_recall_and_precision_are_those_of_the_confusion_table_weakest_class_first() -> None:
    record = a_record()
    record["test"]["confusion"] = [[8, 2, 0], [0, 5, 5], [0, 0, 0]]
    first, second, third = class_rows(judge(record), {"class0": 7})
    assert (first.label, first.recall, first.precision, first.support) == ("class1", 0.5, 5 / 7, 10)
    assert (second.label, second.recall, second.precision, second.learned) == ("class0", 0.8, 1.0, 7)
    assert (third.label, third.recall, third.precision, third.support) == ("class2", None, 0.0, 0)


def test_a_class_without_test_pictures_has_a_dash_for_its_recall() -> None:
    text = page_of(empty_class(a_record())).text
    assert re.search(r"class1 0 – \d", text)


def test_few_classes_get_a_confusion_table_with_every_count() -> None:
    page = page_of(a_record())
    assert len(page.with_class("right")) == 3
    assert {attrs["title"] for _, attrs in page.with_class("wrong")} == {
        "class0, said class1: 2 of 12",
        "class1, said class2: 2 of 13",
        "class2, said class0: 2 of 14",
    }


def test_many_classes_get_the_pairs_that_are_confused_most_instead() -> None:
    record = a_record(classes=100)
    record["test"]["confusion"][7][3] = 9
    pairs = confused_pairs(judge(record), PAIRS)
    assert len(pairs) == PAIRS
    assert (pairs[0].label, pairs[0].predicted, pairs[0].count) == ("class7", "class3", 9)
    page = page_of(record)
    assert page.with_class("matrix") == []
    assert "100 classes: the 20 pairs confused most" in page.text
    assert all(f"class{i} " in page.text for i in range(100))


def test_calibration_is_given_out_of_fold_and_on_the_test() -> None:
    record = a_record()
    record["test"]["calibration_error"] = 0.1234
    text = page_of(record).text
    assert "Not as they stand; use them to rank pictures: the stated probability differs" in text
    assert "test pictures, saved model 12.3 % 39" in text
    assert re.search(r"out of fold \([^)]*\) 3.1 % 39", text)


# --- pictures ---


def test_the_most_wrong_pictures_stand_with_label_answer_and_probabilities() -> None:
    page = page_of(a_record())
    assert "is class0 10.0 % said class1 90.0 % 0.png" in page.text
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 3


def test_a_picture_that_cannot_be_read_any_more_keeps_its_words() -> None:
    page = page_of(a_record(), unreadable)
    assert "not to be read any more is class0" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_no_misjudged_picture_is_said_to_be_none() -> None:
    assert "None: all of the 39 test pictures were judged right." in page_of(no_worst(a_record())).text


@pytest.mark.parametrize("shape", [(600, 800, 3), (800, 600, 1), (1, 3000, 3), (28, 28, 1), (1, 1, 3)], ids=str)
def test_thumbnails_are_small_and_keep_their_proportions(shape: tuple[int, int, int]) -> None:
    made = thumbnail(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert made is not None
    with Image.open(io.BytesIO(base64.b64decode(made.uri.partition(",")[2]))) as image:
        width, height = image.size
    shrink = min(1.0, THUMBNAIL / max(shape[:2]))
    assert (width, height) == (max(1, round(shape[1] * shrink)), max(1, round(shape[0] * shrink)))
    assert made.tiny == (max(shape[:2]) <= THUMBNAIL // 2)


def test_flat_and_grey_thumbnails_have_the_colour_of_the_picture() -> None:
    made = thumbnail(np.full((300, 300, 1), 90, dtype=np.uint8))
    assert made is not None
    with Image.open(io.BytesIO(base64.b64decode(made.uri.partition(",")[2]))) as image:
        assert np.abs(np.asarray(image.convert("L")).astype(int) - 90).max() <= 2


# --- what was left out ---


def test_files_left_out_are_all_counted_and_the_first_are_named() -> None:
    record = a_record()
    record["data"]["left_out"] = [{"where": f"x/{i}.png", "reason": "it is empty."} for i in range(LISTED + 23)]
    record["data"]["notes"] = [{"where": "n.gif", "reason": "first of 12 frames used"}]
    record["data"]["ignored"] = [{"where": "Thumbs.db", "reason": "a file of the operating system"}]
    record["test"]["left_out"] = [{"where": "test/t.png", "reason": "it is cut short."}]
    text = page_of(record).text
    assert "73 pictures were left out." in text
    assert "Pictures not learned from 73 Test pictures not judged 1" in text
    assert text.count(": it is empty.") == LISTED
    assert "and 23 more, all in record.json" in text
    for file in (
        "n.gif: first of 12 frames used",
        "Thumbs.db: a file of the operating system",
        "test/t.png: it is cut",
    ):
        assert file in text


# --- how ---


def test_options_numerics_folds_licence_and_versions_are_told() -> None:
    text = page_of(a_record()).text
    how = text[text.index("How it was done") :]
    for fact in (
        "data /photos",
        "group not given",
        "strict no",
        "architecture somenet",
        "pretrained, digest c0ffee",
        "licence Apache-2.0",
        "5-fold cross-validation, 3 times",
        "precision bfloat16",
        "cosine of 0.9961",
        "regraft 0.1.0",
        "torch 2.13.0",
    ):
        assert fact in how


def test_options_of_the_search_are_told_in_words() -> None:
    record = with_ladder(a_record(), "top layers", rate_factor=0.1)
    text = page_of(record).text
    how = text[text.index("How it was done") :]
    for fact in (
        "budget 5m",
        "augment not given",
        "balanced no",
        "clipping gradients by norm, at 1.0",
        "trained part what top layers does; 9 epochs, learning rate 0.0001 of the highest layers, 0.7 of it for each",
        "its share in the answer is one half",
        "augmentation crops, mixes of stored features",
        "head linear, penalty 0.1, on b, c",
    ):
        assert fact in how
    record["options"]["augment"] = ["crop", "light"]
    assert "augment crop, light balanced no" in page_of(record).text
    record["options"]["augment"] = []
    assert "augment none balanced no" in page_of(record).text


def test_a_winner_that_answers_alone_has_no_head_beside_it() -> None:
    text = page_of(with_ladder(a_record(), "top layers", share=1.0)).text
    assert "it answers alone augmentation" in text
    assert "head none beside the trained part; the probe was linear" in text


# --- labels and file names of any kind ---

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "caf\udce9",
    "bell\x07 nul\x00 escape\x1b[31m",
    "line\nbreak\ttab",
    "right\u202eot-left",
    "</title></style><b>",
    "{{ 7 * 7 }} {% raw %} &amp; &lt;",
    "ﷺ 猫 😀",
]


def put_everywhere(record: Record, text: str) -> Record:
    """The record with this text wherever a label, a path, a name or a reason stands."""
    record["data"]["labels"][0] = text
    record["test"]["labels"] = list(record["data"]["labels"])
    for item in record["test"]["worst"]:
        item |= {"where": text, "label": text, "predicted": text}
    for group in ("left_out", "notes", "ignored"):
        record["data"][group] = [{"where": text, "reason": text}]
    record["data"]["leaks"] = [{"tested": text, "learned": text, "equal": "bytes"}]
    record["data"]["per_class"][0] = 99
    record["options"] |= {"data": text, "group": text, text: text}
    record["curve"]["reason"] = text
    record["curve"]["backbone"] |= {"architecture": text, "licence": text, "weights": text}
    record["curve"]["cuts"][1]["name"] = text
    record["chosen"]["cuts"] = [text]
    record["machine"]["python"] = text
    if "ladder" in record:
        for attempt in record["ladder"]["attempts"]:
            attempt |= {"does": text, "reason": text, "opens": [text]}
            attempt["augment"][text] = True
        winner = next(a for a in record["ladder"]["attempts"] if a["name"] == record["ladder"]["winner"])
        winner |= {"name": text, "cut": text}
        record["ladder"] |= {"winner": text, "reason": text}
        record["ladder"]["probe"]["name"] = text
        record["options"] |= {"augment": [text], "clipping": [text, text]}
    return record


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("classes", [3, 40])
def test_labels_and_names_of_any_kind_stay_text(text: str, classes: int, tmp_path: Path) -> None:
    path = tmp_path / REPORT_FILE
    write_report(path, put_everywhere(with_ladder(a_record(classes), "top layers"), text), grey)
    html = path.read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]", html)
    page, plain = Page(html), page_of(put_everywhere(with_ladder(a_record(classes), "top layers"), "harmless"))
    assert page.open == []
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [set(attrs) for _, attrs in page.elements] == [set(attrs) for _, attrs in plain.elements]


def test_what_cannot_be_shown_is_spelled_out() -> None:
    text = page_of(put_everywhere(a_record(), "caf\udce9\x07")).text
    assert f"is {printable('caf' + chr(0xDCE9))}\\x07 10.0 %" in text


def test_what_can_be_shown_is_shown_as_it_is() -> None:
    assert "is ﷺ 猫 😀 10.0 %" in page_of(put_everywhere(a_record(), "ﷺ 猫 😀")).text
