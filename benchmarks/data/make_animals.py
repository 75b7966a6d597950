"""Makes the set of real photographs that README's results were measured on, from anybody's
VOC2012.

    python benchmarks/data/make_animals.py                       # from VOC2012 where data lives
        (downloaded if it is not there)
    python benchmarks/data/make_animals.py path/to/VOC2012 OUT   # from and to somewhere else

VOC2012-animals holds 3,026 photographs of VOC2012's trainval that show animals and people:
1,697 of the official train split and 1,329 of official val. Their ids are in
voc2012_animals_train.txt and voc2012_animals_val.txt beside this script. Pictures are scaled so
that the longest side has at most 400 px; boxes and sizes in the annotations are scaled with
them.
"""
import argparse, shutil, tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from defusedxml.ElementTree import parse
from PIL import Image
from tqdm.auto import tqdm

from course_lib.data import data_root, get_data, open_image

HERE = Path(__file__).parent


def shrink(xml_file, picture_file, out, side, quality):
    "One picture and its annotation, scaled to `side`."
    root = parse(xml_file).getroot()
    image = open_image(picture_file)
    w, h = image.size
    scale = min(1, side / max(w, h))
    W, H = round(w * scale), round(h * scale)
    image.resize((W, H), Image.Resampling.LANCZOS).save(out / "JPEGImages" / picture_file.name,
                                                        quality=quality)
    root.find("size/width").text, root.find("size/height").text = str(W), str(H)
    for box in root.iter("bndbox"):
        x0, y0, x1, y1 = (float(box.find(k).text) for k in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0 = min(round((x0 - 1) * W / w), W - 1), min(round((y0 - 1) * H / h), H - 1)
        x1, y1 = max(round(x1 * W / w), x0 + 1), max(round(y1 * H / h), y0 + 1)
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1)):
            box.find(key).text = str(value)
    ET.ElementTree(root).write(out / "Annotations" / xml_file.name)


def make_animals(voc, out, side=400, quality=80, ids=None):
    "Write the set to `out`, whole or not at all; `ids` maps a split to its picture ids."
    voc, out = Path(voc), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already. Delete it, or name another folder.")
    ids = (ids or {s: (HERE / f"voc2012_animals_{s}.txt").read_text().split()
                   for s in ("train", "val")})
    missing = [i for split in ids.values() for i in split
               if not (voc / "JPEGImages" / f"{i}.jpg").is_file()]
    if missing:
        raise FileNotFoundError(f"{voc} lacks {len(missing)} of the pictures, among them "
                                f"{missing[0]}.jpg. "
                                "Give the folder VOC2012 that holds JPEGImages and Annotations.")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{out.name}.part-", dir=out.parent))
    try:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (part / folder).mkdir(parents=True)
        for split, names in ids.items():
            (part / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
            for name in tqdm(names, desc=split):
                shrink(voc / "Annotations" / f"{name}.xml", voc / "JPEGImages" / f"{name}.jpg",
                       part, side, quality)
        part.rename(out)
    finally: shutil.rmtree(part, ignore_errors=True)
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("voc", nargs="?", help="the folder VOC2012 (default: where data lives, by "
                   "download if need be)")
    p.add_argument("out", nargs="?", help="the folder to make (default: VOC2012-animals where "
                   "data lives)")
    args = p.parse_args()
    voc = args.voc or get_data("voc2012").train[0].path.parents[1]
    print("made", make_animals(voc, args.out or data_root() / "VOC2012-animals").name)
