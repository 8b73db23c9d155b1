"""Backends through real entry points: distributions written to a folder on sys.path."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rope3d
from rope3d import backends, plugins
from rope3d.compile_constant import compile_constant

NEGATING = """
class Negating:
    name = "{name}"
    def why_not(self, q, k):
        return None if q.shape[-1] <= 64 else "head_dim above 64"
    def rotate(self, q, k, cos, sin):
        return -q, -k
BACKEND = Negating()
"""
BROKEN = "raise RuntimeError('no GPU driver')"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Forget found backends before and after; and no variable from outside."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.refresh()
    yield
    monkeypatch.undo()
    backends.refresh()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution that offers one backend."""

    def write(distribution: str, name: str, code: str) -> str:
        folder, module = tmp_path / distribution, distribution.replace("-", "_")
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0")
        (info / "entry_points.txt").write_text(f"[rope3d.backends]\n{name} = {module}:BACKEND\n")
        (folder / f"{module}.py").write_text(code.format(name=name) if "{name}" in code else code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)
        backends.refresh()
        return module

    return write


@pytest.fixture
def tensors():
    return torch.ones(5, 2, 8), torch.ones(5, 1, 8), rope3d.lumina(8).rotation(torch.zeros(5, 2))


@pytest.fixture
def on_cuda():
    """Tensors that say they are on CUDA, on a machine without it."""
    with FakeTensorMode():
        yield torch.empty(5, 2, 8, device="cuda"), torch.empty(5, 2, 128, device="cuda")


def test_reference_comes_through_the_same_door() -> None:
    entry = backends.installed()["reference"]
    assert entry.dist is not None
    assert entry.dist.name == "rope3d"
    assert isinstance(backends.load("reference"), rope3d.Backend)


def test_argument_decides_then_the_environment(install, tensors, monkeypatch) -> None:
    install("negating-rope", "negating", NEGATING)
    q, k, rotation = tensors
    assert torch.equal(rope3d.rotate(q, k, rotation)[0], q)
    assert torch.equal(rope3d.rotate(q, k, rotation, backend="negating")[0], -q)
    assert torch.equal(rope3d.apply(q, k, rope3d.lumina(8), q[..., 0], backend="negating")[1], -k)
    monkeypatch.setenv("ROPE3D_BACKEND", "negating")
    assert torch.equal(rope3d.rotate(q, k, rotation)[0], -q)
    assert torch.equal(rope3d.rotate(q, k, rotation, backend="reference")[0], q)
    monkeypatch.setenv("ROPE3D_BACKEND", "")
    assert torch.equal(rope3d.rotate(q, k, rotation)[0], q)


def test_named_backend_compiles_without_a_break(install, tensors) -> None:
    install("negating-rope", "negating", NEGATING)
    torch._dynamo.reset()
    compiled = torch.compile(rope3d.rotate, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors, backend="negating")[0], -tensors[0])


def test_what_only_the_reference_can_turn_goes_to_it(install, on_cuda) -> None:
    install("negating-rope", "negating", NEGATING)
    small, _ = on_cuda
    assert backends.choose(small, small).name == "negating"
    assert backends.choose(small, small, reference_only="own angles").name == "reference"


def test_a_named_backend_refuses_what_only_the_reference_can_turn(install) -> None:
    install("negating-rope", "negating", NEGATING)
    q, positions = torch.ones(5, 2, 8), torch.ones(5, 2, requires_grad=True)
    for rope in (rope3d.LearnedRope(rope3d.lumina(8)), rope3d.lumina(8)):
        with pytest.raises(ValueError, match="negating: cosine or sine requires a gradient"):
            rope3d.apply(q, q, rope, positions, backend="negating")
        with torch.no_grad():  # a constant table again
            assert torch.equal(rope3d.apply(q, q, rope, positions, backend="negating")[0], -q)
    learned = rope3d.LearnedRope(rope3d.lumina(8), heads=2)
    with torch.no_grad(), pytest.raises(ValueError, match="negating: each head has its own"):
        rope3d.apply(q, q, learned, positions, backend="negating")


def test_cpu_imports_no_other_backend_and_reads_no_metadata(install, tensors) -> None:
    module = install("negating-rope", "negating", NEGATING)
    rope3d.rotate(*tensors)
    assert module not in sys.modules
    assert plugins.installed.cache_info().currsize == 0


def test_cuda_takes_the_first_that_serves(install, on_cuda) -> None:
    install("negating-rope", "negating", NEGATING)
    small, large = on_cuda
    assert backends.choose(small, small).name == "negating"
    assert backends.choose(large, large).name == "reference"


def test_failed_automatic_choice_warns_once_and_falls_back(install, on_cuda) -> None:
    install("broken-rope", "broken", BROKEN)
    small, _ = on_cuda
    with pytest.warns(RuntimeWarning, match=r"broken-rope 1\.0 failed .* no GPU driver"):
        assert backends.choose(small, small).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(small, small).name == "reference"


def test_failed_named_choice_raises(install, tensors) -> None:
    install("broken-rope", "broken", BROKEN)
    with pytest.raises(ImportError, match="RuntimeError: no GPU driver"):
        rope3d.rotate(*tensors, backend="broken")


def test_an_object_that_is_no_backend_is_refused(install, tensors) -> None:
    install("empty-rope", "empty", "BACKEND = 3")
    with pytest.raises(ImportError, match="int lacks name, why_not, rotate"):
        rope3d.rotate(*tensors, backend="empty")


def test_named_backend_that_cannot_serve_raises_its_reason(install) -> None:
    install("negating-rope", "negating", NEGATING)
    q, rotation = torch.ones(5, 2, 72), rope3d.lumina(72).rotation(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="negating: head_dim above 64"):
        rope3d.rotate(q, q, rotation, backend="negating")


def test_unknown_name_lists_what_is_installed(install, tensors) -> None:
    install("negating-rope", "negating", NEGATING)
    with pytest.raises(ValueError, match=r"unknown backend 'fast'; installed: .*reference"):
        rope3d.rotate(*tensors, backend="fast")
    with pytest.raises(ValueError, match="unknown backend"):
        rope3d.explain(*tensors[:2], backend="fast")


def test_two_claims_of_one_name_name_both(install, tensors) -> None:
    install("one-rope", "same", NEGATING)
    install("two-rope", "same", NEGATING)
    with pytest.raises(RuntimeError, match=r"(?=.*one-rope 1\.0)(?=.*two-rope 1\.0)"):
        rope3d.rotate(*tensors, backend="same")


def test_explain_tells_who_runs_and_why_the_others_do_not(install, tensors, on_cuda) -> None:
    install("negating-rope", "negating", NEGATING)
    install("broken-rope", "broken", BROKEN)

    def lines(*args, **options):
        # Columns are as wide as the longest name of what happens to be installed.
        rows = [line.split() for line in rope3d.explain(*args, **options).splitlines()]
        return {row[0]: " ".join(row) for row in rows}

    cpu = lines(*tensors[:2])
    assert "negating-rope 1.0 no " in cpu["negating"]
    assert "not imported: q is on cpu" in cpu["negating"]
    assert " yes " in cpu["reference"]

    named = lines(*tensors[:2], backend="negating")
    assert " yes " in named["negating"]
    assert "negating is named" in named["reference"]

    small, large = on_cuda
    cuda = lines(small, small)
    assert "no GPU driver" in cuda["broken"]
    assert " yes " in cuda["negating"]
    assert "negating comes first" in cuda["reference"]
    assert "head_dim above 64" in lines(large, large)["negating"]


def test_import_loads_neither_triton_nor_the_compiler() -> None:
    code = "import rope3d, sys; print(sorted({'triton', 'torch._dynamo'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_compile_constant_leaves_the_mark_of_torch() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    compile_constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert ours.__dict__ == theirs.__dict__


def test_public_names_are_all_there() -> None:
    assert all(hasattr(rope3d, name) for name in rope3d.__all__)
    assert rope3d.__version__ == "0.1.0"
