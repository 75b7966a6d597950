"""Makes the pictures of README and its companions.

    python pictures/make.py                 # those that notebooks have stored, PICTURES below
    python pictures/make.py map.png         # one of them, or some
    python pictures/make.py front.png       # the truth beside what is found, for README's top:
        trains a detector on the built-in pictures first, some minutes on two processor cores,
        and keeps it in a temporary folder for the next call

PICTURES names a notebook's picture by words of the cell that drew it. All are saved in full colour.
"""
import base64, io, json, sys, tempfile
from pathlib import Path

from PIL import Image

TOP = Path(__file__).parent.parent
# file name -> (notebook, words in the source of the cell, largest side in pixels[, share of the
# width that is kept, from the left])
PICTURES = {
    "pocket.png": ("03_largest", "show_grid(one.train[:8]", 640),
    "start.png": ("00_start", "show_detections(photo, found, names)", 320),
    "data.png": ("01_data", "Do it yourself first", 320),
    "plot.png": ("01b_plot", "A bright line on a wider dark one", 320),
    "boxes.png": ("02_boxes", "At .5 the guess (dashed)", 320),
    "largest.png": ("03_largest", "squish: all there, shapes change", 320),
    "backbone.png": ("03a_backbone", "Mean strength of the features", 320, .5),
    "locate.png": ("04_locate", "One picture, eight times", 320),
    "single.png": ("05_single", "show_guesses(range(8)", 320),
    "multilabel.png": ("06_multilabel", "Each class has its own map", 320),
    "grid.png": ("07_grid", "After: {total_after", 320),
    "anchors.png": ("08_anchors", "189 anchors: each grid", 320),
    "ssd.png": ("08b_ssd", "often several for one object", 320),
    "paper.png": ("08c_paper", "draw_scales()", 320),
    "focal.png": ("09_focal", "The hardest backgrounds (dashed)", 320),
    "nms.png": ("10_nms", "before and after NMS", 320),
    "map.png": ("11_map", "One curve, three ways", 320),
    "detector.png": ("11b_detector", "learn.show_results(", 320),
    "fpn.png": ("12_fpn", "Centres of positive anchors", 320),
    "fast.png": ("12b_fast", "One mechanism for crop", 320),
    "recipe.png": ("13_recipe", "The recipe (circles) and torchvision's", 320),
    "beside.png": ("13_recipe", "The recipe (circles) and torchvision's", 800),
    "deploy.png": ("13b_deploy", "Found by onnxruntime", 320),
}
# the two photographs at README's top, the name and the box of what is there, drawn by hand
CAT, WOMAN = ("cat", [0., 0, 400, 300]), ("person", [17., 14, 361, 512])
# two held-out pictures of the built-in set that stand beside them; in the second a cat is missed
POCKET = (86, 55)


def stored_picture(notebook, words):
    "The picture that the first cell whose source holds `words` has stored."
    for cell in json.loads((TOP / "nbs" / f"{notebook}.ipynb").read_text(
        encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and words in "".join(cell["source"]):
            for output in cell["outputs"]:
                for kind in ("image/png", "image/jpeg"):
                    if kind in output.get("data", {}):
                        return Image.open(
                            io.BytesIO(base64.b64decode(output["data"][kind]))).convert("RGB")
    raise SystemExit(f"{notebook} has no stored picture in a cell with {words!r}. Run the "
                     f"notebook, or mend PICTURES.")


def shrunk(notebook, words, side, share=1.):
    "A stored picture, in the size in which it is shown."
    picture = stored_picture(notebook, words)
    picture = picture.crop((0, 0, round(share * picture.width), picture.height))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def front():
    """The truth above what is found: two photographs, asked of the detector that comes with the
    course, and two built-in pictures, asked of one that is trained here."""
    import matplotlib.pyplot as plt
    from skimage import data as photos
    from course_lib.data import get_data
    from course_lib.detect import predict, show_detections
    from course_lib.plot import show_boxes
    from course_lib.recipe import train
    from course_lib.saving import load_detector
    animals, names = load_detector("animals", device="cpu")
    pocket = get_data("pocket")
    learn = train("pocket", out=Path(tempfile.gettempdir(), "course-front"), size=128, epochs=6)
    rows = [(picture, [box], [names.index(name)], None, animals, names)
            for picture, (name, box) in ((photos.chelsea(), CAT), (photos.astronaut(), WOMAN))]
    rows += [(r, r.boxes, r.labels, r.difficult, learn.model, pocket.classes)
             for r in (pocket.valid[i] for i in POCKET)]
    fig, axes = plt.subplots(2, 4, figsize=(8.6, 3.85), layout="constrained",
                             gridspec_kw=dict(width_ratios=[451 / 300, 1, 1, 1]))
    fig.get_layout_engine().set(w_pad=.02, h_pad=.02, wspace=0, hspace=0)
    for (above, below), (picture, boxes, labels, difficult, model, classes) in zip(axes.T, rows):
        show_boxes(picture, boxes, labels, classes, difficult=difficult, ax=above)
        show_detections(picture, predict(model, picture), classes, ax=below)
    for ax, word in zip(axes[:, 0], ("the truth", "what is found")):
        ax.text(-.02, .5, word, transform=ax.transAxes, rotation=90, ha="right", va="center",
                size=11)
    return fig


def save_front(path, width=900):
    "`front` at README's width, its colours rounded to 48 levels each, which halves its size."
    file = io.BytesIO()
    front().savefig(file, dpi=2 * width / 8.6)
    picture = Image.open(file).convert("RGB")
    picture = picture.resize((width, round(width * picture.height / picture.width)),
                             Image.Resampling.LANCZOS)
    picture.point(lambda level: round(level / 255 * 47) * 255 // 47).save(path, optimize=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        path = TOP / "pictures" / name
        if name == "front.png": save_front(path)
        else: shrunk(*PICTURES[name]).save(path, optimize=True)
        print(name, Image.open(path).size, f"{path.stat().st_size / 1000:.0f} kB")
