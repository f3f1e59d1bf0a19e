"Packaging: everything that changes from release to release stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    # nbdev's pyproject.toml announces classifiers, so there must be some
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Programming Language :: Python :: {cfg['min_python']}",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["vermouth", "vermouth.*"]),
    # the Toybox family's weights and the modules' small tables travel with the code
    package_data={"vermouth": ["py.typed", "toybox/**/*", "app/static/*", "**/*.json", "**/*.csv", "**/*.txt"]},
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={
        key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")
    },
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"vermouth={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
