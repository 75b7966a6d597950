"""The parts of gpu.py, which says what they are: each gives its units, by name, as the seconds that
a unit takes and a function that measures it and returns what is to be kept.

Every part takes `s`: the `device` ("cuda" or "cpu"), `tiny` (the rehearsal?), `out` (the folder
for results), `data` (the folder of the photographs, or None), `end` (the moment, by
time.monotonic, when the part must be over).
"""
import json, statistics, subprocess, sys, tempfile, time, traceback, warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import course_lib.machine  # noqa: F401, before fastai
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch.autograd import DeviceType
from torchvision.models.detection import _utils as tv

sys.path += [str(Path(__file__).resolve().parent / name) for name in ("timings", "experiments")]
import bench_loss  # noqa: E402
import bench_step  # noqa: E402
from many_objects import ANIMALS, torchvision_retinanet
from speedrun import Clock, Unvalidated
from course_lib.anchors import make_anchors
from course_lib.augment import train_tfms, valid_tfms
from course_lib.data import get_data
from course_lib.deploy import to_onnx
from course_lib.detect import detections, predict as predict_files
from course_lib.detector import detection_learner, load_detector
from course_lib.fast import cut, follow, in_memory, memory_loaders, random_windows
from course_lib.fpn import RetinaNet, atss, retina_loss
from course_lib.learn import backbone, dataloaders, keep_memory, only_largest, param_groups
from course_lib.losses import SSDLoss
from course_lib.machine import data_root
from course_lib.match import match
from course_lib.metrics import mean_ap
from course_lib.pocket import make_pocket
from course_lib.recipe import EMA, Half, fast_learner, one_cycle, train
from course_lib.single import SingleHead, SingleLoss

WATCHED = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
BARS = 65, 70, 72
RUNS = {  # settings of the speed run, in order of worth
    "64 x 24": dict(size=288, bs=64, epochs=24, lr=7e-3, ema=.98),
    "64 x 8": dict(size=288, bs=64, epochs=8, lr=7e-3, ema=.98),
    "32 x 24": dict(size=288, bs=32, epochs=24, lr=5e-3, ema=.99),
    "64 x 12, 224 px": dict(size=224, bs=64, epochs=12, lr=7e-3, ema=.98),
    "64 x 24, whole body": dict(size=288, bs=64, epochs=24, lr=7e-3, ema=.98, whole=True)}
TINY_RUNS = {"2 x 2": dict(size=64, bs=4, epochs=2, lr=5e-3, ema=.9)}


# ---------------------------------------------------------------- tools of the units

def finish(s):
    if s.device == "cuda": torch.cuda.synchronize()


def put(x, device):
    "The same on another device."
    if isinstance(x, (list, tuple)): return type(x)(put(y, device) for y in x)
    return x.to(device) if hasattr(x, "to") else x


def step_seconds(step, repeats, s):
    "The times of so many steps, one after the other."
    if s.device != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter(); step(); times.append(time.perf_counter() - begin)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    finish(s)
    marks[0].record()
    for mark in marks[1:]: step(); mark.record()
    finish(s)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]


def call_seconds(calls, repeats, s):
    "Median seconds of each of several calls, by turns, each from one synchronisation to the next."
    times = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name in list(calls)[::-1 if i % 2 else 1]:
            finish(s)
            begin = time.perf_counter()
            calls[name]()
            finish(s)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def seen(run, s):
    "What the profiler sees of a call on the GPU: numbers of events, and seconds of kernels."
    with torch.profiler.profile(activities=WATCHED) as profile:
        run()
        finish(s)
    events = [e for e in profile.events() if not getattr(e, "is_user_annotation", False)]
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA
              and not e.name.startswith(("Optimizer", "ProfilerStep", "##"))]
    kernels = [e for e in on_gpu if not e.name.startswith(("Memcpy", "Memset"))]
    names = [e.name for e in events if e.device_type == DeviceType.CPU]
    return dict(launches=sum("LaunchKernel" in n for n in names),
                graphs=sum("GraphLaunch" in n for n in names), kernels=len(kernels),
                synchronisations=sum("Synchronize" in n for n in names),
                copies_to_host=sum("DtoH" in e.name for e in on_gpu),
                kernel_ms=sum(e.time_range.elapsed_us() for e in kernels) / 1e3)


def profiled(run, s):
    "The same, less what it sees of nothing; or why it sees nothing at all."
    if s.device != "cuda": return {}
    try:
        nothing, found = seen(lambda: None, s), seen(run, s)
        return {k: round(v - nothing[k], 3) for k, v in found.items()}
    except Exception as error: return dict(profiler=f"{type(error).__name__}: {error}"[:300])


def gauge(step, pictures, s, seconds=2.):
    "All that is to be known of a step that sees so many pictures."
    begin = time.perf_counter()
    step(); finish(s)
    row = dict(first_step_seconds=round(time.perf_counter() - begin, 2))
    for _ in range(1 if s.tiny else 3): step()
    one = statistics.median(step_seconds(step, 2, s))
    times = step_seconds(step, 2 if s.tiny else max(5, min(30, int(seconds / one))), s)
    middle = statistics.median(times)
    row |= dict(pictures_per_second=round(pictures / middle, 1), ms=round(1e3 * middle, 2),
                ms_fastest=round(1e3 * min(times), 2), steps=len(times))
    if s.device != "cuda": return row
    torch.cuda.reset_peak_memory_stats()
    step(); finish(s)
    row["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    row |= profiled(step, s)
    if "kernel_ms" in row: row["busy"] = round(row["kernel_ms"] / (1e3 * middle), 2)
    return row


def captured(run, s, random=None):
    "A call as one CUDA graph, which is launched as a whole."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if random is not None: graph.register_generator_state(random)
    with torch.cuda.graph(graph): run()
    return graph.replay


def warned(run):
    "The waits that PyTorch warns of while it runs a call that switches its warnings on."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    said = [w for w in said if "synchroniz" in str(w.message)]
    places = Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in said)
    return dict(waits=len(said), places=dict(places.most_common(20)))


def waits(run, s):
    """How often a call makes the host wait for the GPU, and where; on a CPU, the operations that
    would."""
    if s.device != "cuda":
        return dict(waits=bench_step.count(run)["waits"])
    torch.cuda.set_sync_debug_mode("warn")
    try: return warned(run)
    finally: torch.cuda.set_sync_debug_mode("default")


def never_waits(run, s):
    "The same with PyTorch raising an error at the first wait: the strict form."
    if s.device != "cuda": return dict(raised="not on a CPU")
    torch.cuda.set_sync_debug_mode("error")
    try: run()
    except RuntimeError as error:
        return dict(raised="".join(traceback.format_exception(error))[-1200:])
    finally: torch.cuda.set_sync_debug_mode("default")
    return dict(raised=None)


@contextmanager
def exact(s):
    "Products and convolutions in full float32."
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32
    cudnn.allow_tf32 = products.allow_tf32 = False
    try: yield
    finally: cudnn.allow_tf32, products.allow_tf32 = before


def photographs(s, limit=None):
    "The real photographs; in the rehearsal, a handful that are drawn."
    folder = Path(s.data) if s.data else data_root() / "VOC2012-animals"
    if s.tiny and not s.data: folder = drawn(s, "photographs", 8)
    names = ANIMALS if "animals" in folder.name else None
    return get_data(folder, classes=names, limit=limit)


def drawn(s, name, n):
    "A few drawn pictures, for the rehearsal."
    return make_pocket(s.out / "tiny" / name, n_train=n, n_valid=n // 2, n_test=1, size=64)


# ---------------------------------------------------------------- the parts

def agree(s):
    "GPU and CPU say the same, and nothing waits."
    size = 64 if s.tiny else 288
    bench_loss.BATCH = bench_step.BATCH = B = 2 if s.tiny else 32
    both = ("cpu", s.device)

    def off(a, b):
        "||a - b|| / ||b||"
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        return float((a - b).norm() / b.norm().clamp(min=1e-30))

    def examples():
        "Boxes and labels of a batch, and its anchors of two kinds."
        pictures = bench_loss.random_batch(torch.Generator().manual_seed(0))
        return bench_loss.padded(pictures), RetinaNet(bench_loss.CLASSES, bench_loss.SIZE)

    def transforms():
        random = torch.Generator().manual_seed(0)
        images, boxes, labels, _ = bench_step.batch(size, "cpu")
        side = images.shape[-1]
        windows = random_windows(B, side, (.3, 1.), out=.3, generator=random)
        mirror = torch.rand(B, generator=random) < .5
        def run(device):
            x, b, l, w, m = put([images.float(), boxes, labels, windows, mirror], device)
            return put([cut(x, w, size, m), *follow(b, l, w, size, m)], "cpu")
        (x, b, l), (y, c, k) = (run(device) for device in both)
        most = float((x - y).abs().max())
        row = dict(largest_difference_of_255=most, boxes_px=float((b - c).abs().max()),
                   labels_that_differ=int((l != k).sum()))
        return row | dict(agrees=most < .25 and row["boxes_px"] < .01
                          and not row["labels_that_differ"])

    def matches():
        (boxes, labels), net = examples()
        found = {}
        for name, anchors, rule in (("match, 189", bench_loss.anchors_of(189), match),
                                    ("match, 1890", bench_loss.anchors_of(1890),
                                     partial(match, positive=.5, negative=.4)),
                                    ("atss", net.anchors, partial(atss, grids=net.grids))):
            a, b = (rule(*put([anchors, boxes, labels], device)).cpu() for device in both)
            found[name] = int((a != b).sum()) / a.numel()
        return dict(share_that_differs=found, agrees=max(found.values()) <= 1e-4)

    def losses():
        (boxes, labels), net = examples()
        random, found = torch.Generator().manual_seed(1), {}
        for kind in ("bce", "hard", "focal", "retina"):
            anchors = net.anchors if kind == "retina" else bench_loss.anchors_of(189)
            make = lambda: (retina_loss(net) if kind == "retina"
                            else SSDLoss(anchors, kind, positive=.5, negative=.4))
            offsets = torch.randn(B, len(anchors), 4, generator=random) * .5
            logits = torch.randn(B, len(anchors), bench_loss.CLASSES, generator=random) - 3
            results = []
            for device in both:
                net.to(device)
                pred = [x.to(device, copy=True).requires_grad_() for x in (offsets, logits)]
                loss = make().to(device)(pred, *put([boxes, labels], device))
                loss.backward()
                results.append((loss, *(x.grad for x in pred)))
            net.cpu()
            found[kind] = [off(y, x) for x, y in zip(*results)]
        return dict(loss_and_gradients_off_by=found,
                    agrees=max(max(x) for x in found.values()) < 1e-4)

    def step():
        "One forward and backward pass, in float32 on both and in bf16."
        net = RetinaNet(6, size).train()
        images, boxes, labels, difficult = bench_step.batch(size, "cpu")
        x = images[..., :size, :size].float() / 255
        truth = [boxes.clamp(max=size), labels, difficult]
        def run(device, half=False):
            net.to(device).zero_grad()
            kind = torch.device(device).type
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                pred = net(x.to(device, memory_format=torch.channels_last))
            loss = retina_loss(net)(pred, *put(truth, device))
            loss.backward()
            flat = torch.cat([p.grad.detach().float().cpu().flatten() for p in net.parameters()
                              if p.grad is not None])
            return loss.detach().cpu(), flat
        with exact(s): (l, g), (m, h) = (run(device) for device in both)
        rough, rough_g = run(s.device, half=True)
        fast, fast_g = run(s.device)
        row = dict(loss=float(l), loss_off_by=off(m, l), gradient_off_by=off(h, g),
                   bf16_loss_off_by=off(rough, l), bf16_gradient_off_by=off(rough_g, g),
                   as_it_comes_loss_off_by=off(fast, l), as_it_comes_gradient_off_by=off(fast_g, g))
        return row | dict(agrees=row["loss_off_by"] < 1e-4 and row["gradient_off_by"] < 1e-3
                          and row["bf16_loss_off_by"] < .02)

    def moves():
        "A loss that is made first and moved with its model afterwards, as lesson 12 does."
        net = RetinaNet(6, size)
        loss, truth = retina_loss(net), bench_step.batch(size, s.device)[1:]
        net, loss = net.to(s.device), loss.to(s.device)
        with torch.no_grad():
            value = float(loss(net(torch.rand(B, 3, size, size, device=s.device)), *truth))
        return dict(loss=value, agrees=value > 0)

    def found():
        "The detector that comes with the course, on photographs."
        records, scores, answers = photographs(s, 2 if s.tiny else 64).valid, {}, []
        net, names = load_detector("animals", "cpu")
        if s.tiny: net.resize(size)
        images, *truth = in_memory(records, net.size)
        targets = [dict(boxes=b[l >= 0], labels=l[l >= 0], difficult=d[l >= 0])
                   for b, l, d in zip(*truth)]
        with torch.no_grad(), exact(s):
            for device in both:
                net.to(device)
                pred = [net(x.to(device) / 255) for x in images.split(16)]
                pred = [torch.cat(x).cpu() for x in zip(*pred)]
                answers.append(pred)
                out = detections(put(pred, device), net.anchors, net.size, .01)
                out = [{k: v.cpu() for k, v in one.items()} for one in out]
                if not s.tiny: scores[device] = 100 * float(mean_ap(out, targets, len(names)).map)
            same = [detections(put(answers[0], d), net.anchors.to(d), net.size, .05) for d in both]
        n = [sum(len(one["boxes"]) for one in some) for some in same]
        alike = sum(len(a["boxes"]) == len(b["boxes"])
                    and torch.equal(a["labels"].cpu(), b["labels"].cpu())
                    and torch.allclose(a["boxes"].cpu(), b["boxes"].cpu(), atol=.01)
                    for a, b in zip(*same))
        values = list(scores.values()) or [0., 0.]
        row = dict(network_off_by=[off(b, a) for a, b in zip(*answers)], detections=n,
                   pictures=len(images), pictures_alike=alike, map50=scores)
        return row | dict(agrees=abs(values[0] - values[-1]) < .5
                          and alike >= .95 * len(images))

    def quiet_step():
        data = bench_step.batch(size, s.device)
        crowd = [data[0], *(x.repeat(1, 10, *[1] * (x.ndim - 2)) for x in data[1:])]
        row = {}
        for name, setup, some in (("float32", "ours", data), ("bf16", "ours bf16", data),
                                  ("30 objects", "ours", crowd)):
            run = bench_step.make_step(setup, size, s.device, some)
            for _ in range(2): run()
            finish(s)
            row[name] = waits(run, s) | never_waits(run, s)
        # a number is fetched on purpose, so that a zero above means something
        row["control"] = waits(lambda: torch.equal(data[1], data[1] + 1), s)
        none = all(not row[k]["waits"] and row[k]["raised"] is None for k in list(row)[:3])
        return row | dict(agrees=none and row["control"]["waits"] > 0 or s.device == "cpu")

    def quiet_epoch():
        "fastai's loop around it, with batches from memory, averaged weights and bf16."
        data = photographs(s, 4 if s.tiny else 256)
        dls = memory_loaders(data, size, B, device=s.device)
        learn = fast_learner(data, RetinaNet(len(data.classes), size), dls=dls)
        learn.freeze_to(1)
        class Quiet(Callback):
            "Complain between the beginning of an epoch's batches and their end; after the first."
            order = -1000
            mode, batches = "warn", 0
            def before_batch(self):
                if self.epoch and self.training and s.device == "cuda":
                    torch.cuda.set_sync_debug_mode(self.mode)
                self.batches += 1
            def after_train(self):
                if s.device == "cuda": torch.cuda.set_sync_debug_mode("default")
        quiet = Quiet()
        def run():
            with learn.no_bar(), learn.no_logging():
                one_cycle(learn, 2, 1e-3, cbs=[quiet, EMA(.9), Half(), Unvalidated()])
        row = warned(run)
        quiet.mode, raised = "error", None
        try: run()
        except RuntimeError as error: raised = "".join(traceback.format_exception(error))[-1500:]
        finally: quiet.after_train()
        return row | dict(raised=raised, batches=quiet.batches,
                          agrees=not row["waits"] and raised is None)

    return {"transforms": (3, transforms), "match": (3, matches), "losses": (3, losses),
            "a step": (5, step), "a loss moves": (3, moves), "a step never waits": (8, quiet_step),
            "an epoch never waits": (10, quiet_epoch), "detections": (10, found)}


def speedrun(s):
    "Each setting in a process of its own, as someone would start it."
    def one(name):
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("gpu.py")),
                   "--one", name, "--out", str(s.out), "--device", s.device,
                   *["--tiny"] * s.tiny]
        if s.tiny and not s.data: command += ["--data", str(drawn(s, "photographs", 8))]
        elif s.data: command += ["--data", s.data]
        limit = max(10, s.end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{last}\n(code {done.returncode})\n{done.stderr[-2500:]}")
        return json.loads(done.stdout.splitlines()[-1])
    return {name: (25 + 1.2 * run["epochs"], partial(one, name))
            for name, run in (TINY_RUNS if s.tiny else RUNS).items()}


def one_speedrun(name, start, s):
    """JPEG files to mAP, in this process, which began at `start`; the averaged weights of every
    epoch are scored later."""
    run = (TINY_RUNS if s.tiny else RUNS)[name]

    class Snapshots(Callback):
        "The averaged weights after each epoch, and when they were there."
        order = 65
        def before_fit(self): finish(s); self.begin, self.taken = time.perf_counter(), []
        def after_epoch(self):
            finish(s)
            self.taken.append((time.perf_counter() - self.begin, [x.clone() for x in
                                                                  average.average]))

    clock = Clock(s.device)
    clock.last = start
    clock("imports")
    data = photographs(s)
    clock("annotations")
    dls = memory_loaders(data, run["size"], run["bs"], device=s.device)
    clock("pictures")
    net = RetinaNet(len(data.classes), run["size"])
    learn = fast_learner(data, net, dls=dls)
    if not run.get("whole"): learn.freeze_to(1)
    half = [Half()] if s.device == "cuda" and torch.cuda.is_bf16_supported() else []
    images, *truth = next(iter(dls.train))
    with torch.autocast(s.device, torch.bfloat16, enabled=bool(half)): pred = net.train()(images)
    learn.loss_func(pred, *truth).backward()
    learn.opt.zero_grad()
    clock("network")
    average, snapshots = EMA(run["ema"]), Snapshots()
    with learn.no_bar(), learn.no_logging():
        one_cycle(learn, run["epochs"], run["lr"],
                  cbs=[Unvalidated(), average, snapshots, *half])
        clock("training")
        score = lambda: round(100 * float(mean_ap(*learn.get_preds(), len(data.classes)).map), 2)
        final = score()
        clock("scoring")
        before = sum(clock.phases[k] for k in ("imports", "annotations", "pictures", "network"))
        weights = [w for w in net.state_dict().values() if w.is_floating_point()]
        def score_of(epoch):
            for w, kept in zip(weights, snapshots.taken[epoch][1]): w.copy_(kept)
            return score()
        curve, first = bisect(score_of, len(snapshots.taken), BARS, final)
    seconds_to = {str(bar): None if i is None else
                  dict(epoch=i + 1, training=round(snapshots.taken[i][0], 2),
                       all=round(before + snapshots.taken[i][0], 2)) for bar, i in first.items()}
    steps = run["epochs"] * len(dls.train)
    row = dict(map50=final, total_seconds=round(sum(clock.phases.values()), 2),
               phases=clock.phases, seconds_to=seconds_to, steps=steps,
               ms_a_step=round(1e3 * snapshots.taken[-1][0] / steps, 2),
               map50_after_epoch={str(i + 1): x for i, x in sorted(curve.items())},
               train_pictures=len(data.train), scored_pictures=len(data.valid), settings=run,
               bf16=bool(half), threads=torch.get_num_threads())
    if s.device == "cuda":
        row["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print(json.dumps(row))


def bisect(score, n, bars, last):
    """The first of n epochs whose mAP reaches each bar, None where the last one does not, and the
    mAP of those that were looked at; taking for granted that it rises."""
    known, first = {n - 1: last}, {}
    for bar in bars:
        low, high = 0, n - 1
        while low < high and last >= bar:
            middle = (low + high) // 2
            if middle not in known: known[middle] = score(middle)
            if known[middle] >= bar: high = middle
            else: low = middle + 1
        first[bar] = high if last >= bar else None
    return known, first


def step(s):
    "A training step beside torchvision's."
    size = 64 if s.tiny else 224
    if s.device == "cpu": keep_memory()

    def crowd(data):
        return [data[0], *(x.repeat(1, 10, *[1] * (x.ndim - 2)) for x in data[1:])]
    def one(setup, n):
        torch.manual_seed(0)
        bench_step.BATCH = n
        torch.backends.cudnn.benchmark = "tries" in setup
        data = bench_step.batch(size, s.device)
        try:
            run = bench_step.make_step(setup, size, s.device, crowd(data) if "30" in setup
                                       else data)
            if "captured" in setup:
                for group in run.opt.param_groups: group["capturable"] = True
                run = captured(run, s, run.random)
            row = gauge(run, n, s)
            if "captured" not in setup and "compiled" not in setup: row |= waits(run, s)
        finally:
            torch.backends.cudnn.benchmark = False
            if "compiled" in setup: torch._dynamo.reset()
        return row
    if s.tiny:
        plan = [("torchvision", 2, 0), ("torchvision bf16", 2, 0), ("ours", 2, 0),
                ("ours bf16", 2, 0), ("whole", 2, 0), ("ours, 30 objects", 2, 0),
                ("ours bf16 captured", 2, 0)]
    else:
        plan = [("torchvision", 32, 8), ("ours", 32, 5), ("ours bf16", 32, 5),
                ("torchvision", 128, 12), ("ours", 128, 6), ("ours bf16", 128, 6),
                ("ours bf16 captured", 32, 6), ("ours bf16 compiled", 128, 70),
                ("ours bf16 captured", 128, 6), ("torchvision bf16", 32, 8),
                ("torchvision bf16", 128, 12), ("ours, 30 objects", 32, 5),
                ("ours captured", 32, 6), ("whole bf16", 128, 6), ("whole", 32, 5),
                ("ours bf16 tries", 128, 10), ("ours compiled", 32, 60)]
    if s.device == "cpu": plan = [p for p in plan if "captured" not in p[0]]
    return {f"{setup}, {n}": (need, partial(one, setup, n)) for setup, n, need in plan}


def loss(s):
    "Match and loss beside torchvision's."
    C = bench_loss.CLASSES
    bench_loss.BATCH = B = 2 if s.tiny else 32

    def anchors_of(n):
        "The lesson's, or n of those of six grids."
        if n in (189, 1890): return bench_loss.anchors_of(n)
        many = make_anchors(bench_loss.SIZE, (32, 16, 8, 4, 2, 1), (.4, .7, 1., 1.3, 1.6))
        some = torch.randperm(len(many), generator=torch.Generator().manual_seed(0))[:n]
        return many[some.sort().values]
    def one(n):
        random = torch.Generator().manual_seed(42)
        pictures, anchors = bench_loss.random_batch(random), anchors_of(n).to(s.device)
        assert len(anchors) == n
        boxes, labels = put(bench_loss.padded(pictures), s.device)
        targets = [dict(boxes=b.to(s.device), labels=l.to(s.device)) for b, l in pictures]
        offsets = torch.randn(B, n, 4, generator=random).to(s.device)
        rows, repeats = dict(slots=boxes.shape[1]), 1 if s.tiny else 8
        def timed(name, mine, theirs):
            seconds = call_seconds(dict(ours=mine, torchvision=theirs), repeats, s)
            rows[name] = dict(ours_ms=round(1e3 * seconds["ours"], 2),
                              torchvision_ms=round(1e3 * seconds["torchvision"], 2),
                              times_faster=round(seconds["torchvision"] / seconds["ours"], 2))
        for peer, kind, make, columns, matcher, low in (
                ("SSD", "hard", bench_loss.their_ssd, C + 1, tv.SSDMatcher(.5), .5),
                ("RetinaNet", "focal", bench_loss.their_retinanet, C,
                 tv.Matcher(.5, .4, allow_low_quality_matches=True), .4)):
            timed(f"match, {peer}", partial(match, anchors, boxes, labels, None, .5, low),
                  lambda: bench_loss.overlap_and_match(matcher, targets, [anchors] * B))
            logits = (torch.randn(B, n, columns, generator=random) - 3).to(s.device)
            mine, other = bench_loss.ours(anchors, kind, boxes, labels), make(anchors, targets)
            for run in (bench_loss.forward, bench_loss.forward_backward):
                pairs = [[x.clone().requires_grad_(run is bench_loss.forward_backward)
                          for x in (offsets, y)] for y in (logits[..., :C].contiguous(), logits)]
                timed(f"{run.__name__}, {peer}".replace("_", " + "), partial(run, mine, *pairs[0]),
                      partial(run, other, *pairs[1]))
            rows[f"waits, {peer}"] = dict(
                ours=waits(partial(bench_loss.forward, mine, *pairs[0]), s)["waits"],
                torchvision=waits(partial(bench_loss.forward, other, *pairs[1]), s)["waits"])
        rows["times_faster"] = rows["forward + backward, RetinaNet"]["times_faster"]
        return rows
    return {f"{n} anchors": (8, partial(one, n))
            for n in ((189, 300) if s.tiny else (189, 1890, 8732, 20000))}


def predict(s):
    "The detector that comes with the course."
    net, names = load_detector("animals", s.device)
    if s.tiny: net.resize(64)
    data = photographs(s, 2 if s.tiny else 128)
    images = (in_memory(data.valid, net.size)[0].to(s.device) / 255)
    images = images.to(memory_format=torch.channels_last)
    batches = (1, 2) if s.tiny else (1, 32, 128)

    def speeds(run, batches=batches):
        row = {}
        for n in batches:
            x = images[torch.arange(n, device=s.device) % len(images)]
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                seconds = call_seconds(dict(it=partial(run, x)), 1 if s.tiny else 15, s)["it"]
            row[f"{n} at a time"] = dict(ms=round(1e3 * seconds, 2),
                                         pictures_per_second=round(n / seconds, 1))
        row["pictures_per_second"] = row[f"{batches[-1]} at a time"]["pictures_per_second"]
        return row
    def boxes_of(pred): return detections(pred, net.anchors, net.size, .3)
    def whole(x, half=False, run=net):
        with torch.autocast(s.device, torch.bfloat16, enabled=half): pred = run(x)
        return boxes_of(pred)
    def eager():
        row = speeds(whole) | dict(network=speeds(net))
        with torch.no_grad():
            found = whole(images[:32])
            row |= waits(lambda: whole(images[:32]), s)
            row |= profiled(lambda: whole(images[:32]), s)
        return row | dict(found_a_picture=sum(len(f["boxes"]) for f in found) / len(found))
    def graph():
        row = {}
        for n in batches:
            x = images[:n].clone(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(s.device, torch.bfloat16, cache_enabled=False):
                kept = []
                def network(): kept[:] = net(x)
                replay = captured(network, s)
            row |= speeds(lambda _: (replay(), boxes_of(kept)), (n,))
        return row
    def compiled():
        try:
            run, x = partial(whole, half=True, run=torch.compile(net, dynamic=False)), images
            begin = time.perf_counter()
            with torch.no_grad(): run(x[:batches[-1]])
            finish(s)
            first = round(time.perf_counter() - begin, 2)
            return speeds(run, batches[-1:]) | dict(first_seconds=first)
        finally: torch._dynamo.reset()
    def files():
        some = [r.path for r in data.valid]
        seconds = call_seconds(dict(it=lambda: predict_files(net, some)), 1, s)["it"]
        return dict(pictures_per_second=round(len(some) / seconds, 1), pictures=len(some))
    def peer():
        "No weights of its own: nothing is above its threshold, so it has no boxes to sort out."
        theirs = torchvision_retinanet(len(names), net.size).to(s.device).eval()
        theirs.score_thresh = .3
        return speeds(lambda x: theirs(list(x)), batches[:2])
    def runtime():
        try: import onnxruntime
        except ImportError: return dict(note="ONNX Runtime is not installed here")
        there = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" not in there and not s.tiny:
            return dict(providers=there, note="no CUDA provider here")
        kind = "CUDAExecutionProvider" if s.device == "cuda" else "CPUExecutionProvider"
        model = load_detector("animals", "cpu")[0]
        if s.tiny: model.resize(64)
        with tempfile.TemporaryDirectory() as folder:
            path = to_onnx(model, names, Path(folder) / "animals.onnx")
            session = onnxruntime.InferenceSession(str(path), providers=[kind])
        row = speeds(lambda x: session.run(None, {"images": x.cpu().contiguous().numpy()}),
                     batches[:2])
        return row | dict(providers=there, used=session.get_providers()[0])
    units = {"float32": (8, eager), "bf16": (6, lambda: speeds(partial(whole, half=True)))}
    if s.device == "cuda": units["bf16 captured"] = (6, graph)
    units |= {"files": (8, files), "torchvision, float32": (6, peer),
              "ONNX Runtime": (5, runtime)}
    return units if s.tiny else units | {"bf16 compiled": (45, compiled)}


def lessons(s):
    "What the lessons' models need on pocket."
    size, bs = 128, 4 if s.tiny else 32
    got = []

    def data():
        if not got: got.append(get_data(drawn(s, "pocket", 8) if s.tiny else "pocket"))
        return got[0]
    def pocket():
        begin = time.perf_counter()
        pictures = data()
        return dict(seconds=round(time.perf_counter() - begin, 2), train=len(pictures.train),
                    valid=len(pictures.valid))
    def epochs(learn, lesson, cbs=()):
        "Time and memory of an epoch with its look at the held-out pictures, after a first one."
        times = []
        with learn.no_bar(), learn.no_logging():
            for _ in range(1 if s.tiny else 3):
                finish(s)
                begin = time.perf_counter()
                learn.fit(1, 1e-3, cbs=list(cbs))
                finish(s)
                times.append(time.perf_counter() - begin)
        row = dict(first_epoch_seconds=round(times[0], 2), batch=bs, size=size,
                   seconds_an_epoch=round(statistics.median(times[1:] or times), 2))
        row |= dict(epochs_of_the_lesson=lesson,
                    minutes_of_the_lesson=round(lesson * row["seconds_an_epoch"] / 60, 2))
        if s.device == "cuda":
            row |= dict(peak_memory_mb=round(torch.cuda.max_memory_allocated() / 2**20),
                        reserved_mb=round(torch.cuda.max_memory_reserved() / 2**20))
        return row
    def single():
        one, body = only_largest(data()), backbone()
        dls = dataloaders(one, size, bs, train_tfms(size), valid_tfms(size), device=s.device)
        net = torch.nn.Sequential(body, SingleHead(body.channels[-1], len(one.classes), size))
        learn = Learner(dls, net.to(s.device), SingleLoss(size), splitter=param_groups,
                        train_bn=False)
        learn.freeze_to(1)
        return epochs(learn, 8)
    def ssd():
        learn = detection_learner(data(), bs=bs, device=s.device)
        learn.freeze_to(1)
        return epochs(learn, 11)
    def pyramid():
        net = RetinaNet(len(data().classes), size).to(s.device)
        learn = detection_learner(data(), net, bs=bs, loss=retina_loss(net), device=s.device)
        learn.freeze_to(1)
        return epochs(learn, 6)
    def memory(half):
        learn = fast_learner(data(), RetinaNet(len(data().classes), size), bs=bs, device=s.device)
        learn.freeze_to(1)
        return epochs(learn, 12, [Half()] * half)
    def command():
        with tempfile.TemporaryDirectory() as out:
            train(data(), out, size=64 if s.tiny else size, epochs=1 if s.tiny else 2, bs=bs,
                  device=s.device)
            last = json.loads((Path(out) / "run.json").read_text())["epochs"][-1]
        return dict(seconds_an_epoch=last["seconds"], map50_so_far=round(100 * last["map"], 1))
    return {"pocket drawn": (15, pocket), "05 name and box of one": (12, single),
            "11b SSD": (12, ssd), "12 RetinaNet": (12, pyramid),
            "13 from memory": (8, partial(memory, False)),
            "13 from memory, bf16": (8, partial(memory, True)), "13 train": (10, command)}


UNITS = dict(agree=agree, speedrun=speedrun, step=step, loss=loss, predict=predict,
             lessons=lessons)
