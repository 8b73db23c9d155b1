"""Built wheels in clean environments: each alone, all together, and with a stranger's plug-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)

#: What of ours each wheel may bring along, and an import-time ceiling in seconds beyond torch.
ALONE = {
    "rope3d": ({"rope3d"}, 0.5),
    "flowsolvers": ({"flowsolvers"}, 0.5),
    "nextdit-kernels": ({"nextdit-kernels"}, 0.5),
    "nextdit-core": ({"nextdit-core", "rope3d", "flowsolvers"}, 0.5),
    "modality-image": ({"modality-image", "nextdit-core", "rope3d", "flowsolvers"}, 0.5),
    "nextdit-ray": ({"nextdit-ray", "nextdit-core", "rope3d", "flowsolvers"}, 3.0),
}
Environment = Callable[..., Path]


def _uv(*arguments: str | Path) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "uv", *map(str, arguments)],
        env=os.environ | {"UV_COMPILE_BYTECODE": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the wheel of every distribution, the example's too."""
    folder = tmp_path_factory.mktemp("dist")
    for source in [
        *(root / "packages").iterdir(),
        root / "kernels",
        *(root / "examples").iterdir(),
    ]:
        if (source / "pyproject.toml").exists():
            _uv("build", "-q", "--wheel", "--out-dir", folder, source)
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


@pytest.fixture
def environment(root: Path, wheels: dict[str, Path], tmp_path: Path) -> Environment:
    """Make a clean environment with some wheels and what they declare."""

    def make(*requirements: str) -> Path:
        place = tmp_path / "environment"
        _uv("venv", "-q", "--python", sys.executable, place)
        links = [os.environ.get("PIP_FIND_LINKS", ""), str(next(iter(wheels.values())).parent)]
        python = place / "bin" / "python"
        _uv(
            *("pip", "install", "-q", "--python", python),
            *("--constraint", root / "constraints.txt"),
            *(part for link in filter(None, links) for part in ("--find-links", link)),
            *requirements,
        )
        return place

    return make


def _run(place: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(place / "bin" / command[0]), *command[1:]],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _installed(place: Path) -> set[str]:
    python = place / "bin" / "python"
    return {row["name"] for row in json.loads(_uv("pip", "list", "--format=json", "-p", python))}


def _import_seconds(place: Path, module: str, cwd: Path) -> float:
    """Time an import behind that of torch, which most of it would be.

    Without the garbage collector, whose next full run goes over torch's objects.
    """
    code = (
        "import gc, time; gc.disable(); import torch; begun = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - begun)"
    )
    run = _run(place, "python", "-W", "ignore", "-c", code, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.parametrize("name", ALONE)
def test_each_wheel_works_alone(
    name: str, root: Path, wheels: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    ours, ceiling = ALONE[name]
    place = environment(str(wheels[name]))
    installed = _installed(place)
    assert installed & ALONE.keys() == ours

    seconds = min(_import_seconds(place, name.replace("-", "_"), tmp_path) for _ in range(2))
    size = wheels[name].stat().st_size / 1024
    others = ", ".join(sorted(installed - {name}))
    print(f"\n{name}: {size:.0f} KiB, imports in {seconds:.3f} s beyond torch, brings {others}")
    assert seconds < ceiling

    if name == "nextdit-ray":
        run = _run(place, "nextdit", "modalities", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert re.search(r"engine +ray +nextdit-ray", run.stdout)
        assert "missing: pip install modality-image" in run.stdout
        return
    folder = root / ("kernels" if name == "nextdit-kernels" else f"packages/{name}")
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert example is not None
    run = _run(place, "python", "-c", example.group(1), cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_demo_works_without_a_clone(
    wheels: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    """All of it from wheels, with a short training; the full one is `hatch run demo`."""
    place = environment(f"{wheels['modality-image']}[demo]")
    run = _run(place, "nextdit", "demo", "steps=20", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"accuracy +\d+\.\d% of 200 samples", run.stdout)
    assert (tmp_path / "runs" / "digits" / "digits.png").is_file()


def test_a_plug_in_from_outside_is_listed_trained_and_sampled(
    root: Path, wheels: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    place = environment(str(wheels["nextdit-core"]))
    before = _run(place, "nextdit", "modalities", cwd=tmp_path).stdout
    assert "curves" not in before

    python = place / "bin" / "python"
    _uv("pip", "install", "-q", "--no-deps", "--python", python, wheels["nextdit-curves"])
    after = _run(place, "nextdit", "modalities", cwd=tmp_path).stdout
    assert re.search(r"modality +curves +nextdit-curves +0.1.0 +installed", after)

    recipe = root / "examples" / "nextdit-curves" / "curves.toml"
    run = _run(place, "nextdit", "train", str(recipe), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = _run(
        place, *("nextdit", "sample", "runs/curves", "a circle"), "--out=circle.svg", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "circle.svg").read_text().startswith("<svg")

    # The radius of what was asked to be a circle varies little, unlike that of the other shapes.
    check = (
        "from nextdit_core import Pipeline\n"
        "from nextdit_core.testing import check_modality\n"
        "from nextdit_curves import Curves, Shapes\n"
        "check_modality(Curves(), [Shapes()[0].media, Shapes()[1].media[:16]], wrong_size=(5,))\n"
        "pipe = Pipeline.from_pretrained('runs/curves', device='cpu')\n"
        "for name in ('circle', 'spiral'):\n"
        "    radii = [c.norm(dim=-1) for c in pipe([f'a {name}'] * 20, seed=0)]\n"
        "    print(sum(float(r.std() / r.mean()) for r in radii) / 20)\n"
    )
    run = _run(place, "python", "-W", "ignore", "-c", check, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    circle, spiral = map(float, run.stdout.split())
    assert circle < 0.2 < 0.4 < spiral
