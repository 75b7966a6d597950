"""The project's own files agree with one another."""
import ast, configparser, importlib, importlib.metadata, io, json, re, shutil, subprocess, sys
import tokenize, zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parent.parent
config = configparser.ConfigParser(delimiters=["="])
config.read(TOP / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
required = [Requirement(r) for r in settings["requirements"].split()]
developers = [Requirement(r) for r in settings["dev_requirements"].split()]
constraints = {canonicalize_name(r.name): next(iter(r.specifier)).version
               for r in (Requirement(l) for l in (TOP / "constraints.txt").read_text().splitlines()
                         if l and not l.startswith("#"))}


def test_conda_users_get_the_same_requirements():
    "environment.yml says what settings.ini says: Python from conda, everything else by pip."
    env = yaml.safe_load((TOP / "environment.yml").read_text())
    assert env["channels"] == ["conda-forge"]
    conda, (pip,) = ([d for d in env["dependencies"] if isinstance(d, str)],
                     [d["pip"] for d in env["dependencies"] if isinstance(d, dict)])
    assert any(d.replace(" ", "") == f"python>={settings['min_python']},<3.14" for d in conda)
    assert sorted(pip) == sorted(settings["requirements"].split())


@pytest.mark.parametrize("requirement", required + developers, ids=str)
def test_the_tested_versions_are_within_the_bounds(requirement):
    version = constraints.get(canonicalize_name(requirement.name))
    assert version, f"constraints.txt says nothing of {requirement.name}"
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("requirement", required, ids=str)
def test_what_is_installed_is_within_the_bounds(requirement):
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name),
                                          prereleases=True)


def test_torch_and_torchvision_are_a_pair():
    import torch, torchvision
    assert len(torchvision.ops.nms(torch.tensor([[0., 0, 1, 1]]), torch.tensor([1.]), .5)) == 1


def notebooks(): return sorted((TOP / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_a_notebook_can_be_read_without_running_it(path):
    """It opens with a title, carries fixed cell ids and outputs, shows no warning, error or path
    of one machine, and loads on the web."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    assert first.startswith("# ") and "\n> " in first
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids) and path.stat().st_size < 4e6
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    for o in outputs:
        text = (json.dumps({k: v for k, v in o.items() if k != "data"})
                + json.dumps({k: v for k, v in o.get("data", {}).items()
                              if not k.startswith("image")}))
        assert not re.search(r"/(home|root|tmp|mnt|Users|work)/", text), text[:300]
        assert "Warning" not in text, text[:300]


BELOW = ["machine", "checks", "files", "formats", "tables", "pocket"]
LESSONS = ["data", "plot", "boxes", "backbone", "learn", "augment", "single", "match", "anchors",
           "ssd", "losses", "detect", "metrics", "detector", "fpn", "fast", "recipe", "deploy"]
# below the lesson that uses it
BETWEEN = {"saving": "detector", "loaders": "fast", "runs": "recipe"}
ABOVE = ["commands", "start", "yours", "app", "exercises", "explore"]
ORDER = [*BELOW, *(name for lesson in LESSONS
                   for name in [*(k for k, v in BETWEEN.items() if v == lesson), lesson]), *ABOVE]
modules = sorted((TOP / "course_lib").glob("[a-z]*.py"))


def test_modules_import_only_from_what_stands_below_them():
    for path in modules:
        for other in re.findall(r"^\s*from (?:course_lib)?\.(\w+) import", path.read_text(), re.M):
            assert ORDER.index(other) < ORDER.index(path.stem), f"{path.stem} imports from {other}"


def test_each_module_has_one_notebook():
    owners = Counter(found.group(1) for path in notebooks() for source in code_of(path)
                     if (found := re.match(r"#\| default_exp (\w+)", source)))
    assert owners == Counter(path.stem for path in modules)


def code_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def test_no_line_of_code_is_cut_off_on_a_page():
    sources = [(path, source) for path in notebooks() for source in code_of(path)]
    sources += [(path, path.read_text(encoding="utf-8"))
                for folder in ("tests", "benchmarks", "pictures")
                for path in (TOP / folder).rglob("*.py")]
    wide = [(path.name, line) for path, source in sources for line in source.splitlines()
            if len(line) > 100 and not line.startswith("#|")]
    assert not wide, wide[:5]


def code_lines(path):
    "Lines of code, without blank lines, comments and docstrings."
    text = path.read_text(encoding="utf-8")
    named = (ast.FunctionDef, ast.ClassDef, ast.Module)
    first = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, named)
             and node.body]
    docs = {row for one in first if isinstance(one, ast.Expr)
            and isinstance(one.value, ast.Constant)
            for row in range(one.lineno, one.end_lineno + 1)}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER}
    rows = {row for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skip
            for row in range(t.start[0], t.end[0] + 1)}
    return len(rows - docs)


def test_the_library_stays_small():
    size = {path.stem: code_lines(path) for path in modules}
    assert sum(size[name] for name in LESSONS) <= 1700
    assert max(size[name] for name in LESSONS) <= 200, size


# two errors of two kinds: an unknown name and weights that can't be fetched; a folder and names
MORE = {("backbone", "backbone"), ("deploy", "to_onnx")}


def test_a_lesson_has_at_most_one_line_of_checking():
    "What is wrong is said in `checks`: a raise or an ensure of a lesson's module is one statement."
    for name in LESSONS:
        for node in ast.walk(ast.parse((TOP / "course_lib" / f"{name}.py").read_text())):
            if not isinstance(node, ast.FunctionDef): continue
            lines = [n for n in ast.walk(node) if isinstance(n, ast.Raise)
                     or isinstance(n, ast.Call)
                     and isinstance(n.func, ast.Name) and n.func.id == "ensure"]
            more = f"{name}.{node.name} has {len(lines)} raises and checks of its own"
            assert len(lines) <= (2 if (name, node.name) in MORE else 1), more


@pytest.mark.parametrize("name", ["backbone", "boxes", "anchors", "match", "losses", "ssd", "fpn",
                                  "detect", "metrics"])
def test_what_a_detector_is_made_of_does_not_need_fastai(name):
    code = f"import sys, course_lib.{name}; print('fastai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert done.stdout.strip() == "False", done.stderr[-500:]


PROMISED = {
    "data": "Record Data read_voc read_coco get_data hold_out VOC_CLASSES open_image "
    "download unpack",
    "plot": "show_image show_boxes show_grid PALETTE", "boxes": "convert area iou pairwise_iou",
    "learn": "dataloaders backbone Backbone pick_device one_thread keep_memory "
    "lite0_weights largest",
    "backbone": "backbone Backbone lite0_weights", "augment": "train_tfms valid_tfms",
    "single": "SingleHead SingleLoss", "match": "match unmatched strongest_first "
    "BACKGROUND IGNORED",
    "anchors": "make_anchors encode decode", "ssd": "SSDHead SSD", "losses": "focal_loss SSDLoss",
    "detect": "nms detections predict show_detections", "metrics": "mean_ap error_kinds",
    "detector": "detection_learner MeanAP load_detector checkpoint write_whole "
    "read_checkpoint FORMAT", "fpn": "FPN RetinaNet atss giou iou_losses retina_loss",
    "fast": "memory_loaders MemoryLoader in_memory augment cut follow",
    "deploy": "to_onnx Deployable",
    "recipe": "train fast_learner one_cycle EMA Flipped Grow Half Keep Together go_on machine "
    "write_json",
    "commands": "course_train course_predict predict_files", "files": "download unpack write_json",
    "machine": "check_machine IN_TEST project_root data_root", "pocket": "make_pocket",
    "start": "check_machine IN_TEST project_root data_root judge"}


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_are_where_they_were(module):
    found = importlib.import_module(f"course_lib.{module}")
    assert not [name for name in PROMISED[module].split() if not hasattr(found, name)]


def test_the_wheel_carries_weights_and_modules(tmp_path):
    "Built from the files that git knows, in a folder of its own."
    names = subprocess.run(["git", "ls-files", "course_lib", "setup.py", "settings.ini",
                            "README.md",
                            "pyproject.toml"], capture_output=True, text=True, cwd=TOP, check=True)
    for name in names.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
                    "-w", "dist"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = {item.filename: item.file_size for item in zipfile.ZipFile(wheel).infolist()}
    assert {f"course_lib/{path.name}" for path in modules} <= inside.keys()
    assert 1e6 < inside["course_lib/weights/animals.pth"] < 10e6
    assert "course_lib/weights/animals.md" in inside and wheel.stat().st_size < 12e6
