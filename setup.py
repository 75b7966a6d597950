"""Hands pip what settings.ini says: that file is the one place where name, version and requirements are kept."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    license="Apache-2.0", packages=[cfg["lib_path"]], package_data={cfg["lib_path"]: ["weights/*"]},
    python_requires=f">={cfg['min_python']},<3.14",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    entry_points={"nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"], "console_scripts": cfg["console_scripts"].split()},
)
