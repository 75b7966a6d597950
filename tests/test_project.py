"""The project's own files agree with one another."""
import configparser, importlib.metadata, json, re
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


def test_modules_import_only_from_earlier_lessons():
    order = ["pocket", "machine", "data", "plot", "boxes", "learn", "augment", "single", "match",
             "anchors", "ssd", "losses", "detect", "metrics",
             "detector", "fpn", "fast", "recipe", "deploy", "start", "yours", "exercises", "explore"]
    for path in (TOP / "course_lib").glob("[a-z]*.py"):
        used = set(re.findall(r"^\s*(?:from|import) (?:course_lib)?\.?(\w+)", path.read_text(),
                              re.M)) & set(order)
        for other in re.findall(r"from \.(\w+) import", path.read_text()):
            assert order.index(other) < order.index(path.stem), f"{path.stem} imports from {other}"
        assert path.stem in order
