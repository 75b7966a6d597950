"""The map of lesson 00 is true: read from the page and held against notebooks and library."""
import ast, importlib, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

import course_lib
from course_lib import start
from course_lib.detector import DetectionLearner
from course_lib.start import course_map, lessons, opened_by

TOP = Path(__file__).parent.parent


def read(name): return json.loads((TOP / "nbs" / f"{name}.ipynb").read_text("utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def sources(name): return [source(c) for c in read(name) if c["cell_type"] == "code"]


page = [s for s in sources("00_start") if not s.startswith("#|")]
trees = [ast.parse(s) for s in page]
def get(module, name):
    home = importlib.import_module(module)
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(
        f"{module}.{name}")


imported = {a.asname or a.name: get(n.module, a.name)
            for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
            and n.module.split(".")[0] == "course_lib" for a in n.names}


def meant(node):
    "The object of the library that a name on the page stands for; None for others."
    if isinstance(node, ast.Name): return imported.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "learn": return getattr(DetectionLearner, node.attr)
        if node.value.id in imported: return getattr(imported[node.value.id], node.attr)


def dicts():
    "The dictionaries from which the page makes its tables, by name."
    return {n.targets[0].id: [meant(key) for key in n.value.keys] for tree in trees
            for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)}


rows = [func for keys in dicts().values() for func in keys]
called = [f for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)
          and (f := meant(n.func)) is not None]


def test_the_reader_of_the_page_sees_it():
    assert {f.__name__ for f in called} >= {"load_detector", "predict", "train", "evaluate"}
    assert set(dicts()) >= {"hides", "deeper"} and None not in rows and len(rows) >= 15


@pytest.mark.parametrize("func", dict.fromkeys(called), ids=lambda f: f.__name__)
def test_every_public_call_of_the_page_is_on_the_map(func):
    assert func in rows or opened_by(func) == "00_start"


@pytest.mark.parametrize("func", dict.fromkeys(rows), ids=lambda f: f.__name__)
def test_a_row_names_the_notebook_whose_module_exports_the_function(func):
    name = opened_by(func)
    defined = re.compile(rf"^(?:def|class) {func.__name__}\b", re.M)
    cells = [s for s in sources(name) if s.startswith("#| export") and defined.search(s)]
    assert len(cells) == 1
    other = re.match(r"#\| export +(\w+)", cells[0])
    module = other[1] if other else next(l["module"] for l in lessons() if l["name"] == name)
    home = importlib.import_module(f"course_lib.{module}")
    assert getattr(home, func.__name__, None) is func or func.__module__ == home.__name__


def test_lessons_are_the_notebooks_in_order_with_their_titles():
    names = [lesson["name"] for lesson in lessons()]
    assert names == sorted(p.stem for p in (TOP / "nbs").glob("[0-9]*.ipynb")) and len(names) > 20
    for lesson in lessons():
        head = source(read(lesson["name"])[0]).split("\n")
        assert head[0] == f"# {lesson['title']}" and f"> {lesson['about']}" in head
        exports = [s for s in sources(lesson["name"]) if s.startswith("#| default_exp")]
        assert exports == ([f"#| default_exp {lesson['module']}"] if lesson["module"] else [])


def test_the_stored_tables_are_those_of_today():
    "Running the page again would store the same rows."
    stored = "".join("".join(o["data"].get("text/markdown", "")) for c in read("00_start")
                     if c["cell_type"] == "code" for o in c["outputs"] if "data" in o)
    for keys in dicts().values():
        for func in keys:
            line, lesson = course_map({func: "WORDS"}).data.splitlines()[-1].split("WORDS")
            assert re.search(f"{re.escape(line)}[^|]{{10,90}}{re.escape(lesson)}", stored), line


def test_without_the_notebooks_the_map_says_so_and_keeps_the_names(tmp_path):
    shutil.copytree(Path(course_lib.__file__).parent, tmp_path / "course_lib",
                    ignore=shutil.ignore_patterns("__pycache__"))
    program = ("from course_lib.boxes import iou; from course_lib.start import *\n"
               "print(lessons(), opened_by(iou)); print(course_map({iou: 'w'}).data)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.startswith("[] 02_boxes"), done.stderr
    assert "| `iou` | w | 02_boxes |" in done.stdout and "not on this machine" in done.stdout


@pytest.mark.parametrize("func", [torch.nn.Linear, print, eval("lambda: 0"), meant])
def test_what_the_course_did_not_write_is_refused(func):
    with pytest.raises(ValueError, match="no notebook of this course"): opened_by(func)


def test_a_second_notebook_of_a_module_is_told_apart(tmp_path, monkeypatch):
    "A cell with `#| export boxes` in 02b is opened by 02b, though the module is that of 02."
    (tmp_path / "two_homes.py").write_text(
        "# %% ../nbs/02_boxes.ipynb #one\ndef first(): pass\n\n"
        "# %% ../nbs/02b_many.ipynb #two\n@staticmethod\ndef second(): pass\nclass Third: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    two = importlib.import_module("two_homes")
    assert [opened_by(f) for f in (two.first, two.second, two.Third)] == ["02_boxes", "02b_many",
                                                                         "02b_many"]


def test_names_that_lesson_00_used_to_export_are_still_there():
    cell = next(s for s in sources("00_start") if "from course_lib.machine import" in s
                and "#| export" in s)
    names = [a.name for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.ImportFrom)
             for a in n.names]
    assert len(names) == 21 and all(hasattr(start, name) for name in names)


def test_the_page_keeps_its_promises():
    "The third cell draws detections; the page is short; the last part has at most eight cells."
    cells = read("00_start")
    code = [source(c) for c in cells if c["cell_type"] == "code"]
    assert "load_detector(" in code[0] and "show_image(" in code[1]
    assert "show_detections(" in code[2] and all("import " not in s for s in code[1:3])
    words = sum(len(source(c).split()) for c in cells if c["cell_type"] == "markdown")
    assert words <= 2500 and len(code) <= 40
    heads = [i for i, c in enumerate(cells) if source(c).startswith("## ")]
    library = next(i for i in heads if "The notebook is the library" in source(cells[i]))
    assert next(i for i in heads if i > library) - library <= 8


def test_the_upload_button_shows_what_is_found_in_each_file(tmp_path, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    cell = next(s for s in page if "FileUpload(" in s)
    seen, drawn = [], []
    class File: name, content = "cat.png", memoryview((TOP / "pictures/data.png").read_bytes())
    space = dict(detector="d", names=["cat"], predict=lambda d, p: seen.append(p) or "found",
                 show_detections=lambda *given: drawn.append(given))
    exec("import os, tempfile\nfrom pathlib import Path\n" + cell, space)
    space["look"]([File, File])
    assert [p.read_bytes() for p in seen] == [bytes(File.content)] * 2
    assert drawn == [(p, "found", ["cat"]) for p in seen]
    space["look"](())
    assert len(drawn) == 2


def test_six_epochs_are_enough_with_every_seed():
    "What was measured is what the page trains, and comes to at least 45%."
    measured = json.loads((TOP / "benchmarks/results/start.json").read_text())["page"]
    assert [run["seed"] for run in measured] == [0, 1, 2]
    assert all(run["map"] >= 45 for run in measured)
    call = next(n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)
                and getattr(n.func, "id", "") == "train")
    given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    assert all(given == dict(size=run["size"], epochs=run["epochs"]) for run in measured)
