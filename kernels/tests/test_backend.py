"""The backend as rope3d finds and uses it, and what it refuses."""

import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nextdit_kernels import TRITON, rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def rope3d():
    return pytest.importorskip("rope3d", reason="rope3d is not installed; it is not required")


def test_entry_point_leads_to_the_backend() -> None:
    (entry,) = entry_points(group="rope3d.backends", name="triton")
    assert entry.load() is TRITON
    assert TRITON.name == "triton"


def test_rope3d_rotates_with_it(rope3d, monkeypatch) -> None:
    q, k = torch.randn(2, 6, 4, 24, device=DEVICE), torch.randn(2, 6, 2, 24, device=DEVICE)
    rotation = rope3d.lumina(24).rotation(rope3d.grid(height=2, width=3).to(DEVICE))
    assert isinstance(TRITON, rope3d.Backend)
    assert " yes " in rope3d.explain(q, k, backend="triton").splitlines()[1]
    expected = rope3d.rotate(q, k, rotation, backend="reference")
    launches = []
    monkeypatch.setattr(
        rotary, "_outputs", lambda *x, old=rotary._outputs: launches.append(x) or old(*x)
    )
    ours = rope3d.rotate(q, k, rotation, backend="triton")
    assert len(launches) == 1
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_rope3d_rotates_in_place_with_it(rope3d, monkeypatch) -> None:
    q, k = torch.randn(2, 6, 4, 26, device=DEVICE), torch.randn(2, 6, 2, 26, device=DEVICE)
    rotation = rope3d.lumina(24).partial(26).rotation(rope3d.grid(height=2, width=3).to(DEVICE))
    assert isinstance(TRITON, rope3d.WritingBackend)
    expected = rope3d.rotate(q, k, rotation, backend="reference")
    monkeypatch.setattr(rotary, "_outputs", None)  # needs no memory of its own
    ours = rope3d.rotate(q, k, rotation, backend="triton", inplace=True)
    assert ours[0] is q
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_rope3d_compiles_with_it(rope3d) -> None:
    q, k = torch.randn(6, 4, 24, device=DEVICE), torch.randn(6, 2, 24, device=DEVICE)
    rotation = rope3d.lumina(24).rotation(rope3d.grid(height=2, width=3).to(DEVICE))

    def rotate(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rope3d.rotate(q, k, rotation, backend="triton")

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(q, k), rotate(q, k), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("q", "k", "reason"),
    [
        (torch.zeros(5, 2, 8).double(), torch.zeros(5, 1, 8).double(), "torch.float64"),
        (torch.zeros(5, 2, 8).half(), torch.zeros(5, 1, 8), "one of bfloat16"),
        (torch.zeros(5, 2, 8), torch.zeros(5, 1, 8, device="meta"), "needs one device"),
        (torch.zeros(5, 2, 8, device="meta"), torch.zeros(5, 1, 8, device="meta"), "on meta"),
        (torch.zeros(5, 2, 7), torch.zeros(5, 1, 7), "even ones up to 256"),
        (torch.zeros(5, 2, 258), torch.zeros(5, 1, 258), "even ones up to 256"),
    ],
)
def test_refusals_say_what_is_served(q, k, reason) -> None:
    if q.device.type == k.device.type == "cpu":
        q, k = q.to(DEVICE), k.to(DEVICE)
    assert reason in TRITON.why_not(q, k)


@pytest.mark.parametrize(
    ("available", "major", "reason"),
    [(False, 9, "no CUDA device"), (True, 7, "compute capability 8.0"), (True, 8, None)],
)
def test_needs_a_gpu_that_triton_serves(monkeypatch, available, major, reason) -> None:
    with FakeTensorMode():
        q = torch.empty(5, 2, 8, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = TRITON.why_not(q, q)
    assert reason in found if reason else found is None


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("import nextdit_kernels, sys; assert not {'triton', 'torch'} & set(sys.modules)", {}),
        ("import rope3d, sys; assert 'triton' not in sys.modules", {}),
        ("import nextdit_kernels.rotary, sys; assert 'rope3d' not in sys.modules", {}),
        (
            "import torch; from nextdit_kernels import TRITON; q = torch.zeros(5, 2, 8); "
            "assert 'TRITON_INTERPRET=1' in TRITON.why_not(q, q)",
            {"TRITON_INTERPRET": "0"},
        ),
    ],
    ids=["light", "rope3d-stays-light", "knows-nobody", "cpu-without-interpreter"],
)
def test_in_a_fresh_process(code, environment, monkeypatch) -> None:
    if "import rope3d" in code:
        pytest.importorskip("rope3d", reason="rope3d is not installed; it is not required")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(ImportError, match="nothing"):
        from nextdit_kernels import nothing  # noqa: F401
