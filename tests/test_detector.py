"""Attacks on `course_lib.detector`."""
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import set_seed
from torch import nn

from course_lib import detector
from course_lib.anchors import encode
from course_lib.data import Data, Record
from course_lib.detect import predict as predict_pictures
from course_lib.detector import (MeanAP, checkpoint, detection_learner, load_detector,
                                 read_checkpoint, unpad, write_whole)
from course_lib.backbone import backbone
from course_lib.metrics import mean_ap
from course_lib.ssd import SSD

SIZE = 64


def ssd(n_classes=3, size=SIZE, **kwargs):
    return SSD(n_classes, size, grids=(2, 1), body=backbone(pretrained=False), **kwargs)


def records(folder, n, boxes=((10, 10, 40, 50),), labels=(1,)):
    made = []
    for i in range(n):
        path = folder / f"{len(list(folder.iterdir()))}.png"
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (60, 80, 3), dtype=np.uint8)).save(
            path)
        made.append(Record(path, torch.tensor(boxes, dtype=torch.float).view(-1, 4),
                           torch.tensor(labels, dtype=torch.long),
                           torch.zeros(len(labels), dtype=torch.bool), (80, 60)))
    return made


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    many = records(folder, 1, [[5, 5, 20, 20], [30, 10, 70, 50], [0, 0, 80, 60]], [0, 1, 1])
    return Data(records(folder, 5) + records(folder, 1, [], []), records(folder, 2)
                + records(folder, 2, [], []) + many, records(folder, 2), ["a", "b", "c"])


@pytest.fixture
def make(data, tmp_path):
    def make(data=data, **kwargs):
        kwargs = dict(model=ssd(len(data.classes)), bs=2, device="cpu", path=tmp_path) | kwargs
        return detection_learner(data, **kwargs)
    return make


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Told(nn.Module):
    "A detector that answers each picture with the same boxes."
    size = SIZE
    def __init__(self, boxes, labels, n_classes=3, body=None, probability=.9):
        super().__init__()
        self.body, self.weight = nn.Conv2d(3, 1, 1), nn.Parameter(torch.zeros(1))
        self.register_buffer("anchors", torch.tensor([[0., 0, 32, 32], [32, 32, 64, 64]]))
        self.offsets = encode(torch.tensor(boxes, dtype=torch.float), self.anchors)
        self.logits = torch.full((2, n_classes), -20.)
        for a, label in enumerate(labels):
            self.logits[a, label] = math.log(probability / (1 - probability))
    def forward(self, x):
        zero = self.weight * x.mean()
        return (self.offsets.expand(len(x), -1, -1) + zero * 0, self.logits.expand(len(x), -1, -1)
                + zero * 0)


def test_unpad_is_the_reverse_of_padding():
    boxes, labels = (torch.rand(3, 4, 4),
                     torch.tensor([[0, 2, -1, -1], [-1, -1, -1, -1], [1, 1, 1, 0]]))
    difficult = torch.rand(3, 4) > .5
    for one, b, l, d in zip(unpad(boxes, labels, difficult), boxes, labels, difficult):
        n = int((l >= 0).sum())
        assert torch.equal(one["boxes"], b[:n]) and torch.equal(one["labels"], l[:n])
        assert torch.equal(one["difficult"], d[:n])
    assert "difficult" not in unpad(boxes, labels)[0] and unpad(boxes[:0], labels[:0]) == []


def test_perfect_and_hopeless_detectors_score_1_and_0(make, data):
    truth = [[8, 10.667, 32, 53.333], [0, 0, 1, 1]]
    data.valid = data.valid[:4]
    assert quiet(make(model=Told(truth, [1]))).validate()[1] == 1
    assert quiet(make(model=Told(truth, [0]))).validate()[1] == 0
    assert quiet(make(model=Told(truth, [1], probability=.005))).validate()[1] == 0


def test_false_alarms_in_pictures_without_objects_count(make, data):
    truth = [[8, 10.667, 32, 53.333], [0, 0, 1, 1]]
    data.valid = data.valid[2:4] + data.valid[:2]
    learn = quiet(make(model=Told(truth, [1])))
    expected = mean_ap(*learn.get_preds(), 3).map
    assert learn.validate()[1] == pytest.approx(expected) and expected < 1


def test_metric_agrees_with_evaluate_and_does_not_depend_on_the_batch_size(make):
    learn = quiet(make(model=Told([[8, 10, 32, 53], [20, 8, 60, 55]], [1, 1])))
    value = learn.validate()[1]
    assert 0 < value < 1 and learn.evaluate().map == pytest.approx(value, abs=1e-4)
    assert quiet(make(model=learn.model, bs=5)).validate()[1] == pytest.approx(value)


def test_metric_ignores_difficult_objects(make, data):
    learn = quiet(make(model=Told([[8, 10.667, 32, 53.333], [0, 0, 1, 1]], [1])))
    data.valid[-1].difficult[:] = True
    assert learn.validate()[1] == learn.evaluate().map == mean_ap(*learn.get_preds(), 3).map


def test_nothing_to_find_and_nothing_found(make, data):
    data.valid = data.valid[2:4]
    learn = quiet(make())
    assert math.isnan(learn.validate()[1]) and math.isnan(MeanAP().value)
    assert quiet(make(model=Told([[0, 0, 1, 1]] * 2, []))).get_preds()[0][0]["boxes"].shape == (
        0, 4)


def test_a_diverged_network_scores_0_and_does_not_crash(make):
    learn = quiet(make())
    for p in learn.model.parameters(): nn.init.constant_(p, float("nan"))
    assert learn.validate()[1] == 0


def test_names_of_metrics_differ():
    names = [MeanAP().name, MeanAP(iou=.75).name, MeanAP(style="coco").name,
             MeanAP(style="11pt").name]
    assert names[0] == "mAP" and len(set(names)) == 4


def test_trains_with_map_at_every_epoch(make):
    learn = quiet(make())
    learn.fine_tune(2, frozen=1)
    assert learn.recorder.metric_names[-2] == "mAP" and len(learn.recorder.values) == 2
    assert all(math.isfinite(x) for row in learn.recorder.values for x in row)


def test_fine_tune_leaves_the_early_body_alone(make):
    learn = quiet(make())
    early, late, head = (group[0].clone() for group in (learn.splitter(learn.model)))
    learn.fine_tune(1, frozen=0, lr=1e-2)
    groups = learn.splitter(learn.model)
    assert torch.equal(groups[0][0], early) and not torch.equal(groups[2][0], head)


def test_lr_find_restores_the_weights_and_the_optimiser(make, tmp_path):
    learn = quiet(make())
    learn.fit_one_cycle(1, 1e-3)
    before, steps = weights(learn), [s.get("step") for s in learn.opt.state_dict()["state"]]
    learn.lr_find(num_it=8, show_plot=False)
    assert same(before, weights(learn))
    assert [s.get("step") for s in learn.opt.state_dict()["state"]] == steps
    assert list((tmp_path / "models").iterdir()) == []


def test_same_seed_same_training(make):
    def run():
        set_seed(7)
        learn = quiet(make(model=ssd()))
        learn.fine_tune(1, frozen=1)
        return weights(learn), learn.recorder.values
    (a, values), (b, again) = run(), run()
    assert same(a, b) and values == again


def test_save_and_load_go_round(make, data, tmp_path):
    learn, other = quiet(make()), quiet(make())
    learn.fit(1)
    assert learn.save("x") == tmp_path / "models" / "x.pth"
    assert other.load("x") is other and same(weights(learn), weights(other))
    a, b = learn.opt.state_dict(), other.opt.state_dict()
    assert [h["lr"] for h in a["hypers"]] == [h["lr"] for h in b["hypers"]]
    assert all(torch.equal(x["grad_avg"], y["grad_avg"]) for x, y in zip(a["state"], b["state"])
               if "grad_avg" in x)
    other.fit_one_cycle(1, 1e-3)
    model, classes = load_detector(tmp_path / "models" / "x.pth", device="cpu")
    assert classes == data.classes and not model.training
    assert same(weights(learn), model.state_dict())
    assert torch.equal(model.anchors, learn.model.anchors)


def test_an_optimiser_with_other_groups_is_left_out(make):
    learn, other = quiet(make()), quiet(make(splitter=lambda model: [list(model.parameters())]))
    learn.fit(1)
    learn.save("x")
    with pytest.warns(UserWarning, match="optimiser"): other.load("x")
    assert same(weights(learn), weights(other))
    other.fit(1)


def test_a_path_with_a_suffix_is_a_path(make, tmp_path):
    learn, path = make(), tmp_path / "new" / "folder" / "mine.pth"
    assert learn.save(str(path), with_opt=False) == path and path.exists()
    assert "opt" not in read_checkpoint(path)
    learn.load(path)


def test_file_alone_is_enough_in_another_process(make, tmp_path):
    path = make().save(tmp_path / "x.pth")
    code = ("import sys; from course_lib.detector import load_detector; m, c = "
            "load_detector(sys.argv[1], 'cpu'); print(c, m.size, type(m).__name__)")
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True,
                         check=True, cwd=tmp_path).stdout
    assert out.strip() == "['a', 'b', 'c'] 64 SSD"


def test_body_and_its_statistics_come_back(tmp_path):
    model = SSD(2, SIZE, grids=(2,), body=backbone("resnet18", pretrained=False))
    model.body.fixed_stats = True
    write_whole(checkpoint(model, ["x", "y"]), tmp_path / "r.pth")
    again, _ = load_detector(tmp_path / "r.pth", "cpu")
    assert again.body.fixed_stats and again.body.channels == model.body.channels
    assert torch.equal(again.body.mean, model.body.mean)
    x = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(again(x), model.eval()(x))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_file(make, tmp_path, monkeypatch, error):
    learn, path = make(), tmp_path / "x.pth"
    learn.save(path)
    old = path.read_bytes()
    def stop(state, f):
        f.write(old[:1000])
        raise error
    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(type(error)): learn.save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.glob("*x.pth*")] == ["x.pth"]
    assert not list(tmp_path.glob(".*"))


def test_what_could_not_be_loaded_is_not_put_in_place(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"old")
    with pytest.raises(Exception): write_whole(dict(format="x", odd=Image.new("L", (1, 1))), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_odd_numbers_and_names_can_be_saved(tmp_path):
    model = ssd()
    model.settings["size"] = np.int64(SIZE)
    write_whole(checkpoint(model, np.array(["a", "b", "c"])), tmp_path / "x.pth")
    assert load_detector(tmp_path / "x.pth", "cpu")[1] == ["a", "b", "c"]


def test_wrong_files_are_refused_in_one_sentence_and_change_nothing(make, data, tmp_path):
    learn = make()
    before, bad = weights(learn), {}
    bad["knows b, a, c"] = make(Data(data.train, data.valid, [],
                                     ["b", "a", "c"])).save(tmp_path / "order.pth")
    bad["96 px"] = make(model=ssd(size=96)).save(tmp_path / "size.pth")
    bad["other anchors"] = make(model=ssd(zooms=(.5, 1, 1.3))).save(tmp_path / "anchors.pth")
    bad["do not fit"] = make(model=Told([[0, 0, 1, 1]] * 2, [])).save(tmp_path / "told.pth")
    for name, content in dict(text=b"hello", empty=b"", half=bad["96 px"].read_bytes()[:5000],
                              pickled=pickle.dumps({"a": print}, 2)).items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        bad[f"{name}.pth"] = tmp_path / f"{name}.pth"
    torch.save(learn.model.state_dict(), tmp_path / "bare.pth")
    bad["bare.pth"] = tmp_path / "bare.pth"
    (tmp_path / "folder.pth").mkdir()
    bad["folder.pth"] = tmp_path / "folder.pth"
    for words, path in bad.items():
        with pytest.raises(ValueError, match=words) as e: learn.load(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 250
    assert same(before, weights(learn))
    with pytest.raises(FileNotFoundError, match="nowhere"): learn.load("nowhere")


def test_load_detector_on_rubbish(make, tmp_path):
    for content in (b"", b"rubbish", pickle.dumps([1, 2], 2)):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match="x.pth"): load_detector(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_detector(tmp_path / "nowhere.pth")


def test_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))
    torch.save(dict(format=detector.FORMAT, classes=Evil()), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth"): load_detector(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["os.system", "SSD", "course_lib.ssd.SSD.x.y",
                                  "course_lib.machine.check_machine", "course_lib.nowhere.SSD",
                                  "course_lib.ssd.Nothing", "subprocess.Popen"])
def test_checkpoint_names_only_networks_of_the_course(tmp_path, kind):
    state = checkpoint(ssd(), ["a", "b", "c"]) | dict(kind=kind)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth"): load_detector(tmp_path / "x.pth")


def test_checkpoint_without_one_of_its_parts(tmp_path):
    state = checkpoint(ssd(), ["a", "b", "c"])
    for part in set(state) - {"format"}:
        torch.save({k: v for k, v in state.items() if k != part}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="x.pth"): load_detector(tmp_path / "x.pth")


def test_load_takes_no_misspelt_options_and_works_on_a_wrapped_model(make, tmp_path):
    learn = make()
    learn.create_opt()
    path = learn.save(tmp_path / "x.pth")
    with pytest.raises(TypeError): learn.load(path, with_optim=False)
    learn.model = nn.DataParallel(learn.model)
    learn.load(path)


def test_a_loader_without_pictures_gives_no_predictions(make, data):
    learn = quiet(make())
    found, there = learn.get_preds(dl=learn.dls.valid.new(dataset=learn.dls.valid.dataset.__class__(
        [], learn.dls.valid.dataset.tfms), bs=1))
    assert found == [] == there


def test_a_network_of_ones_own_is_loaded_into_one(make, tmp_path):
    model = Told([[0, 0, 32, 32], [1, 1, 9, 9]], [2])
    nn.init.constant_(model.weight, 3)
    path = make(model=model).save(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model="): load_detector(path)
    again, classes = load_detector(path, "cpu", model=Told([[0, 0, 32, 32], [1, 1, 9, 9]], [2]))
    assert again.weight.item() == 3 and classes == ["a", "b", "c"]


@pytest.mark.parametrize("with_opt", [False, True])
def test_save_model_callback(make, tmp_path, with_opt, capsys):
    learn = quiet(make())
    learn.fit_one_cycle(2, 1e-3, cbs=SaveModelCallback(monitor="mAP", fname="best",
                                                       with_opt=with_opt))
    assert (tmp_path / "models" / "best.pth").exists()
    learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback(every_epoch=True, fname="each"))
    load_detector(tmp_path / "models" / "each_0.pth", "cpu")


def test_predict_takes_every_kind_of_picture(make, data):
    learn, record = make(model=Told([[0, 0, 32, 64], [32, 32, 64, 64]], [2, 0])), data.valid[0]
    array = np.asarray(Image.open(record.path))
    kinds = [record, record.path, str(record.path), Image.open(record.path), array,
             torch.tensor(array).permute(2, 0, 1)]
    for one in [*map(learn.predict, kinds), *learn.predict(kinds)]:
        assert sorted(zip(one["labels"].tolist(), one["boxes"].round().tolist())) == [
            (0, [40, 30, 80, 60]), (2, [0, 0, 40, 60])]
    assert learn.predict([]) == []
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"): learn.predict("nowhere.jpg")


def test_get_preds_is_in_order_and_leaves_the_metrics_alone(make, data):
    learn = quiet(make())
    metrics = list(learn.metrics)
    for split, records in ((0, data.train), (1, data.valid)):
        found, there = learn.get_preds(split)
        assert len(found) == len(there) == len(records)
    assert [len(t["labels"]) for t in there] == [len(r.labels) for r in data.valid]
    assert list(learn.metrics) == metrics


def test_show_results_with_empty_pictures_and_nothing_found(make, data):
    import matplotlib.pyplot as plt
    learn = make(model=Told([[0, 0, 1, 1]] * 2, []))
    for n in (1, 3, 50): assert len(learn.show_results(n).axes) % 4 == 0
    learn.show_results(2, records=data.test)
    with pytest.raises(ValueError, match="no picture"): learn.show_results(3, records=[])
    plt.close("all")


def test_what_does_not_fit_is_refused(make, data):
    with pytest.raises(ValueError, match="64 px"): make(size=128)
    with pytest.raises(ValueError, match="4 classes"): make(model=ssd(4))
    with pytest.raises(ValueError, match="valid"): make(Data(data.train, [], [], data.classes))
    with pytest.raises(NotImplementedError, match="load_detector"): make().export()


def test_defaults_are_the_courses(data, tmp_path):
    learn = detection_learner(data, device="cpu", path=tmp_path)
    assert learn.size == 128 and learn.model.n_classes == 3
    assert len(learn.splitter(learn.model)) == 3
    assert learn.loss_func.kind == "focal" and not learn.train_bn
    assert len(learn.dls.train.one_batch()) == 4


# ------------------------------------------------ detectors that come with the course

def test_a_detector_that_comes_with_the_course_is_opened_by_its_name():
    from skimage import data as photos
    model, names = load_detector("animals", "cpu")
    assert names == ["cat", "cow", "dog", "horse", "person", "sheep"]
    assert next(model.parameters()).dtype == torch.float32
    cat = predict_pictures(model, photos.chelsea())
    assert names[cat["labels"][0]] == "cat" and cat["scores"][0] > .5
    assert names[predict_pictures(model, photos.astronaut())["labels"][0]] == "person"


def test_a_file_of_that_name_comes_first_and_a_misspelt_name_is_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").write_text("somebody's own file")
    with pytest.raises(ValueError, match="'animals' can't be read"): load_detector("animals")
    with pytest.raises(FileNotFoundError, match="'animls'.*with the course come animals"):
        load_detector("animls")
    (tmp_path / "animals").unlink()
    (tmp_path / "animals").mkdir()
    assert load_detector("animals", "cpu")[0].size == 320, "a folder of that name is no file"
