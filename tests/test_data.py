"The readers of `course_lib.data`: formats, conventions, and every kind of broken file."
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from course_lib import checks as D
from course_lib.data import (VOC_CLASSES, Data, Record, get_data, hold_out, open_image, read_coco,
                             read_voc, as_rgb)


def obj(name="cat", box=(3, 2, 5, 3), difficult=0, extra=""):
    fields = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return (f"<object><name>{name}</name><difficult>{difficult}</difficult>{extra}"
            f"<bndbox>{fields}</bndbox></object>")


def xml(*objects, size=(8, 6)):
    return (f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height>"
            "<depth>3</depth></size>" + "".join(objects) + "</annotation>")


def voc(folder, pages, splits=None, size=(8, 6)):
    "A small data set in VOC's layout: pages is {id: xml}, splits {name: ids}."
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        Image.new("RGB", size, "gray").save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    for split, ids in (splits or {"train": list(pages)}).items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return folder


def coco(path, annotations=(), images=None, categories=None):
    images = images or [{"id": 7, "file_name": "a.png", "width": 8, "height": 6}]
    categories = categories or [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=list(annotations),
                                    categories=categories)))
    return path


def ann(bbox=(2, 1, 3, 2), id=1, image_id=7, category_id=3, **more):
    return dict(id=id, image_id=image_id, category_id=category_id, bbox=list(bbox), **more)


# the conventions

def test_voc_pixels_become_continuous(tmp_path):
    (record,), classes = read_voc(voc(tmp_path / "d",
                                      {"a": xml(obj(difficult=1), obj("dog", (1, 1, 8, 6)))}))
    assert record.boxes.tolist() == [[2, 1, 5, 3], [0, 0, 8, 6]]
    assert classes == ["cat", "dog"] and record.labels.tolist() == [0, 1]
    assert record.difficult.tolist() == [True, False] and record.size == (8, 6)
    assert (record.boxes.dtype, record.labels.dtype,
            record.difficult.dtype) == (torch.float32, torch.int64, torch.bool)


def test_coco_and_voc_agree(tmp_path):
    voc_boxes = read_voc(voc(tmp_path / "d",
                             {"a": xml(obj(box=(48, 240, 195, 371)), size=(353, 500))}))[0][0].boxes
    images = [{"id": 7, "file_name": "a.png", "width": 353, "height": 500}]
    coco_boxes = read_coco(coco(tmp_path / "a.json", [ann((47, 239, 148, 132))],
                                images))[0][0].boxes
    assert voc_boxes.equal(coco_boxes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(1, 8),
                          st.integers(1, 6)), max_size=6))
def test_the_pixels_of_a_voc_box_are_the_slice(tmp_path_factory, corners):
    "Painting the inclusive pixels and slicing with the read box give the same pixels."
    corners = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    folder = voc(tmp_path_factory.mktemp("d"), {"a": xml(*[obj(box=c) for c in corners])})
    record = read_voc(folder)[0][0]
    assert record.boxes.shape == (len(corners), 4)
    for (x0, y0, x1, y1), box in zip(corners, record.boxes.int().tolist()):
        painted = {(x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1)}
        assert painted == {(x + 1, y + 1) for x in range(box[0], box[2])
                           for y in range(box[1], box[3])}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-20, 20)] * 4), max_size=5))
def test_every_box_lies_inside_and_has_area(tmp_path_factory, boxes):
    path = coco(tmp_path_factory.mktemp("c") / "a.json",
                [ann(b, id=i) for i, b in enumerate(boxes)])
    b = read_coco(path)[0][0].boxes
    assert (b >= 0).all() and (b[:, 2] <= 8).all() and (b[:, 3] <= 6).all()
    assert b.shape[1] == 4 and ((b[:, 2:] - b[:, :2]) >= 0).all()


def test_fractions_are_accepted(tmp_path):
    record = read_voc(voc(tmp_path / "d", {"a": xml(obj(box=(1.5, 2.25, 7.5, "5.0")))}))[0][0]
    assert record.boxes.tolist() == [[.5, 1.25, 7.5, 5.]]


def test_parts_of_a_body_are_no_objects(tmp_path):
    part = ("<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
            "<ymax>2</ymax></bndbox></part>")
    record = read_voc(voc(tmp_path / "d", {"a": xml(obj("person", extra=part))}))[0][0]
    assert record.boxes.tolist() == [[2, 1, 5, 3]]


def test_an_empty_picture_is_ordinary(tmp_path, capsys):
    record = read_voc(voc(tmp_path / "d", {"a": xml(), "b": xml(obj())}))[0][0]
    assert record.boxes.shape == (0, 4) and record.labels.shape == (0,)
    assert record.difficult.shape == (0,)
    record = read_coco(coco(tmp_path / "a.json"), images=None)[0][0]
    assert record.boxes.shape == (0, 4) and record.labels.dtype == torch.long
    assert "warn" not in capsys.readouterr().out.lower()


def test_crowds_and_ignored_are_difficult(tmp_path):
    path = coco(tmp_path / "a.json",
                [ann(id=1), ann(id=2, iscrowd=1), ann(id=3, ignore=1, iscrowd=0)])
    assert read_coco(path)[0][0].difficult.tolist() == [False, True, True]


def test_categories_are_sorted_by_id_and_not_used_as_labels(tmp_path):
    records, classes = read_coco(coco(tmp_path / "a.json",
                                      [ann(category_id=3), ann(id=2, category_id=1)]))
    assert classes == ["dog", "cat"] and records[0].labels.tolist() == [1, 0]


def test_xml_is_not_trusted(tmp_path):
    bomb = ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]>'
            + xml(obj("&y;")))
    with pytest.raises(ValueError, match="a.xml"): read_voc(voc(tmp_path / "d", {"a": bomb}))
    steal = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>' + xml(obj("&x;"))
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ValueError, match="b.xml"): read_voc(voc(tmp_path / "e", {"b": steal}))


# what is wrong and cannot be repaired

@pytest.mark.parametrize("text, says", [
    (xml(obj(box=("nan", 2, 5, 3))), "object 1 (cat), xmin: 'nan'"),
    (xml(obj(), obj("dog", (1, "inf", 5, 3))), "object 2 (dog), ymin: 'inf'"),
    (xml(obj(box=(1, 2, "", 3))), "xmax: ''"),
    (xml(obj(box=(1, 2, 5, "three"))), "ymax: 'three'"),
    (xml(obj(box=(1, 2, 5))), "ymax: is missing"),
    (xml("<object><name>cat</name></object>"), "xmin: is missing"),
    (xml(obj(name=" ")), "object 1: has no <name>"),
    (xml(size=(0, 6)), "0 x 6"),
    (xml(size=(8.5, 6)), "8.5 x 6"),
    (xml(size=("wide", 6)), "<size>, width: 'wide'"),
    ("<annotation></annotation>", "<size>, width: is missing"),
    ("<annotation><size>", "not a proper XML file"),
    ("", "not a proper XML file"),
    ("no xml at all", "not a proper XML file"),
])
def test_bad_xml(tmp_path, text, says):
    with pytest.raises(ValueError) as error:
        read_voc(voc(tmp_path / "d", {"good": xml(obj()), "bad": text}))
    assert "Annotations/bad.xml" in str(error.value) and says in str(error.value)


def test_bad_bytes_in_xml(tmp_path):
    folder = voc(tmp_path / "d", {"a": ""})
    (folder / "Annotations/a.xml").write_bytes(b'<?xml version="1.0" '
                                               b'encoding="nonsense"?><annotation/>')
    with pytest.raises(ValueError, match="a.xml"): read_voc(folder)
    (folder / "Annotations/a.xml").write_bytes(b"\xff\xfe\x00<annotation>\x80")
    with pytest.raises(ValueError, match="a.xml"): read_voc(folder)


def test_missing_things(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): read_voc(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="JPEGImages"): read_voc(tmp_path / "other")
    folder = voc(tmp_path / "d", {"a": xml(obj()), "b": xml()})
    with pytest.raises(FileNotFoundError, match="tarin.txt.*train"): read_voc(folder, "tarin")
    (folder / "Annotations/b.xml").unlink()
    with pytest.raises(FileNotFoundError, match="Annotations/b.xml"): read_voc(folder)
    (folder / "JPEGImages/a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="train.txt, line 1.*picture a "): read_voc(folder)


def test_empty_and_doubled_splits(tmp_path):
    folder = voc(tmp_path / "d", {"a": xml(obj())}, {"train": ["a"], "empty": ["", " "],
                                                     "twice": ["a", "", "a"]})
    with pytest.raises(ValueError, match="empty.txt is empty"): read_voc(folder, "empty")
    with pytest.raises(ValueError, match="twice.txt, line 3.*line 1"): read_voc(folder, "twice")
    (folder / "ImageSets/Main/flags.txt").write_text("\ufeffa  -1\r\n", encoding="utf-8")
    assert len(read_voc(folder, "flags")[0]) == 1


def test_names_with_blanks_and_points(tmp_path):
    folder = voc(tmp_path / "d", {"my cat": xml(obj()), "v1.2": xml()})
    assert [r.path.name for r in read_voc(folder)[0]] == ["my cat.jpg", "v1.2.jpg"]
    (folder / "ImageSets/Main/endings.txt").write_text("v1.2.jpg")
    with pytest.raises(FileNotFoundError, match="without .jpg"): read_voc(folder, "endings")


def test_a_split_cannot_point_outside(tmp_path):
    folder = voc(tmp_path / "d", {"a": xml(obj())}, {"train": ["../Annotations/a"]})
    with pytest.raises(FileNotFoundError, match="line 1"): read_voc(folder)


def test_unknown_class(tmp_path):
    folder = voc(tmp_path / "d", {"a": xml(obj("cart"))})
    with pytest.raises(ValueError, match="a.xml, object 1.*'cart'.*Did you mean cat"):
        read_voc(folder, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="string"): read_voc(folder, classes="cart")
    with pytest.raises(ValueError, match="twice"): read_voc(folder, classes=["cart", "cart"])
    assert read_voc(folder, classes=["dog", "cart"])[0][0].labels.tolist() == [1]


@pytest.mark.parametrize("change, says", [
    (dict(annotations=[ann(image_id=8)]), "annotation 1: image_id 8"),
    (dict(annotations=[ann(category_id=2)]), "annotation 1: category_id 2"),
    (dict(annotations=[ann(), ann()]), "annotations[1]: id 1 is there twice"),
    (dict(annotations=[ann((1, 2, 3))]), "annotation 1: bbox [1, 2, 3]"),
    (dict(annotations=[ann((1, 2, 3, float("nan")))]), "annotation 1, bbox: nan"),
    (dict(annotations=[ann((1, 2, 3, 10 ** 400))]), "annotation 1, bbox"),
    (dict(annotations=[ann((1, "b", 3, 4))]), "annotation 1, bbox: 'b'"),
    (dict(annotations=[ann((1, None, 3, 4))]), "annotation 1, bbox: is missing"),
    (dict(annotations=[dict(id=1, image_id=7, category_id=3)]), "annotations[0]: bbox is None"),
    (dict(annotations=[[1, 2]]), "annotations[0]: [1, 2] is not an object"),
    (dict(annotations=[ann(image_id=[7])]), "annotations[0]: image_id is [7]"),
    (dict(images=[{"id": 7, "file_name": "a", "width": 8, "height": 6}] * 2),
     "images[1]: id 7 is there twice"),
    (dict(images=[{"id": 7, "width": 8, "height": 6}]), "images[0]: file_name is None"),
    (dict(images=[{"id": 7, "file_name": "a", "width": 8}]), "image 7, height: is missing"),
    (dict(images=[{"id": 7, "file_name": "a", "width": 8, "height": -6}]), "8 x -6"),
    (dict(categories=[{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]),
     "categories[1]: id 3 is there twice"),
    (dict(categories=[{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}]),
     "categories: two have the same name"),
])
def test_bad_coco(tmp_path, change, says):
    path = coco(tmp_path / "sub" / "bad.json", **change)
    with pytest.raises(ValueError) as error: read_coco(path)
    assert "sub/bad.json" in str(error.value) and says in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"images": []}',
                                  '{"images": {}, "annotations": [], "categories": []}',
                                  '{"images": [], "annotations": [], "categories": []}',
                                  "[" * 100_000, "\x80"])
def test_bad_json(tmp_path, text):
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="bad.json"): read_coco(tmp_path / "bad.json")


def test_missing_coco(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"): read_coco(tmp_path / "none.json")
    path = coco(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_coco(path, images=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="image 7.*a.png"): read_coco(path, images=tmp_path)
    rows = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in range(3)]
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    with pytest.raises(FileNotFoundError, match="image 0.*0.png"):
        read_coco(coco(tmp_path / "b.json", images=rows))


# what is repaired, aloud

def test_boxes_outside_are_clipped_and_counted(tmp_path, capsys):
    folder = voc(tmp_path / "d", {"a": xml(obj(box=(0, 2, 99, 3))),
                                  "b": xml(obj(), obj(box=(-5, -5, 20, 20)))})
    records, _ = read_voc(folder)
    assert records[0].boxes.tolist() == [[0, 1, 8, 3]]
    assert records[1].boxes.tolist() == [[2, 1, 5, 3], [0, 0, 8, 6]]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "2 boxes" in out and "Annotations/b.xml, object 2 (cat)" in out


def test_boxes_without_area_are_dropped_and_counted(tmp_path, capsys):
    boxes = [(5, 2, 4, 3), (5, 2, 3, 3), (9, 1, 9, 2), (3, 5, 4, 1), (3, 2, 3, 2)]
    record = read_voc(voc(tmp_path / "d", {"a": xml(*[obj(box=b) for b in boxes])}))[0][0]
    assert record.boxes.tolist() == [[2, 1, 3, 2]]
    assert len(record.labels) == len(record.difficult) == 1
    out = capsys.readouterr().out
    assert "4 boxes" in out and "object 1" in out and "object 3" in out and "object 4" not in out
    assert "..." in out


def test_rounding_is_no_news(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    box = read_coco(coco(tmp_path / "a.json", [ann((2, 1, 6.004, 5.004))]))[0][0].boxes
    assert box.tolist() == [[2, 1, 8, 6]] and capsys.readouterr().out == ""


# opening

def test_open_image(tmp_path):
    folder = voc(tmp_path / "d", {"a": xml(obj()), "b": xml(size=(400, 300))})
    small, wrong = read_voc(folder)[0]
    assert open_image(small).size == (8, 6) and open_image(str(small.path)).mode == "RGB"
    with pytest.raises(ValueError, match="JPEGImages/b.jpg has 8 x 6.*400 x 300"): open_image(wrong)
    with pytest.raises(FileNotFoundError, match="gone.jpg"): open_image(tmp_path / "gone.jpg")


def test_broken_pictures(tmp_path):
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in dict(half=whole[:len(whole) // 2], text=b"not a picture",
                              nothing=b"").items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        with pytest.raises(OSError, match=f"{name}.jpg"): open_image(tmp_path / f"{name}.jpg")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_kinds_of_picture(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 6)).save(path)
    assert open_image(path).mode == "RGB"


def test_pictures_are_turned_as_a_viewer_would(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (6, 8)
    empty = torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool()
    for size in ((6, 8), (8, 6)):
        assert open_image(Record(tmp_path / "a.jpg", *empty, size)).size == size


def test_reading_does_not_open_pictures(tmp_path):
    folder = voc(tmp_path / "d", {"a": xml(obj())})
    (folder / "JPEGImages/a.jpg").write_bytes(b"broken")
    assert len(read_voc(folder)[0]) == 1


# whole data sets

def three(tmp_path):
    pages = {"a": xml(obj("cat"), obj("zebra", difficult=1)), "b": xml(obj("dog"), obj("cat")),
             "c": xml(obj("bird")), "d": xml()}
    return voc(tmp_path / "d", pages, {"train": ["a", "d"], "val": ["b"], "test": ["c"]})


def test_classes_agree_between_splits(tmp_path):
    data = get_data(three(tmp_path))
    assert data.classes == ["bird", "cat", "dog", "zebra"]
    assert [r.labels.tolist() for r in data.train + data.valid
            + data.test] == [[1, 3], [], [2, 1], [0]]
    assert "train: 2 pictures, 2 objects" in repr(data) and "zebra" in repr(data)


def test_chosen_classes_drop_the_others_and_say_so(tmp_path, capsys):
    data = get_data(three(tmp_path), classes=["dog", "cat"])
    assert data.classes == ["dog", "cat"] and [len(r.boxes) for r in data.train] == [1, 0]
    assert data.valid[0].labels.tolist() == [0, 1] and len(data.test) == 1
    assert data.test[0].boxes.shape == (0, 4)
    out = capsys.readouterr().out
    assert "2 objects" in out and "zebra 1" in out and "bird 1" in out
    get_data(three(tmp_path))
    assert capsys.readouterr().out == ""


def test_wrong_class_names(tmp_path):
    folder = three(tmp_path)
    with pytest.raises(ValueError, match="no 'cta' here. Did you mean cat?"):
        get_data(folder, classes=["cta"])
    with pytest.raises(ValueError, match="Did you mean dog"): get_data(folder, classes=["Dog"])
    with pytest.raises(ValueError, match="string"): get_data(folder, classes="cat")
    with pytest.raises(ValueError, match="twice"): get_data(folder, classes=["cat", "cat"])
    with pytest.raises(ValueError, match="empty"): get_data(folder, classes=[])


def test_limit(tmp_path):
    data = get_data(three(tmp_path), limit=1)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [1, 1, 1]
    assert len(data.classes) == 4
    with pytest.raises(ValueError, match="limit"): get_data(three(tmp_path), limit=0)


def test_no_validation_split(tmp_path):
    data = get_data(voc(tmp_path / "d", {"a": xml(obj())}))
    assert data.valid == [] and data.test == [] and "valid: 0 pictures" in repr(data)
    with pytest.raises(FileNotFoundError, match="train.txt"):
        get_data(voc(tmp_path / "e", {"a": xml()}, {"trainval": ["a"]}))


def test_unknown_source():
    with pytest.raises(FileNotFoundError, match="pokcet.*Did you mean pocket"): get_data("pokcet")
    with pytest.raises(FileNotFoundError, match="voc2021.*voc2012"): get_data("voc2021")
    with pytest.raises(FileNotFoundError, match="no/such/folder"): get_data("no/such/folder")


def test_coco_siblings(tmp_path):
    row = lambda name: [{"id": 7, "file_name": name, "width": 8, "height": 6}]
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / f"{split}2017" / f"{split}.png")
        coco(tmp_path / "annotations" / f"instances_{split}2017.json", [ann()], row(f"{split}.png"))
    data = get_data(tmp_path / "annotations" / "instances_train2017.json")
    assert data.train[0].path == tmp_path / "train2017" / "train.png"
    assert open_image(data.valid[0]).size == (8, 6)
    assert data.test == [] and data.classes == ["dog", "cat"]
    for split in ("train", "valid", "test"):
        path = coco(tmp_path / "export" / split / "_annotations.coco.json", [ann(category_id=1)],
                    row(f"{split}.png"))
        Image.new("RGB", (8, 6)).save(path.parent / f"{split}.png")
    data = get_data(tmp_path / "export" / "train" / "_annotations.coco.json")
    assert [open_image(s[0]).size for s in (data.train, data.valid, data.test)] == [(8, 6)] * 3


def test_boxes_without_pictures_are_announced(tmp_path, capsys):
    assert len(get_data(coco(tmp_path / "a.json", [ann()])).train) == 1
    assert "no pictures beside it" in capsys.readouterr().out


def test_pocket_is_drawn_under_the_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setattr("course_lib.data.make_pocket",
                        lambda folder: voc(folder, {"a": xml(obj())}))
    assert get_data("pocket").train[0].path == tmp_path / "pocket" / "JPEGImages" / "a.jpg"
    assert len(get_data().train) == 1


def test_voc_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    year = lambda y: {f"{y}{s}": xml(obj("cat")) for s in ("train", "val", "test")}
    split = lambda y: {s: [f"{y}{s}"] for s in ("train", "val", "test")}
    voc(tmp_path / "VOCdevkit/VOC2007", year("07"), split("07"))
    voc(tmp_path / "VOC2012", year("12"), {k: v for k, v in split("12").items() if k != "test"})
    names = lambda records: [r.path.stem for r in records]
    data = get_data("voc0712")
    assert names(data.train) == ["07train", "12train", "12val"] and names(data.valid) == ["07val"]
    assert names(data.test) == ["07test"]
    assert data.classes == VOC_CLASSES and len(set(VOC_CLASSES)) == 20
    assert data.train[0].labels.tolist() == [7]
    assert names(get_data("voc2007").test) == ["07test"] and get_data("voc2012").test == []
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    assert get_data("voc2007").test == [] and "no test.txt" in capsys.readouterr().out


def test_hold_out(tmp_path):
    record = lambda i: Record(Path(f"{i}.jpg"), torch.zeros(0, 4), torch.zeros(0).long(),
                              torch.zeros(0).bool(), (8, 6))
    data = Data([record(i) for i in range(50)], [record("v")], [record("t")], ["cat"])
    held = hold_out(data)
    assert len(held.train) == 40 and len(held.valid) == 10 and held.test == data.valid
    assert held.classes == ["cat"]
    assert set(held.train) | set(held.valid) == set(data.train)
    assert not set(held.train) & set(held.valid)
    assert held.valid == hold_out(data).valid != hold_out(data, seed=1).valid
    assert data.test[0] not in held.train + held.valid + held.test and len(data.train) == 50
    for share in (0, 1, -1, .001): pytest.raises(ValueError, hold_out, data, share)


def test_the_2018_lessons_files():
    "The JSON files that the 2018 lessons read, where COURSE_JSON names their folder."
    folder = Path(os.environ.get("COURSE_JSON", "no such folder"))
    if not folder.is_dir(): pytest.skip("COURSE_JSON names no folder")
    data = get_data(folder / "pascal_train2007.json")
    assert [len(s) for s in (data.train, data.valid, data.test)] == [2501, 2510, 4952]
    assert data.classes == VOC_CLASSES
    assert data.test[0].boxes.tolist() == [[47, 239, 195, 371], [7, 11, 352, 498]]


def test_reading_is_fast(tmp_path):
    "300 files, each the size of VOC's, well within a second on a slow machine."
    import time
    folder = voc(tmp_path / "d", {f"{i:06}": xml(*[obj() for _ in range(4)]) for i in range(300)})
    start = time.perf_counter()
    read_voc(folder)
    assert time.perf_counter() - start < 2


def test_short_names_in_messages(tmp_path):
    with pytest.raises(ValueError) as error: read_voc(voc(tmp_path / "d", {"a": "<"}))
    assert str(tmp_path) not in str(error.value)
    assert D.short("/x/y/z.xml") == "y/z.xml"


def test_grey_of_16_bits_is_scaled_and_not_clipped_to_white(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).round().reshape(4, 256)
    for suffix, dtype in ((".png", np.uint16), (".tiff", np.uint16), (".tiff", np.int32)):
        path = tmp_path / f"ramp{suffix}"
        Image.fromarray(ramp.astype(dtype)).save(path)
        grey = np.asarray(open_image(path))
        assert grey.shape == (4, 256, 3)
        assert abs(grey.astype(float).mean() - 127.5) < 1, (suffix, dtype)
    dark = Image.fromarray((ramp / 257).astype(np.int32))
    assert abs(np.asarray(as_rgb(dark)).astype(float).mean() - 127) < 1
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(OSError, match="float.tiff.*uint8"): open_image(tmp_path / "float.tiff")
