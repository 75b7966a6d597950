"""The scripts that readers repeat our numbers with."""
import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = map(str, (HERE, HERE / "experiments", HERE / "timings", HERE / "data"))
import ladder  # noqa: E402
import speedrun  # noqa: E402
from make_animals import make_animals  # noqa: E402
from course_lib.data import read_voc  # noqa: E402


def fake_voc(folder, sizes):
    "A VOC2012 of noise pictures, one dog in each, with the folders and tags of the real one."
    for sub in ("JPEGImages", "Annotations"): (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (h, w, 3),
                                     dtype=np.uint8)).save(folder / "JPEGImages" / f"p{i}.jpg")
        (folder / "Annotations" / f"p{i}.xml").write_text(
            f"<annotation><filename>p{i}.jpg</filename><size><width>{w}</width>"
            f"<height>{h}</height><depth>3</depth></size>"
            "<object><name>dog</name><difficult>0</difficult><bndbox><xmax>101</xmax>"
            "<xmin>11</xmin><ymax>61</ymax><ymin>21</ymin></bndbox>"
            "</object></annotation>")
    return folder


def test_the_lists_are_those_of_the_table():
    ids = {s: (HERE / "data" / f"voc2012_animals_{s}.txt").read_text().split()
           for s in ("train", "val")}
    assert {s: len(v) for s, v in ids.items()} == dict(train=1697, val=1329)
    assert len(set(ids["train"]) | set(ids["val"])) == 3026 and ids["train"] == sorted(ids["train"])


def test_pictures_and_boxes_shrink_together(tmp_path):
    voc = fake_voc(tmp_path / "VOC2012", [(500, 333), (200, 150)])
    out = make_animals(voc, tmp_path / "out" / "animals", ids=dict(train=["p0"], val=["p1"]))
    (big,), classes = read_voc(out, "train")
    (small,), _ = read_voc(out, "val")
    assert classes == ["dog"] and big.size == Image.open(big.path).size == (400, 266)
    assert small.size == (200, 150)
    assert small.boxes.tolist() == [[10, 20, 101, 61]]
    assert np.abs(big.boxes[0].numpy()
                  - np.array([8, 20 * 266 / 333, 80.8, 61 * 266 / 333])).max() <= .5
    assert ET.parse(out / "Annotations/p0.xml").find("object/name").text == "dog"


def test_nothing_half_done_stays(tmp_path):
    voc = fake_voc(tmp_path / "VOC2012", [(60, 60)])
    with pytest.raises(FileNotFoundError, match="p9.jpg"):
        make_animals(voc, tmp_path / "animals", ids=dict(train=["p0", "p9"]))
    (voc / "Annotations/p0.xml").write_text("<annotation>")
    with pytest.raises(Exception): make_animals(voc, tmp_path / "animals", ids=dict(train=["p0"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["VOC2012"]
    (tmp_path / "animals").mkdir()
    with pytest.raises(FileExistsError, match="Delete it"):
        make_animals(voc, tmp_path / "animals", ids=dict(train=["p0"]))


def test_every_rung_changes_something_and_stands_on_another():
    for rung, (name, on, changes) in ladder.RUNGS.items():
        if on is None: continue
        below, here = ladder.settings(on), ladder.settings(rung)
        assert list(ladder.RUNGS).index(on) < list(ladder.RUNGS).index(rung)
        assert {k for k in here if here[k] != below[k]} == set(changes) and changes, rung
    assert set(ladder.MIRRORED) <= set(ladder.RUNGS)


def test_stored_results_are_those_of_the_rungs():
    "Each result was measured with the settings that the rung has now."
    files = sorted(ladder.RESULTS.glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert file.stem == f"{result['rung']}-{result['seed']}"
        assert result["settings"] == ladder.settings(result["rung"])
        assert result["on"] == ladder.RUNGS[result["rung"]][1]
        assert result["name"] == ladder.RUNGS[result["rung"]][0]
        assert (result["train_pictures"], result["valid_pictures"]) == (1697, 1329)


def test_a_prediction_grows_with_the_pictures():
    "Ten times the pictures take ten times as long, but for what does not depend on them."
    phases = dict(imports=5, annotations=1, pictures=20, network=2, training=100, scoring=10)
    run = dict(seconds=phases, train_pictures=1655.1, scored_pictures=495.2, size=320, epochs=8)
    assert speedrun.predict(run) == dict(train=16551, scored=4952, size=320, epochs=8,
                                         seconds=5 + 2 + 10 * (1 + 20 + 100 + 10))


def test_a_stored_prediction_follows_from_its_run():
    for data, runs in json.loads((HERE / "results" / "speedrun.json").read_text()).items():
        for name, stored in runs.items():
            run, _, predicted = name.partition(": predicted")
            if predicted: assert stored == speedrun.predict(runs[run]), (data, name)
            else:
                assert stored["total_seconds"] == pytest.approx(sum(stored["seconds"].values()),
                                                                abs=.1)
