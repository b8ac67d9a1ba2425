"""Average precision: equal to pycocotools', and what its traps are."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import numpy as np
import pytest

from pipeline.detection import figures, masks
from pipeline.detection.figures import Found
from tests.detection.world import CLASSES, HEIGHT, WIDTH, scene


def scenes(count=12):
    return [scene(number, number % 4, number % 3 == 0)[1] for number in range(count)]


def guesses(found, seed=0, right=0.8):
    """Answers that are near the truth, or nowhere."""
    drawn = np.random.RandomState(seed)
    answers = []
    for one in found:
        here = []
        for thing in [*one.things, *one.single[:1]]:
            shift = drawn.randint(-2, 3, 4) if drawn.rand() < right else drawn.randint(-15, 16, 4)
            x, y = np.clip(np.array(thing.box[:2]) + shift[:2], 0, [WIDTH - 2, HEIGHT - 2])
            wide, high = np.clip(np.array(thing.box[2:]) + shift[2:], 1, [WIDTH - x, HEIGHT - y])
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[int(y) : int(y + high), int(x) : int(x + wide)] = 1
            name = thing.name if drawn.rand() < 0.9 else CLASSES[drawn.randint(2)]
            here.append(
                Found(name, float(drawn.rand()), (float(x), float(y), float(wide), float(high)), masks.encode(mask))
            )
        answers.append(here)
    return answers


@pytest.mark.parametrize("seed", range(5))
def test_all_figures_are_pycocotools(seed):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    found = scenes()
    answers = guesses(found, seed, 0.2 * seed + 0.1)
    ours = figures.measure(found, answers, CLASSES)
    for kind, name in figures.KINDS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = figures.truth_of(found, CLASSES)
            truth.createIndex()
            peer = cocoeval.COCOeval(truth, truth.loadRes(figures.results_of(found, answers, CLASSES, kind)), name)
            peer.evaluate()
            peer.accumulate()
            peer.summarize()
        theirs = [None if value < 0 else value for value in peer.stats.tolist()]
        assert [ours[kind][figure] for figure in figures.FIGURES] == pytest.approx(theirs, abs=1e-12)


def test_the_truth_itself_is_perfect_and_its_crowds_are_not_asked_for():
    found = scenes()
    answers = [[Found(t.name, 0.9, t.box, t.mask) for t in one.single] for one in found]
    measured = figures.measure(found, answers, CLASSES)
    for kind in figures.KINDS:
        assert measured[kind]["ap"] == pytest.approx(1) and measured[kind]["ar100"] == pytest.approx(1)
        assert list(measured[kind]["per_class"].values()) == pytest.approx([1, 1])
    # An answer inside a crowd counts neither way, one beside it is wrong.
    crowd = next(one for one in found if any(thing.crowd for thing in one.things))
    place = found.index(crowd)
    thing = next(thing for thing in crowd.things if thing.crowd)
    more = [*answers[:place], [*answers[place], Found(thing.name, 0.99, thing.box, thing.mask)], *answers[place + 1 :]]
    assert figures.measure(found, more, CLASSES)["mask"]["ap"] == pytest.approx(1)


def test_nothing_found_is_zero_and_what_no_object_defines_is_none():
    found = scenes()
    measured = figures.measure(found, [[] for _ in found], CLASSES)
    assert (measured["box"]["ap"], measured["mask"]["ap50"]) == (0.0, 0.0)
    assert measured["box"]["ap_large"] is None
    only = [dataclasses.replace(one, things=tuple(t for t in one.things if t.name == "red")) for one in found]
    measured = figures.measure(only, [[] for _ in only], CLASSES)
    assert measured["box"]["per_class"] == {"red": 0.0, "blue": None}


def test_answers_for_other_images_are_a_bug():
    with pytest.raises(AssertionError):
        figures.measure(scenes(3), [[]], CLASSES)
