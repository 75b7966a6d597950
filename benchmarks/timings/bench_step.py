"""What a training step costs: the course's pyramid beside torchvision's RetinaNet on the same
backbone, 224 px, batches of 32.

    python benchmarks/timings/bench_step.py  # writes benchmarks/results/step.json (on a GPU:
        step_cuda.json)

A step starts from bytes in memory: transform, forward, loss, backward, optimiser. `ours` is
what `course_train` does (early half of the body frozen), `whole` trains the whole body, as
`torchvision` does: its RetinaNet with a pyramid of 128 channels, mirror images only. `bf16`
adds autocast, `compiled` torch.compile of the network. Each set-up runs in a process of its
own, in turn, several times; ratios are medians of turns. `operations` counts what PyTorch is
asked to do in a step, `waits` those of them that need a number back on the host, or make a
shape that depends on data: on a GPU each of these stops the queue. They are counted on any
device. On a GPU, kernel launches, synchronisations and peak memory are measured as well.

Expected before measuring: the frozen half saves a third of the time; compile helps most where
there are many small element-wise steps between convolutions, as in this backbone; bf16 helps on
CPUs with AMX or AVX512-BF16; torchvision waits about three times a picture.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

SETUPS = ["torchvision", "whole", "ours", "ours bf16", "ours compiled", "ours compiled bf16"]
BATCH, CLASSES = 32, 6


def batch(size, device):
    "Bytes of BATCH pictures and three objects in each."
    import torch
    random = torch.Generator().manual_seed(0)
    side = round(size * 8 / 7)
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=random)
    corner, sides = (torch.rand(BATCH, 3, 2, generator=random) * side * .5,
                     (.1 + .4 * torch.rand(BATCH, 3, 2, generator=random)) * side)
    boxes, labels = (torch.cat([corner, corner + sides], 2),
                     torch.randint(0, CLASSES, (BATCH, 3), generator=random))
    return [x.to(device) for x in (images, boxes, labels, torch.zeros(BATCH, 3, dtype=torch.bool))]


def make_step(setup, size, device, data=None):
    """A function that does one training step, on `data` or on `batch(size, device)`; its optimiser
    and random numbers are its attributes `opt` and `random`."""
    import torch
    from functools import partial
    from course_lib.fast import augment
    from course_lib.fpn import RetinaNet, retina_loss
    from course_lib.learn import param_groups
    data = batch(size, device) if data is None else data
    random = torch.Generator(device).manual_seed(0)
    if setup.startswith("torchvision"):
        from many_objects import torchvision_retinanet
        model = torchvision_retinanet(CLASSES, size).to(device).train()
        tfms = partial(augment, crop=1, color=0)
        def losses(x, boxes, labels, difficult):
            truth = [dict(boxes=b, labels=l) for b, l in zip(boxes, labels)]
            with torch.autocast(device, torch.bfloat16, enabled="bf16" in setup):
                return sum(model(list(x), truth).values())
    else:
        model, tfms = RetinaNet(CLASSES, size).to(device).train(), augment
        if not setup.startswith("whole"):
            for p in param_groups(model)[0]: p.requires_grad_(False)
        loss = retina_loss(model)
        if "compiled" in setup: model.compile(dynamic=False)
        def losses(x, *truth):
            with torch.autocast(device, torch.bfloat16, enabled="bf16" in setup): pred = model(x)
            return loss(pred, *truth)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    def step():
        x, *truth = tfms(data[0].float(), *data[1:], size=size, generator=random)
        losses((x / 255).to(memory_format=torch.channels_last), *truth).backward()
        opt.step()
        opt.zero_grad()
    step.opt, step.random = opt, random
    return step


def count(step):
    "Operations of a step, and those that wait for their result."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        operations = waits = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            self.waits += str(func).split(".")[1] in ("_local_scalar_dense", "nonzero",
                                                      "masked_select", "_unique2", "equal",
                                                      "is_nonzero") or \
                (str(func).startswith("aten.index.Tensor")
                 and any(x is not None and x.dtype.is_floating_point is False
                         and str(x.dtype) == "torch.bool" for x in args[1]))
            return func(*args, **(kwargs or {}))
    with Count() as counted: step()
    return dict(operations=counted.operations, waits=counted.waits)


def one(setup, size, device, steps):
    "What this process measures: pictures a second, seconds until the first step is done, counts."
    import torch
    import course_lib.machine
    from course_lib.learn import keep_memory
    if device == "cpu": keep_memory()
    torch.manual_seed(0)
    step = make_step(setup, size, device)
    finish = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    begin = time.perf_counter()
    step(); finish()
    first, times = time.perf_counter() - begin, []
    for _ in range(2): step()
    finish()
    for _ in range(steps):
        begin = time.perf_counter()
        step(); finish()
        times.append(time.perf_counter() - begin)
    result = dict(pictures_per_second=BATCH / statistics.median(times), first_step_seconds=first)
    if "compiled" not in setup: result |= count(step)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as seen:
            step(); finish()
        names = [e.name for e in seen.events()]
        result |= dict(launches=sum("LaunchKernel" in n for n in names),
                       synchronisations=sum("Synchronize" in n for n in names) - 1,
                       peak_memory_mb=round(torch.cuda.max_memory_allocated() / 2**20))
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--device", default=None, help="cpu or cuda; default: the GPU if there is one")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--steps", type=int, default=4, help="steps that are timed in each process")
    p.add_argument("--setups", nargs="+", choices=SETUPS, default=SETUPS)
    p.add_argument("--out", default=None)
    p.add_argument("--one", choices=SETUPS, help=argparse.SUPPRESS)
    args = p.parse_args()
    import torch
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.one: return print(json.dumps(one(args.one, args.size, args.device, args.steps)))
    turns = []
    for _ in range(args.turns):
        turns.append({})
        for setup in args.setups:
            command = [sys.executable, "-W", "ignore", __file__, "--one", setup, "--size",
                       str(args.size), "--device", args.device, "--steps", str(args.steps)]
            # the first step's time is that of compiling
            fresh = os.environ | dict(TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
            out = subprocess.run(command, check=True, capture_output=True, text=True,
                                 env=fresh).stdout
            turns[-1][setup] = json.loads(out.splitlines()[-1])
            print(setup, turns[-1][setup], flush=True)
    middle = lambda setup, key: round(statistics.median(t[setup][key] for t in turns), 2)
    result = {s: {k: middle(s, k) for k in turns[0][s]} for s in args.setups}
    base = args.setups[0]
    for s in args.setups:
        result[s][f"speed_of_{base}"] = round(statistics.median(
            t[s]["pictures_per_second"] / t[base]["pictures_per_second"] for t in turns), 2)
    machine = dict(cores=os.cpu_count(), threads=torch.get_num_threads(),
                   torch=torch.__version__.split("+")[0],
                   device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu")
    out = Path(args.out or Path(__file__).resolve().parents[1] / "results"
               / ("step.json" if args.device == "cpu" else f"step_{args.device}.json"))
    out.write_text(json.dumps(dict(size=args.size, batch=BATCH, turns=args.turns, machine=machine,
                                   setups=result), indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__": main()
