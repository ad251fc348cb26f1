# PointPillars with the focal loss of its base, gamma 2 and alpha 0.25: the baseline.
_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"
