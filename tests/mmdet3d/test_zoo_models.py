"""Whole models of MMDetection3D's zoo, made small, with their losses swapped at epsilon 0."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet3d.registry", reason="needs MMDetection3D: run `make setup-3d`")

from mmengine.hub import get_config

ROOT = Path(__file__).resolve().parents[2]
FCOS3D = "fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py"
CONFIGS = {
    FCOS3D: "FCOSMono3DHead",
    "pgd/pgd_r101-caffe_fpn_head-gn_4xb3-4x_kitti-mono3d.py": "PGDHead",
    "smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py": "SMOKEMono3DHead",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_its_losses_swapped_at_epsilon_0_is_the_stock_one(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zoo_sweep

    rows = list(zoo_sweep.Sweep([]).rows(name, get_config(f"mmdet3d::{name}")))
    wrong = [row for row in rows if row["status"] not in ("identical", "refused")]
    assert not wrong
    same = {row["head"] for row in rows if row["status"] == "identical"}
    assert f"{CONFIGS[name]}.loss_cls" in same
