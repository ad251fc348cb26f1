# CenterPoint (pillars) on nuScenes with Poly-1 on the heatmaps' Gaussian focal loss.
_base_ = "mmdet3d::centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py"

# epsilon: nothing is published for heatmaps; choose on your data. alpha 2, gamma 4: the base's.
model = dict(
    pts_bbox_head=dict(loss_cls=dict(type="polyfocal.GaussianPoly1FocalLoss", epsilon=-0.5))
)
