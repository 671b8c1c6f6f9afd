"""Which folders are packages: all else is in pyproject.toml, which cannot say this.

`classification`, `detection` and `configs` alone would be anybody's names in site-packages, so that they are packages
of `revnets.scripts` in a wheel. In a checkout they stay beside `revnets/` (`revnets.scripts.script` knows both).
"""

from setuptools import find_packages, setup

SCRIPTS = "revnets.scripts"
packages = find_packages(include=["revnets", "revnets.*"])
folders = {"revnets": "revnets"}
for name in find_packages(include=["classification*", "detection*"]):
    folders[f"{SCRIPTS}.{name}"] = name.replace(".", "/")
folders[f"{SCRIPTS}.configs"] = "configs"

setup(packages=[*packages, *(name for name in folders if name not in packages)], package_dir=folders)
