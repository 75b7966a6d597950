"""Makes the pictures stored in notebooks smaller, so that pages load fast: python
pictures/shrink.py nbs/07_grid.ipynb ...

A PNG of more than 100 kB gets a palette of 256 colours, if that saves a third of it. Run it
after a notebook has been run in full.
"""
import base64, io, json, sys
from pathlib import Path

from PIL import Image


def shrink(png):
    "The same picture with 256 colours."
    image, out = Image.open(io.BytesIO(png)), io.BytesIO()
    if image.mode == "P": return png
    white = Image.new("RGBA", image.size, "white")
    Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").quantize(256).save(
        out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        notebook, before = json.loads(path.read_text(encoding="utf-8")), path.stat().st_size
        for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
            png = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if len(png) < 100_000: continue
            small = shrink(png)
            if len(small) < 2 / 3 * len(png):
                output["data"]["image/png"] = base64.b64encode(small).decode()
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name, before, path.stat().st_size)
