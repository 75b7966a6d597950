"""Attacks on the built-in data set: its determinism, its rules, and its files."""
import hashlib, json, os, platform, signal, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from course_lib import pocket
from course_lib.pocket import (DRAW, POCKET_CLASSES, RARE, SPLITS, arrange, cut_out, draw_decoy,
                               extent, make_pocket, mix, plan, pocket_picture, raster, voc_xml)

BOXES = "40ea62275dd415b507bdc99444b57f9b64ae6822ae31f170663dfc7da69aeef1"
PIXELS = "06ac122a730707c98b55a6a46d00305b3f3768323e22a23c3f588f2620711fec"
TESTED = {"resvg_py": "0.5.0", "pillow": "13.0.0", "numpy": "2.4.6"}
SMALL = dict(n_train=6, n_valid=3, n_test=2, size=64)


def labels(index, seed=42, size=256):
    "The objects of a picture, without painting it."
    return [item.label() for item in arrange(np.random.default_rng([seed, index]).spawn(3)[2], size)
            if item.name]


def whole(folder, n):
    "Is there a complete data set of `n` pictures in the folder?"
    names = [name for split in SPLITS
             for name in (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()]
    for name in names:
        Image.open(folder / "JPEGImages" / f"{name}.jpg").load()
        ElementTree.parse(folder / "Annotations" / f"{name}.xml")
    return len(names) == n and (folder / "pocket.json").is_file()


def leftovers(folder):
    return list(folder.parent.glob(f".{folder.name}-drawing-*"))


# The same everywhere

def test_boxes_of_the_first_hundred_pictures():
    lines = [json.dumps([i, thing["name"], thing["box"], thing["pose"], thing["truncated"],
                         thing["occluded"], thing["difficult"]])
             for i in range(100) for thing in labels(i)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == BOXES


def test_pixels_of_the_first_twenty_pictures():
    found = {name: version(name) for name in TESTED}
    if found != TESTED or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"the pixels are promised for {TESTED} on x86-64; here: {found} on "
                    f"{platform.machine()}")
    pixels = hashlib.sha256()
    for i in range(20): pixels.update(np.asarray(pocket_picture(42, i)[0]).tobytes())
    assert pixels.hexdigest() == PIXELS


def test_a_picture_can_be_drawn_alone_and_out_of_order():
    first, objects = pocket_picture(7, 5)
    pocket_picture(7, 4)
    again, objects_again = pocket_picture(7, 5)
    assert objects == objects_again == labels(5, seed=7)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert first.size == (256, 256) and first.mode == "RGB"


def test_neighbours_seeds_and_splits_differ():
    keys = [(42, 0), (42, 1), (43, 0), (42, 1_000_000), (42, 2_000_000)]
    pictures = {np.asarray(pocket_picture(seed, index, 64)[0]).tobytes() for seed, index in keys}
    assert len(pictures) == len(keys)


# The rules

def test_annotations_agree_with_a_second_way_of_counting():
    "Paint numbers instead of colours on a canvas three times as wide, and read everything off it."
    seen_flags, n_objects, size = set(), 0, 256
    for index in range(45):
        items = arrange(np.random.default_rng([13, index]).spawn(3)[2], size)
        wide = np.zeros((3 * size, 3 * size), int)
        alone = []
        for number, item in enumerate(items, 1):
            mask = item.layer[..., 3] >= 128
            y, x = size + item.y, size + item.x
            wide[y:y + mask.shape[0], x:x + mask.shape[1]][mask] = number
            inside = np.zeros_like(wide, bool)
            inside[y:y + mask.shape[0], x:x + mask.shape[1]] = mask
            alone.append((mask.sum(), inside[size:2 * size, size:2 * size].sum()))
        picture = wide[size:2 * size, size:2 * size]
        for number, (item, (silhouette, inside)) in enumerate(zip(items, alone), 1):
            if not item.name: continue
            ys, xs = np.nonzero(picture == number)
            box, thing = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), item.label()
            short = min(box[2] - box[0], box[3] - box[1])
            assert thing["box"] == box and thing["name"] in POCKET_CLASSES
            assert len(xs) >= 0.15 * silhouette and short >= 5, "too little of it to be kept"
            assert thing["truncated"] == (inside < 0.95 * silhouette)
            assert thing["occluded"] == (len(xs) < 0.90 * inside)
            assert thing["difficult"] == (len(xs) < 0.30 * silhouette or short < 8)
            seen_flags |= {(flag, thing[flag]) for flag in ("truncated", "occluded", "difficult")}
            n_objects += 1
    assert n_objects > 80 and len(seen_flags) == 6


def test_what_pictures_are_planned_to_show():
    plans = [plan(np.random.default_rng([3, i])) for i in range(4000)]
    n = np.array([len(p) for p in plans])
    sides = np.array([side for p in plans for _, side in p])
    names = [name for p in plans for name, _ in p]
    assert n.max() == 8 and 2.2 < n.mean() < 2.8 and 0.02 < (n == 0).mean() < 0.04
    assert sides.min() >= 0.05 and sides.max() <= 0.9 and (sides < 0.15).mean() > 0.1
    assert (sides > 0.5).mean() > 0.1
    usual = np.mean([names.count(name) for name in POCKET_CLASSES if name not in RARE])
    for name in POCKET_CLASSES:
        assert abs(names.count(name) / usual - RARE.get(name,
                                                        1)) < (0.08 if name in RARE else 0.25), name
    assert sum(len(p) >= 4 and len({name for name, _ in p}) == 1 for p in plans) > 0.05 * len(plans)


@pytest.mark.parametrize("draw", [*DRAW.values(), draw_decoy], ids=lambda draw: draw.__name__)
def test_no_drawing_leaves_the_canvas_that_is_measured(draw):
    for i in range(15):
        mask = raster(draw(np.random.default_rng([17, i])), (-30, -30, 160, 160), 80,
                      80)[..., 3] > 127
        x0, y0, x1, y1 = extent(mask)
        assert x1 - x0 > 15 and y1 - y0 > 6 and min(x0, y0) > 3 and max(x1, y1) < 77


@pytest.mark.parametrize("name", POCKET_CLASSES)
def test_a_cut_out_is_as_large_as_asked_for_and_whole(name):
    for i, side in enumerate((20, 60, 150)):
        layer, mirrored = cut_out(DRAW[name], np.random.default_rng([19, i]), side)
        x0, y0, x1, y1 = extent(layer[..., 3] > 127)
        assert 0.85 * side - 2 <= max(x1 - x0, y1 - y0) <= side + 1 and isinstance(mirrored, bool)
        rim = np.concatenate([layer[0, :, 3], layer[-1, :, 3], layer[:, 0, 3], layer[:, -1, 3]])
        assert rim.max() < 128, "cut off at the rim of its layer"


def test_other_sizes():
    for size in (64, 200, 320):
        picture, objects = pocket_picture(42, 1, size)
        assert picture.size == (size, size) and objects
        for thing in objects:
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size


# Small helpers

@settings(deadline=None, max_examples=50)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_extent_is_the_smallest_box(mask):
    x0, y0, x1, y1 = extent(mask)
    if not mask.any(): assert (x0, y0, x1, y1) == (0, 0, 0, 0)
    else:
        inside = mask[y0:y1, x0:x1]
        assert inside.sum() == mask.sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


@given(st.integers(0, 2 ** 24 - 1), st.integers(0, 2 ** 24 - 1))
def test_mix_ends_where_it_should(one, other):
    one, other = f"#{one:06x}", f"#{other:06x}"
    assert mix(one, other, 0) == one and mix(one, other, 1) == other


@given(st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(1, 56), st.integers(1, 56)),
       st.booleans(), st.booleans())
def test_voc_counts_from_one_and_includes_the_last_pixel(numbers, truncated, difficult):
    x, y, w, h = numbers
    thing = dict(name="cat", box=(x, y, x + w, y + h), pose="Left", truncated=truncated,
                 occluded=False, difficult=difficult)
    node = ElementTree.fromstring(voc_xml(12, [thing], 256))
    xmin, ymin, xmax, ymax = (int(node.findtext(f"object/bndbox/{tag}"))
                              for tag in ("xmin", "ymin", "xmax", "ymax"))
    assert (xmin, ymin, xmax - xmin + 1, ymax - ymin + 1) == (x + 1, y + 1, w, h)
    assert 1 <= xmin <= xmax <= 256
    assert node.findtext("object/truncated") == str(int(truncated))
    assert node.findtext("object/difficult") == str(int(difficult))
    assert node.findtext("filename") == "0000012.jpg" and node.findtext("size/width") == "256"


# The files

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return make_pocket(tmp_path_factory.mktemp("data") / "pocket", **SMALL)


def test_a_drawn_set_is_whole_and_says_what_it_is(drawn):
    assert whole(drawn, 11) and not leftovers(drawn)
    assert sorted(p.name for p in drawn.iterdir()) == ["Annotations", "ImageSets", "JPEGImages",
                                                       "pocket.json"]
    names = (drawn / "ImageSets" / "Main" / "val.txt").read_text().split()
    assert names == ["1000000", "1000001", "1000002"]
    text = (drawn / "Annotations" / "1000001.xml").read_text()
    assert text == voc_xml(1_000_001, pocket_picture(42, 1_000_001, 64)[1], 64)


def test_it_speaks_when_it_draws_and_is_silent_when_it_reuses(tmp_path, capfd):
    make_pocket(tmp_path / "p", n_train=2, n_valid=0, n_test=0, size=64)
    out, err = capfd.readouterr()
    assert out == "drawing pocket: 2 pictures\n" and err == ""
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    assert make_pocket(str(tmp_path / "p"), n_train=2, n_valid=0, n_test=0,
                       size=64) == tmp_path / "p"
    assert capfd.readouterr() == ("", "")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}


def test_a_larger_training_set_leaves_the_others_alone(drawn, tmp_path):
    other = make_pocket(tmp_path / "p", **(SMALL | dict(n_train=8)))
    for name in ("0000005", "1000002", "2000001"):
        assert (other / "Annotations" / f"{name}.xml").read_text() == (
            drawn / "Annotations" / f"{name}.xml").read_text()


def test_our_own_reader_reads_it(drawn):
    data = pytest.importorskip("course_lib.data")
    records, classes = data.read_voc(drawn, split="train", classes=POCKET_CLASSES)
    assert classes == POCKET_CLASSES and len(records) == 6
    for i, record in enumerate(records):
        objects = pocket_picture(42, i, 64)[1]
        assert record.boxes.tolist() == [list(map(float, thing["box"])) for thing in objects]
        assert [classes[label]
                for label in record.labels.tolist()] == [thing["name"] for thing in objects]
        assert record.difficult.tolist() == [thing["difficult"] for thing in objects]
        assert tuple(record.size) == (64, 64)


@pytest.mark.parametrize("change", [dict(seed=1), dict(n_train=7), dict(n_valid=2), dict(n_test=0),
                                    dict(size=80)])
def test_a_set_drawn_otherwise_is_reported_and_left_alone(drawn, change):
    before = (drawn / "pocket.json").read_bytes()
    with pytest.raises(ValueError, match=f"{list(change)[0]} is .* there.*delete that folder"):
        make_pocket(drawn, **(SMALL | change))
    assert (drawn / "pocket.json").read_bytes() == before and whole(drawn, 11)


def test_a_newer_drawing_is_not_mistaken_for_an_older_one(drawn, monkeypatch):
    monkeypatch.setattr(pocket, "DRAWING", pocket.DRAWING + 1)
    with pytest.raises(ValueError, match="drawing is"): make_pocket(drawn, **SMALL)


def test_somebody_elses_folder_is_never_touched(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="photos exists.*another folder"):
        make_pocket(folder, **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["photos", "cat.jpg"]
    assert (folder / "cat.jpg").read_bytes() == b"precious"
    with pytest.raises(FileExistsError, match="another folder"):
        make_pocket(folder / "cat.jpg", **SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="another folder"):
        make_pocket(tmp_path / "empty", **SMALL)
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "{}"])
def test_a_broken_manifest_is_reported(tmp_path, text):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pocket.json").write_text(text)
    with pytest.raises(ValueError, match="drawn in another way"):
        make_pocket(tmp_path / "p", **SMALL)
    assert (tmp_path / "p" / "pocket.json").read_text() == text


def test_missing_pictures_are_reported(tmp_path):
    folder = make_pocket(tmp_path / "p", **SMALL)
    (folder / "JPEGImages" / "0000003.jpg").unlink()
    with pytest.raises(ValueError, match="should hold 11 .* holds 10"): make_pocket(folder, **SMALL)


@pytest.mark.parametrize("wrong", [dict(n_train=-1), dict(size=10), dict(size=128.0), dict(seed=-3),
                                   dict(seed="x"), dict(n_test=None), dict(n_valid=True)])
def test_arguments_that_cannot_be_drawn(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"^{list(wrong)[0]}: must be a whole number"):
        make_pocket(tmp_path / "p", **(SMALL | wrong))
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(job): raise OSError("disk full")
    monkeypatch.setattr(pocket, "_draw_file", fail)
    with pytest.raises(OSError, match="disk full"): make_pocket(tmp_path / "p", **SMALL)
    assert not list(tmp_path.iterdir())


# Other processes

CALL = ("from course_lib.pocket import make_pocket; make_pocket({folder!r}, n_train={n}, "
        "n_valid=0, n_test=0, size=64)")


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_drawing_is_never_taken_for_a_finished_one(tmp_path):
    folder = tmp_path / "p"
    child = python(CALL.format(folder=str(folder), n=60))
    deadline = time.monotonic() + 60
    while len(
        list(tmp_path.glob(".p-drawing-*/JPEGImages/*.jpg"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not folder.exists()
    assert len(leftovers(folder)) == 1
    make_pocket(folder, n_train=60, n_valid=0, n_test=0, size=64)
    assert whole(folder, 60)


def test_what_a_killed_drawing_left_is_swept_away_a_day_later(tmp_path):
    for name, age in (("old", 25), ("new", 1)):
        (tmp_path / f".p-drawing-{name}").mkdir()
        os.utime(tmp_path / f".p-drawing-{name}", (time.time() - age * 3600,) * 2)
    make_pocket(tmp_path / "p", n_train=1, n_valid=0, n_test=0, size=64)
    assert [p.name for p in leftovers(tmp_path / "p")] == [".p-drawing-new"]


def test_two_processes_at_once_do_no_harm(tmp_path):
    folder = tmp_path / "p"
    children = [python(CALL.format(folder=str(folder), n=25)) for _ in range(2)]
    for child in children:
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
    assert whole(folder, 25) and not leftovers(folder)


def test_a_second_finisher_takes_the_first_ones_set(tmp_path, monkeypatch):
    "Another process finishes just before our rename."
    folder, fill = tmp_path / "p", pocket._fill
    def slow(part, *rest):
        fill(part, *rest)
        monkeypatch.setattr(pocket, "_fill", fill)
        make_pocket(folder, **SMALL)
    monkeypatch.setattr(pocket, "_fill", slow)
    assert make_pocket(folder, **SMALL) == folder
    assert whole(folder, 11) and not leftovers(folder)


def test_a_script_without_a_main_guard_works(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CALL.format(folder=str(tmp_path / "p"), n=70) + "\nprint('end')\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          timeout=120,
                          env=os.environ | {"PYTHONPATH": str(Path(pocket.__file__).parents[1])})
    assert done.returncode == 0 and done.stdout == "drawing pocket: 70 pictures\nend\n", done.stderr
    assert "Traceback" not in done.stderr and whole(tmp_path / "p", 70)
    assert not leftovers(tmp_path / "p")


def test_many_processes_draw_what_one_draws(tmp_path):
    folder = make_pocket(tmp_path / "p", n_train=64, n_valid=0, n_test=0, size=64)
    for i in (0, 33, 63):
        assert (folder / "Annotations" / f"{i:07d}.xml").read_text() == voc_xml(
            i, pocket_picture(42, i, 64)[1], 64)
