"""MMDetection3D's own KITTI evaluation, run by Numba's simulator of CUDA: `python this in out`."""

import os
import sys

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # before Numba is imported

import pickle
from pathlib import Path

import numpy as np
from mmdet3d.evaluation.functional.kitti_utils.eval import do_eval

LEAST = np.array([[[0.7, 0.5, 0.5]] * 3, [[0.7, 0.5, 0.5], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])

if __name__ == "__main__":
    truth, detections = pickle.loads(Path(sys.argv[1]).read_bytes())
    found = do_eval(truth, detections, [0, 1, 2], LEAST, ["bbox", "bev", "3d", "aos"])
    np.save(sys.argv[2], np.stack(found))  # (AP11 and AP40 of 2D, BEV, 3D, AOS), class, level, k
