"""Attacks on `course_lib.machine`: versions at the edges, broken installations, missing folders,
hidden GPUs."""
import importlib.metadata, os, re, subprocess, sys, types
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from course_lib import machine as M
from course_lib.machine import (Check, Machine, check_data, check_gpu, check_machine, check_memory,
                              check_pair, check_version,
                              check_weights, data_root, data_sets, judge, lab_command, memory_gb,
                              project_root, requirements, spell, why_no_gpu)

TOP = Path(__file__).parent.parent
BOUNDS = SpecifierSet(">=2.11,!=2.13.0,<2.16")


def voc(root, name, n=0):
    "An empty data set in VOC's layout, with n pictures"
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / name / part).mkdir(parents=True)
    for i in range(n): (root / name / "JPEGImages" / f"{i}.jpg").touch()


def python(code, **env):
    "Runs code in a new process; a value of None removes that variable"
    full = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full)


# ---- versions

@pytest.mark.parametrize("version, verdict", [
    ("2.11", "ok"), ("2.11.0", "ok"), ("2.15.9", "ok"), ("2.12.0+cpu", "ok"), ("2.13.1", "ok"),
    ("2.9.1", "too old"), ("2.10.99", "too old"), ("1.13", "too old"), ("2.11.0rc1", "too old"),
    ("2.16", "too new"), ("2.16.0+cu130", "too new"), ("3.0", "too new"), ("10.0", "too new"),
    ("2.13.0", "known to fail"), ("2.13.0+cpu", "known to fail")])
def test_judge(version, verdict): assert judge(version, BOUNDS) == verdict


@pytest.mark.parametrize("spec, version, verdict", [
    ("", "0.0.1", "ok"), ("==0.1.0", "0.1.0", "ok"), ("==0.1.0", "0.2", "too new"),
    ("==0.1.0", "0.0.9", "too old"),
    ("==2.4.*", "2.4.7", "ok"), ("==2.4.*", "2.5", "too new"), ("~=1.4.2", "1.3", "too old"),
    ("~=1.4.2", "1.5", "too new"),
    (">=1.0,<1.1", "1.1.dev1", "too new"), ("<=2", "2.1", "too new"), (">2", "2", "too old")])
def test_judge_other_bounds(spec, version, verdict):
    assert judge(version, SpecifierSet(spec)) == verdict


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30),
       st.integers(0, 30))
def test_judge_agrees_with_the_order_of_numbers(lo, width, minor, major, extra):
    spec, version = SpecifierSet(f">={lo}.{minor},<{lo + width + 1}"), f"{major}.{extra}"
    want = ("too old" if (major, extra) < (lo, minor) else "too new" if major >= lo + width + 1
            else "ok")
    assert judge(version, spec) == want


def test_bounds_are_spelt_so_that_pip_reads_them():
    assert spell(BOUNDS) == ">=2.11,<2.16,!=2.13.0" and spell(SpecifierSet("")) == ""
    assert all(SpecifierSet(spell(s)) == s for s in requirements().values())


def test_requirements_are_those_of_settings_ini():
    text = (project_root() / "settings.ini").read_text(encoding="utf-8")
    line = re.search(r"^requirements = (.*)$", text, re.M)[1].split()
    found = requirements()
    assert len(found) == len(line) and found["torch"] == SpecifierSet(line[0].removeprefix("torch"))
    assert "pytest" not in found


def test_requirements_without_a_project_come_from_pip(monkeypatch, tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = somebody_elses\nrequirements = "
                                           "kettle>=3\n")
    monkeypatch.setattr(M, "project_root", lambda: tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires",
                        lambda name: ["torch>=2.11,<2.16", 'pytest>=8; extra == "dev"',
                                      "ipywidgets"])
    assert requirements() == {"torch": SpecifierSet(">=2.11,<2.16"), "ipywidgets": SpecifierSet("")}


def test_a_missing_package_says_how_to_install_it():
    check = check_version("no-such-package-at-all", SpecifierSet(">=2"))
    assert check.state == "fix" and check.found == "not installed"
    assert 'pip install "no-such-package-at-all>=2"' in check.todo


def test_an_old_package_is_a_line_of_the_report(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: "0.1" if name in ("timm", "pillow") else real(name))
    machine = check_machine()
    assert not machine.ok and machine["timm"].found == "0.1 is too old"
    assert machine["pillow"].state == "fix"
    assert "Not ready" in repr(machine) and "- timm: " in repr(machine)


# ---- compiled code

def test_pair_works_here(): assert check_pair().state == "ok"


def test_a_pair_that_does_not_fit_is_told(monkeypatch):
    import torchvision
    def broken(*args):
        raise RuntimeError("operator torchvision::nms does not exist\nand a long second line")
    monkeypatch.setattr(torchvision.ops, "nms", broken)
    check = check_pair()
    assert check.state == "fix" and "nms does not exist" in check.found
    assert "second line" not in check.found


def test_a_torchvision_that_does_not_import_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check = check_pair()
    assert check.state == "fix" and "torchvision" in check.found


def test_an_error_without_words_does_not_break_the_check(monkeypatch):
    import torchvision
    def broken(*args): raise RuntimeError()
    monkeypatch.setattr(torchvision.ops, "nms", broken)
    assert check_pair().state == "fix"


def test_the_module_needs_no_torch_to_be_imported():
    done = python("import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
                  "from course_lib.machine import check_machine; m = check_machine(); "
                  "print(m.ok); print(m)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False") and "PyTorch does not import" in done.stdout


# ---- processor and memory

def test_memory_is_plausible_or_unknown():
    gb = memory_gb()
    assert gb is None or 0.1 < gb < 100_000


def test_memory_unknown_as_on_windows(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert memory_gb() is None and M.cpu_count() >= 1
    assert next(c for c in check_memory() if c.what == "memory").state == "note"


def test_little_memory_and_little_shared_memory_get_advice(monkeypatch):
    monkeypatch.setattr(M, "memory_gb", lambda: 2.0)
    monkeypatch.setattr(M.shutil, "disk_usage",
                        lambda p: types.SimpleNamespace(total=64 * 2**20, free=10**9))
    todo = {c.what: c.todo for c in check_memory()}
    assert "batches of 16" in todo["memory"]
    if Path("/dev/shm").is_dir(): assert "--shm-size" in todo["shared memory"]


# ---- GPU

def no_gpu(monkeypatch, driver=True, cuda="13.0"):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(M.shutil, "which", lambda name, **kw: "/usr/bin/nvidia-smi" if driver
                        else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("driver, cuda, hidden, word", [
    (False, "13.0", None, "no NVIDIA driver"), (True, None, None, "processor only"),
    (True, "13.0", "", "CUDA_VISIBLE_DEVICES"), (True, "13.0", "-1", "CUDA_VISIBLE_DEVICES"),
    (True, "13.0", None, "CUDA does not start")])
def test_each_reason_for_no_gpu_has_its_own_words(monkeypatch, driver, cuda, hidden, word):
    no_gpu(monkeypatch, driver, cuda)
    if hidden is not None: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert word in why_no_gpu()[0]
    with pytest.raises(RuntimeError, match=word) as e: check_machine(gpu=True)
    assert str(e.value).endswith(".") and "\n" not in str(e.value) and str(e.value).count(". ") == 0
    assert check_gpu().state == "note"


def test_an_old_driver_speaks_for_itself(monkeypatch):
    import torch, warnings
    no_gpu(monkeypatch)
    def warn():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\nmore")
        return False
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert why_no_gpu()[0].endswith("driver on your system is too old")


def a_gpu(monkeypatch, gb=16, major=8, n=1):
    import torch
    props = types.SimpleNamespace(name="NVIDIA Toy", total_memory=gb * 2**30, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: props)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, device=None, **kw: real(*a, **kw))


@pytest.mark.parametrize("gb, major, n, state, words", [
    (16, 8, 1, "ok", "NVIDIA Toy, 16 GB"), (80, 9, 8, "ok", "8 x NVIDIA Toy"),
    (4, 7, 1, "note", "bfloat16: no"), (24, 8, 1, "ok", "bfloat16: yes")])
def test_a_gpu_is_described(monkeypatch, gb, major, n, state, words):
    a_gpu(monkeypatch, gb, major, n)
    check = check_gpu()
    assert check.state == state and words in check.found
    assert check_machine(gpu=True)["GPU"] == check


def test_a_gpu_that_pytorch_cannot_use_is_no_gpu(monkeypatch):
    import torch
    a_gpu(monkeypatch)
    def fail(*a, **kw):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the "
                           "device\nlong tail")
    monkeypatch.setattr(torch, "ones", fail)
    assert check_gpu().state == "fix" and "long tail" not in check_gpu().todo
    with pytest.raises(RuntimeError, match="no kernel image"): check_machine(gpu=True)


def test_an_apple_gpu_counts(monkeypatch):
    import torch
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "Apple" in check_machine(gpu=True)["GPU"].found


# ---- data

def test_data_root_is_the_projects_own(monkeypatch):
    monkeypatch.delenv("COURSE_DATA", raising=False)
    assert data_root() == project_root() / "data" and data_root().is_dir()


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_is_no_variable(monkeypatch, empty):
    monkeypatch.setenv("COURSE_DATA", empty)
    assert data_root() == project_root() / "data"


def test_course_data_is_obeyed_and_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    (tmp_path / "sets").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path)); monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("COURSE_DATA", "~/sets")
    assert data_root() == tmp_path / "sets"


def test_a_folder_that_is_not_there_is_an_error_and_is_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "unmounted"))
    with pytest.raises(FileNotFoundError, match="COURSE_DATA.*unmounted.*no such folder"):
        data_root()
    assert not (tmp_path / "unmounted").exists()
    machine = check_machine()
    assert machine["data folder"].state == "fix" and not machine.ok


def test_course_data_that_is_a_file_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="COURSE_DATA"): data_root()


def test_data_sets_are_found_at_three_depths_and_no_deeper(tmp_path):
    voc(tmp_path, "pocket", 3); voc(tmp_path, "VOCdevkit/VOC2007", 2); voc(tmp_path, "a/b/c")
    voc(tmp_path, "a/b2/c/too_deep")
    (tmp_path / "a file").touch(); (tmp_path / "empty").mkdir()
    assert data_sets(tmp_path) == {"pocket": 3, "VOCdevkit/VOC2007": 2, "a/b/c": 0}


def test_data_sets_of_an_empty_folder(tmp_path): assert data_sets(tmp_path) == {}


@pytest.mark.parametrize("wanted, there, missing", [
    ("voc2007", ["VOCdevkit/VOC2007"], None), ("voc0712", ["VOCdevkit/VOC2007"],
                                               "voc2012 not found"),
    ("voc0712", ["voc2007", "voc2012"], None), ("voc2007", [], "voc2007 not found"),
    ("voc2007", ["VOC2007-animals"], "voc2007 not found"),
    ("pocket", [], None), ("no/such/annotations.json", [], "no/such/annotations.json not found")])
def test_the_data_set_that_is_wanted(monkeypatch, tmp_path, wanted, there, missing):
    for name in there: voc(tmp_path, name)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    fixes = [c for c in check_data(wanted) if c.state == "fix"]
    assert [c.found for c in fixes] == ([missing] if missing else [])


def test_a_path_of_ones_own_may_be_wanted(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    (tmp_path / "mine.json").write_text("{}")
    assert all(c.state != "fix" for c in check_data(tmp_path / "mine.json"))


def test_a_full_disk_gets_advice(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setattr(M.shutil, "disk_usage",
                        lambda p: types.SimpleNamespace(total=10**11, free=2**30))
    check = next(c for c in check_data() if c.what == "data folder")
    assert check.state == "note" and "6 GB" in check.todo


def test_missing_weights_are_told(monkeypatch):
    assert check_weights().state == "ok"
    monkeypatch.setattr(M.importlib.util, "find_spec", lambda name: None)
    assert check_weights().state == "fix"


# ---- the report

def test_the_report_shows_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path)); voc(tmp_path, "pocket", 1)
    text = repr(check_machine())
    assert str(tmp_path) not in text and str(project_root()) not in text
    assert str(Path.home()) not in text
    assert "pocket (1 picture)" in text


def test_every_line_that_is_not_ok_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    monkeypatch.setattr(M, "memory_gb", lambda: 1.0)
    for check in check_machine(data="voc0712").checks:
        assert check.state in ("ok", "note", "fix")
        assert check.state == "ok" or check.todo, check


def test_machine_by_name():
    machine = Machine([Check("tea", "none", "fix", "Buy some."), Check("kettle", "1.7 litres")])
    assert machine["kettle"].state == "ok"
    assert not machine.ok and Machine([machine["kettle"]]).ok
    with pytest.raises(KeyError, match="coffee"): machine["coffee"]


@pytest.mark.parametrize("value, want", [("1", True), ("true", True), ("", False), ("0", False),
                                         ("False", False), (None, False)])
def test_in_test_reads_the_variable(value, want):
    done = python("from course_lib.machine import IN_TEST; print(IN_TEST)", IN_TEST=value)
    assert done.stdout.strip() == str(want), done.stderr


# ---- opening the course

def as_user(monkeypatch, uid):
    "The user that `os.geteuid` tells of; None: a system that knows no such thing, like Windows"
    if uid is None: monkeypatch.delattr(os, "geteuid", raising=False)
    else: monkeypatch.setattr(os, "geteuid", lambda: uid, raising=False)


@pytest.mark.parametrize("uid, root", [(0, True), (1000, False), (65534, False), (None, False)])
def test_only_root_is_let_in_as_root(monkeypatch, uid, root):
    as_user(monkeypatch, uid)
    command = lab_command([])
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert command[3] == str(project_root() / "nbs") and Path(command[3], "00_start.ipynb").exists()
    assert command[4:] == ["--ip=127.0.0.1", *["--allow-root"] * root]


@pytest.mark.parametrize("uid", [0, 1000, None])
def test_the_server_stays_closed(monkeypatch, uid):
    "Whoever starts it: one address, this machine's own, and nothing about token or password"
    as_user(monkeypatch, uid)
    for arguments in ([], ["--no-browser", "--port", "8888"], ["--LabApp.dev_mode=False"]):
        options = lab_command(arguments)[4:]
        assert options.count("--ip=127.0.0.1") == 1
        assert not re.search("token|password|allow_origin|remote_access", " ".join(options))
        assert arguments == [o for o in options if o not in ("--ip=127.0.0.1", "--allow-root")]


@pytest.mark.parametrize("own", [["--ip=127.0.0.2"], ["--ip", "::1"], ["--ServerApp.ip=127.0.0.2"]])
def test_an_address_of_ones_own_stands_alone(own):
    "JupyterLab stops at a second `--ip`."
    assert lab_command(own)[-len(own):] == own
    assert "127.0.0.1" not in " ".join(lab_command(own))


def test_the_command_becomes_jupyterlab(monkeypatch):
    seen = []
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setattr(os, "execv", lambda program, words: seen.append((program, words)))
    monkeypatch.setattr(sys, "argv", ["course_lab", "--port", "8888"])
    M.course_lab()
    assert seen == [(sys.executable, lab_command(["--port", "8888"]))]


@pytest.mark.parametrize("code", [0, 1])
def test_on_windows_the_command_waits_and_hands_on_the_result(monkeypatch, code):
    seen = []
    def run(words):
        seen.append(words)
        return types.SimpleNamespace(returncode=code)
    as_user(monkeypatch, None)
    monkeypatch.setattr(M, "project_root", lambda: TOP)
    monkeypatch.setattr(M, "os", types.SimpleNamespace(name="nt"))
    monkeypatch.setattr(M.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["course_lab", "--no-browser"])
    with pytest.raises(SystemExit) as end: M.course_lab()
    assert end.value.code == code
    assert seen == [[sys.executable, "-m", "jupyterlab", str(TOP / "nbs"), "--ip=127.0.0.1",
                     "--no-browser"]]


def test_pip_installs_the_command_and_the_readme_names_it():
    settings, readme = ((TOP / name).read_text(encoding="utf-8")
                        for name in ("settings.ini", "README.md"))
    scripts = re.search(r"^console_scripts = (.*)$", settings, re.M)[1].split()
    assert "course_lab=course_lib.machine:course_lab" in scripts
    assert "pip install -e . && course_lab\n" in readme and "jupyter lab nbs" not in readme
