"""What the host has left, as control groups of either version limit it."""

from __future__ import annotations

from pathlib import Path

from pipeline.planner import host_memory


def test_control_groups_limit_the_host(tmp_path: Path) -> None:
    def group(name: str, limit: str, used: int, cache: int) -> None:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")

    group("slurm/job", "max", 100, 0)
    assert host_memory.cgroup_free("0::/slurm/job\n", tmp_path) is None
    group("slurm", "1000", 300, 100)
    assert host_memory.cgroup_free("0::/slurm/job\n", tmp_path) == 800, (
        "the parent's limit holds; its cache is given back"
    )
    group("slurm/job", "500", 450, 0)
    assert host_memory.cgroup_free("0::/slurm/job\n", tmp_path) == 50
    group("", "700", 0, 0)
    assert host_memory.cgroup_free("0::/known/to/the/host\n", tmp_path) == 700, "a container's own root"
    old = tmp_path / "memory/docker"
    old.mkdir(parents=True)
    for name, text in (("limit", "900"), ("usage", "300")):
        (old / f"memory.{name}_in_bytes").write_text(text)
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert host_memory.cgroup_free("5:memory:/docker\n4:cpu:/docker\n", tmp_path) == 650
