"""Attacks on `course_lib.recipe`: runs that are killed, commands that are misused, two processes,
averages and mirrors."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastai.torch_core import set_seed

from course_lib.data import Data, Record
from course_lib.detector import load_detector, read_checkpoint
from course_lib.fpn import RetinaNet, retina_loss
from course_lib.backbone import backbone
from course_lib.commands import predict_files
from course_lib.recipe import EMA, Flipped, Grow, fast_learner, one_cycle, train
from course_lib.ssd import SSD


def body(): return backbone(pretrained=False, out_indices=(2, 3, 4))


def draw(folder, name, n, seed):
    rs = np.random.RandomState(seed)
    picture = rs.randint(0, 90, (60, 80, 3), dtype=np.uint8)
    boxes = []
    for _ in range(n):
        x, y = rs.randint(0, 50), rs.randint(0, 30)
        picture[y:y + 25, x:x + 25] = (250, 60, 20)
        boxes.append([x, y, x + 25, y + 25])
    Image.fromarray(picture).save(folder / name)
    return boxes


@pytest.fixture
def folder(tmp_path):
    "A tiny data set in VOC's layout."
    top = tmp_path / "tiny"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"): (top / part).mkdir(parents=True)
    for split, counts in (("train", [1, 2, 1, 0, 1, 2, 1, 1, 1]), ("val", [1, 0, 2, 1, 1])):
        names = [f"{split}{i}" for i in range(len(counts))]
        (top / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for i, (name, n) in enumerate(zip(names, counts)):
            boxes = draw(top / "JPEGImages", f"{name}.png", n, i)
            objects = "".join(
                "<object><name>square</name><difficult>0</difficult>"
                f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
                f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>" for x0, y0, x1, y1 in boxes)
            (top / "Annotations" / f"{name}.xml").write_text(
                "<annotation><size><width>80</width><height>60</height></size>"
                f"{objects}</annotation>")
    return top


def run_of(out): return json.loads((out / "run.json").read_text())
def curve(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run_of(out)["epochs"]]


OPTIONS = dict(size=64, epochs=3, bs=4, device="cpu")


# ---------------------------------------------------------------- runs

def test_a_run_leaves_what_it_promises(folder, tmp_path):
    out = tmp_path / "run"
    learn = train(str(folder), str(out), **OPTIONS)
    run = run_of(out)
    assert [row["epoch"] for row in run["epochs"]] == [1, 2, 3] and run["classes"] == ["square"]
    assert run["train_pictures"] == 9
    assert (out / "detections.png").stat().st_size > 1000 and not list(out.glob(".*part"))
    model, names = load_detector(out / "detector.pth", "cpu")
    assert names == ["square"] and model.size == 64
    stored = read_checkpoint(out / "last.pth")["model"]
    assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items()), (
        "detector.pth holds the averaged weights of the last epoch")
    assert run["epochs"][-1]["map"] == pytest.approx(learn.evaluate().map, abs=1e-6), (
        "the last epoch's score is that of the detector it left")


def test_an_interrupted_run_goes_on_to_the_same_curve(folder, tmp_path, monkeypatch):
    "Stopped inside the second epoch, and again while it writes."
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(str(folder), str(whole), **OPTIONS)
    from course_lib import recipe, runs
    real, calls = recipe.augment, []
    class Stop(Exception): pass
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise Stop
        return real(*args, **kwargs)
    monkeypatch.setattr(recipe.fast_learner, "__defaults__",
                        tuple(stop if d is real else d for d in recipe.fast_learner.__defaults__))
    with pytest.raises(Stop): train(str(folder), str(cut), **OPTIONS)
    assert len(curve(cut)) == 1
    monkeypatch.undo()
    def broken(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr(runs, "write_whole", broken)
    with pytest.raises(OSError): train(str(folder), str(cut), **OPTIONS)
    monkeypatch.undo()
    train(str(folder), str(cut), **OPTIONS)
    assert curve(cut) == curve(whole)
    a, b = (read_checkpoint(out / "detector.pth")["model"] for out in (cut, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_is_not_trained_again(folder, tmp_path):
    out = tmp_path / "run"
    train(str(folder), str(out), **OPTIONS)
    before = (out / "detector.pth").read_bytes(), curve(out)
    train(str(folder), str(out), **OPTIONS)
    assert curve(out) == before[1]


def test_a_folder_with_another_run_is_refused(folder, tmp_path):
    train(str(folder), str(tmp_path / "run"), **OPTIONS)
    with pytest.raises(ValueError, match="another epochs, lr.*Name another folder"):
        train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=4, lr=1e-3))


def test_a_run_does_not_go_on_with_other_pictures_or_processes(folder, tmp_path, monkeypatch):
    train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))
    listing = folder / "ImageSets/Main/train.txt"
    listing.write_text("\n".join(listing.read_text().split()[:5]))
    with pytest.raises(ValueError, match="another run|other pictures"):
        train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="another processes"):
        train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))


def test_the_last_row_is_not_lost(folder, tmp_path):
    "Killed after the last checkpoint and before run.json: the next start writes it."
    train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))
    (tmp_path / "run/run.json").unlink()
    train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))
    assert len(curve(tmp_path / "run")) == 1


def test_watched_pictures_are_drawn_before_after_one_epoch_and_at_the_end(folder, tmp_path, capsys):
    learn = train(str(folder), str(tmp_path / "run"), watch=2, **OPTIONS)
    drawn = sorted(f.name for f in (tmp_path / "run").glob("watch-*.png"))
    assert drawn == ["watch-00.png", "watch-01.png", "watch-03.png"]
    before = (tmp_path / "run/watch-00.png").read_bytes()
    assert before != (tmp_path / "run/watch-03.png").read_bytes()
    same = train(str(folder), str(tmp_path / "plain"), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(learn.model.state_dict().values(),
                                                same.model.state_dict().values())), (
        "watching changes nothing of the training")
    train(str(folder), str(tmp_path / "run"), watch=learn.data.valid[:1], **OPTIONS)
    assert (tmp_path / "run/watch-00.png").read_bytes() == before, "a finished run draws nothing"


def test_growing_pictures(folder, tmp_path):
    train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(size=96, start_size=32, epochs=5))
    assert [row["size"] for row in curve(tmp_path / "run")] == [32, 32, 64, 96, 96]
    assert load_detector(tmp_path / "run" / "detector.pth", "cpu")[0].size == 96


@pytest.mark.parametrize("options, message", [
    (dict(model="yolo"), "model: 'yolo' is not one of retinanet, ssd"),
    (dict(epochs=0), "epochs: 0 must be at least 1"),
    (dict(model="ssd", start_size=32), "only a retinanet"),
    (dict(start_size=128), "start_size: 128 must lie between 32 and size, 64"),
    (dict(precision="float8"), "precision: 'float8' is not one of"),
    (dict(classes="sqare"), "Did you mean square"), (dict(bs=0), "bs: 0"),
    (dict(lr=0.), "lr: 0.0 must be above 0"), (dict(ema=1.), "ema: 1.0 must lie between 0 and 1")])
def test_arguments_that_cannot_be(options, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(str(folder), str(tmp_path / "run"), **OPTIONS | options)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_out_of_memory_says_what_to_change(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(RetinaNet, "forward", full)
    with pytest.raises(RuntimeError, match="not enough for 4 pictures of 64 px.*smaller bs"):
        train(str(folder), str(tmp_path / "run"), **OPTIONS)


def test_half_precision_trains(folder, tmp_path):
    learn = train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(precision="bfloat16"))
    assert not torch.is_autocast_enabled("cpu")
    assert learn.model(torch.zeros(1, 3, 64, 64))[0].dtype == torch.float32
    assert all(np.isfinite(row["loss"]) for row in curve(tmp_path / "run"))


# ---------------------------------------------------------------- commands

def command(name, *args, **env):
    code = f"import sys; from course_lib.commands import {name}; sys.argv[0] = '{name}'; {name}()"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
                          capture_output=True, text=True, env=os.environ | env)


def test_the_commands_from_training_to_json(folder, tmp_path):
    out = tmp_path / "run"
    trained = command("course_train", "--data", folder, "--out", out, "--size", 64, "--epochs", 1,
                      "--bs", 4, "--device", "cpu")
    assert trained.returncode == 0 and "epoch 1/1: 64 px, loss " in trained.stdout, trained.stderr
    found = command("course_predict", out / "detector.pth", folder / "JPEGImages/val0.png",
                    folder / "JPEGImages", "--out", tmp_path / "drawn", "--score", .01)
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    assert len(results) == 15
    assert all(o["label"] == "square" and len(o["box"]) == 4 for r in results for o in r["objects"])
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 14


@pytest.mark.parametrize("name, args, message", [
    ("course_train", ["--data", "nowhere"], "course_train: source: 'nowhere' is neither"),
    ("course_train", ["--model", "yolo"], "course_train: model: 'yolo'"),
    ("course_predict", ["no.pth", "a.png"], "course_predict: checkpoint: there is no "
     "file 'no.pth'")])
def test_mistakes_are_one_sentence(name, args, message, tmp_path):
    said = command(name, *args, COURSE_DATA=str(tmp_path))
    assert said.returncode == 1 and message in said.stderr and "Traceback" not in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_help_names_every_argument():
    said = command("course_train", "--help")
    assert said.returncode == 0
    assert all(f"--{name} " in said.stdout for name in ("data", "model", "size", "epochs",
                                                        "start_size")), said.stdout


def test_a_killed_process_goes_on(folder, tmp_path):
    "SIGKILL as soon as the first epoch is on disk; then the same command again."
    args = ["--data", folder, "--out", tmp_path / "cut", "--size", 64, "--epochs", 4, "--bs", 4,
            "--device", "cpu"]
    code = "import sys; from course_lib.commands import course_train; course_train()"
    first = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
                             stdout=subprocess.DEVNULL)
    end = time.time() + 120
    while not (tmp_path / "cut/last.pth").exists() and time.time() < end and first.poll() is None:
        time.sleep(.02)
    first.send_signal(signal.SIGKILL); first.wait()
    assert (tmp_path / "cut/last.pth").exists()
    assert command("course_train", *args).returncode == 0
    args[3] = tmp_path / "whole"
    assert command("course_train", *args).returncode == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_two_processes_train_one_detector(folder, tmp_path):
    """torchrun, two CPU processes over gloo: one set of files, the held-out pictures scored whole,
    the weights those of both."""
    out = tmp_path / "run"
    port = 29500 + os.getpid() % 1000
    code = "import sys; from course_lib.commands import course_train; course_train()"
    (tmp_path / "go.py").write_text(code)
    run = subprocess.run([sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
                          "--nproc-per-node", "2", "--master-port", str(port),
                          str(tmp_path / "go.py"),
                          "--data", str(folder), "--out", str(out), "--size", "64", "--epochs", "2",
                          "--bs", "2", "--device", "cpu"],
                         capture_output=True, text=True, env=os.environ
                         | dict(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"), timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    result = run_of(out)
    assert result["machine"]["processes"] == 2
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    assert run.stdout.count("epoch 2/2") == 1
    learn = train(str(folder), str(tmp_path / "one"), **OPTIONS | dict(epochs=1))
    learn.load(out / "detector.pth", with_opt=False)
    assert result["epochs"][-1]["map"] == pytest.approx(learn.evaluate().map, abs=1e-4)


# ---------------------------------------------------------------- parts

def tiny(n=6):
    rs = np.random.RandomState(0)
    def record(i):
        path = Path(os.environ["PICTURES"]) / f"{i}.png"
        boxes = draw(path.parent, path.name, 1, i)
        return Record(path, torch.tensor(boxes).float(), torch.zeros(1, dtype=torch.long),
                      torch.zeros(1, dtype=torch.bool), (80, 60))
    return Data([record(i) for i in range(n)], [record(i) for i in range(n, n + 3)], [], ["square"])


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES", str(tmp_path))
    return tiny()


def test_the_average_by_hand(data):
    """With decay .9 the average is 1/11 old, 10/11 new after a step, then 2/12 and 10/12, and so
    on; the model has it after the fit."""
    learn = fast_learner(data, RetinaNet(1, 64, width=16, depth=1, body=body()), bs=3, device="cpu")
    expected, seen = learn.model.logits.bias.detach().clone(), []
    class Watch(EMA):
        def after_batch(self):
            super().after_batch()
            if self.training:
                nonlocal expected
                keep = min(.9, self.steps / (10 + self.steps))
                expected = keep * expected + (1 - keep) * self.learn.model.logits.bias.detach()
                seen.append(keep)
    with learn.no_bar(), learn.no_logging(): one_cycle(learn, 2, 1e-2, cbs=[Watch(.9)])
    assert seen[:2] == [1 / 11, 2 / 12]
    assert torch.allclose(learn.model.logits.bias, expected, atol=1e-6)


def test_an_average_can_be_used_again(data):
    "A second fit starts from the weights that the first one left, not from an old average."
    learn, ema = fast_learner(data, RetinaNet(1, 64, width=16, depth=1, body=body()), bs=3,
                              device="cpu"), EMA(.9)
    with learn.no_bar(), learn.no_logging():
        one_cycle(learn, 1, 1e-2, cbs=[ema])
        assert ema.average is None and ema.steps == 0
        before = learn.model.logits.bias.detach().clone()
        one_cycle(learn, 1, 1e-9, cbs=[ema])
    assert torch.allclose(learn.model.logits.bias, before, atol=1e-6)


def test_saving_with_the_optimiser(data, tmp_path):
    "A learner with one of PyTorch's own optimisers can be saved and loaded with its state."
    make = lambda: fast_learner(data, RetinaNet(1, 64, width=16, depth=1, body=body()), bs=3,
                                device="cpu")
    first, second = make(), make()
    with first.no_bar(), first.no_logging(): one_cycle(first, 1, 1e-2)
    second.load(first.save(tmp_path / "a.pth"))
    a, b = first.opt.state_dict(), second.opt.state_dict()
    assert a["param_groups"][0]["lr"] == b["param_groups"][0]["lr"]
    assert len(a["state"]) == len(b["state"]) > 0
    assert all(torch.equal(a["state"][k]["exp_avg"], b["state"][k]["exp_avg"]) for k in a["state"])
    with second.no_bar(), second.no_logging(): one_cycle(second, 1, 1e-3)


def test_sizes_that_grow_by_hand():
    grow = Grow(128, 224, share=.6)
    assert [grow.size_at(e / 10) for e in range(10)] == [128, 128, 160, 160, 192, 192, 224, 224,
                                                         224, 224]
    assert Grow(224, 224).size_at(0) == 224


def test_a_resized_network_answers_as_one_made_for_that_size():
    small = RetinaNet(3, 64, width=16, depth=1, body=body()).eval()
    large = RetinaNet(3, 96, width=16, depth=1, body=body()).eval()
    large.load_state_dict(small.state_dict())
    small.resize(96)
    x = torch.rand(1, 3, 96, 96)
    assert torch.equal(small.anchors, large.anchors) and small.grids == large.grids
    assert small.settings == large.settings
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(small(x), large(x)))


@pytest.mark.parametrize("make", [lambda: RetinaNet(3, 64, width=16, depth=1, body=body()),
                                  lambda: RetinaNet(2, 72, width=16, ratios=((1, 1), (1, .5)),
                                                    body=body()),
                                  lambda: SSD(3, 64, grids=(2, 1),
                                              body=backbone(pretrained=False))])
def test_a_mirrored_detector_is_symmetric(make):
    "The answers for a mirrored picture are the mirrored answers, whatever the weights."
    set_seed(0)
    net = Flipped(make().eval())
    x = torch.rand(2, 3, net.size, net.size)
    with torch.no_grad(): (o, l), (o2, l2) = net(x), net(x.flip(3))
    assert torch.allclose(l2, l[:, net.twin], atol=1e-4)
    assert torch.allclose(o2, o[:, net.twin] * torch.tensor([-1, 1, 1, 1]), atol=1e-4)
    assert torch.equal(net.twin[net.twin], torch.arange(len(net.anchors)))


def test_schedules(data):
    for flat in (False, True):
        learn = fast_learner(data, RetinaNet(1, 64, width=16, depth=1, body=body()), bs=2,
                             device="cpu")
        with learn.no_bar(), learn.no_logging(): one_cycle(learn, 4, 1e-2, flat=flat)
        rates = learn.recorder.lrs
        assert max(rates) == pytest.approx(1e-2, rel=.05) and rates[0] < 1e-3
        assert (rates[-1] > 9e-3 if flat else rates[-1] < 1e-3)
        assert [h["lr"] for h in learn.opt.hypers][0] == pytest.approx(rates[-1] / 100)


def test_predicting_files(folder, tmp_path):
    train(str(folder), str(tmp_path / "run"), **OPTIONS | dict(epochs=1))
    results = predict_files(str(tmp_path / "run/detector.pth"), [str(folder / "JPEGImages")],
                            out="", score=0.)
    assert len(results) == 14 and all(r["objects"] for r in results)
    with pytest.raises(FileNotFoundError, match="no picture in"):
        predict_files(str(tmp_path / "run/detector.pth"), [str(folder / "Annotations")], out="")
