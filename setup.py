"What this needs to know is in settings.ini; the lock of dependencies is requirements.txt."
from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="MIT",
    keywords=settings["keywords"].split(),
    python_requires=f">={settings['min_python']},<3.12",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    entry_points={"console_scripts": [settings["console_scripts"]]},
    zip_safe=False,
)
