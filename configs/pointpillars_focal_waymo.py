# PointPillars on Waymo with the focal loss of its base, gamma 2 and alpha 0.25: the baseline.
_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_sbn-all_16xb2-2x_waymo-3d-3class.py"
