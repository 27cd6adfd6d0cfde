"""The Triton kernels compiled ahead of time for GPUs that are not there, and the records that docs/gpu.md shows.

Compiled here, in about half a minute of processor time: forward and backward of a small MLP for every target, backward
of it for sm_80 in bfloat16 and in exact float32, and the paper's network in training mode, as one tile forward, as
several launches backward. The whole grid is compiled by `python -m bench.gpu_static`; what it found is held to the
same promises here, and to being of today's sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from bench import gpu_grid, gpu_roofline, gpu_static
from bench.gpu_grid import Cell
from bench.gpu_inspect import SHARED_LIMIT, TARGETS
from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.benchmark.cases import Case

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
TRAINED = "paper's network, training"
COMPILED = [
    *(Cell("MLP", 32, target, "tf32", kernel) for target in TARGETS for kernel in gpu_grid.KERNELS),
    *(Cell("MLP", 32, "sm_80", precision, "backward") for precision in ("bf16", "ieee")),
    Cell(TRAINED, 32, "sm_80", "tf32", "forward"),
    Cell(f"{TRAINED}, a batch of {gpu_grid.BATCH}", 32, "sm_80", "tf32", "backward"),
]


@cache
def records() -> dict[str, dict[str, Any]]:
    return gpu_grid.read_records()


def assert_fits(cell: Cell, found: Mapping[str, Any]) -> None:
    assert (found["spills"], found["stack"]) == (0, 0), cell.key
    assert found["shared"] <= SHARED_LIMIT[cell.target]
    assert found["instructions"] > 100
    if cell.precision != "ieee":
        assert found["matrix"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("cell", COMPILED, ids=lambda cell: cell.key)
def test_kernels_spill_nothing_and_use_matrix_units(cell: Cell) -> None:
    found = gpu_static.compile_cell(cell)
    assert_fits(cell, found)


def test_the_record_is_of_today_s_sources() -> None:
    stale = records().keys() - gpu_grid.current(records()).keys()
    assert not stale, "compile them again with `python -m bench.gpu_static --write`"


def test_the_page_shows_the_record() -> None:
    assert gpu_grid.page(records()) in PAGE


def test_the_page_s_tiles_are_those_that_the_code_chooses() -> None:
    table = gpu_grid.tiles_page()
    assert table in PAGE
    assert table.count("| memory |") > 5
    assert len(table.splitlines()) > 12


def test_plan_and_tile_are_the_same_in_every_precision() -> None:
    for name, width in product(gpu_grid.PROGRAMS, (64, 512)):
        program = gpu_grid.program_of(name, width)
        assert len({tiling.tile(program, 1024, precision, "cuda") for precision in gpu_grid.PRECISIONS}) == 1


def test_the_grid_holds_every_width_gpu_and_precision() -> None:
    cells = list(gpu_grid.grid())
    for target in ("sm_80", "sm_90"):
        usual = {(c.program, c.width) for c in cells if (c.target, c.precision) == (target, "tf32")}
        assert usual >= set(product(set(gpu_grid.PROGRAMS) - set(gpu_grid.ONLY), gpu_grid.WIDTHS))
    assert {c.target for c in cells} == set(TARGETS)
    assert {c.precision for c in cells} == set(gpu_grid.PRECISIONS)


def test_recorded_kernels_keep_their_promises() -> None:
    cells = {cell.key: cell for cell in gpu_grid.grid()}
    assert len(records()) >= 16
    for key, found in records().items():
        assert_fits(cells[key], found)


@pytest.mark.parametrize("name", gpu_grid.PROGRAMS)
def test_every_network_of_the_grid_has_sources(name: str) -> None:
    width = gpu_grid.ONLY.get(name, gpu_grid.WIDTHS)[0]
    for kernel in gpu_grid.KERNELS:
        cell = Cell(name, width, "sm_80", "tf32", kernel)
        _, source, _ = gpu_grid.source_of(cell)
        assert gpu_grid.kernels_of(cell, source)


def test_a_changed_source_makes_a_record_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("MLP", 32, "sm_80", "tf32", "forward")
    before = gpu_grid.digest(cell)
    made = {cell.key: {"digest": before}}
    assert gpu_grid.current(made) == made
    known = gpu_grid._definitions()
    monkeypatch.setattr(gpu_grid, "_definitions", lambda: {**known, "gelu": known["relu"]})  # which it does not call
    assert gpu_grid.digest(cell) == before
    monkeypatch.setattr(gpu_grid, "_definitions", lambda: {**known, "load_block": known["load_rows"]})
    assert gpu_grid.digest(cell) != before
    assert not gpu_grid.current(made)


def test_the_digest_is_of_the_device_functions_that_a_source_needs_without_comments() -> None:
    _, source, _ = gpu_grid.source_of(Cell("MLP", 32, "sm_80", "tf32", "forward"))
    assert "philox_words" not in source.text  # `normals` calls it
    taken = "".join(gpu_grid.device_functions(source))
    assert "name='philox_words'" in taken
    assert "'INTERPRETED'" in taken
    assert "name='linear_input_grad'" not in taken
    assert "Philox4x32-10" not in taken


def test_records_are_written_whole_and_read_again(tmp_path: Path) -> None:
    made = {"b": {"digest": "1", "spills": 0}, "a": {"digest": "2", "spills": 1}}
    gpu_grid.write_records(made, tmp_path / "r.json")
    assert gpu_grid.read_records(tmp_path / "r.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert gpu_grid.read_records(tmp_path / "none.json") == {}


# --- the roofline -----------------------------------------------------------------------------------------------------


def test_operators_that_launch_are_counted_and_views_are_not() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with gpu_roofline.CountOperators() as counter:
        (x @ w.t()).relu().view(15)[2:].sum()
    assert counter.counts == {"mm": 1, "relu": 1, "sum": 1}


def test_launches_of_either_plan() -> None:
    assert gpu_roofline.our_launches(Case.parse("mlp-64x100-10-forward")) == 2
    assert gpu_roofline.our_launches(Case.parse("paper-64x100-5-trainable")) == 5
    # 5 steps, 7 BatchNorms: 8 stretches each way; pack and start, pack, finish and reduce.
    assert gpu_roofline.our_launches(Case.parse("paper-1024x100-5-trainable")) == 2 * 5 * 8 + 5


def test_eager_launches_grow_with_the_steps_as_ours_do_not() -> None:
    few, many = (gpu_roofline.eager_launches(Case.parse(f"mlp-4x8-{steps}-frozen")) for steps in (2, 4))
    assert few > 20
    assert (many - few) % 2 == 0
    assert many > few + 20


def test_the_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    header, row = gpu_roofline.rows(["mlp-4096x256-10-trainable"])
    case = Case.parse("mlp-4096x256-10-trainable")
    floor = row[header.index("floor, A100 80 GB SXM")]
    moved = case.compulsory_bytes + gpu_roofline.kept_bytes(case)
    assert float(floor.split()[0]) * 1e-6 == pytest.approx(max(case.flops / 156e12, moved / 2039e9), rel=0.06)
