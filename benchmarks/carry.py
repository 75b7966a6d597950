"""What must be carried to a machine that has a GPU and PyTorch but no network: photographs, small
enough, and the packages that are not there. Called by gpu.py, which says how.

FOLDER/photographs.zip holds a data set in VOC's layout, its pictures shrunk to --side and saved
with the best JPEG quality that fits; FOLDER/wheels the packages that this library imports, less
those that machines with PyTorch have (THERE) and what those need. --lacks NAME names one of them
that is not there after all. All of it, and the code (what git lists, without nbs/), must fit into
--limit MiB, or nothing is packed. On the other machine, set_up unpacks the pictures to
FOLDER/data and installs into FOLDER/site the wheels of what is missing there, or has a version
that settings.ini does not allow.
"""
import importlib.metadata as metadata
import json, os, shutil, subprocess, sys, tempfile, zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what is taken to be there, with all that it needs
THERE = ("torch torchvision numpy pillow timm matplotlib pandas scipy scikit-learn accelerate onnx "
         "onnxscript onnxruntime requests tqdm packaging pyyaml rich").split()
QUALITIES = range(90, 45, -5)
TRACE = """
import json, sys, importlib.metadata as metadata
import course_lib.recipe, course_lib.deploy
from course_lib.learn import backbone
backbone()
names = metadata.packages_distributions()
tops = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted({d for top in tops for d in names.get(top, [])})))
"""
WHEELS_FOR = [part for n in ("28", "27", "24", "17", "12", "5")
              for part in ("--platform", f"manylinux_2_{n}_x86_64")]
WHEELS_FOR += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]


def arguments(p):
    p.add_argument("--photos", default="VOC2012-animals", help="for --pack: a folder in VOC's "
                   "layout, or the name of one where data lives")
    p.add_argument("--side", type=int, default=288, help="for --pack: longest side of a picture")
    p.add_argument("--limit", type=float, default=64, help="for --pack: MiB, the code included")
    p.add_argument("--python", default="3.12", help="for --pack: version of Python there")
    p.add_argument("--lacks", nargs="+", default=[], metavar="NAME", help="for --pack: packages "
                   "that are usually there, and are not")


def normal(name): return name.lower().replace("_", "-").replace(".", "-")


def needs_of(names):
    "Packages and all that they need, as far as it is installed here, by normal name."
    from packaging.requirements import Requirement
    found, new = set(), [normal(n) for n in names]
    while new:
        name = new.pop()
        if name in found: continue
        found.add(name)
        try: lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        for line in map(Requirement, lines):
            if not line.marker or line.marker.evaluate({"extra": ""}): new.append(normal(line.name))
    return found


def imported():
    "The packages that the library imports."
    env = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACE], env=env, check=True,
                         capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def packages(names, lacks=()):
    "Name and version of each of the packages that is not taken to be there."
    there = needs_of(THERE) - {normal(n) for n in lacks} | {"course-lib", "pip", "setuptools"}
    return {n: metadata.version(n) for n in [*names, *lacks] if normal(n) not in there}


def fetch_wheels(names, folder, python):
    "Download a wheel of each package for that Python on Linux, without what it needs."
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
               "--python-version", python, "--implementation", "cp", *WHEELS_FOR, "-d", str(folder)]
    done = subprocess.run([*command, *(f"{n}=={v}" for n, v in names.items())],
                          capture_output=True, text=True)
    if done.returncode: sys.exit(f"The wheels could not be had:\n{done.stderr[-2000:]}")


def code_bytes(but=None):
    "Bytes of what git lists, without nbs/ and without the folder `but`."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others",
                             "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = ([ROOT / f for f in listed.stdout.split("\0") if f] if listed.returncode == 0 else
             [f for f in ROOT.rglob("*") if "__pycache__" not in f.parts])
    out = {ROOT / "nbs"} | ({Path(but).resolve()} if but else set())
    return sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink()
               and not out & set(f.parents))


def shrunk(voc, ids, side, quality, out):
    "Some pictures and their annotations, shrunk into the folder `out`."
    sys.path.append(str(Path(__file__).resolve().parent / "data"))
    from make_animals import shrink
    for name in ("JPEGImages", "Annotations"): (out / name).mkdir(parents=True, exist_ok=True)
    for i in ids:
        shrink(voc / "Annotations" / f"{i}.xml", voc / "JPEGImages" / f"{i}.jpg", out, side,
               quality)


def zip_photographs(voc, file, side, quality, ids=None):
    "One zip of a folder in VOC's layout, of all its pictures or those named; its size in bytes."
    splits = sorted((voc / "ImageSets/Main").glob("*.txt"))
    every = sorted({line.split()[0] for s in splits if s.stem in ("train", "val", "valid", "test")
                    for line in s.read_text().splitlines() if line.strip()})
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(file, "w") as packed:
        shrunk(voc, every if ids is None else ids(every), side, quality, Path(tmp))
        texts = [(f"ImageSets/Main/{s.name}", s) for s in splits]
        files = [(f.relative_to(tmp).as_posix(), f) for f in sorted(Path(tmp).rglob("*.*"))]
        for name, f in texts + files:
            kind = zipfile.ZIP_STORED if f.suffix == ".jpg" else zipfile.ZIP_DEFLATED
            packed.writestr(zipfile.ZipInfo(f"{voc.name}/{name}"), f.read_bytes(), kind)
    return file.stat().st_size


def pack_photographs(voc, file, side, room):
    "The zip with the best quality that fits into `room` bytes; the quality, or None."
    ids = lambda every: every[::max(1, len(every) // 200)]
    for quality in QUALITIES:
        with tempfile.TemporaryDirectory() as tmp:
            few = zip_photographs(voc, Path(tmp) / "some.zip", side, quality, ids)
            with zipfile.ZipFile(Path(tmp) / "some.zip") as packed:
                n = sum(name.endswith(".jpg") for name in packed.namelist())
        every = sum(1 for f in (voc / "Annotations").glob("*.xml"))
        if few * every / n > room * 1.1: continue
        if zip_photographs(voc, file, side, quality) <= room: return quality
    file.unlink(missing_ok=True)


def bytes_of(folder, say=True):
    "Print what is to be carried, and return its bytes."
    folder = Path(folder).resolve()
    rows = {f.name: f.stat().st_size for f in sorted([*folder.glob("*.zip"),
                                                      *(folder / "wheels").glob("*.whl")])}
    rows["the code, without nbs/"] = code_bytes(folder)
    total = sum(rows.values())
    if say:
        print("\nTo be carried:")
        for name, size in rows.items(): print(f"  {size:12,}  {name[:80]}")
        print(f"  {total:12,}  bytes, {total / 2**20:.1f} MiB")
    return total


def pack(args, parser, names=None):
    "Make the folder, whole or not at all."
    folder, voc = args.pack.resolve(), Path(args.photos)
    if not voc.is_dir():
        from course_lib.machine import data_root
        voc = data_root() / args.photos
    if not (voc / "Annotations").is_dir(): parser.error(f"--photos: there is no folder {voc}")
    if folder.exists(): parser.error(f"--pack: {folder} is there already. Delete it, or name "
                                     "another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        (part / "wheels").mkdir()
        names = packages(imported() if names is None else names, args.lacks)
        if names: fetch_wheels(names, part / "wheels", args.python)
        room = args.limit * 2**20 - bytes_of(part, say=False)
        quality = pack_photographs(voc, part / "photographs.zip", args.side, room)
        if quality is None:
            bytes_of(part)
            sys.exit(f"refused: {room / 2**20:.1f} of {args.limit:g} MiB are left for the "
                     f"photographs, too little even at quality {QUALITIES[-1]}. Take a smaller "
                     f"--side than {args.side}, or carry fewer packages. Nothing was packed.")
        part.rename(folder)
    finally: shutil.rmtree(part, ignore_errors=True)
    total = bytes_of(folder)
    print(f"{voc.name} at {args.side} px, JPEG quality {quality}. {total:,} bytes of "
          f"{int(args.limit * 2**20):,} that may be carried. Counted on, there: "
          f"{', '.join(n for n in THERE if n not in args.lacks)}.")


def missing(folder):
    "The wheels of packages that are not installed here, or not in a version that will do."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = {}
    try:
        from packaging.requirements import Requirement
        for line in map(Requirement, config["DEFAULT"].get("requirements", "").split()):
            wanted[normal(line.name)] = line.specifier
    except ImportError: pass
    for wheel in sorted(folder.glob("*.whl")):
        name = normal(wheel.name.split("-")[0])
        try: version = metadata.version(name)
        except metadata.PackageNotFoundError: fits = False
        else: fits = name not in wanted or wanted[name].contains(version, True)
        if not fits: yield wheel


def set_up(folder):
    "Unpack and install, without a network."
    folder = Path(folder).resolve()
    for name in ("data", "data.part", "site"): shutil.rmtree(folder / name, ignore_errors=True)
    with zipfile.ZipFile(folder / "photographs.zip") as packed:
        packed.extractall(folder / "data.part")
    wheels = list(missing(folder / "wheels")) if (folder / "wheels").is_dir() else []
    (folder / "site").mkdir()
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
                        "--no-compile", "--no-cache-dir", "--target", str(folder / "site"),
                        *map(str, wheels)], check=True)
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    print(f"installed {len(wheels)} packages: {', '.join(w.name.split('-')[0] for w in wheels)}",
          flush=True)
    tried = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACE], capture_output=True,
                           env=dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1",
                                    COURSE_DATA=str(folder / "data.part")), text=True)
    if tried.returncode:
        sys.exit("The library does not import here: "
                 f"{(tried.stderr.strip() or 'no reason given').splitlines()[-1]}\nA package that "
                 "is missing can be named with --lacks when packing.")
    (folder / "data.part").rename(folder / "data")
    print(f"ready: python benchmarks/gpu.py --packed {folder} --out OUT\n"
          f"(or by hand: PYTHONPATH={path} COURSE_DATA={folder / 'data'})")
