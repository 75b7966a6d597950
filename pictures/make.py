"""Takes the pictures of README out of the notebooks' stored outputs: python pictures/make.py

PICTURES names a notebook's picture by words of the cell that drew it.
"""
import base64, io, json
from pathlib import Path

from PIL import Image

TOP = Path(__file__).parent.parent
# file name -> (notebook, words in the source of the cell, largest side in pixels)
PICTURES = {
    "pocket.png": ("03_largest", "show_grid(one.train[:8]", 1100),
    "start.png": ("00_start", "the library reads in the order of the lessons", 480),
    "data.png": ("01_data", "Do it yourself first", 480),
    "plot.png": ("01b_plot", "A bright line on a wider dark one", 480),
    "boxes.png": ("02_boxes", "At .5 the guess (dashed)", 480),
    "largest.png": ("03_largest", "Mean strength of the features", 480),
    "locate.png": ("04_locate", "One picture, eight times", 480),
    "single.png": ("05_single", "show_guesses(range(8)", 480),
    "multilabel.png": ("06_multilabel", "Each class has its own map", 480),
    "grid.png": ("07_grid", "After: {total_after", 480),
    "anchors.png": ("08_anchors", "189 anchors: each grid", 480),
    "ssd.png": ("08b_ssd", "often several for one object", 480),
    "focal.png": ("09_focal", "The hardest backgrounds (dashed)", 480),
    "nms.png": ("10_nms", "before and after NMS", 480),
    "map.png": ("11_map", "One curve, three ways", 480),
    "detector.png": ("11b_detector", "learn.show_results(", 480),
    "fpn.png": ("12_fpn", "Centres of positive anchors", 480),
    "fast.png": ("12b_fast", "One mechanism for crop", 480),
    "recipe.png": ("13_recipe", "draw_ladder(ladder);", 480),
    "ladder.png": ("13_recipe", "draw_ladder(ladder);", 900),
    "beside.png": ("13_recipe", "The recipe (circles) and torchvision's", 800),
    "deploy.png": ("13b_deploy", "Found by onnxruntime", 480),
    "pocket_classes.png": ("90_pocket", "show_variants(draw_cat", 480),
}


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


if __name__ == "__main__":
    for name, (notebook, words, width) in PICTURES.items():
        picture = stored_picture(notebook, words)
        picture.thumbnail((width, width))
        picture.quantize(128).save(TOP / "pictures" / name, optimize=True)
        print(name, picture.size)
