"""What this needs to know is in settings.ini, also what the package and its extras require; the
lock of what `make` installs is requirements.txt."""
from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
ending = "_requirements"
extras = {name.removesuffix(ending): settings[name].split()
          for name in settings if name.endswith(ending)}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="MIT",
    keywords=settings["keywords"].split(),
    python_requires=f">={settings['min_python']},<3.14",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    package_data={settings["lib_path"]: ["py.typed"]},
    install_requires=settings["requirements"].split(),
    extras_require={**extras, "all": sorted(set().union(*extras.values()))},
    entry_points={"console_scripts": [settings["console_scripts"]]},
    zip_safe=False,
)
