"""Write models/<run>/parameters/<chapter>.yml from the profile and the command line; files that
do not change keep their time."""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from common import (
    MODELS,
    PROFILES,
    chapters,
    main,
    parameter_names,
    rooms,
    titled,
    write_if_changed,
)

from cvdl.core import DataError


def read_profile(
    name: str,  # of nbs/profiles/<name>.yml
) -> dict:  # description, parameters, chapters
    "A profile with the shape that it must have."
    path = PROFILES / f"{name}.yml"
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yml")))
        raise DataError(f"PROFILE={name}: no such profile, expected one of: {known}.") from None
    except yaml.YAMLError as error:
        raise DataError(
            f"nbs/profiles/{name}.yml is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    keys = ("description", "parameters", "chapters")
    unknown = sorted(set(profile) - set(keys)) if isinstance(profile, dict) else [profile]
    if unknown:
        raise DataError(
            f"nbs/profiles/{name}.yml: unknown entry {unknown[0]!r}, expected "
            f"{', '.join(keys)}."
        )
    sections = {
        "parameters": profile.get("parameters") or {},
        "chapters": profile.get("chapters") or {},
    }
    for where, section in [*sections.items(), *sections["chapters"].items()]:
        if not isinstance(section, dict):
            raise DataError(
                f"nbs/profiles/{name}.yml: {where}: expected 'name: value' lines, got "
                f"{section!r}."
            )
    return sections


def plan(
    profile: Mapping,  # parameters, chapters
    known: Mapping[str, list[str]],  # chapter or room -> names in its parameters cell
    *,
    overrides: Mapping,  # from the command line, for every chapter that knows them
    name: str,  # of the profile, for messages
) -> dict[str, dict]:  # chapter -> parameters
    """What every chapter is asked to do; a name that nobody knows is refused, papermill would
    only warn."""
    everywhere = {**profile["parameters"], **overrides}
    for key in everywhere:
        if not any(key in names for names in known.values()):
            anything = sorted({each for names in known.values() for each in names})
            raise DataError(
                f"nbs/profiles/{name}.yml: no chapter has a parameter {key!r}, expected one "
                f"of: {', '.join(anything)}."
            )
    for chapter, values in profile["chapters"].items():
        if chapter not in known:
            raise DataError(
                f"nbs/profiles/{name}.yml: no chapter is called {chapter!r}, expected one of: "
                f"{', '.join(known)}."
            )
        for key in values:
            if key not in known[chapter]:
                raise DataError(
                    f"nbs/profiles/{name}.yml: {titled(chapter)} has no parameter {key!r}, "
                    f"expected one of: {', '.join(known[chapter])}."
                )
    planned = {}
    for chapter, names in known.items():
        values = {key: value for key, value in profile["parameters"].items() if key in names}
        values |= profile["chapters"].get(chapter, {})
        planned[chapter] = values | {
            key: value for key, value in overrides.items() if key in names
        }
    return planned


def state(
    data: str,  # a name or a path
) -> str:  # changes when a file is added, removed, or written
    "One line about the files behind `data`, so that changed data runs the book again."
    path = Path(data)
    if not path.exists():
        return ""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    newest = max((each.stat().st_mtime_ns for each in files), default=0)
    size = sum(file.stat().st_size for file in files)
    return f"# {len(files)} files, {size} bytes, newest {newest}\n"


def write_plan() -> None:
    """Read PROFILE, DATA and RUN from the environment and write the parameters of every chapter
    and room."""
    name, data, run = os.environ["PROFILE"], os.environ.get("DATA", ""), os.environ["RUN"]
    overrides = {"run": run}
    if data:
        overrides["data"] = str(Path(data).expanduser())
    planned = plan(
        read_profile(name),
        {chapter: parameter_names(chapter) for chapter in chapters() + rooms()},
        overrides=overrides,
        name=name,
    )
    for chapter, values in planned.items():
        text = yaml.safe_dump(values, sort_keys=True, allow_unicode=True, width=120)
        if "data" in values:
            text = state(values["data"]) + text
        write_if_changed(MODELS / run / "parameters" / f"{chapter}.yml", text)


if __name__ == "__main__":
    main(write_plan)
