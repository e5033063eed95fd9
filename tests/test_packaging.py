"""What `pip install` brings: two names at the top level, everything the commands read, nothing of anybody else's."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["ecmoe", "modeling_ecmoe", "conversion", "finetune", "analysis", "model_cards", "recipes"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools works in the folder that it is given."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ROOMS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "build" / "lib" / "conversion").mkdir(parents=True)
    (copy / "build" / "lib" / "conversion" / "stale.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a folder of its own, as it would lie in site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, work: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_top_level_names(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        rows = archive.read(record).decode().splitlines()
    names = {row.partition("/")[0] for row in rows}
    assert {name for name in names if not name.endswith(".dist-info")} == {"ecmoe", "modeling_ecmoe"}


def test_every_file_of_the_rooms_is_there(installed: Path) -> None:
    for room in ROOMS:
        place = installed / room if room.endswith("ecmoe") else installed / "ecmoe" / room
        held = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        if room == "ecmoe":
            held = {name for name in held if "/" not in name}
        own = {str(path.relative_to(ROOT / room)) for path in (ROOT / room).rglob("*") if path.is_file()}
        own = {name for name in own if "__pycache__" not in name and name != "stories260K.md"}  # a rendered card
        assert held == own, room


def test_a_user_s_own_names_shadow_nothing(installed: Path, tmp_path: Path) -> None:
    """And llama.cpp's converter, whose package is called `conversion` too, stays what it is."""
    for name in ("conversion", "finetune", "analysis", "model_cards", "recipes"):
        (tmp_path / f"{name}.py").write_text(f"WHOSE = 'the user'\nprint('{name} of the user')\n")
    for room in ("conversion", "finetune", "analysis"):
        printed = run(installed, tmp_path, "-m", f"ecmoe.{room}", "--help")
        assert printed.startswith("usage: ecmoe-") and "of the user" not in printed
    script = (
        "import conversion, ecmoe; from ecmoe.finetune.recipe import shipped; "
        "print(conversion.WHOSE, ecmoe.__file__, *shipped('.yaml'))"
    )
    printed = run(installed, tmp_path, "-c", script).splitlines()[-1]
    assert printed.startswith(f"the user {installed / 'ecmoe' / '__init__.py'} ") and "full" in printed.split()


def test_a_clone_beside_an_installed_package_is_used_whole(installed: Path) -> None:
    """Run in the repository's folder, all of it is the repository's; nothing is missing and nothing is mixed."""
    script = "import ecmoe.conversion, ecmoe.finetune, ecmoe; print(ecmoe.conversion.__file__, ecmoe.__file__)"
    for place in run(installed, ROOT, "-c", script).split():
        assert place.startswith(f"{ROOT}/")
    assert run(installed, ROOT, "-m", "ecmoe.conversion", "--help").startswith("usage: ecmoe-convert")


def test_what_an_earlier_build_left_is_not_packed(wheel: Path) -> None:
    """The fixture's folder holds packages of another layout where setuptools used to build."""
    with zipfile.ZipFile(wheel) as archive:
        assert not any("stale" in name for name in archive.namelist())


def test_remote_code_is_no_part_of_the_front_door(installed: Path) -> None:
    for path in (installed / "modeling_ecmoe").glob("*_ecmoe.py"):
        assert "import ecmoe" not in path.read_text() and "from ecmoe" not in path.read_text(), path.name
