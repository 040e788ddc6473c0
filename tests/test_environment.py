"""pyproject.toml, constraints.txt and environment.yml say the same, and what they say can be installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line of constraints.txt is an exact pin"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def environment(repository: Path) -> dict:
    return yaml.safe_load((repository / "environment.yml").read_text())


def pip_lines(environment: dict) -> list[str]:
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    return pip


def requirements(project: dict) -> list[Requirement]:
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [Requirement(text) for text in texts if not text.startswith(project["name"])]


def test_every_requirement_has_a_pin_inside_its_range(project: dict, pins: dict[str, str]) -> None:
    for requirement in requirements(project):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is in pyproject.toml and not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {name}=={pins[name]}"


def test_core_needs_torch_and_numpy_alone(project: dict) -> None:
    assert sorted(Requirement(text).name for text in project["dependencies"]) == ["numpy", "torch"]


# With no packages but those of an extra: what is installed besides cannot be imported.
ALONE = """
import sys
code, *missing = sys.argv[1:]
sys.modules |= dict.fromkeys(missing)
exec(code)
"""


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("notebooks", "from misa import tour; tour.state_table({}), tour.small_model()"),
        (
            "docs",
            "from pathlib import Path; from misa.results.sections import fill_page\n"
            "for page in Path('docs').rglob('*.md'): fill_page(page.read_text(), Path())",
        ),
    ],
    ids=["notebooks", "docs"],
)
def test_extra_holds_all_that_its_users_import(project: dict, repository: Path, extra: str, code: str) -> None:
    extras, installed = project["optional-dependencies"], {canonicalize_name(one.name): one for one in distributions()}
    needed: set[tuple[str, str]] = set()
    left = [Requirement(f"{project['name']}[{extra}]")]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in needed or name not in {*installed, project["name"]}:
                continue
            needed.add((name, wanted))
            if name == project["name"]:
                texts = extras[wanted] if wanted else project["dependencies"]
            else:
                texts = installed[name].requires or []
            left += [one for one in map(Requirement, texts) if not one.marker or one.marker.evaluate({"extra": wanted})]
    names = {name for name, _ in needed}
    missing = [
        module
        for module, owners in packages_distributions().items()
        if module != "misa" and names.isdisjoint(map(canonicalize_name, owners))
    ]
    done = subprocess.run([sys.executable, "-c", ALONE, code, *missing], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_named_once(project: dict, pins: dict[str, str], environment: dict) -> None:
    named = [requirement for requirement in requirements(project) if requirement.name == "torch"]
    assert len(named) == 1
    assert "+" not in pins["torch"], "a pin with the name of a build cannot be met on other machines"
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert not [entry for entry in [*conda, *pip_lines(environment)] if "torch" in entry]


def test_environment_has_no_packages_of_its_own(project: dict, environment: dict) -> None:
    assert set(environment["channels"]) <= {"conda-forge", "nodefaults"}
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert {entry.partition("=")[0] for entry in conda} == {"python", "pip", "git", "make"}
    (python,) = [entry.removeprefix("python=") for entry in conda if entry.startswith("python=")]
    assert python.count("=") == 0, "no build strings"
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)
    assert pip_lines(environment) == ["-c constraints.txt", "-e .[all]"]


def test_rules_name_the_same_environment(repository: Path, environment: dict) -> None:
    rules = yaml.safe_load((repository / "workflows" / "envs" / "misa.yaml").read_text())
    assert rules["channels"] == environment["channels"]
    (named,) = [entry for entry in rules["dependencies"] if isinstance(entry, dict)]
    # Two folders below the root, where snakemake, too, puts its copy.
    assert [line.replace("../../", "") for line in named["pip"]] == pip_lines(environment)
    plain = [[entry for entry in one["dependencies"] if isinstance(entry, str)] for one in (rules, environment)]
    assert plain[0] == plain[1]


def test_installed_versions_are_the_pinned_ones(pins: dict[str, str]) -> None:
    installed = {canonicalize_name(one.name): one.version.partition("+")[0] for one in distributions()}
    wrong = {name: (installed[name], pin) for name, pin in pins.items() if installed.get(name, pin) != pin}
    assert not wrong, f"installed and pinned versions differ: {wrong}"


def test_pip_part_of_environment_resolves(package_index: None, repository: Path, environment: dict) -> None:
    # conda writes the lines into a requirements file beside environment.yml and hands that to pip; so does this test.
    file = repository / ".environment-test.requirements.txt"
    file.write_text("\n".join(pip_lines(environment)) + "\n")
    try:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "-r", file.name]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    finally:
        file.unlink()
    assert done.returncode == 0, done.stderr
